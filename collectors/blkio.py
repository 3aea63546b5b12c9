"""Block I/O of one job, per device "major:minor", from the blkio (v1) or io (v2) controller.

Reads only: arming the throttle counters, which count nothing on recent kernels before, is the cgroup driver's. It does
not sum over devices either: a loop device's or a device-mapper volume's I/O is also counted on the disk below it.
Kernel docs: admin-guide/cgroup-v1/blkio-controller.rst, admin-guide/cgroup-v2.rst ("IO Interface Files"),
block/bfq-iosched.rst.

v1 can count the same I/O of a disk up to three times, in files of different names:

- `blkio.throttle.*`: I/O as submitted, whatever the disk's scheduler; once armed. Not recursive on old kernels.
- `blkio.bfq.*`: requests as bfq handled them, after merging; disks scheduled by bfq only.
- `blkio.io_*`: the same for CFQ, gone since 5.0.

Each device's number is the **highest** of those that count it. They describe the same I/O, so their sum would be
double, and each misses some of it: throttle what came before arming and, on old kernels, nested cgroups; a scheduler
what ran under another one. The highest has missed least. Nor does it matter which source was taken before: each
only grows, hence so does the highest, also when a disk is armed or changes its scheduler half-way through a job
and over a restart of the agent, where "throttle if it is not 0, else the scheduler" would fall back to nearly nothing
on the day the disk is armed. The price: operations are submissions where throttle leads, and merged requests where not.
"""

from collections.abc import Mapping

from acctd.kernel.cgroupfs import CgroupDir
from acctd.metrics import (
    BLOCK_DISCARD_BYTES,
    BLOCK_READ_BYTES,
    BLOCK_READS,
    BLOCK_WRITE_BYTES,
    BLOCK_WRITES,
    Key,
    Metric,
    Readings,
)
from collectors.parse import MalformedFile, Parser, number
from collectors.reader import CombiningReader, present

METRICS = (BLOCK_READ_BYTES, BLOCK_WRITE_BYTES, BLOCK_READS, BLOCK_WRITES, BLOCK_DISCARD_BYTES)

_BYTES = {b"Read": BLOCK_READ_BYTES, b"Write": BLOCK_WRITE_BYTES, b"Discard": BLOCK_DISCARD_BYTES}
_OPERATIONS = {b"Read": BLOCK_READS, b"Write": BLOCK_WRITES}

_IO_STAT = {
    b"rbytes": BLOCK_READ_BYTES,
    b"wbytes": BLOCK_WRITE_BYTES,
    b"rios": BLOCK_READS,
    b"wios": BLOCK_WRITES,
    b"dbytes": BLOCK_DISCARD_BYTES,
}


# blkio.throttle.io_service_bytes, v1 (6.18). Old kernels have no Discard line; before any I/O the last line is all:
#   254:0 Read 192512
#   254:0 Write 121634816
#   254:0 Sync 209907712
#   254:0 Async 16777216
#   254:0 Discard 104857600
#   254:0 Total 226684928
#   Total 226684928
def parse_blkio(text: bytes, path: str, metrics: Mapping[bytes, Metric]) -> Readings:
    """Any of v1's per-device files. `metrics` says which operation becomes which metric; bytes or operations."""
    return _lines_parser(metrics)(text, path)


def _lines_parser(metrics: Mapping[bytes, Metric]) -> Parser:
    """parse_blkio that knows again how a line begins (b"254:0 Read"): one for all jobs, whose disks are the same."""
    known: dict[bytes, Key | None] = {}

    def parse(text: bytes, path: str) -> Readings:
        readings: Readings = {}
        for line in text.split(b"\n"):
            beginning, _, value = line.rpartition(b" ")
            if beginning in known:
                key = known[beginning]
            else:
                key = _line_key(line, path, metrics)
                if beginning.count(b" ") == 1:
                    known[beginning] = key
            if key is not None:
                readings[key] = number(value, path, line)
        return readings

    return parse


def _line_key(line: bytes, path: str, metrics: Mapping[bytes, Metric]) -> Key | None:
    words = line.split(b" ")
    if len(words) < 2 or (metric := metrics.get(words[1])) is None:
        return None
    if len(words) != 3:
        raise MalformedFile(path, line)
    return metric, _device(words[0], path, line)


