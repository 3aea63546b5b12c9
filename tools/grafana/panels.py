"""What a dashboard is made of, before it is JSON: panels, rows, links. Pure data; no language and no position in it.

Nothing is told by colour alone: every series has a name in a legend that is a table, limits and second quantities have
another line, what comes in or is read is above the axis and what goes out or is written below it.
"""

from dataclasses import dataclass, field
from typing import Literal

from tools.grafana.intents import Query

BYTES, BYTES_PER_SECOND, SECONDS, SHARE, COUNT, CORES = "bytes", "Bps", "s", "percentunit", "short", "suffix: cores"
GIGABYTES = "decbytes"
"""Powers of 1000: what a price is told for."""


@dataclass(frozen=True)
class Link:
    """To another dashboard; `sets` are its variables and the labels of what was clicked on that they are set to."""

    to: str
    sets: tuple[tuple[str, str], ...]


TO_JOB = Link("job", (("job", "job"), ("host", "host"), ("user", "owner")))
TO_USER = Link("user", (("user", "owner"),))
TO_BILL = Link("bill", (("user", "owner"),))
TO_BILL_OF_CLASS = Link("bill", (("class", "class"),))
TO_NODE = Link("node", (("host", "host"),))
TO_AGENT = Link("agent", (("host", "host"),))


@dataclass(frozen=True)
class Column:
    """Of a table: as it is called there, and its unit."""

    name: str
    unit: str = "string"
    link: Link | None = None


LABEL_COLUMNS = {
    "job": Column("Job", link=TO_JOB),
    "host": Column("Host", link=TO_NODE),
    "owner": Column("Owner", link=TO_USER),
    "class": Column("Class"),
    "direction": Column("Direction"),
    "cluster": Column("Cluster"),
    "parent": Column("Inside of"),
    "scheduler": Column("Scheduler"),
    "account": Column("Account"),
    "state": Column("State"),
    "event": Column("Event"),
    "text": Column("What happened"),
    "sink": Column("Sink"),
    "version": Column("Version"),
}
"""What labels are called in a table, whatever the database calls them."""


@dataclass(frozen=True)
class Panel:
    """One panel. It is left out where a language has none of its queries."""

    title: str
    description: str
    kind: Literal["timeseries", "stat", "table"]
    unit: str
    queries: tuple[Query, ...]
    stacked: bool = False
    bars: bool = False  # a bar an interval, and their sum in the legend
    below: str = ""  # what is drawn below the axis: a regular expression of names
    limits: tuple[str, ...] = ()  # names of series that are a limit
    columns: tuple[Column, ...] = ()  # of a table, beside those of LABEL_COLUMNS
    labels: tuple[str, ...] = ()  # of a table, those it shows
    when: bool = False  # of a table, whether a row has a time
    links: tuple[Link, ...] = ()
    width: int = 12
    height: int = 8
    calc: str = "lastNotNull"  # of a stat
    daily: bool = False  # one point a day


@dataclass(frozen=True)
class Row:
    """Panels under a heading; once for each value of the variable `repeat`."""

    title: str
    panels: tuple[Panel, ...]
    repeat: str = ""


@dataclass(frozen=True)
class Board:
    """One dashboard."""

    name: str
    title: str
    description: str
    variables: tuple[str, ...]
    rows: tuple[Row, ...] = field(default_factory=tuple)
    shortages: bool = False  # whether times at which memory ran out are marked
    since: str = "now-6h"
    utc: bool = False
