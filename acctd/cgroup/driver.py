"""A job's cgroups from making to removing: made in every hierarchy, limited, joined, killed, taken away.

Works on any layout. Knows nothing of networks, ledgers or what the counters mean. Kernel docs:
admin-guide/cgroup-v1/freezer-subsystem.rst, admin-guide/cgroup-v1/cpusets.rst, admin-guide/cgroup-v2.rst.
"""

import errno
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from acctd.cgroup import limits as limit_files
from acctd.cgroup.layout import V2_NAME, Hierarchy, Layout
from acctd.errors import InUseError, KernelRefusedError, NotFoundError, UnavailableError
from acctd.kernel import procs
from acctd.kernel.cgroupfs import CgroupDir, checked_parts
from acctd.model import Limits

_V1_THROTTLE = "blkio.throttle.write_bps_device"
_V1_RULES = ("blkio.throttle.read_bps_device", _V1_THROTTLE)
_UNREACHED_BPS = 1 << 44
"""17.6 TB/s, for rules that I/O passes under: before 6.7 the kernel multiplies a limit by time and may overflow."""

_V2_FILE = {
    "memory": "memory.max",
    "cpu": "cpu.weight",
    "cpuset": "cpuset.cpus",
    "blkio": "io.stat",
    "pids": "pids.max",
}
"""A file that a v2 cgroup has once the controller works there."""

_OWN = "own"
"""On v2 a cgroup with controllers for its children may hold no processes: a job's live in this child of its directory,
so that families find room beside it. man 7 cgroups, "no internal processes" rule."""

