"""What a tariff can price: meters, each a sum of a record's counters, and the units that prices are for. Floor 3.

Every unit is an exact number of the counter's own: nothing here rounds. Pure data; metrics.py says what is counted.
"""

from dataclasses import dataclass
from fractions import Fraction

from acctd.metrics import (
    BLOCK_READ_BYTES,
    BLOCK_READS,
    BLOCK_WRITE_BYTES,
    BLOCK_WRITES,
    CPU_RESERVED,
    CPU_SYSTEM,
    CPU_USER,
    MEMORY_RESERVED_TIME,
    MEMORY_RESIDENT_TIME,
    NETWORK_BYTES,
    NETWORK_PACKETS,
    NFS_OPERATIONS,
    NFS_READ_BYTES,
    NFS_READS,
    NFS_WRITE_BYTES,
    NFS_WRITES,
    Metric,
)

_TIMES = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}  # s
_SIZES = {
    "byte": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "PB": 10**15,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "PiB": 2**50,
}
_NUMBERS = {"": 1, "1000 ": 1000, "million ": 10**6}


def _counts(one: str) -> dict[str, Fraction]:
    """operation, 1000 operations, million operations."""
    return {f"{word}{one}{'s' * (word != '')}": Fraction(factor) for word, factor in _NUMBERS.items()}


_WALL = {name: Fraction(s * 10**9) for name, s in _TIMES.items()}
_CORES = {f"core-{name}": ns for name, ns in _WALL.items()} | _WALL
_BYTES = {name: Fraction(size) for name, size in _SIZES.items()}
# The counters are in KiB*s: a GB-hour is 10^9 bytes for 3600 s, 3515625000 of them; a GiB-hour is 3774873600.
_MEMORY = {
    f"{size}-{time}": Fraction(of * s, 1024)
    for size, of in _SIZES.items()
    for time, s in _TIMES.items()
    if size not in ("byte", "PB", "PiB")
}


@dataclass(frozen=True, slots=True)
class Meter:
    """One thing that can be priced. Its quantity is the sum of its counters, over all their labels but as told."""

    name: str
    metrics: tuple[Metric, ...]  # none: wall time, and jobs
    units: dict[str, Fraction]  # unit of a price -> how many of the counters' own make one
    network: bool = False  # labelled by class and direction, so that an item may take some of it
    devices: bool = False  # labelled by device: those that are stacked on others are left out
    absent: str = ""  # what it means that a record has none of the counters; "" where that is nothing to tell


METERS: dict[str, Meter] = {
    meter.name: meter
    for meter in (
        Meter("cpu", (CPU_USER, CPU_SYSTEM), _CORES, absent="no CPU time was counted"),
        Meter("cores", (CPU_RESERVED,), _CORES, absent="no cores were asked for, or the agent was an older one"),
        Meter("wall", (), _WALL),
        Meter("memory", (MEMORY_RESIDENT_TIME,), _MEMORY, absent="no memory over time was counted"),
        Meter(
            *("memory_reserved", (MEMORY_RESERVED_TIME,), _MEMORY),
            absent="no memory was asked for, or the agent was an older one",
        ),
        Meter("network", (NETWORK_BYTES,), _BYTES, network=True, absent="no network was counted"),
        Meter("network_packets", (NETWORK_PACKETS,), _counts("packet"), network=True, absent="no network was counted"),
        Meter("block_read", (BLOCK_READ_BYTES,), _BYTES, devices=True),
        Meter("block_write", (BLOCK_WRITE_BYTES,), _BYTES, devices=True),
        Meter("block_reads", (BLOCK_READS,), _counts("operation"), devices=True),
        Meter("block_writes", (BLOCK_WRITES,), _counts("operation"), devices=True),
        Meter("nfs_read", (NFS_READ_BYTES,), _BYTES),
        Meter("nfs_write", (NFS_WRITE_BYTES,), _BYTES),
        Meter("nfs_reads", (NFS_READS,), _counts("operation")),
        Meter("nfs_writes", (NFS_WRITES,), _counts("operation")),
        Meter("nfs_operations", (NFS_OPERATIONS,), _counts("operation")),
        Meter("jobs", (), _counts("job")),
    )
}
"""By the word that a tariff has for it. A record counts as one of `jobs`, in the slice of time in which it began."""
