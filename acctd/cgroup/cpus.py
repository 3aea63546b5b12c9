"""Cores for a job alone: which ones there are, which are free, and which of those a job gets that asks for linear:N.

Reads the topology and what a base cgroup allows, and chooses; writes nothing, and remembers nothing: who has which
cores stands in the ledger. Kernel docs: admin-guide/cputopology.rst, admin-guide/cgroup-v1/cpusets.rst,
admin-guide/cgroup-v2.rst, ABI/stable/sysfs-devices-node.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from acctd.cgroup.layout import Hierarchy, Layout
from acctd.errors import ExhaustedError, UnavailableError

_PART = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?\Z", re.ASCII)
_NODE = re.compile(r"node(\d{1,6})\Z", re.ASCII)

Cores = Callable[[Sequence[str]], tuple[str, str]]
"""From the CPU lists that other jobs have for themselves to those of a new one: its CPUs and its memory nodes."""


def parse_list(text: str) -> frozenset[int]:
    """The numbers of a list such as "0-3,8" (cputopology.rst); none for "". Raises ValueError for what is no list."""
    numbers: set[int] = set()
    for part in text.strip().split(",") if text.strip() else ():
        match = _PART.match(part)
        if match is None:
            raise ValueError(f"{text!r} is no list of numbers")
        low, high = int(match[1]), int(match[2] or match[1])
        if high < low:
            raise ValueError(f"{text!r} has a range that runs backwards")
        numbers.update(range(low, high + 1))
    return frozenset(numbers)


def format_list(numbers: Iterable[int]) -> str:
    """The reverse, as short as the kernel writes it."""
    runs = groupby(enumerate(sorted(set(numbers))), key=lambda pair: pair[1] - pair[0])
    spans = [[number for _, number in run] for _, run in runs]
    return ",".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)


@dataclass(frozen=True, slots=True)
class Core:
    """One core: its CPUs (hyperthreads) that are online, and where it is. Without NUMA there is only node 0."""

    cpus: frozenset[int]
    package: int
    node: int = 0


def read_topology(root: Path = Path("/")) -> list[Core]:
    """The cores with a CPU online, in their order: by node, package and first CPU. UnavailableError without sysfs."""
    devices = root / "sys/devices/system"
    try:
        online = parse_list((devices / "cpu/online").read_text())
        nodes = _nodes(devices / "node")
        cores = {
            Core(_siblings(devices, cpu) & online or frozenset({cpu}), _package(devices, cpu), nodes.get(cpu, 0))
            for cpu in online
        }
    except (OSError, ValueError) as e:
        raise UnavailableError(f"the CPUs of this host cannot be read ({e}); leave linear:N out") from e
    return sorted(cores, key=lambda core: (core.node, core.package, min(core.cpus)))


def _nodes(directory: Path) -> dict[int, int]:
    """The memory node of each CPU. A node may have none, and a kernel without NUMA has no nodes."""
    found = {}
    for path in directory.glob("node*"):
        if match := _NODE.match(path.name):
            found.update(dict.fromkeys(parse_list((path / "cpulist").read_text()), int(match[1])))
    return found


def _siblings(devices: Path, cpu: int) -> frozenset[int]:
    """The CPUs of one core. A CPU that goes offline meanwhile has no topology any more."""
    try:
        return parse_list((devices / f"cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
    except FileNotFoundError:
        return frozenset({cpu})


def _package(devices: Path, cpu: int) -> int:
    """The socket that a CPU is in; -1 on a machine that does not say."""
    try:
        return int((devices / f"cpu/cpu{cpu}/topology/physical_package_id").read_text())
    except FileNotFoundError:
        return -1


def read_allowed(hierarchy: Hierarchy, base: str) -> tuple[frozenset[int], frozenset[int]]:
    """The CPUs and memory nodes that jobs below a base may have.

    Of a base that does not exist yet, or has no cpuset yet, what the next cgroup above it has.
    """
    directory = hierarchy.job(base, "x").parent
    cpus: tuple[str, ...] = ("cpuset.cpus.effective", "cpuset.effective_cpus")
    mems: tuple[str, ...] = ("cpuset.mems.effective", "cpuset.effective_mems")
    if hierarchy.version == 1:
        # An older kernel tells no effective ones.
        cpus, mems = (*cpus, "cpuset.cpus"), (*mems, "cpuset.mems")
    while True:
        found = [next((text for file in files if (text := directory.read(file))), b"") for files in (cpus, mems)]
        if all(text.strip() for text in found):
            return parse_list(found[0].decode()), parse_list(found[1].decode())
        if not directory.parts:
            raise UnavailableError(f"cgroup {directory.path} does not tell its CPUs; leave linear:N out")
        directory = directory.parent


def chooser(count: int, layout: Layout, base: str, root: Path = Path("/")) -> Cores:
    """What gives a new job below a base `count` cores. All files are read here, so that it is quick when called.

    Raises UnavailableError where there are no cpusets, or not so many cores at all.
    """
    hierarchy = layout.of("cpuset")
    if hierarchy is None:
        raise UnavailableError("cpuset cannot be limited: this host has no cpuset controller; leave it out")
    topology = read_topology(root)
    cpus, mems = read_allowed(hierarchy, base)
    cores = [Core(core.cpus & cpus, core.package, core.node) for core in topology if core.cpus & cpus]
    if len(cores) < count:
        raise UnavailableError(
            f"cpuset linear:{count} is more than there is: jobs here have {len(cores)} "
            f"{'core' if len(cores) == 1 else 'cores'}; ask for fewer"
        )

    def choose_of(taken: Sequence[str]) -> tuple[str, str]:
        chosen = choose(count, cores, [parse_list(text) for text in taken])
        # A node without memory is in no cpuset: then the job takes memory where its base may.
        nodes = {core.node for core in chosen} & mems
        return format_list(cpu for core in chosen for cpu in core.cpus), format_list(nodes)

    return choose_of


def choose(count: int, cores: Sequence[Core], taken: Sequence[frozenset[int]]) -> list[Core]:
    """`count` of the cores that have no CPU in any set of `taken`, one of which is one job's.

    On one node (and socket) if they fit there, and then on the fullest; else on as few as will do. Side by side where
    that is possible, in the smallest gap. Raises ExhaustedError where too few are free.
    """
    used = frozenset[int]().union(*taken)
    free = [index for index, core in enumerate(cores) if not core.cpus & used]
    if len(free) < count:
        ours = frozenset[int]().union(*(core.cpus for core in cores))
        holders = sum(1 for each in taken if each & ours)
        who = f"{holders} job has" if holders == 1 else f"{holders} jobs have"
        raise ExhaustedError(
            f"cpuset linear:{count} asks for more cores than are free: {len(free)} of {len(cores)} are, {who} the "
            "others; try again when one has finished"
        )
    rooms: dict[tuple[int, int], list[int]] = {}
    for index in free:
        rooms.setdefault(_place(cores[index]), []).append(index)
    chosen: list[int] = []
    while len(chosen) < count:
        room = _best(list(rooms.values()), count - len(chosen))
        del rooms[_place(cores[room[0]])]
        chosen += _side_by_side(room, count - len(chosen))
    return [cores[index] for index in sorted(chosen)]


def _place(core: Core) -> tuple[int, int]:
    """What is near to each other: a node. A machine whose firmware tells of one node only still has its sockets."""
    return core.node, core.package


def _side_by_side(room: list[int], count: int) -> list[int]:
    """At most `count` of a node's free cores, in as few runs of neighbours as will do."""
    runs = [[index for _, index in run] for _, run in groupby(enumerate(room), key=lambda pair: pair[1] - pair[0])]
    chosen: list[int] = []
    while runs and len(chosen) < count:
        run = _best(runs, count - len(chosen))
        runs.remove(run)
        chosen += run[: count - len(chosen)]
    return chosen


def _best(sets: list[list[int]], count: int) -> list[int]:
    """The smallest that holds `count`, or the largest where none does; the first of equals."""
    enough = [each for each in sets if len(each) >= count]
    return min(enough, key=len) if enough else max(sets, key=len)
