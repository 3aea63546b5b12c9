"""Panels that several dashboards have."""

from acctd import metrics as m
from tools.grafana.intents import Ask, How, Query, Scope
from tools.grafana.numbers import Number, of
from tools.grafana.panels import (
    BYTES,
    BYTES_PER_SECOND,
    COUNT,
    SECONDS,
    TO_BILL_OF_CLASS,
    Column,
    Link,
    Panel,
)

CPU = (of(m.CPU_USER), of(m.CPU_SYSTEM))
NETWORK = (of(m.NETWORK_BYTES),)
KINDS = (
    ("heap", m.MEMORY_ANON),
    ("shared", m.MEMORY_SHMEM),
    ("page cache", m.MEMORY_FILE),
    ("kernel", m.MEMORY_KERNEL),
    ("swap", m.MEMORY_SWAP),
)


def one(legend: str, number: Number, how: How = "level", by: tuple[str, ...] = ()) -> Ask:
    """Of the chosen job."""
    return Ask(legend, (number,), how, "job", by)


def memory(scope: Scope) -> tuple[Query, ...]:
    """Each kind apart."""
    return tuple(Ask(kind, (of(metric),), "level", scope) for kind, metric in KINDS)


def traffic(scope: Scope, links: tuple[Link, ...] = (TO_BILL_OF_CLASS,)) -> Panel:
    return Panel(
        "Network",
        "Bytes a second by class and direction, IP headers included; what comes in is below the axis.",
        "timeseries",
        BYTES_PER_SECOND,
        (Ask("{direction} {class}", NETWORK, "rate", scope, ("class", "direction")),),
        below="^incoming",
        links=links,
    )


def disks(scope: Scope) -> Panel:
    return Panel(
        "Block devices",
        "Bytes a second by device; what is read is below the axis. What lies on another device is counted there only.",
        "timeseries",
        BYTES_PER_SECOND,
        (
            Ask("written to {device}", (of(m.BLOCK_WRITE_BYTES),), "rate", scope, ("device",)),
            Ask("read from {device}", (of(m.BLOCK_READ_BYTES),), "rate", scope, ("device",)),
        ),
        below="^read",
    )


def jobs_table(title: str, description: str, scope: Scope) -> Panel:
    by = ("job", "host", "owner")
    return Panel(
        title,
        description,
        "table",
        COUNT,
        (
            Ask("CPU time", CPU, "total", scope, by),
            Ask("Memory", (of(m.MEMORY_RESIDENT_PEAK),), "total", scope, by),
            Ask("Network", NETWORK, "total", scope, by),
        ),
        columns=(Column("CPU time", SECONDS), Column("Memory", BYTES), Column("Network", BYTES)),
        labels=by,
        width=24,
        height=10,
    )
