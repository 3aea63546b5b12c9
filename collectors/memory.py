"""Memory of one job, kinds apart, and its peaks, from the memory controller of either hierarchy.

Reads only: limits are written by the cgroup driver, and notification is its own. Page cache is never part of what is
called resident. All kinds are those of the whole subtree, nested cgroups included. Kernel docs:
admin-guide/cgroup-v1/memory.rst (5.2 "stat file"), admin-guide/cgroup-v2.rst ("Memory Interface Files").

What differs between kernels:

- v1 calls anonymous memory `rss`; `cache` there and `file` on v2 both contain shared memory, which is taken out.
- RHEL 7 (3.10) does not tell shared memory: MEMORY_SHMEM is absent, MEMORY_RESIDENT is the anonymous memory alone (a
  lower bound), and MEMORY_FILE is the length of the two file LRU lists, on which shared memory never stands.
- `memory.peak` (v2) is there from 5.19 on; v1's memory.oom_control has no `oom_kill` line on old kernels: no reading.
- v1 has two limits and counts the hits apart: a job without swap is stopped at that of memory and swap together, and
  its memory.failcnt stays 0: see MEMORY_SWAP_FAILCNT too.
- v1 counts MEMORY_OOM_KILLS of this very cgroup; v2 adds those of nested ones.

The peaks by kind are the meter's: it keeps the highest of what is emitted here.
"""

from acctd.kernel.cgroupfs import CgroupDir
from acctd.metrics import (
    MEMORY_ANON,
    MEMORY_FAILCNT,
    MEMORY_FILE,
    MEMORY_KERNEL,
    MEMORY_OOM_KILLS,
    MEMORY_PEAK,
    MEMORY_RESIDENT,
    MEMORY_SHMEM,
    MEMORY_SWAP,
    MEMORY_SWAP_FAILCNT,
    Readings,
)
from collectors.parse import Parser, StatLines, named, single
from collectors.reader import Reader, present

METRICS = (
    MEMORY_ANON,
    MEMORY_SHMEM,
    MEMORY_FILE,
    MEMORY_KERNEL,
    MEMORY_SWAP,
    MEMORY_SWAP_FAILCNT,
    MEMORY_RESIDENT,
    MEMORY_PEAK,
    MEMORY_FAILCNT,
    MEMORY_OOM_KILLS,
)

# The lines wanted of memory.stat, bytes. v1 (6.18), between others; the lines without total_ leave nested cgroups out:
#   rss 339968
#   total_cache 48431104
#   total_rss 339968
#   total_shmem 0
#   total_swap 0
#   total_inactive_file 48250880
#   total_active_file 180224
_V1 = (b"total_cache", b"total_rss", b"total_shmem", b"total_swap")
_V1_OLD = (b"total_rss", b"total_swap", b"total_inactive_file", b"total_active_file")

# v2 (6.1), between others:
#   anon 0
#   file 24576
#   kernel 53248
#   shmem 0
_V2 = (b"anon", b"file", b"kernel", b"shmem")


_LINES_V1, _LINES_V1_OLD, _LINES_V2 = StatLines(_V1), StatLines(_V1_OLD), StatLines(_V2)

_ANON, _SHMEM, _FILE, _RESIDENT = (MEMORY_ANON, ""), (MEMORY_SHMEM, ""), (MEMORY_FILE, ""), (MEMORY_RESIDENT, "")
_SWAP, _KERNEL = (MEMORY_SWAP, ""), (MEMORY_KERNEL, "")


def parse_memory_stat_v1(text: bytes, path: str) -> Readings:
    """v1's memory.stat, bytes."""
    lines = _LINES_V1 if b"\ntotal_shmem " in text or text.startswith(b"total_shmem ") else _LINES_V1_OLD
    return _from_v1(lines.take(text, path))


def parse_memory_stat_v2(text: bytes, path: str) -> Readings:
    """v2's memory.stat, bytes. `kernel` is there from 5.18 on."""
    return _from_v2(_LINES_V2.take(text, path))


# memory.oom_control, v1 (6.18); processes killed so far:
#   oom_kill_disable 0
#   under_oom 0
#   oom_kill 0
parse_oom_control = named({b"oom_kill": MEMORY_OOM_KILLS})

# memory.events, v2 (6.1): limit hits and processes killed. Here `max` is a line's name, not a value:
#   low 0
#   high 0
#   max 103
#   oom 1
#   oom_kill 1
#   oom_group_kill 0
parse_memory_events = named({b"max": MEMORY_FAILCNT, b"oom_kill": MEMORY_OOM_KILLS})


class MemoryReader(Reader):
    """Reads one job's memory: `directory` is its cgroup in the memory hierarchy (v1) or the unified one (v2)."""

    def __init__(self, directory: CgroupDir) -> None:
        super().__init__(present(directory, _V1_FILES if directory.has("memory.usage_in_bytes") else _V2_FILES))


_V1_FILES: tuple[tuple[str, Parser], ...] = (
    ("memory.stat", parse_memory_stat_v1),
    ("memory.kmem.usage_in_bytes", single(MEMORY_KERNEL)),
    ("memory.max_usage_in_bytes", single(MEMORY_PEAK)),
    ("memory.failcnt", single(MEMORY_FAILCNT)),
    ("memory.memsw.failcnt", single(MEMORY_SWAP_FAILCNT)),
    ("memory.oom_control", parse_oom_control),
)
_V2_FILES: tuple[tuple[str, Parser], ...] = (
    ("memory.stat", parse_memory_stat_v2),
    ("memory.swap.current", single(MEMORY_SWAP)),
    ("memory.peak", single(MEMORY_PEAK)),
    ("memory.events", parse_memory_events),
)


def _from_v1(stat: dict[bytes, int]) -> Readings:
    readings: Readings = {}
    if (swap := stat.get(b"total_swap")) is not None:
        readings[_SWAP] = swap
    shmem = stat.get(b"total_shmem")
    if shmem is not None:
        file = None if (cache := stat.get(b"total_cache")) is None else cache - shmem
    elif b"total_inactive_file" in stat and b"total_active_file" in stat:
        file = stat[b"total_inactive_file"] + stat[b"total_active_file"]
    else:
        file = None
    _put_kinds(readings, stat.get(b"total_rss"), shmem, file)
    return readings


def _from_v2(stat: dict[bytes, int]) -> Readings:
    readings: Readings = {}
    if (kernel := stat.get(b"kernel")) is not None:
        readings[_KERNEL] = kernel
    shmem, file = stat.get(b"shmem"), stat.get(b"file")
    _put_kinds(readings, stat.get(b"anon"), shmem, None if file is None or shmem is None else file - shmem)
    return readings


def _put_kinds(readings: Readings, anon: int | None, shmem: int | None, file: int | None) -> None:
    """Each kind that is known, and what anonymous and shared memory come to."""
    if anon is not None:
        resident = anon if shmem is None else anon + shmem
        readings[_ANON] = anon
        readings[_RESIDENT] = resident
    if shmem is not None:
        readings[_SHMEM] = shmem
    if file is not None:
        # The kernel sums both lines per CPU, one after the other, while pages move: the difference can dip below 0.
        readings[_FILE] = max(file, 0)
