"""What a job may use, as interface files: `Limits` turned into (controller, file, value) for v1 and v2, and written.

Every value is read back, since the kernel rounds and some kernels ignore. What each limit means on v1 and on v2, and
what cannot be had, is tabled in docs/limits.md. Changing a living job's is change.py's. Kernel docs:
scheduler/sched-bwc.rst, admin-guide/cgroup-v1/memory.rst, admin-guide/cgroup-v1/pids.rst, admin-guide/cgroup-v2.rst.
"""

import mmap
from collections.abc import Callable
from typing import NamedTuple

from acctd.cgroup.layout import Layout
from acctd.errors import KernelRefusedError, NotFoundError, NotPermittedError, UnavailableError, UsageError
from acctd.kernel.cgroupfs import CgroupDir
from acctd.model import INT64_MAX, Limits

PERIOD_US = 100_000

_SINCE = {"cpu.cfs_burst_us": "5.14", "cpu.max.burst": "5.14"}
"""The Linux that has a file which not every kernel in use has."""


class Setting(NamedTuple):
    """One value to write: the limit it stands for, the controller, the file, the value."""

    limit: str
    controller: str
    file: str
    value: str


Place = Callable[[str], CgroupDir | None]
"""The job's directory for a controller, or None where this host has no such controller."""


def settings(layout: Layout, limits: Limits, cpus: str = "", mems: str = "") -> list[Setting]:
    """What stands for the limits here, controller by controller: a host may have some on v1 and the others on v2.

    `cpus` and `mems` are the CPU and node lists that were chosen for linear:N; they win over limits.cpuset. Raises
    UsageError and UnavailableError for what cannot be had.
    """
    v1 = {controller for h in layout.hierarchies if h.version == 1 for controller in h.controllers}
    on_v1 = [s for s in v1_settings(limits, cpus, mems, memory="memory" in v1) if s.controller in v1]
    return on_v1 + [s for s in v2_settings(limits, cpus, mems) if s.controller not in v1]


def v1_settings(limits: Limits, cpus: str = "", mems: str = "", *, memory: bool = True) -> list[Setting]:
    """In the order v1 accepts: memory before memsw, which may never be the lower one. `memory`: v1 has it here."""
    out = _v1_memory(limits) if memory else []
    if limits.cpus is not None:
        out.append(Setting("cpus", "cpu", "cpu.cfs_period_us", str(PERIOD_US)))
        out.append(Setting("cpus", "cpu", "cpu.cfs_quota_us", str(quota_us(limits.cpus))))
        if limits.cpu_burst is not None:
            out.append(Setting("cpu_burst", "cpu", "cpu.cfs_burst_us", str(burst_us(limits.cpus, limits.cpu_burst))))
    if limits.cpu_shares is not None:
        out.append(Setting("cpu_shares", "cpu", "cpu.shares", str(limits.cpu_shares)))
    return out + _everywhere(limits, cpus, mems)


def _v1_memory(limits: Limits) -> list[Setting]:
    out = []
    if limits.soft is not None:
        out.append(Setting("memory_soft", "memory", "memory.soft_limit_in_bytes", str(limits.soft)))
    if limits.hard is not None:
        out.append(Setting("memory", "memory", "memory.limit_in_bytes", str(limits.hard)))
    if limits.swap is None or limits.memory_policy == "none":
        return out
    if limits.hard is not None:
        both = str(min(limits.hard + limits.swap, INT64_MAX))
        out.append(Setting("swap", "memory", "memory.memsw.limit_in_bytes", both))
    elif limits.swap:
        raise UnavailableError(
            f"swap {limits.swap} cannot be limited under memory_policy {limits.memory_policy}: cgroup v1 only limits "
            "memory and swap together, which needs a hard limit; leave swap out, or choose 0, or memory_policy custom"
        )
    if not limits.swap:
        # Memory and swap together say nothing against being swapped out for want of memory elsewhere.
        out.append(Setting("swap", "memory", "memory.swappiness", "0"))
    return out


