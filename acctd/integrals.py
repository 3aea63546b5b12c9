"""What a job had, summed over the time it had it: cores and memory that it asked for, and memory that it held.

Pure arithmetic on integers, of times on the boottime clock; reads no clock and stores nothing. Between two readings the
value of the first one held. A sum is kept as what it was when its value last changed, with what is left of a unit, so
that it is the same however often it is looked at in between, and nothing has to be stored while nothing changes. From
a job's begin to its end it is value x wall time, rounded down once.

A family has sums of its own, and its parent's hold them already: what a family asks for is part of what its parent has,
and the kernel counts its memory in the parent's cgroup. So they are never added up.
"""

from dataclasses import dataclass, field
from fractions import Fraction

from acctd.cgroup.cpus import parse_list
from acctd.metrics import CPU_RESERVED, MEMORY_RESERVED_TIME, MEMORY_RESIDENT, MEMORY_RESIDENT_TIME, Key, Metric
from acctd.model import INT64_MAX, Limits

RESIDENT: Key = (MEMORY_RESIDENT, "")

_PARTS = 10**18
"""Of a core: a number from 0.01 up that is written with a double's 17 digits is a whole number of these."""

_CORES = _PARTS  # of a core x ns, in ns
_BYTES = 1024 * 10**9  # bytes x ns, in KiB*s


@dataclass(frozen=True, slots=True)
class Sums:
    """The integrals of a job at rest, as the ledger keeps them."""

    begin: int = 0  # CLOCK_BOOTTIME of the begin that they go back to, ns; those of another one are void
    parts: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # metric -> whole, rest, as of when


class Integral:
    """One value summed over time."""

    __slots__ = ("_per", "_rest", "_since", "_whole", "key", "rate")

    def __init__(self, metric: Metric, per: int, rate: int | None, since: int) -> None:
        """`rate` a ns, of which `per` make one of the metric's units; None where the job never had such a value."""
        self.key: Key = (metric, "")
        self.rate = rate
        self._per, self._since = per, since
        self._whole = self._rest = 0

    def at(self, now: int) -> int:
        """The sum up to a time not before the last change. Above 2^63-1, which no exporter carries, it stays there."""
        passed = now - self._since
        if passed <= 0 or not self.rate:
            return self._whole
        return min(self._whole + (self._rest + self.rate * passed) // self._per, INT64_MAX)

    def change(self, rate: int | None, now: int) -> None:
        """The value is another one from now on. One that there was once is 0 when there is none any more."""
        if rate == self.rate:
            return
        passed = now - self._since
        if passed > 0:
            if self.rate:
                whole, self._rest = divmod(self._rest + self.rate * passed, self._per)
                self._whole = min(self._whole + whole, INT64_MAX)
            self._since = now
        self.rate = rate or 0

    def begin(self, now: int) -> None:
        """From zero."""
        self._whole = self._rest = 0
        self._since = now

    def stored(self) -> tuple[int, int, int]:
        """For the ledger."""
        return self._whole, self._rest, self._since

    def restore(self, stored: tuple[int, int, int]) -> None:
        """Go on from there."""
        self._whole, self._rest, self._since = stored
        self.rate = self.rate or 0


class Integrals:
    """One job's. Times are of CLOCK_BOOTTIME, in ns."""

    __slots__ = ("_begin", "_cores", "_memory", "_parts", "_resident")

    def __init__(self, begin: int, limits: Limits, cpus: str, sums: Sums, resident: int | None) -> None:
        """`cpus`: the list of those it has for itself; `resident`: bytes as last read, None before."""
        self._begin = begin
        self._cores = Integral(CPU_RESERVED, _CORES, cores(limits, cpus), begin)
        self._memory = Integral(MEMORY_RESERVED_TIME, _BYTES, limits.memory, begin)
        self._resident = Integral(MEMORY_RESIDENT_TIME, _BYTES, resident, begin)
        self._parts = (self._cores, self._memory, self._resident)
        if sums.begin == begin:
            for part in self._parts:
                if (stored := sums.parts.get(part.key[0].name)) is not None:
                    part.restore(stored)

    def begin(self, now: int) -> None:
        """The job begins now, whatever was before."""
        self._begin = now
        for part in self._parts:
            part.begin(now)

    def reserve(self, limits: Limits, cpus: str, now: int) -> None:
        """It may use something else from now on."""
        self._cores.change(cores(limits, cpus), now)
        self._memory.change(limits.memory, now)

    def hold(self, resident: int, now: int) -> None:
        """It is read to hold so many bytes now."""
        self._resident.change(resident, now)

    def show(self, totals: dict[Key, int], now: int) -> None:
        """Put the sums up to now among a job's totals; those of what it never had stay away."""
        for part in self._parts:
            if part.rate is not None:
                totals[part.key] = part.at(now)

    def sums(self) -> Sums:
        """For the ledger."""
        kept = {part.key[0].name: part.stored() for part in self._parts if part.rate is not None}
        return Sums(self._begin, kept)


def cores(limits: Limits, cpus: str) -> int | None:
    """What a job has reserved of CPUs, in 10^-18: its quota, or those it has for itself where they are more."""
    quota = int(Fraction(repr(limits.cpus)) * _PARTS) if limits.cpus is not None else 0
    return max(quota, len(parse_list(cpus)) * _PARTS) or None


def cores_asked(limits: Limits, cpus: str) -> float | None:
    """The same in cores: what a job asked for, wherever that is shown, judged or sent."""
    parts = cores(limits, cpus)
    return parts / _PARTS if parts is not None else None
