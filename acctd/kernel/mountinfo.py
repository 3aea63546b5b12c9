"""Where the cgroup hierarchies are mounted, from /proc/self/mountinfo: found, never assumed.

Kernel docs: filesystems/proc.rst, 3.5 "/proc/<pid>/mountinfo". Reads one file; opens nothing below cgroupfs.
"""

import os
from dataclasses import dataclass
from pathlib import Path

V1_CONTROLLERS = (
    "cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids",
    "net_cls", "net_prio", "perf_event", "hugetlb", "rdma", "misc",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CgroupMount:
    """One mounted hierarchy. v1: the controllers it carries; v2: none here, they are listed in cgroup.controllers."""

    mount: Path
    version: int
    controllers: tuple[str, ...]


# /proc/self/mountinfo, one line a mount; optional fields stand between the options and " - ":
#   32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:10 - cgroup cgroup rw,cpu,cpuacct
#   41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
def parse_mountinfo(text: str, root: Path = Path("/")) -> list[CgroupMount]:
    """Every cgroup mount, as it lies below `root`. A hierarchy mounted twice is listed once, where it came first."""
    mounts: dict[tuple[int, tuple[str, ...]], CgroupMount] = {}
    for line in text.split("\n"):  # not splitlines(): a path may hold what that takes for a line's end
        before, dash, after = line.partition(" - ")
        fields, tail = before.split(" "), after.split(" ")
        if not dash or len(fields) < 5 or tail[0] not in ("cgroup", "cgroup2"):
            continue
        mount = root / _unescape(fields[4]).lstrip("/")
        if tail[0] == "cgroup2":
            found = CgroupMount(mount, 2, ())
        else:
            options = tail[2].split(",") if len(tail) > 2 else []
            controllers = tuple(option for option in options if option in V1_CONTROLLERS)
            if not controllers:
                continue  # a named hierarchy such as name=systemd counts nothing
            found = CgroupMount(mount, 1, controllers)
        mounts.setdefault((found.version, found.controllers), found)
    return list(mounts.values())


def cgroup_mounts(root: Path = Path("/")) -> list[CgroupMount]:
    """The hierarchies this process sees; `root` is where a test keeps its captured tree."""
    return parse_mountinfo(os.fsdecode((root / "proc/self/mountinfo").read_bytes()), root)


def cgroup_roots(root: Path = Path("/")) -> set[str]:
    """What the cgroup mounts of this process begin at in their hierarchies: "" for the whole, or a container's part.

    A path in /proc/PID/cgroup is below one of these if the cgroup can be seen here.
    """
    found = set()
    for line in os.fsdecode((root / "proc/self/mountinfo").read_bytes()).split("\n"):
        before, dash, after = line.partition(" - ")
        fields = before.split(" ")
        if dash and len(fields) >= 5 and after.split(" ")[0] in ("cgroup", "cgroup2"):
            found.add(_unescape(fields[3]).rstrip("/"))
    return found


def _unescape(field: str) -> str:
    """mountinfo writes space, tab, newline and backslash as three octal digits."""
    for octal, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(octal, char)
    return field
