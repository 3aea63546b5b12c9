"""What a panel asks, whatever the language: of which numbers, summed by what, as what. Pure data.

Each job's own series is looked at first, then jobs are summed: a counter's rate is never that of a sum, because a job
that ends would make a sum fall.
"""

from dataclasses import dataclass
from typing import Literal

from tools.grafana.numbers import Number

Scope = Literal["job", "jobs", "inside", "agent"]
"""job: the chosen job. jobs: all top-level ones, whose numbers include those inside. inside: jobs in the chosen one.
agent: the agents of the chosen hosts."""

How = Literal["level", "rate", "change", "total", "count"]
"""level: as it is. rate: by how much it grows a second. change: by how much it grew in an interval. total: the newest
value in the range, one a series. count: how many jobs there are."""


@dataclass(frozen=True)
class Ask:
    """One query. `legend` may hold {label}; `by` are labels beside those it takes."""

    legend: str
    numbers: tuple[Number, ...]  # they are added up
    how: How
    scope: Scope = "jobs"
    by: tuple[str, ...] = ()

    @property
    def by_columns(self) -> tuple[str, ...] | None:
        """Labels that a table of it has beside its value; None where its text says so itself."""
        return self.by

    @property
    def number(self) -> Number:
        """The one that names measurement and unit."""
        return self.numbers[0]


@dataclass(frozen=True)
class Records:
    """What records of ended jobs say: one field, or network bytes by class and direction. InfluxDB only.

    sum: over jobs; days: the same, day by day (UTC). `price`: the variable that it is multiplied with, a GB.
    """

    legend: str
    how: Literal["sum", "days"]
    field: str = ""  # of acctd_record
    per_unit: int = 1
    direction: str = ""  # instead of a field: Outgoing or Incoming, of the class $class
    by: tuple[str, ...] = ()
    price: str = ""

    @property
    def by_columns(self) -> tuple[str, ...] | None:
        """As Ask.by_columns."""
        return self.by


@dataclass(frozen=True)
class Flow:
    """Network bytes of a day, or of the range, from counters. Prometheus only, which has no records.

    A counter that began within the time counts from 0, so that a job of one sample is not lost; nothing is
    extrapolated.
    """

    legend: str
    how: Literal["sum", "days"]
    direction: str = ""
    by: tuple[str, ...] = ()
    price: str = ""

    @property
    def by_columns(self) -> tuple[str, ...] | None:
        """As Ask.by_columns."""
        return self.by


@dataclass(frozen=True)
class Text:
    """A query as it is, for what has no form of its own. A language that has none does not have its panel."""

    legend: str
    influxql: str = ""
    flux: str = ""
    promql: str = ""
    instant: bool = False  # Prometheus: at the end of the range only

    @property
    def by_columns(self) -> tuple[str, ...] | None:
        """As Ask.by_columns."""
        return None


Query = Ask | Records | Flow | Text
