"""The report of one job: what it was, what went wrong, what to ask for next time, how it went, what it cost.

Puts sections together; draws nothing itself and reads no file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import tzinfo

from acctd.bill import Bill
from acctd.cli.summary import ending
from acctd.model import Record
from acctd.points import Point
from acctd.policies import Shortage
from acctd.report import timelines
from acctd.report.hints import Facts, Hint, hints, too_short
from acctd.report.markup import Child, Html, join, tag
from acctd.report.money import bill_section, top_items
from acctd.report.page import Column, Section, bar, facts, page, table
from acctd.report.quantities import quantities
from acctd.report.units import duration, few, mebibytes, size, stamp

_LEVELS = {"problem": "Problem", "advice": "Next time", "note": "To know", "good": "Good"}
_WHOSE = {
    "job": "the job's own limit",
    "family": "the limit of a family inside it",
    "parent": "the limit of a job around it",
    "host": "the node itself",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """All that a job's report is made from."""

    record: Record
    points: Sequence[Point]
    why_no_points: str = ""  # one sentence, where there are none
    bill: Bill | None = None
    looked: str = ""  # which records the bill rests on
    zone: tzinfo


def job_page(subject: Subject) -> Html:
    """The whole file."""
    record = subject.record
    found = _facts(subject)
    said = hints(found)
    sections = [
        Section("job", "The job", _about(subject)),
        Section("advice", "In short", _advice(said, found)),
        Section("used", "Asked for and used", _used(found)),
        *([Section("shortages", "When memory ran out", _shortages(subject))] if record.shortages else []),
        *(Section(line.name, line.title, line.body) for line in _timelines(subject)),
        Section("most", "What it used most", _most(subject)),
    ]
    if subject.bill is not None:
        sections.append(Section("bill", "The bill", bill_section(subject.bill, subject.looked)))
    return page(f"Job {record.id}", _lead(subject), sections, _footer(subject))


def _lead(subject: Subject) -> str:
    record = subject.record
    how = "still running" if record.state == "running" else ending(record)
    so_far = " so far" if record.state == "running" else ""
    return f"Of {record.owner} on {record.node}: {how}, {duration(record.wall_ns)}{so_far}."


def _footer(subject: Subject) -> str:
    if subject.record.state == "running":
        at = stamp(subject.record.started + subject.record.wall_ns / 1e9, subject.zone)
        return f"The job had not ended: all numbers are as of {at} and nobody has signed them."
    return f"From the record that was signed off on {subject.record.node} when the job had ended."


def _facts(subject: Subject) -> Facts:
    record = subject.record
    running = record.state == "running"
    return Facts(
        wall_ns=record.wall_ns,
        limits=record.limits,
        totals=record.totals,
        shortages=record.shortages,
        shortages_dropped=record.shortages_dropped,
        exclusive=record.cpus,
        running=running,
        failed=not running and (record.exit_code != 0 or record.exit_signal is not None),
        cores_peak=timelines.busiest(subject.points, record),
    )


def _about(subject: Subject) -> Html:
    record = subject.record
    running = record.state == "running"
    return join(
        facts(
            [
                ("Owner", f"{record.owner} (uid {record.uid})"),
                ("Node", record.node),
                ("Part of", record.parent and f"job {record.parent}, in whose account and bill it is included"),
                ("State", "running" if running else ending(record)),
                ("Started", stamp(record.started, subject.zone)),
                ("Ended", None if running else stamp(record.ended, subject.zone)),
                ("Time", duration(record.wall_ns)),
                (
                    "Network",
                    {"host": "the host's, not counted", "parent": "its parent's, counted there"}.get(
                        record.network, record.network
                    ),
                ),
                ("Cores for itself", record.cpus),
                *((f"Tag {key}", value) for key, value in sorted(record.tags.items())),
            ]
        ),
        [tag("p", tag("strong", "Note: "), mebibytes(note)) for note in record.notes],
    )


def _advice(said: Sequence[Hint], found: Facts) -> Html:
    if not said:
        why = too_short(found) or "These numbers give no reason for advice."
        return tag("p", why)
    items = [tag("li", tag("strong", _LEVELS[hint.level]), hint.text, class_=hint.level) for hint in said]
    return tag("ul", items, class_="hints", role="list")


