"""A job's cgroups from making to removing: made in every hierarchy, limited, joined, killed, taken away.

Works on any layout. Knows nothing of networks, ledgers or what the counters mean. Kernel docs:
admin-guide/cgroup-v1/freezer-subsystem.rst, admin-guide/cgroup-v1/cpusets.rst, admin-guide/cgroup-v2.rst.
"""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

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

_ROUNDS = 50  # of following processes that fork while they are moved or killed

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

    def inside(self, controller: str) -> CgroupDir | None:
        """Where its own processes are in a controller's hierarchy, those of families not; None where it is lacking."""
        hierarchy = self.layout.of(controller)
        return _door(hierarchy, hierarchy.job(self.base, self.name)) if hierarchy else None

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

    def create(self, limits: Limits, cpus: str = "", mems: str = "") -> None:
        """Make, mark and limit all directories; on failure nothing of this job is left. InUseError if one exists.

        `cpus` and `mems` are lists of what was chosen for linear:N.
        """
        for _, directory in self.all():
            if directory.exists():
                raise _taken(directory)
        begun: list[Hierarchy] = []
        try:
            for hierarchy in self.layout.hierarchies:
                begun.append(hierarchy)
                self._make(hierarchy)
            self._limit(limits, cpus, mems)
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
        """End every process of the job; returns the pids still there after `timeout` seconds (see procs.stuck)."""
        deadline = time.monotonic() + timeout
        for number, (left, pause) in enumerate(self.killing()):
            if number and time.monotonic() > deadline:
                return left
            time.sleep(pause)
        return set()

    def killing(self) -> Iterator[tuple[set[int], float]]:
        """End every process, a round at a time: who is still there and the s to wait before the next; until none is.

        The caller waits, and may give up. cgroup.kill, where there is a v2 directory, also beside v1's: no fork can
        outrun it. v1 alone: freeze, SIGKILL all, thaw; a task that waits in OOM keeps the freezer from completing, and
        is killed all the same. Neither: nobody may fork meanwhile, as far as pids are counted.
        """
        pause, again = 0.0005, False
        while self.procs():
            self._end(again)
            if not (left := self.living()):
                return
            # Some 50 us an exit: to look at a thousand that are dying takes the time that they need.
            yield left, max(pause, len(left) * 2e-5)
            pause, again = min(pause * 2, 0.1), True

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

    def thawing(self) -> tuple[Path, str] | None:
        """The file, and what to write to it, for somebody else who has to thaw the job; None without a freezer."""
        freezer = self.layout.of("freezer")
        if freezer is None:
            return None
        place = freezer.job(self.base, self.name).path
        return (place / "freezer.state", "THAWED") if freezer.version == 1 else (place / "cgroup.freeze", "0")

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
            protects = hierarchy.version == 2 and limit_files.value_of(directory, "memory.low") not in ("", "0")
            while not all([cgroup.remove() for cgroup in directory.subtree()]):
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.001)
            if protects:
                limit_files.carry_up(directory.parent, _OWN)
            _tidy(hierarchy, self.base)
        return True

    def living(self) -> set[int]:
        """The job's pids less zombies: a zombie has freed its memory and waits only for its parent."""
        pids = self.procs()
        alive = {pid for pid in pids if not procs.is_dead(pid)}
        if pids and not alive:
            # One that forks and exits, without end, is gone whenever it is looked at, and its child is there.
            return self.procs() - pids
        return alive

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

    def carry_protection(self) -> None:
        """v2: have the soft limits of this job and of those beside it take effect. After one was set or taken away."""
        if (directory := self.directory("memory")) is not None:
            limit_files.carry_protection(directory, _OWN)

    def _limit(self, limits: Limits, cpus: str, mems: str) -> None:
        limit_files.apply(limit_files.settings(self.layout, limits, cpus, mems), self.directory)
        memory = self.directory("memory")
        # A family by itself gives the directory `own` beside it memory files, which at first protect nothing.
        if memory is not None and (limits.soft is not None or memory.parent.description()):
            self.carry_protection()

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

    def _end(self, again: bool) -> None:
        """One round of killing()."""
        freezer = self.layout.of("freezer")
        frozen = freezer.job(self.base, self.name) if freezer is not None and freezer.version == 1 else None
        if (unified := self.unified) is not None and unified.has("cgroup.kill"):
            _write_if_there(unified, "cgroup.kill", "1")
            if not again:
                # v1's freezer holds back those whom it has killed; v2's does not.
                if frozen is not None:
                    _thaw(frozen)
                return
            # It passes over a process whose leader has exited before its other threads, and who has left v2's tree.
        if freezer is not None and frozen is not None and frozen.exists():
            self._freeze_kill_thaw(freezer.top, frozen)
        else:
            with self._sterile():
                self._kill_all()

    def _freeze_kill_thaw(self, top: CgroupDir, directory: CgroupDir) -> None:
        _write_if_there(directory, "freezer.state", "FROZEN")
        try:
            killed = self._kill_all()
        finally:
            _thaw(directory)
        if (directory.read("freezer.parent_freezing") or b"0").strip() != b"0":
            # A family inside a suspended job: a frozen process dies only when it is thawed. All it does is to end.
            for pid in killed.intersection(pid for cgroup in directory.subtree() for pid in cgroup.procs()):
                try:
                    top.write("cgroup.procs", str(pid))
                except KernelRefusedError as e:
                    if not isinstance(e.__cause__, OSError) or e.__cause__.errno != errno.ESRCH:
                        raise

    @contextmanager
    def _sterile(self) -> Iterator[None]:
        """Nobody in the job can fork meanwhile, where its pids are counted."""
        directory = self.directory("pids")
        before = directory.read("pids.max") if directory is not None else None
        if directory is None or before is None:
            yield
            return
        _write_if_there(directory, "pids.max", "0")
        try:
            yield
        finally:
            _write_if_there(directory, "pids.max", before.decode().strip())

    def _kill_all(self) -> set[int]:
        """SIGKILL to every process, and to those forked while the others got it; who did get it.

        Of all hierarchies: a process may have left some. By pidfd: one that forks and exits without end goes through
        all pids of a host in seconds, and a pid that was just read may be another's.
        """
        killed, seen = set[int](), set[int]()
        for _ in range(_ROUNDS):
            if not (new := self.procs() - seen):
                break
            killed.update(pid for pid in new if procs.end(pid, self._holds))
            seen |= new
        return killed


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


def _thaw(directory: CgroupDir) -> None:
    """v1: let go a cgroup and each below it: one that the job has frozen by itself stays so when its parent thaws."""
    for cgroup in reversed(list(directory.subtree())):
        _write_if_there(cgroup, "freezer.state", "THAWED")
