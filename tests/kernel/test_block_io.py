"""A job's block I/O by device, by the real CLI on real disks: exact bytes, operations, the right device's number.

Two kinds of disk: the one that holds the test's directory, and loop devices made for a test under numbers of their own,
whose /sys/block/*/stat nobody else moves: an independent count.
"""

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from acctd.cgroup.layout import discover
from acctd.kernel import procs
from tests.kernel.conftest import REPO, Node

TOTAL = 20 * (1 << 20)  # 20971520
LOAD = str(REPO / "lab" / "load.py")
_LOOP_CTL_ADD, _LOOP_CTL_REMOVE = 0x4C80, 0x4C81
_FIRST_NUMBER = 4000  # far from what losetup --find would take


class Loop:
    """A loop device on a file of its own. Fresh: the kernel has made the disk for us, nobody has armed it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.path = f"/dev/loop{number}"

    @property
    def device(self) -> str:
        return (self._sys / "dev").read_text().strip()

    # /sys/block/<disk>/stat: reads, merged, sectors of 512 bytes, ms, writes, merged, sectors, ms, ...
    def stat(self) -> dict[str, int]:
        """What the block layer counts for the whole disk."""
        words = [int(word) for word in (self._sys / "stat").read_text().split()]
        names = ("block_reads", "block_read", "block_writes", "block_write")
        return dict(zip(names, (words[0], words[2] * 512, words[4], words[6] * 512), strict=True))

    @property
    def _sys(self) -> Path:
        return Path("/sys/block") / f"loop{self.number}"


@contextmanager
def fresh_loop(image: Path, number: int | None = None) -> Iterator[Loop]:
    """Make a disk under an unused number (or this one), attach the file, and take all of it away again."""
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        number = _add(control) if number is None else fcntl.ioctl(control, _LOOP_CTL_ADD, number)
        try:
            path = f"/dev/loop{number}"
            subprocess.run(["losetup", "--direct-io=on", path, str(image)], check=True, capture_output=True)
            try:
                yield Loop(number)
            finally:
                subprocess.run(["losetup", "--detach", path], check=True)
        finally:
            if Path("/run/udev/control").exists():
                subprocess.run(["udevadm", "settle"], check=True)  # the kernel refuses while anyone looks at the disk
            fcntl.ioctl(control, _LOOP_CTL_REMOVE, number)
    finally:
        os.close(control)


def _add(control: int) -> int:
    for number in range(_FIRST_NUMBER, _FIRST_NUMBER + 1000):
        try:
            return int(fcntl.ioctl(control, _LOOP_CTL_ADD, number))
        except FileExistsError:
            continue
    raise AssertionError("no loop device could be made")


@pytest.fixture
def image(node: Node) -> Path:
    """A file that can hold what is written, its blocks allocated."""
    path = node.directory / "image"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, TOTAL + (4 << 20))
    return path


def disk_of(directory: Path) -> str:
    """The whole disk that a directory lies on, "major:minor"."""
    number = directory.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    if (Path("/sys/dev/block") / device / "partition").exists():
        device = ((Path("/sys/dev/block") / device).resolve().parent / "dev").read_text().strip()
    assert device in procs.disks(), f"{directory} lies on {device}, which is no disk; set TMPDIR to a place on one"
    return device


def on(record: dict[str, Any], device: str) -> dict[str, int]:
    """What a record says of one device."""
    names = ("block_read", "block_reads", "block_write", "block_writes")
    return {name: record["totals"][name].get(device, 0) for name in names}


def dd(*operands: str) -> list[str]:
    return ["dd", "status=none", *operands]


def job(node: Node, *command: str) -> dict[str, Any]:
    return node.job("--network", "none", "--", *command)


def test_direct_writes_are_exact(node: Node) -> None:
    device = disk_of(node.directory)
    record = job(node, *dd("if=/dev/zero", f"of={node.directory}/f", "oflag=direct", "bs=4k", "count=5120"))
    seen = on(record, device)
    assert seen["block_write"] == TOTAL
    assert seen["block_writes"] == 5120


def test_direct_writes_in_large_pieces(node: Node) -> None:
    """A piece of 1 MiB is 256 pages, and cut where the disk takes fewer segments or an extent ends."""
    device = disk_of(node.directory)
    record = job(node, *dd("if=/dev/zero", f"of={node.directory}/f", "oflag=direct", "bs=1M", "count=20"))
    seen = on(record, device)
    assert seen["block_write"] == TOTAL
    assert 20 <= seen["block_writes"] <= 2 * 20 + _extents(node.directory / "f")


def test_direct_reads_are_exact(node: Node) -> None:
    file = node.directory / "f"
    subprocess.run(dd("if=/dev/zero", f"of={file}", "bs=1M", "count=20", "conv=fsync"), check=True)
    # Open first: finding the file would read metadata in the job's name.
    with file.open("rb") as standing:
        record = job(
            node, *dd(f"if=/proc/{os.getpid()}/fd/{standing.fileno()}", "of=/dev/null", "iflag=direct", "bs=4k")
        )
    seen = on(record, disk_of(node.directory))
    assert seen["block_read"] == TOTAL
    assert seen["block_reads"] == 5120
    assert seen["block_write"] == 0


def test_buffered_writes_count_when_they_are_synced(node: Node) -> None:
    """The data to the byte, and what the file system wrote in the job's name to sync the file: a few blocks.

    With a journal those are the journal thread's and not the job's; without one fsync writes them itself.
    """
    file = node.directory / "f"
    record = job(node, *dd("if=/dev/zero", f"of={file}", "bs=1M", "count=20", "conv=fsync"))
    written = on(record, disk_of(node.directory))["block_write"]
    metadata = written - TOTAL
    print(f"\nmetadata written in the job's name: {metadata} bytes")
    assert 0 <= metadata <= 16 * 4096
    assert metadata % os.statvfs(file).f_frsize == 0


def test_the_load_generator_writes_what_it_says(node: Node) -> None:
    record = job(node, sys.executable, LOAD, "--write", "20M", "--directory", str(node.directory))
    seen = on(record, disk_of(node.directory))
    assert seen["block_write"] == TOTAL
    assert 320 <= seen["block_writes"] <= 320 + 16


def test_a_loop_device_has_a_number_of_its_own(node: Node, image: Path) -> None:
    """And the disk's own statistics say the same, operations too: direct writes leave nothing to merge."""
    with fresh_loop(image) as loop:
        before = loop.stat()
        record = job(node, *dd("if=/dev/zero", f"of={loop.path}", "oflag=direct", "bs=64k", "count=320"))
        counted = {name: value - before[name] for name, value in loop.stat().items()}
        seen = on(record, loop.device)
    assert seen == counted == {"block_write": TOTAL, "block_writes": 320, "block_read": 0, "block_reads": 0}