_ROUNDS = 50  # of following processes that fork while they are moved

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

    @contextmanager
    def joining(self) -> Iterator[dict[int, str]]:
        """Descriptors and paths, one a hierarchy, by which the launched helper puts itself into the job."""
        with ExitStack() as opened:
            doors = {}
            for door in self._doors():
                fd = door.open_procs()
                opened.callback(os.close, fd)
                doors[fd] = str(door.path)
            yield doors

    def _doors(self) -> list[CgroupDir]:
        """Where its processes are put."""
        return [_door(hierarchy, directory) for hierarchy, directory in self.all()]

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
            self._count_block_io()
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

    def members(self) -> set[int]:
        """Every pid in the job as one hierarchy tells it: for showing, at a seventh of what procs() costs."""
        hierarchy = self.layout.of("pids") or self.layout.hierarchies[0]
        return {pid for cgroup in hierarchy.job(self.base, self.name).subtree() for pid in cgroup.procs()}

    def kill(self, timeout: float = 10.0) -> set[int]:
        """End every process of the job; returns the pids still there after `timeout` seconds (state D, as a rule).

        v2: cgroup.kill, which no fork can outrun. v1: freeze, SIGKILL all, thaw; repeated, because a task waiting in
        OOM keeps the freezer from completing and a fork may have slipped through.
        """
        deadline = time.monotonic() + timeout
        pause = 0.0005
        again = False
        while pids := self.living():
            freezer = self.layout.of("freezer")
            if freezer is not None and freezer.version == 1 and (frozen := freezer.job(self.base, self.name)).exists():
                self._freeze_kill_thaw(frozen)
            elif (unified := self.unified) is not None and unified.has("cgroup.kill"):
                _write_if_there(unified, "cgroup.kill", "1")
                if again:
                    # It passes over a process whose leader has exited before its other threads; kill(2) does not.
                    _kill_all(pids)
            else:
                _kill_all(pids)
            again = True
            if time.monotonic() > deadline:
                return self.living()
            time.sleep(pause)
            pause = min(pause * 2, 0.05)
        return set()

    def attach(self, pid: int) -> None:
        """Move a process into the job. Raises NotFoundError if it is gone, KernelRefusedError if the kernel says no."""
        for door in self._doors():
            try:
                door.write("cgroup.procs", str(pid))
            except KernelRefusedError as e:
                if isinstance(e.__cause__, OSError) and e.__cause__.errno == errno.ESRCH:
                    raise NotFoundError(f"pid {pid} does not exist any more; attach a living process") from e
                raise

    def fold_into(self, parent: "JobCgroups") -> None:
        """Move every process to another job's cgroups. A process that forks meanwhile is followed, for some rounds."""
        for _ in range(_ROUNDS):
            pids = self.living()
            if not pids:
                return
            for pid in pids:
                try:
                    parent.attach(pid)
                except NotFoundError:
                    continue  # it ended by itself
        raise KernelRefusedError(f"the processes of {self.name} fork faster than they can be moved; suspend it first")

    def describe(self, text: bytes) -> None:
        """Write down in every directory what it is for; orphans() finds it."""
        for _, directory in self.all():
            directory.describe(text)

    def signal(self, number: int) -> set[int]:
        """Send a signal to every process of the job; the pids it was sent to."""
        return {pid for pid in self.procs() if procs.send(pid, number, self._holds)}

    def _holds(self, pid: int) -> bool:
        """Whether a process is in one of its cgroups now; a pid that was read a moment ago may be another's."""
        inside = f"/{self.base}/{self.name}/"
        return any(inside in f"{path}/" for path in procs.cgroups(pid))

    def freeze(self) -> None:
        """Stop every process of the job, without a signal that it could see. UnavailableError without a freezer."""
        self._set_frozen(True)

    def thaw(self) -> None:
        """Let a frozen job go on."""
        self._set_frozen(False)

    def _set_frozen(self, frozen: bool) -> None:
        freezer = self.layout.of("freezer")
        if freezer is None:
            raise UnavailableError("this host has no freezer; put it back into cgroup.controllers")
        directory = freezer.job(self.base, self.name)
        if freezer.version == 1:
            directory.write("freezer.state", "FROZEN" if frozen else "THAWED")
        else:
            directory.write("cgroup.freeze", "1" if frozen else "0")

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

    def living(self) -> set[int]:
        """The job's pids less zombies: a zombie has freed its memory and waits only for its parent."""
        return {pid for pid in self.procs() if not procs.is_dead(pid)}

    def _make(self, hierarchy: Hierarchy) -> None:
        parts = checked_parts(self.base)
        # A finishing neighbour may take an empty base away between our two mkdirs: then begin again.
        ours = False
        for _ in range(100):
            directory = hierarchy.top
            try:
                for part in parts:
                    directory = directory.child(part)
                    # Settled even if it was there: its maker, a neighbour or an admin, may not have come to that yet.
                    _settle(hierarchy, directory, fresh=directory.make())
                directory = directory.child(self.name)
                ours = directory.make() or ours
                if not ours:
                    raise _taken(directory)
                _settle(hierarchy, directory, fresh=True)
                # Only now: before, a neighbour could take the base away and another make it anew, without controllers.
                _delegate_down(hierarchy, directory)
                if (door := _door(hierarchy, directory)) != directory:
                    door.make()
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
        # Controller by controller: a host may have some on v1 and the others on v2.
        v1 = {c for h in self.layout.hierarchies if h.version == 1 for c in h.controllers}
        settings = [s for s in limit_files.v1_settings(limits) if s.controller in v1]
        settings += [s for s in limit_files.v2_settings(limits) if s.controller not in v1]
        limit_files.apply(settings, self.directory)

    def _count_block_io(self) -> None:
        """v1 up to 6.4: a cgroup's throttle counters count a disk's reads, and writes, only under a rule of its own.

        Not even its parent's will do there: what a nested cgroup of the job reads and writes those kernels do not tell.
        """
        directory = self.directory("blkio")
        if directory is None or not directory.has(_V1_THROTTLE) or not _counts_under_own_rule(os.uname().release):
            return
        for device in procs.disks():
            for file in _V1_RULES:
                _rule(directory, file, device, _UNREACHED_BPS)

    def _freeze_kill_thaw(self, directory: CgroupDir) -> None:
        _write_if_there(directory, "freezer.state", "FROZEN")
        try:
            # Of all hierarchies: a process may have left this one.
            _kill_all(self.procs())
        finally:
            # Each of them: one that the job has frozen by itself stays so when only its parent thaws.
            for cgroup in reversed(list(directory.subtree())):
                _write_if_there(cgroup, "freezer.state", "THAWED")


def orphans(layout: Layout, base: str, prefix: str) -> dict[tuple[str, str], bytes | None]:
    """What acctd has made below a base: (base, name) of every directory with this prefix and its description.

    Families lie inside their parents' directories, which are their base.
    """
    found: dict[tuple[str, str], bytes | None] = {}
    for hierarchy in layout.hierarchies:
        above = [hierarchy.job(base, "x").parent]
        while above:
            for cgroup in above.pop().children():
                if cgroup.parts[-1].startswith(prefix) and cgroup.marked():
                    key = "/".join(cgroup.parts[:-1]), cgroup.parts[-1]
                    found[key] = cgroup.description() or found.get(key)
                    above.append(cgroup)
    return found


