"""What the agent itself costs: ticks, CPU, memory, descriptors, errors; as numbers that can be published."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from acctd.kernel import procs


@dataclass(slots=True)
class Cost:
    """Counted since the agent's start."""

    ticks: int = 0
    missed_ticks: int = 0  # due while one was still under way
    errors: int = 0
    last_tick: float = 0.0  # s
    longest_tick: float = 0.0  # s
    tick_seconds: float = 0.0  # all of them together
    started: float = field(default_factory=time.monotonic)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Around one tick."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.ticks += 1
            self.last_tick = time.monotonic() - began
            self.longest_tick = max(self.longest_tick, self.last_tick)
            self.tick_seconds += self.last_tick

    def published(self, jobs: int) -> dict[str, float]:
        """All of it; times in s, memory in bytes."""
        usage, resident = resource.getrusage(resource.RUSAGE_SELF), procs.resident()
        return {
            "ticks": self.ticks,
            "missed_ticks": self.missed_ticks,
            "errors": self.errors,
            "last_tick_seconds": self.last_tick,
            "longest_tick_seconds": self.longest_tick,
            "tick_seconds": self.tick_seconds,
            "uptime_seconds": time.monotonic() - self.started,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "resident_bytes": resident,
            # The kernel adds up per-CPU counts for the one and not for the other.
            "resident_peak_bytes": max(resident, usage.ru_maxrss * 1024),
            "open_descriptors": procs.open_descriptors(),
            "jobs": jobs,
        }