def _used(found: Facts) -> Html:
    rows: list[list[Child]] = []

    def row(what: str, asked: str, used: str, share: float | None) -> None:
        percent = "" if share is None else f"{100 * share:.0f} %"
        rows.append([what, asked or "not limited", used, percent, None if share is None else bar(share)])

    need, asked = found.need, found.limits.memory
    if need is not None:
        row(
            "Memory it needed at most (resident and kernel)",
            "" if asked is None else size(asked),
            size(need),
            need / asked if asked else None,
        )
    if (peak := found.one("memory_peak")) is not None:
        row(
            "Memory at most, page cache included",
            "" if asked is None else size(asked),
            size(peak),
            peak / asked if asked else None,
        )
    if found.limits.swap is not None and (swapped := found.one("memory_swap_peak")) is not None:
        swap = found.limits.swap
        row("Swap at most", size(swap), size(swapped), swapped / swap if swap else None)
    if (used := found.cores_used) is not None:
        cores = found.cores
        row("Cores on average", "" if cores is None else few(cores), few(used), used / cores if cores else None)
    if (tasks := found.one("pids_peak")) is not None:
        pids = found.limits.pids
        row(
            "Processes and threads at most",
            "" if pids is None else f"{pids:,}",
            f"{tasks:,}",
            tasks / pids if pids else None,
        )
    columns = [
        Column("What"),
        *(Column(title, number=True) for title in ("Asked for", "Used", "Share")),
        Column("Share as a bar", spare=True),
    ]
    return table("What the job asked for, and what it used of it", columns, rows)


def _timelines(subject: Subject) -> Sequence[Section]:
    drawn = timelines.sections(subject.record, subject.points, subject.zone)
    if drawn:
        return drawn
    why = subject.why_no_points or (
        f"The job took {duration(subject.record.wall_ns)}, too short for readings in between; its totals are exact."
    )
    return [Section("course", "Over time", tag("p", why))]


def _most(subject: Subject) -> Html:
    used = quantities(subject.record)
    if subject.bill is not None and subject.bill.lines:
        return join(top_items(subject.bill), used)
    return used


def _shortages(subject: Subject) -> Html:
    record = subject.record
    shown = []
    for number, shortage in enumerate(record.shortages):
        if number == 1 and record.shortages_dropped:
            shown.append(tag("p", f"{record.shortages_dropped} more in between are not kept."))
        shown.append(_shortage(shortage, number + 1, record, subject.zone))
    return join(shown)


def _shortage(shortage: Shortage, number: int, record: Record, zone: tzinfo) -> Html:
    after = timelines.after_start(shortage, record)
    moment = (
        "at the end" if after >= record.wall_ns else f"{duration(after)} after the start" if after else "at the start"
    )
    whose = "" if shortage.whose is None or shortage.whose == record.id else f" (job {shortage.whose})"
    processes = [
        [process.name, str(process.pid), size(process.resident), stamp(process.started, zone)]
        for process in shortage.processes
    ]
    kinds = [
        (kind, size(value))
        for kind, value in sorted((shortage.memory or {}).items(), key=lambda each: -each[1])
        if value > 0
    ][:12]
    columns = [
        Column("Process"),
        Column("PID", number=True),
        Column("Resident", number=True),
        Column("Started", whole=True),
    ]
    return tag(
        "div",
        tag("h3", f"Shortage {number}, {moment}"),
        tag("p", mebibytes(shortage.text)) if shortage.text else None,
        facts(
            [
                ("When", stamp(shortage.time, zone)),
                ("Which limit", f"{_WHOSE[shortage.level]}{whose}"),
                ("Limit", None if shortage.limit is None else size(shortage.limit)),
                ("In use", None if shortage.usage is None else size(shortage.usage)),
                ("What was done", shortage.action),
                ("Killed by the kernel", str(shortage.kills) if shortage.kills else None),
                ("Memory by kind", ", ".join(f"{kind} {value}" for kind, value in kinds)),
            ]
        ),
        table("The largest processes at that moment", columns, processes) if processes else None,
        class_="shortage",
    )
