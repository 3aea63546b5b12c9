"""Changing the limits of a living job: all of them or none, and no process of it killed for it.

Only what differs between old and new is touched. Every file's value is read before it is written, and put back if a
later one is refused. Memory comes last, because there the way back may be barred: what the job took meanwhile. What the
limits mean as files is limits.py's. Kernel docs: admin-guide/cgroup-v1/memory.rst (3 "User Interface"),
admin-guide/cgroup-v2.rst ("memory.max", "memory.high", "memory.reclaim").

Memory below what is in use: v1 reclaims by itself when the limit is written, and refuses with EBUSY if that does not
do; v2 would go on to kill (OOM). So on v2 memory.max is written only once the use is below it, and while memory.high
stands at the new limit: a job that grows in between is held there, and what still slips by, some pages, the kernel
reclaims before it kills.
"""

import errno
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from acctd.cgroup.driver import JobCgroups
from acctd.cgroup.limits import PERIOD_US, Setting, found, put, settings, value_of
from acctd.errors import AcctdError, KernelRefusedError
from acctd.kernel.cgroupfs import CgroupDir
from acctd.metrics import MEMORY_FILE
from acctd.model import INT64_MAX, Limits
from collectors.memory import parse_memory_stat_v1, parse_memory_stat_v2

_V1_LIMIT, _V1_BOTH, _V2_LIMIT = "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max"
_USAGE = {
    _V1_LIMIT: "memory.usage_in_bytes",
    _V1_BOTH: "memory.memsw.usage_in_bytes",
    _V2_LIMIT: "memory.current",
}
"""What may not be above a limit when it is written."""

_UNLIMITED = {
    **dict.fromkeys((_V1_LIMIT, _V1_BOTH, "memory.soft_limit_in_bytes"), str(INT64_MAX)),
    **dict.fromkeys((_V2_LIMIT, "memory.swap.max", "pids.max"), "max"),
    "memory.low": "0",
    "cpu.cfs_period_us": str(PERIOD_US),
    "cpu.cfs_quota_us": "-1",
    "cpu.max": f"max {PERIOD_US}",
    "cpu.cfs_burst_us": "0",
    "cpu.max.burst": "0",
    "cpu.shares": "1024",
    "cpu.weight": "100",
}
"""What the kernel gives a fresh cgroup. memory.swappiness and v1's cpuset have their parent's."""

_INHERITED = ("memory.swappiness", "cpuset.cpus", "cpuset.mems")

_RECLAIMS = 64  # writes of memory.reclaim, each for all that is above the limit; one does unless the job grows


def change(cgroups: JobCgroups, old: Limits, new: Limits, *, reclaim: bool) -> None:
    """Give a living job other limits. On an error the old ones are in force, unless its sentence says otherwise.

    A memory limit below what is in use is refused, naming limit, use and how much of that is file cache; with `reclaim`
    the kernel drops cache and swaps out first, and it is refused only if that does not do. Lower limits of tasks and of
    swap (v2) take effect on what comes: nothing is ended, and what is swapped out stays so. Cores that were chosen
    (linear:N) are not changed here. Raises KernelRefusedError, UnavailableError, UsageError, NotFoundError.
    """
    if old.cpuset == new.cpuset:
        old, new = replace(old, cpuset=None), replace(new, cpuset=None)
    given, wanted = settings(cgroups.layout, old), settings(cgroups.layout, new)
    memory: list[tuple[Setting, CgroupDir]] = []
    others: list[tuple[Setting, CgroupDir]] = []
    for setting in _differing(given, wanted, cgroups):
        pair = setting, found(setting, cgroups.directory)
        (memory if setting.file in _USAGE else others).append(pair)
    undo: list[Callable[[], None]] = []
    try:
        for setting, where in sorted(others, key=_turn):
            undo.append(partial(put, setting._replace(value=_kept(where, setting.file)), where))
            put(setting, where)
        for setting, where in _memory_order(memory):
            before = setting._replace(value=value_of(where, setting.file))
            undo.append(partial(_put_memory, before, where, reclaim=True))
            _put_memory(setting, where, reclaim=reclaim)
    except BaseException as e:
        _put_back(undo, e)
        raise
    finally:
        if old.soft != new.soft:
            cgroups.carry_protection()


def _differing(given: list[Setting], wanted: list[Setting], cgroups: JobCgroups) -> list[Setting]:
    """What is to be written: the new values, and the kernel's own where there is to be no limit any more."""
    kept = {(setting.file, setting.value) for setting in given}
    written = {setting.file for setting in wanted}
    changed = [setting for setting in wanted if (setting.file, setting.value) not in kept]
    for setting in given:
        if setting.file not in written:
            changed.append(setting._replace(value=_without(setting, cgroups)))
    return changed


