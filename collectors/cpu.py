"""CPU time and throttling of one job, from the cpu and cpuacct controllers or the unified hierarchy.

Reads only: limits are written by the cgroup driver. Kernel docs: admin-guide/cgroup-v1/cpuacct.rst,
scheduler/sched-bwc.rst, admin-guide/cgroup-v2.rst ("CPU Interface Files").

On v2 cpu.stat's user_usec and system_usec add up to usage_usec, never go back, and miss nothing.

On v1 only cpuacct.usage is exact. Since 5.17 cpuacct.usage_user and usage_sys count timer ticks (on 6.18 a 1.6 ms job
reads 0 in both), and RHEL 7 has nothing but cpuacct.stat, in ticks too. So the total comes from cpuacct.usage, and the
ticks only divide it, as the kernel itself does on v2 (cputime_adjust() in kernel/sched/cputime.c): user and system
always add up to cpuacct.usage to the nanosecond, and neither goes back when the proportion shifts. That needs the
division last given out, see `CpuReader`.
"""

import os

from acctd.kernel.cgroupfs import CgroupDir
from acctd.metrics import CPU_PERIODS, CPU_SYSTEM, CPU_THROTTLED, CPU_THROTTLED_PERIODS, CPU_USER, Metric, Readings
from collectors.parse import Parser, StatLines, named, single
from collectors.reader import CombiningReader, present

METRICS = (CPU_USER, CPU_SYSTEM, CPU_PERIODS, CPU_THROTTLED_PERIODS, CPU_THROTTLED)

TICK_NS = 10**9 // os.sysconf("SC_CLK_TCK")
"""ns in one tick of USER_HZ, the unit of cpuacct.stat."""

# cpuacct.usage on its way to the division; CpuReader never lets it out.
_USAGE = Metric("cpu_usage", "ns", "counter", "CPU time, user and system together")

_USAGE_KEY, _USER_KEY, _SYSTEM_KEY = (_USAGE, ""), (CPU_USER, ""), (CPU_SYSTEM, "")

# cpu.stat, v2 (6.1); v1 has nr_periods, nr_throttled and throttled_time (ns); hybrid has the first three alone:
#   usage_usec 1530890
#   user_usec 263054
#   system_usec 1267835
#   nr_periods 0
#   nr_throttled 0
#   throttled_usec 0
_CPU_STAT = {
    b"user_usec": (_USER_KEY, 1000),
    b"system_usec": (_SYSTEM_KEY, 1000),
    b"nr_periods": ((CPU_PERIODS, ""), 1),
    b"nr_throttled": ((CPU_THROTTLED_PERIODS, ""), 1),
    b"throttled_usec": ((CPU_THROTTLED, ""), 1000),
    b"throttled_time": ((CPU_THROTTLED, ""), 1),
}


def _stat_parser() -> Parser:
    lines = StatLines(tuple(_CPU_STAT))

    def parse(text: bytes, path: str) -> Readings:
        readings: Readings = {}
        for name, value in lines.take(text, path).items():
            key, to_ns = _CPU_STAT[name]
            readings[key] = value * to_ns
        return readings

    return parse


# Two, because a hybrid host has two files of this name with different lines.
parse_cpu_stat, _parse_divided = _stat_parser(), _stat_parser()
"""Both hierarchies' cpu.stat; times in ns."""

_cpuacct_stat = named({b"user": CPU_USER, b"system": CPU_SYSTEM})


# cpuacct.stat, v1, in ticks of USER_HZ (10 ms):
#   user 28
#   system 3
def parse_cpuacct_stat(text: bytes, path: str) -> Readings:
    """v1's cpuacct.stat; times in ns, in steps of a tick."""
    return {key: count * TICK_NS for key, count in _cpuacct_stat(text, path).items()}


def divide(usage: int, sampled: tuple[int, int], last: tuple[int, int]) -> tuple[int, int]:
    """Exact `usage` (ns) as (user, system), in the proportion of the sampled pair but never below the `last` pair.

    Where nothing was sampled yet all is user time, as in the kernel. A usage below the last pair's sum is a counter
    that began anew; `last` then binds no more.
    """
    user, system = sampled
    last_user, last_system = last if usage >= last[0] + last[1] else (0, 0)
    share = usage * system // (user + system) if user + system else 0
    if share < last_system:
        share = last_system
    elif share > usage - last_user:
        share = usage - last_user
    return usage - share, share


class CpuReader(CombiningReader):
    """Reads one job's CPU counters. `cpu` and `cpuacct` are its cgroups in those hierarchies; on v2 they are the same.

    On a hybrid host `cpuacct` may be the job's directory in the unified hierarchy: what v1 leaves to us, the kernel has
    divided there already.

    `last`: the job's newest readings from before the agent was restarted. On v1 a new reader must go on from the user
    and system time given out last: a division from scratch could fall short of one of them by some ms, which looks like
    a counter that began anew and would be billed twice. Ignored where the kernel divides.
    """

    def __init__(self, *, cpu: CgroupDir, cpuacct: CgroupDir, last: Readings | None = None) -> None:
        v1 = cpuacct.has("cpuacct.usage")
        sources = present(cpu, [("cpu.stat", parse_cpu_stat)])
        if v1:
            sources += present(cpuacct, _v1_files(cpuacct))
        elif cpuacct != cpu:
            sources += present(cpuacct, [("cpu.stat", _parse_divided)])
        super().__init__(sources)
        self._divided = (last.get(_USER_KEY, 0), last.get(_SYSTEM_KEY, 0)) if last and v1 else (0, 0)

    def _merge(self) -> Readings:
        readings = super()._merge()
        usage = readings.pop(_USAGE_KEY, None)
        if usage is not None:
            sampled = readings.get(_USER_KEY, 0), readings.get(_SYSTEM_KEY, 0)
            self._divided = divide(usage, sampled, self._divided)
            readings[_USER_KEY], readings[_SYSTEM_KEY] = self._divided
        return readings


# cpuacct.usage, cpuacct.usage_user, cpuacct.usage_sys, v1, ns:
#   317158342
def _v1_files(cpuacct: CgroupDir) -> list[tuple[str, Parser]]:
    usage = ("cpuacct.usage", single(_USAGE))
    if cpuacct.has("cpuacct.usage_user") and cpuacct.has("cpuacct.usage_sys"):
        return [usage, ("cpuacct.usage_user", single(CPU_USER)), ("cpuacct.usage_sys", single(CPU_SYSTEM))]
    return [usage, ("cpuacct.stat", parse_cpuacct_stat)]