def v2_settings(limits: Limits, cpus: str = "", mems: str = "") -> list[Setting]:
    """The same on v2. The soft limit is memory.low: what the job keeps when the host or its parent runs short.

    Not memory.high, which would slow the job down although there is memory enough. See carry_protection().
    """
    out = []
    if limits.soft is not None:
        out.append(Setting("memory_soft", "memory", "memory.low", str(limits.soft)))
    if limits.swap is not None and limits.memory_policy != "none":
        out.append(Setting("swap", "memory", "memory.swap.max", str(limits.swap)))
    if limits.hard is not None:
        out.append(Setting("memory", "memory", "memory.max", str(limits.hard)))
    if limits.cpus is not None:
        out.append(Setting("cpus", "cpu", "cpu.max", f"{quota_us(limits.cpus)} {PERIOD_US}"))
        if limits.cpu_burst is not None:
            out.append(Setting("cpu_burst", "cpu", "cpu.max.burst", str(burst_us(limits.cpus, limits.cpu_burst))))
    if limits.cpu_shares is not None:
        out.append(Setting("cpu_shares", "cpu", "cpu.weight", str(weight(limits.cpu_shares))))
    return out + _everywhere(limits, cpus, mems)


def _everywhere(limits: Limits, cpus: str, mems: str) -> list[Setting]:
    """The files that v1 and v2 call the same."""
    out = []
    if not cpus and limits.linear is not None:
        raise UnavailableError(f"cpuset {limits.cpuset!r}: no cores were chosen for this job; give a CPU list instead")
    if cpus or limits.cpuset is not None:
        out.append(Setting("cpuset", "cpuset", "cpuset.cpus", cpus or limits.cpuset or ""))
    if mems:
        out.append(Setting("cpuset", "cpuset", "cpuset.mems", mems))
    if limits.pids is not None:
        out.append(Setting("pids", "pids", "pids.max", str(limits.pids)))
    return out


def quota_us(cpus: float) -> int:
    """CPU quota of one period in us; the kernel takes no less than 1 ms."""
    return max(1000, round(cpus * PERIOD_US))


def burst_us(cpus: float, burst: float) -> int:
    """CPU time that unused quota may save up, in us. The kernel lets no more be saved up than the quota of a period."""
    if burst * 1e6 > quota_us(cpus):
        raise UsageError(
            f"cpu_burst {burst} is above what {cpus} cpus save up at most, {quota_us(cpus) / 1e6} seconds "
            "(the quota of one period of 0.1 seconds); lower it"
        )
    return round(burst * 1e6)


def weight(shares: int) -> int:
    """cpu.shares 2..262144 as cpu.weight 1..10000, on the line that systemd and the container runtimes use."""
    return 1 + ((shares - 2) * 9999) // 262142


def apply(settings: list[Setting], place: Place) -> None:
    """Write each and read it back.

    Raises UnavailableError for a limit this host cannot set, KernelRefusedError for one the kernel refuses or alters
    by more than the rounding to whole pages.
    """
    for setting in settings:
        put(setting, found(setting, place))


def found(setting: Setting, place: Place) -> CgroupDir:
    """Where it is written. UnavailableError where this host lacks the controller, or the kernel the file.

    NotFoundError where the whole cgroup is gone.
    """
    where = place(setting.controller)
    if where is None:
        raise UnavailableError(
            f"{setting.limit} cannot be limited: this host has no {setting.controller} controller; leave it out"
        )
    if not where.has(setting.file):
        if not where.exists():
            raise NotFoundError(f"cgroup {where.path} is gone, and the job with it")
        since = f" (Linux {_SINCE[setting.file]} has it)" if setting.file in _SINCE else ""
        raise UnavailableError(
            f"{setting.limit} cannot be limited: this kernel has no {setting.file}{since}; leave it out"
        )
    return where