def test_operations_are_submissions_not_merged_requests(node: Node, image: Path) -> None:
    """Buffered writes to a bare disk are exact too, there being no file system. They are submitted page by page, and
    the flush is one more; the disk is then asked less often, for larger pieces.
    """
    with fresh_loop(image) as loop:
        before = loop.stat()
        record = job(node, *dd("if=/dev/zero", f"of={loop.path}", "conv=notrunc,fsync", "bs=64k", "count=320"))
        counted = {name: value - before[name] for name, value in loop.stat().items()}
        seen = on(record, loop.device)
    print(f"\nsubmitted {seen['block_writes']}, asked of the disk {counted['block_writes']}")
    assert seen["block_write"] == counted["block_write"] == TOTAL
    assert seen["block_writes"] >= counted["block_writes"] > 0


def test_two_devices_are_told_apart(node: Node, image: Path) -> None:
    other = node.directory / "other"
    other.write_bytes(bytes(TOTAL))
    with fresh_loop(image) as one, fresh_loop(other) as two:
        script = (
            f"dd if=/dev/zero of={one.path} oflag=direct bs=4k count=7; dd if={two.path} iflag=direct bs=4k count=9"
        )
        record = job(node, "sh", "-c", f"({script}) >/dev/null 2>&1")
        first, second = on(record, one.device), on(record, two.device)
    assert (first["block_write"], first["block_writes"], first["block_read"]) == (7 * 4096, 7, 0)
    assert (second["block_read"], second["block_reads"], second["block_write"]) == (9 * 4096, 9, 0)


