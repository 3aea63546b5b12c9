"""A job's cgroups from making to removing: made in every hierarchy, limited, joined, killed, taken away.

Works on any layout. Knows nothing of networks, ledgers or what the counters mean. Kernel docs:
admin-guide/cgroup-v1/freezer-subsystem.rst, admin-guide/cgroup-v1/cpusets.rst, admin-guide/cgroup-v2.rst.
"""

import errno
import os
import signal
import time
from dataclasses import dataclass

from acctd.cgroup import limits as limit_files
from acctd.cgroup.layout import V2_NAME, Hierarchy, Layout
from acctd.errors import InUseError, KernelRefusedError, UnavailableError
from acctd.kernel.cgroupfs import CgroupDir, checked_parts
from acctd.model import Limits

_V1_THROTTLE = "blkio.throttle.write_bps_device"
_SENTINEL = "sentinel"
_SENTINEL_BPS = 18446744073709551614
"""One below the kernel's "no rule": a limit no disk reaches, whose presence alone makes the counters count."""


@dataclass(frozen=True, slots=True)
class JobCgroups:
    """The directories of one job, one a hierarchy."""

    layout: Layout
    base: str
    name: str

    def directory(self, controller: str) -> CgroupDir | None:
        """Where a controller counts this job, or None where the host lacks it."""
        hierarchy = self.layout.of(controller)
        return hierarchy.job(self.base, self.name) if hierarchy else None

    @property
    def unified(self) -> CgroupDir | None:
        return self.layout.unified.job(self.base, self.name) if self.layout.unified else None

    def all(self) -> list[tuple[Hierarchy, CgroupDir]]:
        return [(h, h.job(self.base, self.name)) for h in self.layout.hierarchies]

    def procs_files(self) -> list[str]:
        """What the launched helper writes its own pid to, one file a hierarchy."""
        return [f"{directory.path}/cgroup.procs" for _, directory in self.all()]

    def create(self, limits: Limits) -> None:
        """Make, mark and limit all directories; on failure nothing of this job is left. InUseError if one exists."""
        for _, directory in self.all():
            if directory.exists():
                raise _taken(directory)
        begun: list[Hierarchy] = []
        try:
            for hierarchy in self.layout.hierarchies:
                begun.append(hierarchy)
                self._make(hierarchy)
            self._limit(limits)
        except InUseError:
            # Somebody was quicker in the last one: that is theirs, and only what we made before it goes.
            JobCgroups(Layout(tuple(begun[:-1])), self.base, self.name).remove()
            raise
        except BaseException:
            self.remove()
            raise

    def procs(self) -> set[int]:
        """Every pid in the job, nested cgroups included, from all hierarchies: none can hide by leaving one of them."""
        pids: set[int] = set()
        for _, directory in self.all():
            for cgroup in directory.subtree():
                pids.update(cgroup.procs())
        return pids

    def kill(self, timeout: float = 10.0) -> set[int]:
        """End every process of the job; returns the pids still there after `timeout` seconds (state D, as a rule).

        v2: cgroup.kill, which no fork can outrun. v1: freeze, SIGKILL all, thaw; repeated, because a task waiting in
        OOM keeps the freezer from completing and a fork may have slipped through.
        """
        deadline = time.monotonic() + timeout
        pause = 0.0005
        while pids := self._living():
            freezer = self.layout.of("freezer")
            if freezer is not None and freezer.version == 1 and (frozen := freezer.job(self.base, self.name)).exists():
                self._freeze_kill_thaw(frozen)
            elif (unified := self.unified) is not None and unified.has("cgroup.kill"):
                unified.write("cgroup.kill", "1")
            else:
                _kill_all(pids)
            if time.monotonic() > deadline:
                return self._living()
            time.sleep(pause)
            pause = min(pause * 2, 0.05)
        return set()

    def remove(self, timeout: float = 2.0) -> bool:
        """Remove all directories, deepest first, retrying while the kernel still lets go of exiting tasks.

        True once nothing is left. The base and its parents go too where acctd made them and no other job is inside.
        """
        deadline = time.monotonic() + timeout
        for hierarchy, directory in self.all():
            while not all([cgroup.remove() for cgroup in directory.subtree()]):
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.001)
            _tidy(hierarchy, self.base)
        return True

    def _living(self) -> set[int]:
        """The job's pids less zombies: a zombie has freed its memory and waits only for its parent."""
        return {pid for pid in self.procs() if not _is_dead(pid)}

    def _make(self, hierarchy: Hierarchy) -> None:
        parts = checked_parts(self.base)
        # A finishing neighbour may take an empty base away between our two mkdirs: then begin again.
        ours = False
        for _ in range(100):
            directory = hierarchy.top
            try:
                for part in parts:
                    _delegate(hierarchy, directory)
                    directory = directory.child(part)
                    # Settled even if it was there: its maker, a neighbour or an admin, may not have come to that yet.
                    _settle(hierarchy, directory, fresh=directory.make())
                _delegate(hierarchy, directory)
                directory = directory.child(self.name)
                ours = directory.make() or ours
                if not ours:
                    raise _taken(directory)
                _settle(hierarchy, directory, fresh=True)
            except FileNotFoundError:
                continue
            except KernelRefusedError as e:
                if isinstance(e.__cause__, OSError) and e.__cause__.errno in (errno.ENOENT, errno.ENODEV):
                    continue
                raise
            return
        raise KernelRefusedError(
            f"cgroup {hierarchy.job(self.base, self.name).path} vanishes while being made; try again"
        )

    def _limit(self, limits: Limits) -> None:
        memory = self.layout.of("memory")
        version = memory.version if memory else min(h.version for h in self.layout.hierarchies)
        settings = limit_files.v1_settings(limits) if version == 1 else limit_files.v2_settings(limits)
        limit_files.apply(settings, self.directory)

    def _freeze_kill_thaw(self, directory: CgroupDir) -> None:
        directory.write("freezer.state", "FROZEN")
        try:
            # Of all hierarchies: a process may have left this one.
            _kill_all(self.procs())
        finally:
            # Each of them: one that the job has frozen by itself stays so when only its parent thaws.
            for cgroup in reversed(list(directory.subtree())):
                try:
                    cgroup.write("freezer.state", "THAWED")
                except KernelRefusedError:
                    if cgroup.exists():
                        raise