def sweep_sentinels(layout: Layout, base: str) -> None:
    """Remove the sentinel cgroups of agents that died between making and removing theirs."""
    hierarchy = layout.of("blkio")
    if hierarchy is None or hierarchy.version != 1:
        return
    for cgroup in hierarchy.job(base, "x").parent.children():
        prefix, _, maker = cgroup.parts[-1].partition("-")
        if prefix == _SENTINEL and ":" in maker and not procs.is_alive(maker):
            JobCgroups(Layout((hierarchy,)), base, cgroup.parts[-1]).remove()


def arm_block_counters(layout: Layout, base: str, devices: list[str]) -> list[str]:
    """Make v1's throttle counters count, which newer kernels do only once a rule was written for the disk, ever.

    `devices` are "major:minor" of whole disks; returns those armed. A sentinel cgroup below the base takes the rule and
    goes again: the counters stay armed until the next boot. On v2, or without blkio, there is nothing to do.
    """
    hierarchy = layout.of("blkio")
    if hierarchy is None or hierarchy.version != 1:
        return []
    sentinel = JobCgroups(Layout((hierarchy,)), base, f"{_SENTINEL}-{procs.identity(os.getpid())}")
    armed = []
    try:
        sentinel._make(hierarchy)
        directory = hierarchy.job(base, sentinel.name)
        if directory.has(_V1_THROTTLE):
            for device in devices:
                if _rule(directory, _V1_THROTTLE, device, _SENTINEL_BPS):
                    armed.append(device)
    finally:
        sentinel.remove()
    return armed


def _rule(directory: CgroupDir, file: str, device: str, bps: int) -> bool:
    """Write one throttle rule; False where that is no disk any more, or one without a queue."""
    try:
        directory.write(file, f"{device} {bps}")
    except KernelRefusedError as e:
        if isinstance(e.__cause__, OSError) and e.__cause__.errno == errno.ENODEV:
            return False
        raise
    return True


def _counts_under_own_rule(release: str) -> bool:
    """Whether a kernel is older than 6.5, which counts without: "blk-throttle: Fix io statistics for cgroup v1"."""
    major, _, rest = release.partition(".")
    minor = rest.partition(".")[0].partition("-")[0]
    return major.isdecimal() and minor.isdecimal() and (int(major), int(minor)) < (6, 5)


def _delegate_down(hierarchy: Hierarchy, job: CgroupDir) -> None:
    """v2: give a job's directory our controllers, from the top of the hierarchy down."""
    files = [_V2_FILE[c] for c in hierarchy.controllers if c in _V2_FILE]
    if hierarchy.version == 1 or not files:
        return
    for anew in (False, True):
        above = hierarchy.top
        for name in job.parts:
            _delegate(hierarchy, above, anew=anew)
            above = above.child(name)
        # subtree_control names a controller before a neighbour's write that enables it is done. A write waits for that.
        if all(job.has(file) for file in files):
            return


def _delegate(hierarchy: Hierarchy, directory: CgroupDir, *, anew: bool) -> None:
    """v2: let the children of a directory have our controllers. Written once, unless `anew`; read on later calls."""
    have = (directory.read("cgroup.subtree_control") or b"").decode().split()
    wanted = [V2_NAME[c] for c in hierarchy.controllers if c in V2_NAME]
    missing = [c for c in wanted if anew or c not in have]
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


def _door(hierarchy: Hierarchy, directory: CgroupDir) -> CgroupDir:
    """Where the processes of a job go that has this directory."""
    divided = hierarchy.version == 2 and any(controller in V2_NAME for controller in hierarchy.controllers)
    return directory.child(_OWN) if divided else directory


def _write_if_there(cgroup: CgroupDir, file: str, data: str) -> None:
    """Write to a cgroup that the job, or a service manager, may be removing."""
    try:
        cgroup.write(file, data)
    except KernelRefusedError:
        if cgroup.exists():
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
    """Take away an empty base that acctd made. rmdir refuses a busy one, so no check can be too late.

    The base of a family is a job's own directory, which has a description: that goes with the job.
    """
    directory = hierarchy.job(base, "x").parent
    while directory.parts and directory.marked() and not directory.description() and directory.remove():
        directory = directory.parent


def _kill_all(pids: set[int] | list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it ended by itself
