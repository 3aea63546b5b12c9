"""Bills: usages are added up by payer, stretch of time and item, then priced. Pure arithmetic, no I/O. Floor 3.

Nothing is rounded here: quantities are integers in the counters' own units until pricing.py makes lines of them.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from operator import itemgetter

import msgspec

from acctd.errors import UsageError
from acctd.frames import tag
from acctd.meter import State
from acctd.plans import plans
from acctd.pricing import MINIMUM, Line, Row, price_month, total
from acctd.slices import Calendar, Part, Slice
from acctd.tariff import Tariff
from acctd.usage import Usage, nanoseconds, parts, payer

__all__ = ["GROUPS", "Bill", "Line", "Selection", "Tally"]

GROUPS = ("user", "account", "job", "node", "class", "day", "month")
"""What lines may be grouped by. account is the payer; class is "" for what is no network."""

_Group = tuple[str, ...] | None
_NOTHING: dict[str, int] = {}

_Key = tuple[str, Part, str, _Group]
"""Payer, stretch of time, owner where a discount names one, group (None: not shown)."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which jobs' lines are shown; None is all. What they cost depends on the whole months of who pays for them."""

    job: str | None = None
    user: str | None = None
    account: str | None = None  # the payer
    tags: Mapping[str, str] = field(default_factory=dict)  # all of them; keys in any case


class Bill(msgspec.Struct, frozen=True, kw_only=True):
    """A bill, and what its header says; where the records are from is known to who read them."""

    tariff: str  # its name
    digest: str  # SHA-256 of its file
    currency: str
    digits: int
    timezone: str
    since: float | None  # s since the epoch; None: from the first record
    until: float
    group_by: tuple[str, ...]
    lines: tuple[Line, ...]  # sorted
    total: Decimal  # the sum of the lines
    records: int  # that have some of their time in the period, and are shown
    payers: tuple[str, ...]  # of the lines, sorted
    living: tuple[str, ...]  # ids of the jobs that are billed so far, sorted
    notes: tuple[str, ...]  # what could not be priced, and what to know; one sentence each


