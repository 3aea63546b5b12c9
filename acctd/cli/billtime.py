"""From when until when: what a person writes as a day, a month or a time, in the tariff's timezone. Pure.

Both ends are instants; what is at the later one is not in it any more, so that bills of two months share nothing.
"""

import re
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from acctd.errors import UsageError

_MONTH = re.compile(r"(\d{4})-(\d{2})\Z", re.ASCII)
_TAKES = "write a month, a day or a time, like 2026-11, 2026-11-05 or 2026-11-05T13:00"


def period(since: str | None, until: str | None, zone: ZoneInfo, now: float) -> tuple[float, float]:
    """s since the epoch. This month where nothing is given; else up to this month's end, or from the month's beginning.

    Raises UsageError.
    """
    first = _month(datetime.fromtimestamp(now, zone))
    begin = instant("since", since, zone) if since is not None else None
    end = instant("until", until, zone) if until is not None else _next(first).timestamp()
    if begin is None:
        # The month that `until` is in, or that it ends.
        begin = first.timestamp() if until is None else _month(datetime.fromtimestamp(end - 1e-6, zone)).timestamp()
    if begin >= end:
        raise UsageError(f"since {shown(begin, zone)} is not before until {shown(end, zone)}; give a later --until")
    return begin, end


def shown(at: float, zone: ZoneInfo) -> str:
    """An instant for a person, to the second, or finer where it is."""
    text = datetime.fromtimestamp(at, zone).replace(tzinfo=None).isoformat(" ")
    return text.removesuffix(":00") if text.count(":") == 2 else text


def instant(option: str, text: str, zone: ZoneInfo) -> float:
    """s since the epoch, in `zone` unless the text says otherwise. Raises UsageError, which names the option."""
    try:
        if month := _MONTH.match(text):
            return datetime(int(month[1]), int(month[2]), 1, tzinfo=zone).timestamp()
        found = datetime.fromisoformat(text)
        return (found if found.tzinfo is not None else found.replace(tzinfo=zone)).timestamp()
    except (ValueError, OverflowError):
        raise UsageError(f"--{option} {text!r} is no time; {_TAKES}") from None


def _month(at: datetime) -> datetime:
    return at.replace(day=1, hour=0, minute=0, second=0, microsecond=0, fold=0)


def _next(first: datetime) -> datetime:
    """Aware datetimes of one timezone are reckoned by the clock on the wall."""
    return _month(first + timedelta(days=31))
