"""Records in InfluxDB, as the exporter writes them: the database adds up what lies whole in one slice of time.

A slice has one month and one period of the tariff, so within it nothing need be known but sums by payer and owner. What
reaches over the end of one is fetched and spread as anywhere else; so is everything where a bill is about single jobs.
The points have what that takes: the tag `payer`, and exporters/billfields.py. The same bill to the last digit, but for
a job with a number above 2^63-1, which no InfluxDB can store.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from acctd.bill import Selection
from acctd.errors import UnavailableError
from acctd.meter import State
from acctd.metrics import BILLED, NETWORK_BYTES, NETWORK_PACKETS
from acctd.model import INT64_MAX
from acctd.sources.crew import Reader
from acctd.sources.files import WRONG
from acctd.sources.gather import Begin, Gathered, Make
from acctd.sources.influxql import Database, Row, identifier, quoted
from acctd.usage import Usage, nanoseconds, payer
from exporters.billfields import restored
from exporters.lineprotocol import NONE, record_field

_OUTERMOST = f"parent = {quoted(NONE)}"
_END = "started_ns + wall_ns"
_STEP = 1000  # records of which progress is told
_NO_POINT = (*WRONG, KeyError, TypeError)
_RULE = r"((?:Outgoing|Incoming)[A-Z]\w*)"


@dataclass(frozen=True, slots=True)
class Question:
    """What decides how much the database can add up."""

    select: Selection
    group_by: tuple[str, ...]
    since: float | None  # s since the epoch
    until: float

    @property
    def singly(self) -> bool:
        """Whether each record matters by itself."""
        return "job" in self.group_by or self.select.job is not None or bool(self.select.tags)


def from_database(url: str, question: Question, make: Make, begin: Begin, environ: Mapping[str, str]) -> Gathered:
    """Raises UnavailableError for what is no such database, UsageError for a URL that is none."""
    with Database(url, environ) as database:
        reader = make(frozenset())
        _Collector(database, question, reader, begin(0, 0)).collect()
        return Gathered(reader, "influxdb", (database.name,))


class _Collector:
    """One bill's way through the database."""

    def __init__(
        self, database: Database, question: Question, reader: Reader, progress: Callable[[int, int], None]
    ) -> None:
        self._database, self._question, self._progress = database, question, progress
        self._tally, self._looked, self._since = reader.tally, reader.looked, reader.needed_from
        self._fields = dict(_billed(database.fields("acctd_record")))

    def collect(self) -> None:
        """Everything that the bill needs."""
        if not self._fields:
            raise UnavailableError(f"{self._database.name} has no acctd_record; see db and rp in --from")
        slices = [tuple(map(nanoseconds, ends)) for ends in self._tally.slices(self._since, self._question.until)]
        first, last = slices[0][0], slices[-1][1]
        everything = [f"{_END} >= {first}", f"started_ns < {last}"]
        if self._question.select.job is None:  # a family is billed with its parent, but may be asked for
            everything.append(_OUTERMOST)
        for row in self._select("count(wall_ns) AS records", everything, ["host"]):
            self._looked.nodes.add(row["host"])
            self._looked.records += row["records"]
        self._count_families(last)
        if self._question.singly:
            self._fetch(everything)
            return
        self._fetch([_OUTERMOST, f"started_ns < {first}", f"{_END} > {first}"])
        for begin, end in slices:
            began = [_OUTERMOST, f"started_ns >= {begin}", f"started_ns < {end}"]
            self._add_up([*began, f"{_END} <= {end}"], begin)
            self._fetch([*began, f"{_END} > {end}"])

    def _count_families(self, until: int) -> None:
        """Those that are left out, of which a bill tells how many. With tags each must be looked at."""
        select = self._question.select
        if select.job is not None:
            return
        inside = [_OUTERMOST.replace("=", "!="), f"started_ns < {until}"]
        since = None if self._question.since is None else nanoseconds(self._question.since)
        if since is not None:  # as Tally has it: a job of no time belongs to where it began
            inside.append(f"({_END} > {since} OR started_ns >= {since})")
        if select.tags:
            self._fetch(inside)
            return
        wanted = (("owner", select.user), ("payer", select.account))
        inside += [f"{name} = {quoted(value)}" for name, value in wanted if value is not None]
        for row in self._select("count(wall_ns) AS records", inside, []):
            self._tally.add_families(row["records"])

    def _add_up(self, conditions: Sequence[str], begin: int) -> None:
        """Of records that lie whole in a slice the sums are enough."""
        names = ["wall_ns", *self._fields]
        columns = ", ".join(
            ["count(wall_ns) AS records"]
            + [
                f"sum({name}) AS sum{n}, max({name}) AS max{n}, count({name}) AS count{n}"
                for n, name in enumerate(map(identifier, names))
            ]
        )
        groups = ["owner", "payer", *(["host"] if "node" in self._question.group_by else [])]
        networks = {NETWORK_BYTES.name, NETWORK_PACKETS.name}  # several fields each
        known: dict[str, dict[tuple[str, ...], int]] = {}
        for row in list(self._select(columns, conditions, groups)):
            # The database's own sum goes round at 2^63, and says nothing.
            most = row["records"] * max(row[f"max{n}"] or 0 for n in range(len(names)))
            of_row = [*conditions, *(f"{identifier(name)} = {quoted(row[name])}" for name in groups)]
            if most > INT64_MAX or not row["payer"]:  # without it: written by an acctd that did not know of bills
                self._fetch(of_row)
                continue
            totals: State = {}
            having: dict[str, int] = {}
            for n, (metric, label) in enumerate(self._fields.values(), 1):
                if (value := row[f"sum{n}"]) is not None:
                    totals.setdefault(metric, {})[label] = value
                    having[metric] = max(having.get(metric, 0), row[f"count{n}"])
            for metric in (name for name, count in having.items() if name in networks and count < row["records"]):
                if metric not in known:
                    known[metric] = self._having(metric, conditions, groups)
                having[metric] = known[metric][tuple(row[name] for name in groups)]
            usage = Usage(
                id="",
                owner=row["owner"],
                node=row.get("host", ""),
                started=begin / 10**9,
                wall_ns=row["sum0"],
                totals=totals,
                tags={"account": row["payer"]},
            )
            self._tally.add_sum(usage, jobs=row["records"], having=having)
            self._progress(row["records"], 0)

    def _having(self, metric: str, conditions: Sequence[str], groups: Sequence[str]) -> dict[tuple[str, ...], int]:
        """By group, how many records have any field of a metric: not all jobs have the same classes of network."""
        fields = [identifier(field) for field, (name, _) in self._fields.items() if name == metric]
        either = " OR ".join(f"{field} >= 0" for field in fields)
        rows = self._select("count(wall_ns) AS records", [*conditions, f"({either})"], groups)
        return {tuple(row[name] for name in groups): row["records"] for row in rows}

    def _fetch(self, conditions: Sequence[str]) -> None:
        """Records one by one."""
        for number, row in enumerate(self._select("*", conditions, []), 1):
            self._tally.add(self._usage(row))
            if number % _STEP == 0:
                self._progress(_STEP, 0)

    def _select(self, columns: str, conditions: Sequence[str], groups: Sequence[str]) -> Iterator[Row]:
        by = f" GROUP BY {', '.join(groups)}" if groups else ""
        return self._database.ask(f"SELECT {columns} FROM acctd_record WHERE {' AND '.join(conditions)}{by}")  # noqa: S608

    def _usage(self, row: Row) -> Usage:
        """A point as the record that it was made from, as far as it is billed."""
        try:
            parts = restored(row)
            totals: State = {}
            for field, (metric, label) in self._fields.items():
                if row.get(field) is not None and metric not in parts.totals:
                    totals.setdefault(metric, {})[label] = row[field]
            usage = Usage(
                id=row["job"],
                owner=row["owner"],
                node=row["host"],
                started=row["started_ns"] / 10**9,
                wall_ns=row["wall_ns"],
                totals={**totals, **parts.totals},
                tags=_tags(row.get("tags")),
                midnights=parts.midnights,
                parent=None if row["parent"] == NONE else row["parent"],
            )
        except _NO_POINT as e:
            raise UnavailableError(
                f"{self._database.name} has an acctd_record at {row.get('time')} ns that no acctd has written ({e})"
            ) from e
        # As a tag it may be written otherwise than as text, and sums know it by its tag.
        who = row.get("payer")
        return usage if not who or payer(usage) == who else _paid(usage, who)


def _paid(usage: Usage, who: str) -> Usage:
    tags = {name: value for name, value in usage.tags.items() if name.lower() != "account"}
    return Usage(
        **{**{name: getattr(usage, name) for name in usage.__struct_fields__}, "tags": {**tags, "account": who}}
    )


def _tags(text: Any) -> dict[str, str]:
    """A job's own; none where they were too long to be stored."""
    with suppress(ValueError, TypeError, RecursionError):
        found = json.loads(text)
        if isinstance(found, dict):
            return {str(name): str(value) for name, value in found.items()}
    return {}


def _billed(fields: Iterator[str]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Fields of what may be billed, with metric and label; of devices and mounts a field has the sum."""
    rules = {
        metric: re.compile(f"{re.escape(record_field(metric, '@')).replace('@', _RULE)}\\Z")
        for metric in (NETWORK_PACKETS, NETWORK_BYTES)
    }
    plain = {record_field(metric): metric for metric in BILLED if metric not in rules}
    for field in fields:
        if field in plain:
            yield field, (plain[field].name, "")
        for metric, pattern in rules.items():
            if match := pattern.match(field):
                yield field, (metric.name, match[1])