def test_a_new_disk_is_armed_before_the_jobs_first_byte(node: Node, image: Path) -> None:
    """v1: the counters of a disk nobody has armed count nothing; those of a job on it are complete all the same."""
    hierarchy = discover().of("blkio")
    assert hierarchy is not None
    if hierarchy.version == 2:
        pytest.skip("v2 counts without arming")
    for _ in range(10):
        with fresh_loop(image) as loop:
            if _counts_unarmed(node, loop):
                continue  # another acctd on this host has armed it meanwhile; the next disk is a new one
            record = job(node, *dd("if=/dev/zero", f"of={loop.path}", "oflag=direct", "bs=4k", "count=5120"))
            seen = on(record, loop.device)
        assert (seen["block_write"], seen["block_writes"]) == (TOTAL, 5120)
        return
    pytest.skip("this kernel counts without arming, as older ones do")


def _counts_unarmed(node: Node, loop: Loop) -> bool:
    """Whether the kernel counts what a cgroup that acctd never saw writes to this disk."""
    hierarchy = discover().of("blkio")
    assert hierarchy is not None
    directory = Path(hierarchy.top.path) / f"{node.base}-unarmed"
    directory.mkdir()
    try:
        script = 'echo 0 >"$1/cgroup.procs" && exec dd status=none if=/dev/zero of="$2" oflag=direct bs=4k count=1'
        subprocess.run(["sh", "-c", script, "sh", str(directory), loop.path], check=True)
        lines = (directory / "blkio.throttle.io_service_bytes").read_text().split("\n")
    finally:
        directory.rmdir()
    return f"{loop.device} Write 4096" in lines


def _extents(file: Path) -> int:
    """In how many pieces a file lies on its disk; a write cannot span two."""
    said = subprocess.run(["filefrag", str(file)], check=True, capture_output=True, text=True).stdout
    return int(said.rpartition(": ")[2].split()[0])


_TWO_JOBS = """
import os, subprocess, sys
from acctd import config, launch
from acctd.agent import Agent
from acctd.job import Ending
from acctd.model import JobSpec, Owner
with Agent(config.load(None, os.environ)) as agent:
    for name in ("first", "second"):
        print("ready", flush=True)
        sys.stdin.readline()
        job = agent.create(JobSpec(id=name, owner=Owner(0, 0, "root"), network="none"))
        process, at = launch.start(job, sys.argv[1:], groups=[0], environ=os.environ, blocked=set())
        agent.begin(job, at)
        print(agent.finish(job, Ending.now(process.wait())).totals["block_write"], flush=True)
"""


def test_a_disk_that_comes_back_under_the_same_number_is_armed_again(node: Node, image: Path) -> None:
    """In one long-lived process: the number alone does not tell that it is another disk, which counts nothing yet."""
    with fresh_loop(image) as loop:
        number, device = loop.number, loop.device
    command = dd("if=/dev/zero", f"of=/dev/loop{number}", "oflag=direct", "bs=4k", "count=8")
    child = node.topology.popen(
        node.topology.node, [sys.executable, "-c", _TWO_JOBS, *command],
        env=node.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    for _ in ("first", "second"):
        assert child.stdout.readline() == "ready\n"
        with fresh_loop(image, number):
            child.stdin.write("\n")
            child.stdin.flush()
            assert f"'{device}': 32768" in child.stdout.readline()
    assert child.wait(timeout=30) == 0