class Tally:
    """Adds usages up. One for each process that reads; merge() brings them together. May be pickled.

    All records of the period must be added whatever the selection, because tiers and minimums are of whole
    payer-months; and those back to `needed_from`, whose use has its place in the tiers. Each once: who reads tells
    duplicates. Order does not matter. Memory grows with payers x months x groups, not with records.
    """

    def __init__(
        self,
        tariff: Tariff,
        since: float | None,
        until: float,
        *,
        select: Selection | None = None,
        group_by: tuple[str, ...] = (),
    ) -> None:
        """Raises UsageError for a group that is none, or a period that ends before it begins."""
        for word in group_by:
            if word not in GROUPS or group_by.count(word) > 1:
                wrong = "is there twice" if word in GROUPS else "is none"
                raise UsageError(f"group {word!r} {wrong}; groups are {', '.join(GROUPS)}")
        if since is not None and since >= until:
            raise UsageError(f"since {since} is not before until {until}; give a period that has some time")
        self._tariff, self._since, self._until, self._group_by = tariff, since, until, group_by
        self._select = select or Selection()
        self._tags = {key.lower(): value for key, value in self._select.tags.items()}
        self._all = self._select == Selection()
        self._class_at = group_by.index("class") if "class" in group_by else None
        self._calendar = Calendar(
            tariff, None if since is None else nanoseconds(since), nanoseconds(until), days="day" in group_by
        )
        self._plans = plans(tariff)
        self._columns = len(tariff.item_names)
        self._discounted = {d.owner for period in tariff.periods for d in period.discounts}
        self._slice: Slice | None = None
        self._counts: dict[_Key, list[int]] = {}
        self._living_keys: set[_Key] = set()
        self._living: set[str] = set()
        self._absent: Counter[int] = Counter()  # records without the counters, by column
        self._records, self._unpriced, self._nested = 0, 0, 0
        self._inside: set[tuple[str, str, str]] = set()  # families that were asked for: id, node, parent
        self._families: Tally | None = None  # what they used, which no payer's month has

    @property
    def needed_from(self) -> float:
        """s since the epoch: records that ended before need not be added. -inf without since."""
        first = self._calendar.first
        return float("-inf") if first is None else first / 10**9

    def slices(self, begin: float, end: float) -> list[tuple[float, float]]:
        """The slices of time between two instants, s since the epoch: a job that lies in one needs no spreading."""
        found = self._calendar.between(nanoseconds(begin), nanoseconds(end))
        return [(part.begin / 10**9, part.end / 10**9) for part in found]

    def add(self, usage: Usage, *, living: bool = False) -> None:
        """A job's record, or its account so far. A family (it has a parent) is in its parent's account and left out.

        Raises UsageError for a record with a time that no calendar has.
        """
        if usage.parent is not None:
            self._add_family(usage, usage.parent, living=living)
            return
        calendar, slice_ = self._calendar, self._slice
        begin = nanoseconds(usage.started)
        end = begin + usage.wall_ns
        first = calendar.first
        if begin >= calendar.until or (first is not None and begin < first and end <= first):
            return
        who = payer(usage)
        if self._select.account is not None and who != self._select.account:
            return  # whose months have nothing in common with those that are shown
        if slice_ is None or not slice_.begin <= begin < slice_.end:
            slice_ = self._slice = calendar.at(begin)
        if end <= slice_.end:
            self._count(usage, who, slice_, usage.totals, wall=usage.wall_ns, jobs=1, records=1, living=living)
        else:
            self._spread(usage, who, begin, end, living=living)

    def add_sum(
        self, usage: Usage, *, jobs: int, having: Mapping[str, int] | None = None, living: bool = False
    ) -> None:
        """A sum that a database made, as a Usage: of `jobs` records of one payer, owner and group, without families.

        All of them must lie whole in one slice (see slices()); `started` is any instant in it, wall_ns and totals are
        sums, without stacked devices. `id`, `node` and tags matter only where they are selected or grouped by.
        `having`: how many of the records have each metric; all have those of the totals where it is left out.
        """
        at = nanoseconds(usage.started)
        first = self._calendar.first
        if at >= self._calendar.until or (first is not None and at < first):
            return
        who = payer(usage)
        if self._select.account is None or who == self._select.account:
            slice_ = self._calendar.at(at)
            of = {"wall": usage.wall_ns, "jobs": jobs, "records": jobs}
            self._count(usage, who, slice_, usage.totals, **of, living=living, having=having)

    def _spread(self, usage: Usage, who: str, begin: int, end: int, *, living: bool) -> None:
        """A job that is in several slices."""
        first, until = self._calendar.first, self._calendar.until
        slices = list(self._calendar.between(begin if first is None else max(begin, first), min(end, until)))
        of = {max(part.begin, begin): part for part in slices}
        edges = sorted({edge for part in slices for edge in (part.begin, part.end) if begin < edge < end})
        records = 1
        used = parts(usage, [edge - begin for edge in edges])
        for start, stop, totals in zip((begin, *edges), (*edges, end), used, strict=True):
            if (slice_ := of.get(start)) is not None:
                wall, jobs = stop - start, int(start == begin)
                self._count(usage, who, slice_, totals, wall=wall, jobs=jobs, records=records, living=living)
                if slice_.part.counted:
                    records = 0

    def _count(
        self,
        usage: Usage,
        who: str,
        slice_: Slice,
        totals: State,
        *,
        wall: int,
        jobs: int,
        records: int,
        living: bool,
        having: Mapping[str, int] | None = None,
    ) -> None:
        """Add what was used inside one slice. `records`: how many this is the first of that is shown."""
        part = slice_.part
        group = self._group(usage, who, slice_) if part.counted else None
        if group is not None:
            self._records += records
        if part.period < 0:
            self._unpriced += records if group is not None else 0
            return
        plan = self._plans[part.period]
        key = (who, part, usage.owner if usage.owner in self._discounted else "", group)
        counts = self._of(key)
        for column, name in plan.sums:
            if (labels := totals.get(name)) is not None:
                counts[column] += sum(labels.values())
        for column, name in plan.devices:
            if (labels := totals.get(name)) is not None:
                stacked = usage.stacked
                counts[column] += sum(
                    [n for device, n in labels.items() if device not in stacked] if stacked else labels.values()
                )
        for rules in plan.networks:
            for rule, count in totals.get(rules.metric, _NOTHING).items():
                cls, columns = rules.known.get(rule) or rules.of(rule)
                classed = self._of(self._classed(key, cls, living)) if self._class_at is not None and group else counts
                for column in columns:
                    classed[column] += count
        for column in plan.walls:
            counts[column] += wall
        for column in plan.jobs:
            counts[column] += jobs
        if records and group is not None:
            for column, name in plan.telling:
                there = records if having is None and name in totals else (having or _NOTHING).get(name, 0)
                if there < records:
                    self._absent[column] += records - there
        if living:
            self._living_keys.add(key)
            if group is not None:
                self._living.add(usage.id)

    def _of(self, key: _Key) -> list[int]:
        counts = self._counts.get(key)
        if counts is None:
            counts = self._counts[key] = [0] * self._columns
        return counts

    def _classed(self, key: _Key, cls: str, living: bool) -> _Key:
        """The key of one class of network beside the one of all that has no class."""
        payer_, part, owner, group = key
        at = self._class_at
        if group is None or at is None:
            return key
        classed = (payer_, part, owner, (*group[:at], cls, *group[at + 1 :]))
        if living:
            self._living_keys.add(classed)
        return classed

    def _group(self, usage: Usage, who: str, slice_: Slice) -> _Group:
        if not self._all and not self._shows(usage, who):
            return None
        if not self._group_by:
            return ()
        values = []
        for word in self._group_by:
            if word == "user":
                values.append(usage.owner)
            elif word == "job":
                values.append(usage.id)
            elif word == "account":
                values.append(who)
            elif word == "node":
                values.append(usage.node)
            elif word == "class":
                values.append("")
            else:
                values.append(slice_.day if word == "day" else slice_.part.month)
        return tuple(values)

    def _shows(self, usage: Usage, who: str) -> bool:
        wanted = self._select
        return (
            wanted.job in (None, usage.id)
            and wanted.user in (None, usage.owner)
            and wanted.account in (None, who)
            and all(tag(usage.tags, key) == value for key, value in self._tags.items())
        )

    def _add_family(self, usage: Usage, parent: str, *, living: bool) -> None:
        """A family is billed with its parent. Asked for by its id it is shown, in an account of its own."""
        begin = nanoseconds(usage.started)
        since = None if self._since is None else nanoseconds(self._since)
        over = since is not None and begin + usage.wall_ns <= since and begin < since
        if begin >= self._calendar.until or over or not self._shows(usage, payer(usage)):
            return
        if self._select.job is None:
            self._nested += 1
            return
        if self._families is None:
            self._families = self._alike()
        self._inside.add((usage.id, usage.node, parent))
        self._families.add(msgspec.structs.replace(usage, parent=None), living=living)

    def add_families(self, number: int) -> None:
        """So many records of families, which somebody else has left out: of the period, and of what is selected."""
        self._nested += number

    def _alike(self) -> "Tally":
        return Tally(self._tariff, self._since, self._until, select=self._select, group_by=self._group_by)

    def merge(self, other: "Tally") -> None:
        """Take in what another tally of the same tariff, period, selection and groups has. Raises ValueError else."""
        mine = (self._tariff, self._since, self._until, self._select, self._group_by)
        if mine != (other._tariff, other._since, other._until, other._select, other._group_by):
            raise ValueError("tallies of other bills cannot be brought together")
        for key, more in other._counts.items():
            counts = self._of(key)
            for column, count in enumerate(more):
                counts[column] += count
        self._living_keys |= other._living_keys
        self._living |= other._living
        self._absent.update(other._absent)
        self._records += other._records
        self._unpriced += other._unpriced
        self._nested += other._nested
        self._inside |= other._inside
        if other._families is not None:
            self._families = self._families or self._alike()
            self._families.merge(other._families)

    def bill(self) -> Bill:
        """The bill over all that was added. The tally may go on."""
        families = self._families.bill() if self._families is not None else None
        lines = [*self._lines(), *(families.lines if families else ())]
        # Stable: items stay in the order of the tariff. What is of the payer and no group comes last.
        lines.sort(key=lambda line: (line.payer, line.tier == MINIMUM, line.group, line.month))
        return Bill(
            tariff=self._tariff.name,
            digest=self._tariff.digest,
            currency=self._tariff.currency,
            digits=self._tariff.digits,
            timezone=self._tariff.timezone,
            since=self._since,
            until=self._until,
            group_by=self._group_by,
            lines=tuple(lines),
            total=total(lines, self._tariff.digits),
            records=self._records + (families.records if families else 0),
            payers=tuple(sorted({line.payer for line in lines})),
            living=tuple(sorted(self._living | set(families.living if families else ()))),
            notes=(*self._notes(), *(families.notes if families else ())),
        )

    def _lines(self) -> Iterator[Line]:
        months: dict[tuple[str, str], dict[Part, list[Row]]] = {}
        for key, counts in self._counts.items():
            who, part, owner, group = key
            rows = months.setdefault((who, part.month), {}).setdefault(part, [])
            rows.append(Row(owner, group, counts, key in self._living_keys))
        whole = self._select.job is None and self._select.user is None and not self._select.tags
        for (who, month), stretches in months.items():
            known = {"account": who, "month": month}
            least = tuple(known.get(word, "") for word in self._group_by) if whole else None
            yield from price_month(self._tariff, who, sorted(stretches.items(), key=itemgetter(0)), least=least)

    def _notes(self) -> Iterator[str]:
        for job, node, parent in sorted(self._inside):
            yield (
                f"job {job} on {node} is inside job {parent}, which is billed with all that {job} used; these lines "
                f"are what {job} would cost by itself, and part of no other bill"
            )
        if self._nested:
            yield f"{_records(self._nested)} of jobs inside other jobs, which are billed with all that these used"
        if self._living:
            yield f"{_plural(len(self._living), 'job')} still running and billed so far"
        if self._unpriced:
            first = self._tariff.periods[0].valid_from
            yield f"{_records(self._unpriced)} of a time before {first}, from when on the tariff has prices; not billed"
        names = self._tariff.item_names
        absent = {item.name: item.measure.absent for period in self._tariff.periods for item in period.items}
        for column, number in sorted(self._absent.items()):
            why = absent[names[column]]
            yield f"item {names[column]!r}: {_records(number)} without it ({why}); nothing is billed there"


def _plural(number: int, word: str) -> str:
    return f"{number} {word} is" if number == 1 else f"{number} {word}s are"


def _records(number: int) -> str:
    return _plural(number, "record")
