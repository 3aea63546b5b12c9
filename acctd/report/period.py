"""The report of a user's jobs, or of all of a node, in a period: sums, days, the largest jobs, the bill.

Puts sections together from sums.py; bounded in size whatever the number of jobs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta

from acctd.bill import Bill
from acctd.metrics import split_rule
from acctd.report.markup import Child, Html, join, tag
from acctd.report.money import bill_section, top_items
from acctd.report.page import STYLES, Column, Section, bar, facts, figure, page, table
from acctd.report.plot import Band, Plot
from acctd.report.sums import Sum, Sums, months
from acctd.report.units import Scale, amount, counted, decimal, decimal_scale, duration, few, plain_scale, size, stamp

_DAYS = 100
"""Days that a plot has at most; a longer period is shown by month."""

_CORE_HOUR = 3600 * 10**9
_GIB_HOUR = 3600 * 2**20

_OWNERS = 100

_ENDINGS = {
    "done": "ended well",
    "failed": "ended with an exit status other than 0",
    "killed": "killed by a signal",
    "lost": "of unknown exit status",
    "running": "still running, counted so far",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """All that a period's report is made from."""

    title: str  # Jobs of alice
    sums: Sums
    bill: Bill | None = None
    looked: str = ""  # which records all this rests on
    owners: bool = False  # whether jobs of several owners may be in it


def period_page(subject: Subject) -> Html:
    """The whole file."""
    sums = subject.sums
    sections = [Section("sums", "In short", _short(sums))]
    if sums.days:
        unit, bins = _binned(sums)
        sections.append(Section("cpu", f"CPU by {unit}", _cpu(bins, unit)))
        for direction in ("outgoing", "incoming"):
            if any(split_rule(rule)[1] == direction for rule in sums.all.network):
                drawn = _network(bins, unit, direction, sums.all)
                sections.append(Section(f"network-{direction}", f"Network by {unit}, {direction}", drawn))
        sections.append(Section("jobs", "The largest jobs", _jobs(subject)))
    if subject.owners and sums.owners:
        sections.append(Section("owners", "By owner", _owners(sums)))
    if subject.bill is not None:
        both = join(top_items(subject.bill), bill_section(subject.bill, subject.looked))
        sections.append(Section("bill", "The bill", both))
    since, until = stamp(sums.since, sums.zone), stamp(sums.until, sums.zone)
    return page(subject.title, f"From {since} until {until}.", sections, f"Rests on {subject.looked}.")


def _short(sums: Sums) -> Html:
    if not sums.all.jobs:
        return tag("p", "No job had any of its time in this period.")
    whole = sums.all
    endings = [f"{sums.endings[word]:,} {text}" for word, text in _ENDINGS.items() if sums.endings[word]]
    network = [
        (f"Network {direction}", decimal(number, "B"))
        for direction in ("outgoing", "incoming")
        if (number := sum(n for rule, n in whole.network.items() if split_rule(rule)[1] == direction))
    ]
    inside = (
        f"{counted(sums.families, 'family', 'families')} inside them, in their accounts already"
        if sums.families
        else None
    )
    lost = counted(sums.short_of_memory, "job") if sums.short_of_memory else None
    return join(
        facts(
            [
                ("Jobs", f"{whole.jobs:,}: {', '.join(endings)}"),
                ("Families", inside),
                ("CPU", f"{amount(whole.cpu / _CORE_HOUR)} core-hours"),
                ("Memory held", f"{amount(whole.memory / _GIB_HOUR)} GiB-hours" if whole.memory else None),
                *network,
                ("Disks", f"{decimal(whole.block_read, 'B')} read, {decimal(whole.block_write, 'B')} written"),
                ("Out of memory", lost),
            ]
        ),
        _efficiency(sums),
    )


def _efficiency(sums: Sums) -> Html:
    """How much of what was asked for was used; nothing where nothing was asked for."""
    whole = sums.all
    rows: list[list[Child]] = []
    for what, asked, used, unit, per in (
        ("CPU, of jobs that asked for cores", whole.reserved, sums.asked_cpu, "core-hours", _CORE_HOUR),
        ("Memory, of jobs that asked for some", whole.memory_reserved, sums.asked_resident, "GiB-hours", _GIB_HOUR),
    ):
        if asked:
            share = used / asked
            numbers = [f"{amount(asked / per)} {unit}", f"{amount(used / per)} {unit}", f"{100 * share:.0f} %"]
            rows.append([what, *numbers, bar(share)])
    said = []
    if sums.wasted_memory:
        said.append(
            f"Less than half of the memory asked for was needed by {sums.wasted_memory:,} of "
            f"{counted(sums.asked_memory, 'job')} of 30 s and more that ended well; the report of a job says how much "
            "to ask for."
        )
    columns = [
        Column("What"),
        *(Column(title, number=True) for title in ("Asked for", "Used", "Share")),
        Column("Share as a bar", spare=True),
    ]
    return join(
        table("What was asked for, and what was used of it", columns, rows) if rows else None,
        [tag("p", sentence) for sentence in said],
    )


def _binned(sums: Sums) -> tuple[str, list[tuple[date, Sum]]]:
    """All days from the period's first to the last with a job, also those without one; or months, if they are many."""
    first, last = min(sums.days), max(sums.days)
    if (last - first).days >= _DAYS:
        return "month", sorted(months(sums.days).items())
    began = datetime.fromtimestamp(sums.since, sums.zone).date()
    first = began if (last - began).days < _DAYS else first
    days = [first + timedelta(days=number) for number in range((last - first).days + 1)]
    return "day", [(day, sums.days.get(day, Sum())) for day in days]


