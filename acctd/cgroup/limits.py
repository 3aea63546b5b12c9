"""What a job may use, as interface files: `Limits` turned into (controller, file, value) for v1 and v2, and written.

Every value is read back, since the kernel rounds and some kernels ignore. Kernel docs: scheduler/sched-bwc.rst,
admin-guide/cgroup-v1/memory.rst, admin-guide/cgroup-v1/pids.rst, admin-guide/cgroup-v2.rst.
"""

import mmap
from collections.abc import Callable
from typing import NamedTuple

from acctd.errors import KernelRefusedError, NotPermittedError, UnavailableError
from acctd.kernel.cgroupfs import CgroupDir
from acctd.model import Limits

PERIOD_US = 100_000


class Setting(NamedTuple):
    """One value to write: the limit it stands for, the controller, the file, the value."""

    limit: str
    controller: str
    file: str
    value: str


def v1_settings(limits: Limits) -> list[Setting]:
    """In the order v1 accepts: memory before memsw, which may never be the lower one."""
    out = []
    if limits.memory is not None:
        out.append(Setting("memory", "memory", "memory.limit_in_bytes", str(limits.memory)))
        if limits.swap is not None:
            both = str(limits.memory + limits.swap)
            out.append(Setting("swap", "memory", "memory.memsw.limit_in_bytes", both))
    if limits.memory_soft is not None:
        out.append(Setting("memory_soft", "memory", "memory.soft_limit_in_bytes", str(limits.memory_soft)))
    if limits.cpus is not None:
        out.append(Setting("cpus", "cpu", "cpu.cfs_period_us", str(PERIOD_US)))
        out.append(Setting("cpus", "cpu", "cpu.cfs_quota_us", str(quota_us(limits.cpus))))
    if limits.cpu_shares is not None:
        out.append(Setting("cpu_shares", "cpu", "cpu.shares", str(limits.cpu_shares)))
    if limits.cpuset is not None:
        out.append(Setting("cpuset", "cpuset", "cpuset.cpus", limits.cpuset))
    if limits.pids is not None:
        out.append(Setting("pids", "pids", "pids.max", str(limits.pids)))
    return out


def v2_settings(limits: Limits) -> list[Setting]:
    """The same on v2. memory_soft is memory.low: what the job keeps when the host runs short."""
    out = []
    if limits.memory is not None:
        out.append(Setting("memory", "memory", "memory.max", str(limits.memory)))
    if limits.swap is not None:
        out.append(Setting("swap", "memory", "memory.swap.max", str(limits.swap)))
    if limits.memory_soft is not None:
        out.append(Setting("memory_soft", "memory", "memory.low", str(limits.memory_soft)))
    if limits.cpus is not None:
        out.append(Setting("cpus", "cpu", "cpu.max", f"{quota_us(limits.cpus)} {PERIOD_US}"))
    if limits.cpu_shares is not None:
        out.append(Setting("cpu_shares", "cpu", "cpu.weight", str(weight(limits.cpu_shares))))
    if limits.cpuset is not None:
        out.append(Setting("cpuset", "cpuset", "cpuset.cpus", limits.cpuset))
    if limits.pids is not None:
        out.append(Setting("pids", "pids", "pids.max", str(limits.pids)))
    return out


def quota_us(cpus: float) -> int:
    """CPU quota of one period in us; the kernel takes no less than 1 ms."""
    return max(1000, round(cpus * PERIOD_US))


def weight(shares: int) -> int:
    """cpu.shares 2..262144 as cpu.weight 1..10000, on the line that systemd and the container runtimes use."""
    return 1 + ((shares - 2) * 9999) // 262142


def apply(settings: list[Setting], directory: Callable[[str], CgroupDir | None]) -> None:
    """Write and read back. `directory` gives the job's directory for a controller, or None where there is none.

    Raises UnavailableError for a limit this host cannot set, KernelRefusedError for one the kernel refuses or alters
    by more than the rounding to whole pages.
    """
    for setting in settings:
        where = directory(setting.controller)
        if where is None:
            raise UnavailableError(
                f"{setting.limit} cannot be limited: this host has no {setting.controller} controller; leave it out"
            )
        if not where.has(setting.file):
            raise UnavailableError(
                f"{setting.limit} cannot be limited: this kernel has no {setting.file}; leave it out"
            )
        try:
            where.write(setting.file, setting.value)
        except (KernelRefusedError, NotPermittedError) as e:
            # EACCES too: v1's answer to CPUs outside the parent's, whoever asks.
            raise KernelRefusedError(
                f"{setting.limit}: {e}; it may be below what is in use or outside the parent's"
            ) from e
        got = (where.read(setting.file) or b"").decode().strip()
        if setting.file == "cpuset.cpus" and where.has("cpuset.cpus.effective"):
            # v2 keeps CPUs outside the parent's as a wish and runs the job elsewhere.
            in_force = (where.read("cpuset.cpus.effective") or b"").decode().strip()
            if not _same(setting.controller, setting.value, in_force):
                raise KernelRefusedError(
                    f"{setting.limit}: of CPUs {setting.value!r} only {in_force!r} would be used; "
                    "the others are outside the parent's or offline"
                )
        if not _same(setting.controller, setting.value, got):
            raise KernelRefusedError(
                f"{setting.limit}: wrote {setting.value!r} to {setting.file}, read back {got!r}; choose another value"
            )


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