def sweep_sentinels(layout: Layout, base: str) -> None:
    """Remove the sentinel cgroups of agents that died between making and removing theirs."""
    hierarchy = layout.of("blkio")
    if hierarchy is None or hierarchy.version != 1:
        return
    for cgroup in hierarchy.job(base, "x").parent.children():
        prefix, _, pid = cgroup.parts[-1].partition("-")
        if prefix == _SENTINEL and pid.isdecimal() and not os.path.exists(f"/proc/{pid}"):
            JobCgroups(Layout((hierarchy,)), base, cgroup.parts[-1]).remove()


def arm_block_counters(layout: Layout, base: str, devices: list[str]) -> list[str]:
    """Make v1's throttle counters count, which newer kernels do only once a rule was written for the disk, ever.

    `devices` are "major:minor" of whole disks; returns those armed. A sentinel cgroup below the base takes the rule and
    goes again: the counters stay armed until the next boot. On v2, or without blkio, there is nothing to do.
    """
    hierarchy = layout.of("blkio")
    if hierarchy is None or hierarchy.version != 1:
        return []
    sentinel = JobCgroups(Layout((hierarchy,)), base, f"{_SENTINEL}-{os.getpid()}")
    armed = []
    try:
        sentinel._make(hierarchy)
        directory = hierarchy.job(base, sentinel.name)
        if directory.has(_V1_THROTTLE):
            for device in devices:
                try:
                    directory.write(_V1_THROTTLE, f"{device} {_SENTINEL_BPS}")
                except KernelRefusedError as e:
                    if isinstance(e.__cause__, OSError) and e.__cause__.errno == errno.ENODEV:
                        continue  # no disk any more, or one without a queue
                    raise
                armed.append(device)
    finally:
        sentinel.remove()
    return armed


def _delegate(hierarchy: Hierarchy, directory: CgroupDir) -> None:
    """v2: let the children of a directory have our controllers. Written once, read on every later call."""
    if hierarchy.version == 1:
        return
    have = (directory.read("cgroup.subtree_control") or b"").decode().split()
    wanted = [V2_NAME[c] for c in hierarchy.controllers if c in V2_NAME]
    missing = [c for c in wanted if c not in have]
    if not missing:
        return
    try:
        directory.write("cgroup.subtree_control", " ".join(f"+{c}" for c in missing))
    except KernelRefusedError as e:
        if isinstance(e.__cause__, OSError) and e.__cause__.errno == errno.EBUSY:
            raise UnavailableError(
                f"cgroup {directory.path} holds processes, so the kernel gives its children no controllers; "
                "set cgroup.base to a place below a directory without processes"
            ) from e
        raise


def _taken(directory: CgroupDir) -> InUseError:
    return InUseError(f"cgroup {directory.path} exists already; finish that job or choose another id")


def _settle(hierarchy: Hierarchy, directory: CgroupDir, *, fresh: bool) -> None:
    """v1: a fresh cpuset has no cpus and no mems and takes no task: give it its parent's. Memory sums over children."""
    if hierarchy.version == 2:
        return
    if "cpuset" in hierarchy.controllers:
        for file in ("cpuset.cpus", "cpuset.mems"):
            if not (directory.read(file) or b"").strip():
                directory.write(file, (directory.parent.read(file) or b"").decode().strip())
    if fresh and "memory" in hierarchy.controllers and (directory.read("memory.use_hierarchy") or b"1").strip() == b"0":
        directory.write("memory.use_hierarchy", "1")


def _tidy(hierarchy: Hierarchy, base: str) -> None:
    """Take away an empty base that acctd made. rmdir refuses a busy one, so no check can be too late."""
    directory = hierarchy.job(base, "x").parent
    while directory.parts and directory.marked() and directory.remove():
        directory = directory.parent


def _kill_all(pids: set[int] | list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it ended by itself


def _is_dead(pid: int) -> bool:
    """Gone, or a zombie without living threads: a leader that exited before its threads looks like a zombie too."""
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/stat", "rb") as stat:
                # The command may hold spaces and parentheses: the state follows the last one.
                if stat.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X"):
                    return False
    except (FileNotFoundError, ProcessLookupError):
        return not os.path.exists(f"/proc/{pid}")
    return True
