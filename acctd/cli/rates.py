"""What a job uses now: amounts out of its totals, and rates out of the difference of two readings.

Pure arithmetic; the caller brings the time. A number the host does not count, or the caller may not read, is None.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from acctd.client import Job


@dataclass(frozen=True, slots=True)
class Amounts:
    """One job's totals in a few numbers."""

    cpu: int | None  # ns, user and system
    memory: int | None  # bytes resident now
    received: int | None  # bytes
    sent: int | None  # bytes
    io: int | None  # bytes read from and written to block devices


@dataclass(frozen=True, slots=True)
class Rates:
    """What changed per second between two readings."""

    cpu: float | None = None  # cores
    received: float | None = None  # bytes/s
    sent: float | None = None  # bytes/s
    io: float | None = None  # bytes/s


def amounts(job: Job, stacked: Callable[[str], bool]) -> Amounts:
    """A job's amounts. `stacked` says of a device whether its I/O is counted again under the one it lies on."""
    totals = job.totals
    network = totals.get("network")

    def total(*names: str) -> int | None:
        found = [value for name in names for value in totals.get(name, {}).values()]
        return sum(found) if found else None

    def way(prefix: str) -> int | None:
        return None if network is None else sum(n for rule, n in network.items() if rule.startswith(prefix))

    blocks = [totals[name] for name in ("block_read", "block_write") if name in totals]
    return Amounts(
        cpu=total("cpu_user", "cpu_system"),
        memory=total("memory_resident"),
        received=way("Incoming"),
        sent=way("Outgoing"),
        io=sum(n for block in blocks for device, n in block.items() if not stacked(device)) if blocks else None,
    )


class Clocked:
    """Remembers the last amounts of every job, and gives the rates since then."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, float], tuple[float, Amounts]] = {}

    def rates(self, jobs: Iterable[tuple[Job, Amounts]], now: float) -> dict[str, Rates]:
        """By job id, as of `now`: seconds of a clock that is never set. A job seen for the first time has no rates."""
        # With its start, since an id may be used again.
        current = {(job.id, job.started): (now, used) for job, used in jobs}
        found = {}
        for key, (_, used) in current.items():
            before, then = self._last.get(key, (now, used))
            found[key[0]] = _between(then, used, now - before) if now > before else Rates()
        self._last = current
        return found


def _between(then: Amounts, now: Amounts, seconds: float) -> Rates:
    def rate(before: int | None, after: int | None, unit: int = 1) -> float | None:
        if before is None or after is None:
            return None
        # Totals only grow; what looks otherwise is another agent's, and no rate.
        return (after - before) / unit / seconds if after >= before else None

    return Rates(
        cpu=rate(then.cpu, now.cpu, 10**9),
        received=rate(then.received, now.received),
        sent=rate(then.sent, now.sent),
        io=rate(then.io, now.io),
    )