def _cpu(bins: Sequence[tuple[date, Sum]], unit: str) -> Html:
    values = [each.cpu / _CORE_HOUR for _, each in bins]
    said = f"Core-hours of each {unit}: {amount(sum(values))} in all, {amount(max(values))} on the busiest."
    y = plain_scale(1.02 * max(values), "core-hours")
    columns = [Column(unit.capitalize()), Column("Jobs that began", number=True), Column("Core-hours", number=True)]
    rows: list[list[Child]] = [
        [_shown(day, unit), f"{each.jobs:,}", amount(value)] for (day, each), value in zip(bins, values, strict=True)
    ]
    return _bars("cpu", f"CPU by {unit}", said, bins, unit, y, [Band("CPU", values, 0)], columns, rows)


def _network(bins: Sequence[tuple[date, Sum]], unit: str, direction: str, whole: Sum) -> Html:
    rules = [rule for rule in whole.network if split_rule(rule)[1] == direction]
    rules.sort(key=lambda rule: (-whole.network[rule], rule))
    named = rules if len(rules) <= STYLES else rules[: STYLES - 1]
    rest = [rule for rule in rules if rule not in named]
    bands = [
        Band(split_rule(rule)[0], [float(each.network.get(rule, 0)) for _, each in bins], number)
        for number, rule in enumerate(named)
    ]
    if rest:
        others = [float(sum(each.network.get(rule, 0) for rule in rest)) for _, each in bins]
        bands.append(Band(f"{len(rest)} other classes", others, STYLES - 1))
    most = ", ".join(f"{split_rule(rule)[0]} {decimal(whole.network[rule], 'B')}" for rule in named)
    highest = max(sum(values) for values in zip(*(band.values for band in bands), strict=True))
    columns = [Column(unit.capitalize()), *(Column(band.name, number=True) for band in bands)]
    rows: list[list[Child]] = [
        [_shown(day, unit), *(decimal(band.values[number], "B") for band in bands)]
        for number, (day, _) in enumerate(bins)
    ]
    said = f"{direction.capitalize()} bytes of each {unit} by class. In all: {most}."
    y = decimal_scale(1.02 * highest, "B")
    title = f"Network by {unit}, {direction}"
    return _bars(f"network-{direction}", title, said, bins, unit, y, bands, columns, rows)


def _bars(
    name: str,
    title: str,
    said: str,
    bins: Sequence[tuple[date, Sum]],
    unit: str,
    y: Scale,
    bands: Sequence[Band],
    columns: Sequence[Column],
    rows: Sequence[Sequence[Child]],
) -> Html:
    step = -(-len(bins) // 6)
    ticks = tuple((float(n), _tick(bins[n][0], unit)) for n in range(0, len(bins), step))
    plot = Plot(
        name=f"{name}-plot",
        title=title,
        description=said,
        x=Scale(float(len(bins)), ticks),
        y=y,
        edges=list(range(len(bins) + 1)),
        bands=bands,
        stepped=True,
        x_title=f"{unit} begins",
    )
    return figure(plot, said, table(title, columns, rows))


def _shown(day: date, unit: str) -> str:
    return day.isoformat() if unit == "day" else day.isoformat()[:7]


def _tick(day: date, unit: str) -> str:
    return day.isoformat()[5:] if unit == "day" else day.isoformat()[:7]


def _jobs(subject: Subject) -> Html:
    sums = subject.sums
    rows: list[list[Child]] = []
    for top in sums.top():
        row: list[Child] = [
            top.id,
            top.ending,
            stamp(top.started, sums.zone)[:16],
            duration(top.wall_ns),
            amount(top.cpu / _CORE_HOUR),
            f"{top.cpu / top.wall_ns:.2f}" if top.wall_ns else "",
            "" if top.cores is None else few(top.cores),
            size(top.resident),
            "" if top.memory is None else size(top.memory),
            decimal(top.network, "B"),
        ]
        if subject.owners:
            row.insert(1, top.owner)
        rows.append(row)
    titles = (
        *("Time", "Core-hours", "Cores used", "Cores asked for", "Memory at most", "Memory asked for"),
        "Network",
    )
    columns = [
        Column("Job"),
        Column("Ending"),
        Column(f"Started, {sums.zone.key}", whole=True),
        *(Column(title, number=True) for title in titles),
    ]
    if subject.owners:
        columns.insert(1, Column("Owner"))
    more = sums.all.jobs - len(rows)
    caption = "By CPU time in the period" + (f"; {more:,} smaller ones are in the sums" if more else "")
    return table(caption, columns, rows)


def _owners(sums: Sums) -> Html:
    found = sorted(sums.owners.items(), key=lambda each: (-each[1].cpu, each[0]))
    rows: list[list[Child]] = [
        [
            owner,
            f"{each.jobs:,}",
            amount(each.cpu / _CORE_HOUR),
            amount(each.memory / _GIB_HOUR),
            decimal(sum(each.network.values()), "B"),
            decimal(each.block_read + each.block_write, "B"),
        ]
        for owner, each in found[:_OWNERS]
    ]
    titles = ("Jobs", "Core-hours", "GiB-hours held", "Network", "Disks")
    columns = [Column("Owner"), *(Column(title, number=True) for title in titles)]
    more = len(found) - len(rows)
    return table(f"By CPU time{f'; {more:,} more owners are in the sums' if more else ''}", columns, rows)
