"""The node's own disk is full, over and over: the spool's, the positions' and the quarantine's, while all of them work.

A real file system that is filled to its last byte, because only a real one takes the beginning of a line. What was
written is read once and in order, also by a reader that looks all the time; what was not written is not there.
"""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from acctd import spool
from acctd.errors import LedgerError
from acctd.frames import EVENTS, RECORDS, SAMPLES, EventFrame, encode
from acctd.spool import Position, Reader, Writer
from exporters import delivery
from exporters.delivery import Delivery, Item, RefusedError, quarantine
from lab.smalldisk import SmallDisk

ROUNDS = 30
PATIENCE = 60.0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with SmallDisk(tmp_path / "disk", "2m") as made:
        yield made


def leave(disk: SmallDisk, room: int) -> None:
    """Fill it but for so many bytes, about: a tmpfs gives pages."""
    disk.fill()
    filler = disk.path / "filler"
    os.truncate(filler, filler.stat().st_size - room)


def test_a_reader_that_looks_all_the_time_sees_each_line_once(disk: SmallDisk) -> None:
    directory = disk.path / "stream"
    directory.mkdir()
    writer, ended = Writer(directory, segment_bytes=50_000), threading.Event()
    seen: list[bytes] = []

    def read() -> None:
        reader, position = Reader(directory), Position()
        while True:
            last = ended.is_set()
            batch = reader.read(position, 5)
            assert batch.missing == 0
            seen.extend(batch.lines)
            position = batch.position
            if last and not batch.lines:
                reader.close()
                return

    thread = threading.Thread(target=read)
    thread.start()
    wanted: list[bytes] = []
    refused = 0
    try:
        for turn in range(ROUNDS):
            leave(disk, 4096 * (turn % 4))
            for number in range(20):
                lines = [b"%d %d %d " % (turn, number, n) + b"x" * (37 * turn) for n in range(9)]
                try:
                    writer.append(lines)
                    wanted += lines
                except LedgerError as e:
                    assert "No space left on device" in str(e)
                    refused += 1
            disk.free()
            for segment in writer.full()[:-1]:  # what has been read long ago
                if len(seen) >= segment.first + 2000:
                    spool.remove(segment)
    finally:
        ended.set()
        thread.join(PATIENCE)
    assert refused > ROUNDS
    assert len(wanted) > 9 * ROUNDS
    assert seen == wanted


def test_a_segment_that_cannot_be_compressed_for_want_of_room_stays(disk: SmallDisk) -> None:
    directory = disk.path / "stream"
    directory.mkdir()
    writer = Writer(directory, segment_bytes=10_000)
    lines = [os.urandom(500).hex().encode() for _ in range(40)]
    for line in lines:
        writer.append([line])
    leave(disk, 4096)
    before = sorted(os.listdir(directory))
    with pytest.raises(OSError, match="No space left"):
        spool.pack(writer.full()[0])
    assert sorted(os.listdir(directory)) == before
    disk.free()
    spool.pack(writer.full()[0])
    assert Reader(directory).read(Position(), 100).lines == lines[:10]


class Picky:
    """Takes events but those that say so; the file it writes to is elsewhere."""

    identity = "picky"
    streams = (RECORDS, EVENTS, SAMPLES)
    batch = 16

    def __init__(self, disk: SmallDisk) -> None:
        self.kept: list[bytes] = []
        self.disk, self.turns = disk, 0

    def encode(self, frame: EventFrame) -> list[Item]:
        return [Item("", f"{frame.event} {frame.number} ".encode() + b"y" * 300)]

    def send(self, to: str, data: list[bytes]) -> None:
        self.turns += 1
        if self.turns % 7 == 0:
            leave(self.disk, self.turns % 3 * 4096)
        if any(point.startswith(b"bad") for point in data):
            raise RefusedError("no " * 300)
        self.kept += data

    def state(self) -> dict[str, int]:
        return {}

    def resume(self, state: dict[str, int]) -> None:
        """Nothing is remembered."""

    def close(self) -> None:
        """Nothing is open."""


class Freed(threading.Event):
    """What a delivery waits on for its disk: somebody makes room meanwhile."""

    def __init__(self, disk: SmallDisk) -> None:
        super().__init__()
        self.disk, self.waits = disk, 0

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout == delivery._FULL_DISK
        self.waits += 1
        self.disk.free()
        return False


def test_positions_and_quarantine_wait_for_room_and_are_never_torn(disk: SmallDisk, tmp_path: Path) -> None:
    for name in ("spool/records", "spool/events", "spool/samples"):
        (tmp_path / name).mkdir(parents=True)
    (disk.path / "positions").mkdir()
    names = ["bad" if number % 5 == 0 else "good" for number in range(400)]
    frames = [EventFrame(number, 0.0, name, "") for number, name in enumerate(names)]
    Writer(tmp_path / "spool" / EVENTS).append([encode(frame) for frame in frames])
    target = Picky(disk)
    sink = Delivery("sink", target, tmp_path / "spool", disk.path / "positions")
    sink._stop = Freed(disk)
    sink.run(until_empty=True)
    assert sink._stop.waits > 10
    wanted = [f"{name} {number} ".encode() + b"y" * 300 for number, name in enumerate(names)]
    assert sorted(target.kept) == sorted(point for point in wanted if point.startswith(b"good"))
    kept = quarantine(disk.path / "positions", "sink").read_bytes()
    assert kept.count(b"\n") == kept.count(b'"words"') == 80
    assert all(b'"point": "' + point + b'"' in kept for point in wanted if point.startswith(b"bad"))
    assert sink.numbers().trouble is None
