"""What a job asked for against what it used, and what its owner may do about it, in plain words.

Pure: from the numbers of a record to sentences. It says nothing where the numbers do not carry it: to a job that was
too short, that failed, or that still runs, nothing about what it could have done with less of.
After the habits of Slurm's seff and Princeton's jobstats.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from acctd.integrals import cores_asked
from acctd.meter import State
from acctd.model import Limits
from acctd.policies import Shortage
from acctd.report.units import duration, few, in_cores, size

LEAST_NS = 30 * 10**9
"""A shorter job gets no advice: its memory was sampled a few times only, and starting up was most of what it did."""

_SPARE = 1.2  # what is advised, over what was needed
_OVER = 0.75  # of what was asked for: advice above that is not worth a change
_LEAST_SAVED = 128 << 20  # bytes
_TIGHT = 0.95  # of the limit
_IDLE = 0.5  # of the cores asked for
_WAITING = 0.2  # of the time
_THROTTLED, _PERIODS = 0.1, 50  # of the quota's periods, and how many make a share of them

Level = Literal["problem", "advice", "note", "good"]
"""problem: it went wrong or slower. advice: ask otherwise next time. note: how to read a number. good: as it ought."""


@dataclass(frozen=True, slots=True)
class Hint:
    """One sentence or two for the job's owner."""

    level: Level
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What hints are made from."""

    wall_ns: int
    limits: Limits
    totals: State
    shortages: tuple[Shortage, ...] = ()
    shortages_dropped: int = 0
    exclusive: str = ""  # cores that it had for itself, a CPU list
    running: bool = False
    failed: bool = False  # by exit status or signal, or unknown
    cores_peak: float | None = None  # the most that one step of the plot shows, where there are samples

    def one(self, name: str) -> int | None:
        """A metric without labels; None where the host does not count it."""
        return self.totals.get(name, {}).get("")

    @property
    def cores(self) -> float | None:
        """Cores that it asked for; over its whole time, where that changed."""
        if (held := self.one("cpu_reserved")) and self.wall_ns:
            return held / self.wall_ns
        return cores_asked(self.limits, self.exclusive)

    @property
    def cores_used(self) -> float | None:
        """On average."""
        user, system = self.one("cpu_user"), self.one("cpu_system")
        if user is None or system is None or not self.wall_ns:
            return None
        return (user + system) / self.wall_ns

    @property
    def need(self) -> int | None:
        """Bytes that the job cannot have done without, at its peak: resident and kernel memory, and no page cache."""
        return needed(self.totals)

    def share(self, name: str, per_second: int) -> float:
        """Of the job's time, what a counter of time has."""
        value = self.one(name)
        return value * (10**9 // per_second) / self.wall_ns if value and self.wall_ns else 0.0


def needed(totals: State) -> int | None:
    """Bytes of memory without page cache at most; None where the host does not count it.

    Resident and kernel memory need not have had their peaks at one moment: it is no more than the kernel saw of all.
    """
    if (resident := totals.get("memory_resident_peak", {}).get("")) is None:
        return None
    need = resident + totals.get("memory_kernel_peak", {}).get("", 0)
    return min(need, totals.get("memory_peak", {}).get("") or need)


def hints(facts: Facts) -> list[Hint]:
    """What there is to say, the worst first."""
    long_enough = facts.wall_ns >= LEAST_NS
    found = [*_shortages(facts), *_refused(facts)]
    if long_enough:
        found += [*_memory(facts), *_cache(facts), *_swap(facts), *_cpu(facts), *_waiting(facts)]
    order: tuple[Level, ...] = ("problem", "advice", "note", "good")
    return sorted(found, key=lambda hint: order.index(hint.level))


def advised(need: float) -> int:
    """Bytes to ask for when so many were needed: a fifth more, rounded up to a quarter of the power of two below it."""
    wanted = max(need * _SPARE, float(64 << 20))
    step = 2 ** (math.floor(math.log2(wanted)) - 2)
    return int(math.ceil(wanted / step) * step)


def _shortages(facts: Facts) -> list[Hint]:
    found = []
    own = [shortage for shortage in facts.shortages if shortage.level == "job"]
    if own:
        limit = max((shortage.limit for shortage in own if shortage.limit is not None), default=None)
        times = "once" if len(own) == 1 else f"{len(own)} times"
        if facts.shortages_dropped:  # whose limit was reached by those, nobody knows
            times = f"at least {times}"
        at = "" if limit is None else f" at its limit of {size(limit)}"
        found.append(Hint("problem", f"The job ran out of memory {times}{at}.{_more(facts, own, limit)}"))
    for level, whose in (
        ("host", "the node itself had none left, which this job's own limit would not have changed"),
        ("parent", "the job around it reached its limit"),
        ("family", "a family inside it reached its own limit"),
    ):
        if any(shortage.level == level for shortage in facts.shortages):
            found.append(Hint("problem", f"Memory ran out: {whose}."))
    if not facts.shortages and (kills := facts.one("memory_oom_kills")):
        processes = "1 process" if kills == 1 else f"{kills} processes"
        found.append(
            Hint("problem", f"The kernel killed {processes} of the job for want of memory. Ask for more memory.")
        )
    return found


def _more(facts: Facts, own: Sequence[Shortage], limit: int | None) -> str:
    """What to ask for after a shortage: what it needed, if it was given that and ended well; else nobody knows."""
    if limit is None:
        return ""
    if not (facts.running or facts.failed) and all(shortage.action == "grown" for shortage in own):
        return f" It was given more, and ended well. Ask for {size(advised(max(facts.need or 0, limit)))} next time."
    return (
        f" How much more it needs is not known: try twice as much, {size(2 * limit)}, next time, or make it need less."
    )


def _refused(facts: Facts) -> list[Hint]:
    if not (refused := facts.one("pids_refused")):
        return []
    limit = "" if facts.limits.pids is None else f" of {facts.limits.pids}"
    return [
        Hint(
            "problem",
            f"{refused:,} times it could not start a process or thread, because of its limit{limit}. Start fewer at a "
            "time, or ask for more tasks.",
        )
    ]


def _memory(facts: Facts) -> list[Hint]:
    asked, need = facts.limits.memory, facts.need
    if asked is None or need is None or any(shortage.level == "job" for shortage in facts.shortages):
        return []
    enough = advised(need)
    if need >= _TIGHT * asked:
        if facts.limits.hard is None:
            return [Hint("advice", f"It held {size(need)} and had asked for {size(asked)}. Ask for {size(enough)}.")]
        return [
            Hint(
                "advice",
                f"It came close to its memory limit: {size(need)} of {size(asked)}. Ask for {size(enough)} next time.",
            )
        ]
    if facts.running or facts.failed:
        return []
    if enough <= _OVER * asked and asked - enough >= _LEAST_SAVED:
        return [
            Hint(
                "advice",
                f"It asked for {size(asked)} of memory and held {size(need)} at most. Ask for {size(enough)} next "
                "time: a smaller job often starts sooner.",
            )
        ]
    return [Hint("good", f"Its memory was well asked for: {size(need)} of {size(asked)}.")]


def _cache(facts: Facts) -> list[Hint]:
    asked, need, peak = facts.limits.hard, facts.need, facts.one("memory_peak")
    if asked is None or need is None or peak is None or peak < 0.9 * asked or need > 0.7 * peak:
        return []
    return [
        Hint(
            "note",
            f"Most of the {size(peak)} that its memory reached is page cache: copies of files, kept as long as nobody "
            f"wants the room. The job itself needed {size(need)}.",
        )
    ]


def _swap(facts: Facts) -> list[Hint]:
    swapped, need = facts.one("memory_swap_peak"), facts.need
    if not swapped or need is None or swapped < 0.1 * need or swapped < 64 << 20:
        return []
    return [
        Hint("problem", f"Up to {size(swapped)} of its memory was swapped out, which is slow. Ask for more memory.")
    ]


def _cpu(facts: Facts) -> list[Hint]:
    found = []
    periods, stopped = facts.one("cpu_periods"), facts.one("cpu_throttled_periods")
    throttled = bool(periods and stopped and periods >= _PERIODS and stopped >= _THROTTLED * periods)
    if throttled and periods and stopped:
        quota = "" if facts.limits.cpus is None else f" of {in_cores(facts.limits.cpus)}"
        found.append(
            Hint(
                "problem",
                f"It was stopped by its CPU quota{quota} in {100 * stopped // periods} % of the time slices in which "
                "it ran. Ask for more cores, or start fewer threads.",
            )
        )
    asked, used = facts.cores, facts.cores_used
    if asked is None or used is None or asked <= 0:
        return found
    efficiency = used / asked
    if efficiency >= 0.8:
        if not throttled:
            said = f"Its CPUs were well used: {in_cores(used)} of {in_cores(asked)} on average."
            found.append(Hint("good", said))
        return found
    if efficiency >= _IDLE or throttled or facts.running or facts.failed or asked < 1.5:
        return found
    busiest = used if facts.cores_peak is None else max(facts.cores_peak, used)
    enough = max(1, math.ceil(busiest * 1.05 - 0.1))
    idle = f"It asked for {in_cores(asked)} and used {few(used)} on average ({100 * efficiency:.0f} %)"
    if enough <= _OVER * asked and facts.cores_peak is not None:
        found.append(
            Hint("advice", f"{idle}, {few(busiest)} in its busiest time. Ask for {in_cores(float(enough))} next time.")
        )
    elif facts.cores_peak is None:
        found.append(Hint("advice", f"{idle}. See whether it can use all of them, or ask for fewer next time."))
    else:
        found.append(Hint("note", f"{idle}, but up to {few(busiest)} at times: parts of it run on few cores."))
    return found


def _waiting(facts: Facts) -> list[Hint]:
    found = []
    for name, what, advice in (
        ("io", "for disks", "Read and write in larger pieces, or copy the data to a local disk first."),
        ("memory", "for memory to be freed", "Ask for more memory."),
        ("cpu", "for a free CPU", "Others used them too, or it has more threads than cores."),
    ):
        some, full = facts.share(f"{name}_stall", 10**6), facts.share(f"{name}_stall_full", 10**6)
        throttled = facts.share("cpu_throttled", 10**9)
        if some < _WAITING or (name == "cpu" and throttled >= some / 2):
            continue
        alone = f", all of it during {100 * full:.0f} %" if full >= 0.05 else ""
        found.append(
            Hint("advice", f"Part of it waited {what} during {100 * min(some, 1.0):.0f} % of its time{alone}. {advice}")
        )
    return found


def too_short(facts: Facts) -> str:
    """Why there is no advice, where that is so; else ""."""
    if facts.wall_ns >= LEAST_NS:
        return ""
    return f"The job took {duration(facts.wall_ns)}: too short for advice on what to ask for."