# io.stat, v2 (6.1). A device may stand alone, and 5.x kernels then forget the line's end; io.cost and others add keys
# and words of their own:
#   254:0 rbytes=10489856 wbytes=20971520 rios=164 wios=170 dbytes=0 dios=0
#   7:0 254:16 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0 cost.usage=42
def parse_io_stat(text: bytes, path: str) -> Readings:
    """v2's io.stat: bytes and operations."""
    readings: Readings = {}
    for line in text.split(b"\n"):
        device = b""
        for word in line.split(b" "):
            key, equals, value = word.partition(b"=")
            if not equals:
                device = word if b":" in word else device
            elif (metric := _IO_STAT.get(key)) is not None:
                readings[metric, _device(device, path, line)] = number(value, path, line)
    return readings


_service_bytes, _serviced = _lines_parser(_BYTES), _lines_parser(_OPERATIONS)

# Without and with "_recursive", which alone knows nested cgroups and is taken where the kernel has it.
_V1: tuple[tuple[str, Parser], ...] = (
    ("blkio.throttle.io_service_bytes", _service_bytes),
    ("blkio.throttle.io_serviced", _serviced),
    ("blkio.bfq.io_service_bytes", _service_bytes),
    ("blkio.bfq.io_serviced", _serviced),
    ("blkio.io_service_bytes", _service_bytes),
    ("blkio.io_serviced", _serviced),
)


class BlkioReader(CombiningReader):
    """Reads one job's block I/O: `directory` is its cgroup in the blkio hierarchy (v1) or the unified one (v2)."""

    def __init__(self, directory: CgroupDir, *, bfq: bool = True) -> None:
        """`bfq`: whether some disk of this host is scheduled by it; elsewhere its files hold nothing."""
        if directory.has("io.stat"):
            super().__init__(present(directory, [("io.stat", parse_io_stat)]))
            return
        super().__init__(present(directory, _files(directory, bfq=bfq, recursive=True)))

    def _merge(self) -> Readings:
        merged: Readings = {}
        for source in self._sources:
            for key, value in source.readings.items():
                if value >= merged.get(key, 0):
                    merged[key] = value
        return merged


class OwnBlkioReader(BlkioReader):
    """v1, of a job with families: what its own processes do and those of cgroups it has made itself, and no family's.

    v1's recursive files would have the families in them, and lose an ended one's part some time after its removal,
    unseen if the job has done as much by then.
    """

    def __init__(self, directory: CgroupDir, families: str, *, bfq: bool = True) -> None:
        """`families`: how the names of their directories begin."""
        CombiningReader.__init__(self, present(directory, _files(directory, bfq=bfq, recursive=False)))
        self._directory, self._families, self._bfq = directory, families, bfq
        self._links = 0
        self._nested: dict[str, BlkioReader] = {}
        self._gone: Readings = {}

    def changes(self) -> list[Readings]:
        """What changed since the last call: everything in one dict, or nothing."""
        changed = self._look()
        for reader in self._nested.values():
            changed = bool(reader.changes()) or changed
        return [self._merge()] if super().changes() or changed else []

    def close(self) -> None:
        """Give the descriptors back; a later read() finds nothing."""
        super().close()
        for reader in self._nested.values():
            reader.close()

    def _merge(self) -> Readings:
        merged = super()._merge()
        for part in (self._gone, *(reader._merge() for reader in self._nested.values())):
            for key, value in part.items():
                merged[key] = merged.get(key, 0) + value
        return merged

    def _look(self) -> bool:
        """Whether nested cgroups came or went. What one had done that went is kept as it was last read."""
        if (links := self._directory.links()) == self._links:
            return False
        self._links = links
        there = {child.parts[-1]: child for child in self._directory.children()}
        for name in [name for name in self._nested if name not in there]:
            reader = self._nested.pop(name)
            for key, value in reader._merge().items():
                self._gone[key] = self._gone.get(key, 0) + value
            reader.close()
        for name, child in there.items():
            if not name.startswith(self._families) and name not in self._nested:
                self._nested[name] = BlkioReader(child, bfq=self._bfq)
        return True


def _files(directory: CgroupDir, *, bfq: bool, recursive: bool) -> list[tuple[str, Parser]]:
    files = []
    for name, parser in _V1:
        if "bfq" in name and not bfq:
            continue
        whole = f"{name}_recursive"
        files.append((whole if recursive and directory.has(whole) else name, _remembering(parser)))
    return files


def _remembering(parser: Parser) -> Parser:
    """A parser that keeps a device's last numbers once its lines go: they do when the disk changes its scheduler,
    and the highest of the others may be lower. What was done remains done.
    """
    seen: Readings = {}

    def parse(text: bytes, path: str) -> Readings:
        seen.update(parser(text, path))
        return seen.copy()

    return parse


def _device(word: bytes, path: str, line: bytes) -> str:
    """A label from b"8:0"."""
    major, _, minor = word.partition(b":")
    if major.isdigit() and minor.isdigit():
        return word.decode()
    raise MalformedFile(path, line)