def put(setting: Setting, where: CgroupDir) -> None:
    """Write one setting and read it back. Raises KernelRefusedError."""
    try:
        where.write(setting.file, setting.value)
    except (KernelRefusedError, NotPermittedError) as e:
        # EACCES too: v1's answer to CPUs outside the parent's, whoever asks.
        raise KernelRefusedError(f"{setting.limit}: {e}; it may be below what is in use or outside the parent's") from e
    value = setting.value.strip()
    if value and setting.file in ("cpuset.cpus", "cpuset.mems") and where.has(f"{setting.file}.effective"):
        # v2 keeps CPUs outside the parent's as a wish and runs the job elsewhere.
        in_force = value_of(where, f"{setting.file}.effective")
        if not _same(setting.controller, value, in_force):
            what = "CPUs" if setting.file == "cpuset.cpus" else "memory nodes"
            raise KernelRefusedError(
                f"{setting.limit}: of {what} {value!r} only {in_force!r} would be used; "
                "the others are outside the parent's or offline"
            )
    got = value_of(where, setting.file)
    if not _same(setting.controller, value, got):
        raise KernelRefusedError(
            f"{setting.limit}: wrote {value!r} to {setting.file}, read back {got!r}; choose another value"
        )


def value_of(where: CgroupDir, file: str) -> str:
    """What a file says now; "" where it is empty, or gone with its cgroup."""
    return (where.read(file) or b"").decode().strip()


def carry_protection(job: CgroupDir, own: str) -> None:
    """v2: have a job's memory.low take effect; v1 has nothing of it. `own`: the child that a job's processes are in.

    memory.low counts for no more than that of the cgroup above, which is 0 by itself, and without the mount option
    memory_recursiveprot it ends at a cgroup's children. So it is passed on to `own`, of this job and of the one it is
    in (which has memory files once there are families), and up to each directory that acctd made: the sum of those
    inside, and not more, because under memory_recursiveprot the rest would go to whoever is over.
    """
    _protect_own(job, own)
    carry_up(job.parent if job.parts else job, own)


def carry_up(above: CgroupDir, own: str) -> None:
    """The part of it that is above a job: also when that is gone, and protects nothing any more."""
    while above.parts and above.has("memory.low") and above.marked():
        if above.description():
            _protect_own(above, own)  # a job, whose own limit says what it passes on to families
            return
        while value_of(above, "memory.low") != (together := _protected(above)):
            # Compared again after writing: a neighbour may have summed up before our job was there and written after.
            above.write("memory.low", together)
        above = above.parent


def _protect_own(job: CgroupDir, own: str) -> None:
    inside, low = job.child(own), value_of(job, "memory.low")
    if inside.has("memory.low") and value_of(inside, "memory.low") != low:
        inside.write("memory.low", low)


def _protected(above: CgroupDir) -> str:
    """The sum of what the directories inside protect, in the kernel's own form."""
    lows = [value_of(child, "memory.low") for child in above.children()]
    if "max" in lows or (total := sum(int(low or 0) for low in lows)) > INT64_MAX - mmap.PAGESIZE:
        return "max"
    return str(total)


def _same(controller: str, wrote: str, read: str) -> bool:
    if wrote == read:
        return True
    if controller == "memory" and wrote.isdigit() and read.isdigit():
        # Memory limits are kept in whole pages, rounded down; a value above the machine's maximum becomes that maximum.
        return 0 <= int(wrote) - int(read) < mmap.PAGESIZE or int(read) >= 2**63 - mmap.PAGESIZE
    # cpuset lists come back in canonical form: "0,1" as "0-1".
    return controller == "cpuset" and _cpu_list(wrote) is not None and _cpu_list(wrote) == _cpu_list(read)


def _cpu_list(text: str) -> set[int] | None:
    cpus: set[int] = set()
    for part in text.split(","):
        low, _, high = part.partition("-")
        if not low.isdigit() or (high and not high.isdigit()):
            return None
        cpus.update(range(int(low), int(high or low) + 1))
    return cpus