def _without(setting: Setting, cgroups: JobCgroups) -> str:
    """A file's value where nothing is limited."""
    if setting.file not in _INHERITED:
        return _UNLIMITED[setting.file]
    where = found(setting, cgroups.directory)
    # v2's cpuset files are a wish, and an empty one is the parent's.
    return "\n" if where.has(f"{setting.file}.effective") else value_of(where.parent, setting.file)


def _kept(where: CgroupDir, file: str) -> str:
    """A value to put back; a write of nothing at all would not reach the kernel."""
    return value_of(where, file) or "\n"


def _turn(item: tuple[Setting, CgroupDir]) -> int:
    """Burst may never be above quota: a lower one goes before it, a higher one after it."""
    setting, where = item
    if setting.limit != "cpu_burst":
        return 1
    return 0 if int(setting.value) < int(value_of(where, setting.file)) else 2


def _memory_order(changes: list[tuple[Setting, CgroupDir]]) -> list[tuple[Setting, CgroupDir]]:
    """v1: the limit may never be above that of memory and swap together, so the one that gives way goes first."""
    by_file = {setting.file: (setting, where) for setting, where in changes}
    if _V1_LIMIT not in by_file or _V1_BOTH not in by_file:
        return changes
    limit, both = by_file[_V1_LIMIT], by_file[_V1_BOTH]
    fits = int(limit[0].value) <= int(value_of(both[1], _V1_BOTH))
    return [limit, both] if fits else [both, limit]


def _put_memory(setting: Setting, where: CgroupDir, *, reclaim: bool) -> None:
    """Write a hard limit, if what is in use fits below. Raises KernelRefusedError."""
    limit = int(setting.value) if setting.value != "max" else None
    if limit is None:
        put(setting, where)
        return
    if not reclaim and _in_use(setting, where) > limit:
        raise _too_low(setting, where, "ask for reclaim, or choose a higher limit")
    if setting.file == _V2_LIMIT:
        _put_v2(setting, where, limit, reclaim=reclaim)
        return
    try:
        put(setting, where)
    except KernelRefusedError as e:
        if _errno(e) == errno.EBUSY:
            raise _too_low(setting, where, "the kernel reclaimed what it could; choose a higher limit") from e
        raise


def _put_v2(setting: Setting, where: CgroupDir, limit: int, *, reclaim: bool) -> None:
    now = value_of(where, _V2_LIMIT)
    if now != "max" and int(now) <= limit:
        put(setting, where)
        return
    if reclaim:
        _reclaim(setting, where, limit)
    high = value_of(where, "memory.high")
    hold = high == "max" or int(high) > limit
    if hold:
        # Also reclaims what is above, once; on kernels without memory.reclaim that is all there is.
        where.write("memory.high", setting.value)
    try:
        if _in_use(setting, where) > limit:
            raise _too_low(setting, where, "the kernel reclaimed what it could; choose a higher limit")
        put(setting, where)
    finally:
        if hold:
            where.write("memory.high", high)


def _reclaim(setting: Setting, where: CgroupDir, limit: int) -> None:
    """v2, from 5.19: have the kernel drop cache and swap out until the use is at the limit, or no more is to be had."""
    if not where.has("memory.reclaim"):
        return
    for _ in range(_RECLAIMS):
        above = _in_use(setting, where) - limit
        if above <= 0:
            return
        try:
            where.write("memory.reclaim", str(above))
        except KernelRefusedError as e:
            if _errno(e) != errno.EAGAIN:
                raise
            if _in_use(setting, where) - limit >= above:
                return  # it found nothing


def _in_use(setting: Setting, where: CgroupDir) -> int:
    """Bytes now; 0 once the cgroup is gone, whose write then says so."""
    return int(value_of(where, _USAGE[setting.file]) or 0)


def _too_low(setting: Setting, where: CgroupDir, hint: str) -> KernelRefusedError:
    text, path = where.read("memory.stat") or b"", f"{where.path}/memory.stat"
    parse = parse_memory_stat_v2 if setting.file == _V2_LIMIT else parse_memory_stat_v1
    cache = parse(text, path).get((MEMORY_FILE, ""), 0)
    what = "memory and swap together of " if setting.file == _V1_BOTH else ""
    return KernelRefusedError(
        f"{setting.limit}: {what}{setting.value} is below the {_in_use(setting, where)} bytes in use, "
        f"of which {cache} are file cache; {hint}"
    )


def _put_back(undo: list[Callable[[], None]], error: BaseException) -> None:
    """The old values, in reverse order. Raises KernelRefusedError, naming what is not as it was."""
    failures = []
    for step in reversed(undo):
        try:
            step()
        except AcctdError as e:
            failures.append(str(e))
    if failures:
        raise KernelRefusedError(f"{error}; not put back: {'; '.join(failures)}") from error


def _errno(error: BaseException | None) -> int | None:
    """The kernel's reason below a refusal."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error.errno if error is not None else None
