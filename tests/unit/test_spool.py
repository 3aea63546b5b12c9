"""The spool on a real disk: whoever dies or has no room left, a reader gets each whole line once, or its number."""

import contextlib
import errno
import gzip
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from acctd import spool
from acctd.errors import LedgerError
from acctd.kernel import libc
from acctd.spool import Position, Reader, Writer, pack, remove, segments


@pytest.fixture
def writer(tmp_path):
    """`writer()` is a new one on the same stream; small segments."""
    made = []

    def make(**options):
        made.append(Writer(tmp_path, **{"segment_bytes": 100, **options}))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def reader(tmp_path):
    reader = Reader(tmp_path)
    yield reader
    reader.close()


def numbered(first: int, count: int) -> list[bytes]:
    return [b"line %06d" % number for number in range(first, first + count)]


def everything(reader, position=None, at_once=7):
    """All that is there from a position on: lines, the position after them, and how many were missing."""
    position = reader.oldest() if position is None else position
    lines, missing = [], 0
    while (batch := reader.read(position, at_once)).lines or batch.missing:
        lines += batch.lines
        missing += batch.missing
        position = batch.position
    return lines, position, missing


@contextlib.contextmanager
def files_end_at(size):
    """No file of this process grows beyond; Python ignores SIGXFSZ, so a write says EFBIG, after it took what fits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Writing and reading


@pytest.mark.parametrize("at_once", [1, 2, 7, 1000])
def test_lines_come_in_order_once_over_many_segments(writer, reader, at_once):
    w = writer()
    for start in range(0, 50, 5):
        w.append(numbered(start, 5))
    assert len(segments(reader._directory)) > 3
    lines, position, missing = everything(reader, at_once=at_once)
    assert (lines, position.number, missing) == (numbered(0, 50), 50, 0)


def test_nothing_is_appended_for_nothing(writer, tmp_path):
    writer().append([])
    assert os.listdir(tmp_path) == []


def test_a_stream_that_is_not_there_has_nothing(tmp_path):
    reader = Reader(tmp_path / "none")
    assert reader.read(reader.oldest(), 10) == ([], Position(), 0)
    assert segments(tmp_path / "none") == []
    assert spool.size(tmp_path / "none") == 0


def test_a_reader_follows_a_writer_line_by_line(writer, reader):
    w, position, seen = writer(), reader.oldest(), []
    for number in range(40):
        w.append(numbered(number, 1))
        batch = reader.read(position, 10)
        seen += batch.lines
        position = batch.position
        assert reader.read(position, 10).lines == []
    assert seen == numbered(0, 40)


def test_a_line_may_be_longer_than_what_is_read_at_once(writer, reader, monkeypatch):
    monkeypatch.setattr(spool, "_READ", 16)
    lines = [b"x" * length for length in (1, 15, 16, 17, 200, 0, 3)]
    writer(segment_bytes=10**6).append(lines)
    assert everything(reader)[0] == lines


def test_a_reader_goes_on_from_a_position_that_another_had(writer, tmp_path):
    w = writer()
    for start in range(0, 50, 5):
        w.append(numbered(start, 5))
    first = Reader(tmp_path)
    position = first.read(first.oldest(), 3).position
    for _ in range(5):  # a new reader for every few lines
        other = Reader(tmp_path)
        batch = other.read(position, 4)
        assert batch.lines == numbered(position.number, len(batch.lines))
        position = batch.position
        other.close()
    first.close()


def test_oldest_and_newest_begin_at_a_segment(writer, reader):
    w = writer()
    for start in range(0, 50, 5):
        w.append(numbered(start, 5))
    remove(segments(reader._directory)[0])
    left = segments(reader._directory)
    assert reader.oldest() == Position(left[0].first, left[0].first, 0)
    assert reader.newest() == Position(left[-1].first, left[-1].first, 0)


def test_reading_one_line_at_a_time_does_not_read_the_segment_each_time(writer, tmp_path, monkeypatch):
    writer(segment_bytes=10**9).append(numbered(0, 20_000))
    pieces = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pieces.append(1) or real(fd, size, offset))
    reader = Reader(tmp_path)
    assert len(everything(reader, at_once=1)[0]) == 20_000
    assert len(pieces) < 10
    reader.close()


# Writers that died


def test_a_new_writer_goes_on_behind_the_whole_lines_of_a_dead_one(writer, reader, tmp_path):
    writer().append(numbered(0, 3))
    with open(segments(tmp_path)[-1].path, "ab") as torn:
        torn.write(b"line 00")
    w = writer()
    assert (w.next, w.last) == (3, b"line 000002")
    w.append(numbered(3, 2))
    assert everything(reader) == (numbered(0, 5), Position(5, 3, 24), 0)


def test_what_was_read_ahead_of_a_torn_line_is_not_joined_to_another_writers(writer, reader, tmp_path):
    """Position 0, a segment without a whole line: the next writer begins in the same file anew."""
    (tmp_path / f"{0:020d}.jsonl").write_bytes(b"this never was")
    position = reader.oldest()
    assert reader.read(position, 10) == ([], position, 0)
    writer().append([b"a", b"b"])
    assert everything(reader, position)[0] == [b"a", b"b"]


def test_segments_without_a_whole_line_are_passed_over(writer, reader, tmp_path):
    writer().append(numbered(0, 2))
    for _ in range(3):
        w = writer(at_least=writer().next + 5)
        with pytest.raises(LedgerError), files_end_at(4):
            w.append([b"too long for this disk"])
    writer().append([b"last"])
    lines, _, missing = everything(reader)
    assert lines == [*numbered(0, 2), b"last"]
    assert missing == segments(tmp_path)[-1].first - 2


def test_a_new_writer_every_line(writer, reader):
    for number in range(30):
        w = writer()
        assert w.next == number
        w.append(numbered(number, 1))
        w.close()
    assert everything(reader)[::2] == (numbered(0, 30), 0)


def test_a_writer_begins_at_least_where_it_is_told_to(writer, reader):
    """Positions know lines that a power cut took: a reader would pass over what got their numbers."""
    writer().append(numbered(0, 3))
    w = writer(at_least=10)
    w.append([b"ten"])
    assert w.next == 11
    assert everything(reader, Position(10, 0, 99)) == ([b"ten"], Position(11, 10, 4), 0)
    assert everything(reader, Position(1, 0, 12)) == ([*numbered(1, 2), b"ten"], Position(11, 10, 4), 7)
    assert writer(at_least=4).next == 11


def test_killed_in_the_middle_of_a_line(tmp_path, reader):
    """A real SIGKILL of a real writer, over and over."""
    code = (
        "import os, sys, time; from pathlib import Path; from acctd.spool import Writer\n"
        f"w = Writer(Path({str(tmp_path)!r}), segment_bytes=20000)\n"
        "print(w.next, flush=True)\n"
        "while True: w.append([b'%d ' % (w.next + n) + b'x' * 300 for n in range(7)])"
    )
    for _ in range(4):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            before = spool.size(tmp_path)
            while spool.size(tmp_path) < before + 100_000:
                assert child.poll() is None
            child.kill()
    w = Writer(tmp_path)
    lines, position, missing = everything(reader, at_once=500)
    assert [int(line.split()[0]) for line in lines] == list(range(w.next))
    assert (position.number, missing) == (w.next, 0)


# A disk that is full


def test_a_full_disk_takes_all_lines_or_none_and_says_so(writer, reader):
    w = writer(segment_bytes=10**6)
    w.append(numbered(0, 3))
    with files_end_at(40), pytest.raises(LedgerError, match=r"cannot write to the spool .*File too large"):
        w.append(numbered(3, 5))
    assert (w.next, w.last) == (3, b"line 000002")
    assert everything(reader)[0] == numbered(0, 3)
    w.append(numbered(3, 5))
    assert everything(reader)[::2] == (numbered(0, 8), 0)


def test_room_is_reserved_before_a_reader_can_see_the_beginning(writer, monkeypatch, tmp_path):
    w = writer()
    w.append(numbered(0, 1))
    size = spool.size(tmp_path)

    def full(fd, offset, length):
        assert (offset, length) == (size, 24)
        raise OSError(errno.ENOSPC, "No space left on device")

    def never(fd, data):
        raise AssertionError("written without room")

    monkeypatch.setattr(libc, "reserve", full)
    with monkeypatch.context() as writing, pytest.raises(LedgerError, match=r"No space left .*see that there is room"):
        writing.setattr(os, "write", never)
        w.append(numbered(1, 2))
    assert w.next == 1


def test_a_file_system_that_cannot_reserve_is_written_to_all_the_same(writer, reader, monkeypatch):
    def untold(fd, offset, length):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(libc, "reserve", untold)
    writer().append(numbered(0, 3))
    assert everything(reader)[0] == numbered(0, 3)


def test_reserving_leaves_the_size_as_it_is(tmp_path):
    with open(tmp_path / "file", "wb") as stream:
        libc.reserve(stream.fileno(), 0, 100_000)
        found = os.fstat(stream.fileno())
        assert found.st_size == 0
        assert found.st_blocks * 512 >= 100_000
        with pytest.raises(OSError, match="Invalid argument"):
            libc.reserve(stream.fileno(), 0, 0)


def test_a_writer_that_may_not_begin_a_segment_says_so(tmp_path):
    directory = tmp_path / "stream"
    directory.mkdir()
    w = Writer(directory)
    directory.rmdir()
    directory.write_bytes(b"no directory")
    with pytest.raises(LedgerError, match=f"cannot write to the spool {directory} .*see its owner and mode"):
        w.append([b"x"])
    directory.unlink()
    w.append([b"x"])  # made anew, as it is where somebody has cleared the whole spool
    assert segments(directory)[0].path.read_bytes() == b"x\n"


def test_a_position_that_no_power_cut_explains_moves_no_writer(writer):
    writer().append(numbered(0, 3))
    assert writer(at_least=2**62).next == 3


def test_a_spool_that_was_cleared_by_hand_is_begun_anew(writer, reader, tmp_path):
    w = writer()
    w.append(numbered(0, 3))
    _, position, _ = everything(reader)
    for segment in segments(tmp_path):
        segment.path.unlink()
    w.append(numbered(3, 2))
    assert everything(reader, position) == (numbered(3, 2), Position(5, 3, 24), 0)


# Compressing and removing


def filled(w, lines=50):
    for start in range(0, lines, 5):
        w.append(numbered(start, 5))


def test_full_segments_do_not_include_the_one_with_the_last_line(writer):
    w = writer()
    assert w.full() == []
    filled(w)
    assert [s.first for s in w.full()] == [s.first for s in segments(w._directory)][:-1]
    again = writer()
    assert again.full() == w.full()
    assert again.last == b"line 000049"


def test_compressed_segments_read_the_same_from_every_position(writer, tmp_path):
    w = writer()
    filled(w)
    reader, positions = Reader(tmp_path), []
    position = reader.oldest()
    while (batch := reader.read(position, 1)).lines:
        positions.append(position)
        position = batch.position
    reader.close()
    for segment in w.full():
        pack(segment)
    assert [s.packed for s in segments(tmp_path)] == [True] * len(w.full()) + [False]
    for position in positions:
        reader = Reader(tmp_path)
        assert everything(reader, position) == (numbered(position.number, 50 - position.number), (50, 40, 120), 0)
        reader.close()


def test_a_segment_is_compressed_and_removed_under_its_reader(writer, reader):
    w = writer()
    filled(w)
    batch = reader.read(reader.oldest(), 2)
    first = w.full()[0]
    pack(first)
    batch = reader.read(batch.position, 2)
    assert batch.lines == numbered(2, 2)
    remove(segments(reader._directory)[0])
    lines, _, missing = everything(reader, batch.position)
    assert (lines, missing) == (numbered(4, 46), 0)  # it is still open


def test_lines_that_went_unread_are_counted_exactly(writer, reader, tmp_path):
    w = writer()
    filled(w)
    position = reader.read(reader.oldest(), 3).position
    reader.close()
    gone = w.full()[:2]
    for segment in gone:
        remove(segment)
    after = segments(tmp_path)[0].first
    assert everything(reader, position) == (numbered(after, 50 - after), Position(50, 40, 120), after - 3)


def test_lines_that_went_from_the_middle_are_counted_exactly(writer, reader, tmp_path):
    w = writer()
    filled(w)
    position = reader.oldest()
    middle = segments(tmp_path)[1:3]
    for segment in middle:
        remove(segment)
    lines, _, missing = everything(reader, position)
    assert missing == segments(tmp_path)[1].first - middle[0].first == 50 - len(lines)


def test_whoever_compressed_died_before_the_name(writer, reader, tmp_path):
    w = writer()
    filled(w)
    half = w.full()[0].path.with_suffix(".partial")
    half.write_bytes(b"\x1f\x8bhalf")
    assert everything(reader)[0] == numbered(0, 50)
    pack(w.full()[0])
    assert not half.exists()
    half.write_bytes(b"\x1f\x8bhalf")
    writer()
    assert not half.exists()


def test_whoever_compressed_died_before_the_first_form_was_removed(writer, reader, tmp_path):
    w = writer()
    filled(w)
    first = w.full()[0]
    data = first.path.read_bytes()
    pack(first)
    first.path.write_bytes(data)
    assert everything(reader)[0] == numbered(0, 50)
    again = segments(tmp_path)[0]
    assert again.packed
    remove(again)
    assert not first.path.exists()
    assert segments(tmp_path)[0].first > 0


def test_a_full_disk_leaves_a_segment_as_it_was(writer, tmp_path):
    w = writer(segment_bytes=1000)
    w.append([os.urandom(500).hex().encode()])
    w.append([b"next"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with files_end_at(64), pytest.raises(OSError, match="File too large"):
        pack(w.full()[0])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_compressed_segment_is_as_readable_as_it_was(writer, tmp_path):
    group = os.getgid()
    w = writer(group=group)
    filled(w)
    raw = w.full()[0].path.stat()
    assert raw.st_mode & 0o777 == 0o640
    pack(w.full()[0])
    packed = segments(tmp_path)[0].path.stat()
    assert (packed.st_mode, packed.st_gid) == (raw.st_mode, group)


def test_without_a_group_nobody_else_reads_it(writer, tmp_path):
    writer().append([b"x"])
    assert segments(tmp_path)[0].path.stat().st_mode & 0o777 == 0o600


def test_removing_what_is_gone_is_fine(writer):
    w = writer()
    filled(w)
    first = w.full()[0]
    remove(first)
    remove(first)


# Files that are not what they were


def test_a_damaged_compressed_segment_gives_what_is_before_the_damage(writer, reader, tmp_path):
    w = writer(segment_bytes=500_000)
    noise = [os.urandom(600).hex().encode() for _ in range(500)]
    w.append(noise)
    w.append([b"next"])
    pack(w.full()[0])
    path = segments(tmp_path)[0].path
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) // 2])
    lines, position, missing = everything(reader)
    assert 0 < len(lines) - 1 < 500
    assert lines == [*noise[: len(lines) - 1], b"next"]
    assert (position.number, missing) == (501, 501 - len(lines))


@pytest.mark.parametrize("data", [b"", b"no gzip at all", gzip.compress(b"half a line")])
def test_a_compressed_segment_without_a_line_stops_nobody(writer, reader, tmp_path, data):
    w = writer()
    filled(w)
    pack(w.full()[0])
    segments(tmp_path)[0].path.write_bytes(data)
    second = segments(tmp_path)[1].first
    assert everything(reader)[::2] == (numbered(second, 50 - second), second)
    assert writer().next == 50


def test_an_empty_compressed_segment_does_not_hide_a_new_one_of_its_number(writer, reader, tmp_path):
    (tmp_path / f"{0:020d}.jsonl.gz").write_bytes(b"")
    writer().append(numbered(0, 2))
    assert everything(reader)[0] == numbered(0, 2)


def test_a_position_beyond_the_end_waits_for_what_is_new(writer, reader, tmp_path):
    """After a power cut a file may be shorter than what was read of it."""
    writer().append(numbered(0, 8))
    _, position, _ = everything(reader)
    reader.close()
    os.truncate(segments(tmp_path)[0].path, 30)
    assert reader.read(position, 10) == ([], position, 0)
    w = writer(at_least=position.number)
    w.append(numbered(8, 1))
    assert everything(reader, position) == (numbered(8, 1), Position(9, 8, 12), 0)


def test_a_position_in_a_segment_that_never_reached_the_disk(writer, reader):
    writer().append(numbered(0, 8))
    position = Position(10, 9, 12)
    assert everything(reader, position)[0] == []
    writer(at_least=10).append([b"new"])
    assert everything(reader, position) == ([b"new"], Position(11, 10, 4), 0)


def test_a_position_in_a_segment_that_is_cut_otherwise(writer, reader):
    """Only the number is believed then."""
    writer(segment_bytes=10**6).append(numbered(0, 8))
    assert everything(reader, Position(5, 5, 0)) == (numbered(5, 3), Position(8, 0, 96), 0)


def test_numbers_that_went_back_are_read_and_not_waited_for(writer, reader):
    writer().append(numbered(0, 3))
    assert everything(reader, Position(7, 0, 84))[0] == []
    writer().append([b"again three"])
    assert everything(reader, Position(7, 0, 84)) == ([b"again three"], Position(4, 3, 12), 0)


def test_names_that_are_none_of_its_own_are_passed_over(writer, reader, tmp_path):
    writer().append(numbered(0, 2))
    for name in ("1.jsonl", f"{9:020d}.jsonl.old", f"{9:020d}.jsonl\n", "x", f"{9:020d}.gz"):
        (tmp_path / name).write_bytes(b"no line of a spool\n")
    assert everything(reader)[0] == numbered(0, 2)
    assert writer().next == 2


# All of it in any order


class Spool(RuleBasedStateMachine):
    """One stream with two readers; writers that die, segments that are compressed and removed."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(os.environ["SPOOL_UNDER_TEST"]) / os.urandom(8).hex()
        self.directory.mkdir()
        self.writer = Writer(self.directory, segment_bytes=40)
        self.written = 0
        self.readers = [Reader(self.directory), Reader(self.directory)]
        self.at = [Position(), Position()]
        self.missed = [0, 0]
        self.removed: set[int] = set()

    @rule(lines=st.lists(st.integers(0, 30), min_size=1, max_size=6))
    def append(self, lines):
        self.writer.append([b"%d " % (self.written + n) + b"x" * length for n, length in enumerate(lines)])
        self.written += len(lines)

    @rule(torn=st.sampled_from([b"", b"7", b'{"half']))
    def another_writer(self, torn):
        self.writer.close()
        if torn and (found := segments(self.directory)) and not found[-1].packed:
            with open(found[-1].path, "ab") as stream:
                stream.write(torn)
        self.writer = Writer(self.directory, segment_bytes=40)
        assert self.writer.next == self.written

    @precondition(lambda self: self.writer.full())
    @rule(data=st.data(), dies=st.booleans())
    def compress(self, data, dies):
        segment = data.draw(st.sampled_from(self.writer.full()))
        if not segment.packed:
            raw = segment.path.read_bytes()
            pack(segment)
            if dies:
                segment.path.write_bytes(raw)

    @precondition(lambda self: self.writer.full())
    @rule(data=st.data())
    def take(self, data):
        segment = data.draw(st.sampled_from(self.writer.full()))
        self.removed.update(int(line.split()[0]) for line in spool.content(segment).split(b"\n")[:-1])
        remove(segment)

    @rule(which=st.integers(0, 1), lines=st.integers(1, 9))
    def read(self, which, lines):
        before = self.at[which]
        batch = self.readers[which].read(before, lines)
        assert len(batch.lines) <= lines
        numbers = [int(line.split()[0]) for line in batch.lines]
        assert numbers == list(range(batch.position.number - len(numbers), batch.position.number))
        assert batch.position.number == before.number + batch.missing + len(numbers)
        gone = range(before.number, before.number + batch.missing)
        assert self.removed.issuperset(gone)
        self.at[which] = batch.position

    @rule(which=st.integers(0, 1))
    def another_reader(self, which):
        self.readers[which].close()
        self.readers[which] = Reader(self.directory)

    @invariant()
    def knows_the_last_line(self):
        if self.written:
            assert int(self.writer.last.split()[0]) == self.written - 1
        assert self.writer.next == self.written

    def teardown(self):
        for reader, position in zip(self.readers, self.at, strict=True):
            _, position, _ = everything(reader, position)
            assert position.number == self.written
            reader.close()
        self.writer.close()


def test_any_order(tmp_path, monkeypatch):
    monkeypatch.setenv("SPOOL_UNDER_TEST", str(tmp_path))
    run_state_machine_as_test(Spool, settings=settings(max_examples=120, stateful_step_count=30, deadline=None))
