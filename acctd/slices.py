"""Slices of time in which everything is billed alike: within one month, one period of the tariff, one side of since.

Days and months begin at midnight in the tariff's timezone, whatever the clocks there do: a day may have 23 or 25 hours.
Slices are made as they are asked for and kept. Pure arithmetic, floor 3; all times are ns since the epoch.
"""

from bisect import bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from operator import attrgetter
from typing import NamedTuple
from zoneinfo import ZoneInfo

from acctd.errors import UsageError
from acctd.tariff import Tariff

_SECOND = 10**9
_DAY = timedelta(days=1)


class Part(NamedTuple):
    """What slices have in common that are priced together: a stretch of one month. They sort by time."""

    month: str  # 2026-03
    period: int  # of the tariff's periods; -1: before the first, so that there is no price
    counted: bool  # False: before since, where use only moves the position in the tiers


@dataclass(frozen=True, slots=True)
class Slice:
    """From `begin` on, and before `end`."""

    begin: int
    end: int
    day: str  # 2026-03-29; of the slice's begin where slices are longer than days
    part: Part = field(compare=False)


class Calendar:
    """The slices of a bill. `first`: where the earliest of them begins, the start of since's month."""

    def __init__(self, tariff: Tariff, since: int | None, until: int, *, days: bool) -> None:
        """Raises UsageError for times that no calendar has."""
        self._zone = tariff.zone
        self._days = days
        self._since, self.until = since, until
        self._valid = [midnight(period.valid_from, self._zone) for period in tariff.periods]
        self._begins: list[int] = []
        self._slices: list[Slice] = []
        self.first: int | None = None
        if since is not None:
            self.first = midnight(self._date(since).replace(day=1), self._zone)
        self._date(until)

    def at(self, ns: int) -> Slice:
        """The slice that a time lies in. Raises UsageError for a time that no calendar has."""
        place = bisect_right(self._begins, ns) - 1
        if place >= 0 and ns < self._slices[place].end:
            return self._slices[place]
        made = self._make(ns)
        self._begins.insert(place + 1, made.begin)
        insort(self._slices, made, key=attrgetter("begin"))
        return made

    def between(self, begin: int, end: int) -> Iterator[Slice]:
        """All slices from the one that `begin` lies in to the one that ends at `end` or after it."""
        while True:
            found = self.at(begin)
            yield found
            if found.end >= end:
                return
            begin = found.end

    def _make(self, ns: int) -> Slice:
        day = self._date(ns)
        first = day if self._days else day.replace(day=1)
        begin, end = midnight(first, self._zone), midnight(_next(first, days=self._days), self._zone)
        for edge in (*self._valid, self.until, *(() if self._since is None else (self._since,))):
            if begin < edge <= ns:
                begin = edge
            elif ns < edge < end:
                end = edge
        period = bisect_right(self._valid, ns) - 1
        counted = self._since is None or ns >= self._since
        return Slice(begin, end, first.isoformat(), Part(first.isoformat()[:7], period, counted))

    def _date(self, ns: int) -> date:
        """The day that a time lies in, between that day's midnight and the next one's."""
        try:
            day = datetime.fromtimestamp(ns // _SECOND, self._zone).date()
            # Where clocks go back over midnight an hour of the day before comes again: midnight is when it came first.
            while ns >= midnight(day + _DAY, self._zone):
                day += _DAY
            while ns < midnight(day, self._zone):
                day -= _DAY
        except (ValueError, OverflowError, OSError):
            raise UsageError(f"time {ns / _SECOND:.0f} (s since the epoch) is in no calendar; correct it") from None
        return day


def midnight(day: date, zone: ZoneInfo) -> int:
    """When a day begins: the first time that clocks show 0:00, or would, where they were put forward over it."""
    local = datetime(day.year, day.month, day.day, tzinfo=zone)  # fold=0: the first of two
    return int(local.astimezone(UTC).timestamp()) * _SECOND


def _next(day: date, *, days: bool) -> date:
    return day + _DAY if days else (day.replace(day=1) + timedelta(days=31)).replace(day=1)
