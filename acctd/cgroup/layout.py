"""Which directory carries which controller for a job: the four ways a host mounts cgroups, made one.

v1 with every controller apart or joined (`cpu,cpuacct`), hybrid (v1 controllers beside an empty v2 tree), v2 only.
Knows where things are; makes and writes nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from acctd.errors import UnavailableError, UsageError
from acctd.kernel.cgroupfs import CgroupDir, checked_parts
from acctd.kernel.mountinfo import CgroupMount, cgroup_mounts

CONTROLLERS = ("memory", "cpu", "cpuacct", "cpuset", "blkio", "freezer", "pids")
"""What acctd counts and controls by, in v1's names."""

V2_NAME = {"memory": "memory", "cpu": "cpu", "cpuset": "cpuset", "blkio": "io", "pids": "pids"}
"""v2's names; cpuacct and freezer are part of every v2 cgroup."""


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """One mounted hierarchy and those of our controllers that it carries (in v1's names)."""

    top: CgroupDir
    version: int
    controllers: tuple[str, ...]

    def job(self, base: str, name: str) -> CgroupDir:
        """A job's directory in this hierarchy."""
        return CgroupDir(self.top.mount, (*checked_parts(base), name))


@dataclass(frozen=True, slots=True)
class Layout:
    """Every hierarchy a job is put into. On a hybrid host the bare v2 tree is among them, for pressure and events."""

    hierarchies: tuple[Hierarchy, ...]

    @property
    def kind(self) -> str:
        """v1, v2 or hybrid: what `acctd doctor` calls this host."""
        versions = {h.version for h in self.hierarchies}
        return "hybrid" if len(versions) == 2 else f"v{versions.pop()}"

    def of(self, controller: str) -> Hierarchy | None:
        """The hierarchy that carries a controller, or None where this host has none."""
        return next((h for h in self.hierarchies if controller in h.controllers), None)

    @property
    def unified(self) -> Hierarchy | None:
        return next((h for h in self.hierarchies if h.version == 2), None)


def discover(wanted: Iterable[str] = CONTROLLERS, root: Path = Path("/")) -> Layout:
    """What the host mounts, narrowed to the wanted controllers. UnavailableError where no cgroups are mounted."""
    wanted = tuple(wanted)
    for controller in wanted:
        if controller not in CONTROLLERS:
            raise UsageError(f"controller {controller!r} is unknown; it is one of {', '.join(CONTROLLERS)}")
    hierarchies = [_hierarchy(mount, wanted) for mount in cgroup_mounts(root)]
    taken: set[str] = set()
    kept = []
    # v1 first: on a hybrid host a controller lives in v1 and v2's built-in cpuacct and freezer stand back.
    for hierarchy in sorted(hierarchies, key=lambda h: h.version):
        own = tuple(c for c in hierarchy.controllers if c not in taken)
        taken.update(own)
        if own or hierarchy.version == 2:
            kept.append(Hierarchy(hierarchy.top, hierarchy.version, own))
    if not taken:
        raise UnavailableError("no cgroup controllers are mounted here; mount cgroup2 on /sys/fs/cgroup")
    return Layout(tuple(kept))


def _hierarchy(mount: CgroupMount, wanted: tuple[str, ...]) -> Hierarchy:
    top = CgroupDir(mount.mount)
    if mount.version == 1:
        return Hierarchy(top, 1, tuple(c for c in wanted if c in mount.controllers))
    offered = (top.read("cgroup.controllers") or b"").decode().split()
    # A v2 tree without a single controller of ours still counts CPU time and freezes, but only v1 can limit there.
    builtin = ("cpuacct", "freezer")
    return Hierarchy(top, 2, tuple(c for c in wanted if c in builtin or V2_NAME.get(c) in offered))
