"""What the tests of bills have in common: tariffs from a few lines, usages, and times as people write them."""

from datetime import datetime
from zoneinfo import ZoneInfo

from acctd.bill import Bill, Line, Selection, Tally
from acctd.model import Midnight
from acctd.tariff import Tariff, parse
from acctd.usage import Usage

GB, HOUR, H = 10**9, 3600 * 10**9, 3600


def tariff(items: str, *, timezone: str = "UTC", currency: str = "USD", digits: int = 2) -> Tariff:
    """One period, from 2020 on, unless `items` begins with one of its own."""
    head = f'name = "test"\ncurrency = "{currency}"\ndigits = {digits}\ntimezone = "{timezone}"\n'
    period = "" if items.lstrip().startswith("[[period]]") else "[[period]]\nvalid_from = 2020-01-01\n"
    return parse((head + period + items).encode(), "test.toml")


def at(text: str, timezone: str = "UTC") -> float:
    """2026-03-29 01:00 on the clocks of a timezone, as s since the epoch."""
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(timezone)).timestamp()


def usage(
    job: str,
    start: float,
    hours: float,
    *,
    owner: str = "alice",
    account: str = "",
    node: str = "n1",
    parent: str | None = None,
    midnights: tuple[Midnight, ...] = (),
    stacked: tuple[str, ...] = (),
    tags: dict[str, str] | None = None,
    **totals: int | dict[str, int],
) -> Usage:
    """A job's record; `out=5` is 5 bytes to class External."""
    if "out" in totals:
        out = totals.pop("out")
        assert isinstance(out, int)
        totals["network"] = {"OutgoingExternal": out}
    return Usage(
        id=job,
        owner=owner,
        node=node,
        started=start,
        wall_ns=round(hours * HOUR),
        totals={name: value if isinstance(value, dict) else {"": value} for name, value in totals.items()},
        tags=({"Account": account} if account else {}) | (tags or {}),
        parent=parent,
        midnights=midnights,
        stacked=stacked,
    )


def bill(
    priced: Tariff,
    usages: list[Usage],
    *,
    since: float | None = None,
    until: float = 4102444800,
    group_by: tuple[str, ...] = (),
    select: Selection | None = None,
    living: list[Usage] | None = None,
) -> Bill:
    """The bill over some records and some living jobs."""
    tally = Tally(priced, since, until, select=select, group_by=group_by)
    for one in usages:
        tally.add(one)
    for one in living or []:
        tally.add(one, living=True)
    return tally.bill()


def shown(lines: tuple[Line, ...]) -> list[str]:
    """Lines as people read them: group, month, item, tier: quantity unit x price = amount."""
    return [
        f"{' '.join((line.payer, *line.group))} {line.month} {line.item}{f' ({line.tier})' if line.tier else ''}: "
        f"{line.quantity:f} {line.unit} x {line.price:f} = {line.amount}"
        for line in lines
    ]
