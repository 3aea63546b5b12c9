"""The spool: numbered lines on disk between the agent, which alone writes and removes, and exporters, which read.

A stream is a directory of segments, files named by the number of their first line. A line is whole once its newline is
there; what a dead writer left after the last newline never was. Segments that are full and still wanted are compressed.
Knows nothing of what is in a line, nor who reads how far; a reader keeps its position by itself.
"""

import errno
import gzip
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NamedTuple

from msgspec import Meta

from acctd.errors import LedgerError
from acctd.kernel import libc, private

SEGMENT_BYTES = 8 * 2**20
_PARTIAL = ".partial"
_LOST_MOST = 1_000_000  # lines that a reader may have seen, and a power cut taken
_READ = 2**20
_PIECE = 2**12  # what is lost of a damaged one at most, as compressed
_NAME = re.compile(r"(\d{20})\.jsonl(\.gz)?\Z")
_GZIP = 31  # zlib's window bits for a gzip header and the largest window
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNTOLD = (errno.EOPNOTSUPP, errno.ENOSYS)  # of a file system that cannot reserve room


_Number = Annotated[int, Meta(ge=0, le=2**62)]
"""Also where it is read from a file that another user wrote: it must do for a segment's name, and leave room above."""


class Segment(NamedTuple):
    """One file of a stream."""

    first: int  # number of its first line
    path: Path
    packed: bool


class Position(NamedTuple):
    """How far a reader is: the number of the next line, and where that was seen to be."""

    number: _Number = 0
    segment: _Number = 0
    offset: _Number = 0  # bytes into the segment as it was written, before it was compressed


class Batch(NamedTuple):
    """Lines read, the position after them, and how many before them had gone already."""

    lines: list[bytes]
    position: Position
    missing: int


def segments(directory: Path) -> list[Segment]:
    """A stream's files, oldest first; none where there is no such directory. Of two forms of one the compressed."""
    found: dict[int, Segment] = {}
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    for name in names:
        if match := _NAME.match(name):
            found[int(match[1])] = Segment(int(match[1]), directory / name, match[2] is not None)
    return [found[first] for first in sorted(found)]


def content(segment: Segment) -> bytes:
    """What is in it, as it was written; of a damaged compressed one what is before the damage.

    Raises FileNotFoundError where it is gone, OSError where it cannot be read.
    """
    data = segment.path.read_bytes()
    if not segment.packed:
        return data
    pieces, unpacker = [], zlib.decompressobj(_GZIP)
    for start in range(0, len(data), _PIECE):
        try:
            pieces.append(unpacker.decompress(data[start : start + _PIECE]))
        except zlib.error:
            break
    return b"".join(pieces)


class Writer:
    """The writing end of one stream. A new writer begins a new segment: what a dead one left is not touched."""

    def __init__(
        self, directory: Path, *, at_least: int = 0, group: int | None = None, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        self._directory, self._group, self._segment_bytes = directory, group, segment_bytes
        self._fd: int | None = None
        self._size = 0
        self._last: bytes | None = None
        self.next = 0
        self._kept = -1  # the newest segment with a line in it
        for leftover in directory.glob(f"*{_PARTIAL}"):
            leftover.unlink(missing_ok=True)  # whoever compressed it died
        for segment in reversed(segments(directory)):
            lines = content(segment).split(b"\n")[:-1]
            self.next = max(self.next, segment.first + len(lines))
            if lines:
                self._last, self._kept = lines[-1], segment.first
                break
        if not self.next or at_least - self.next <= _LOST_MOST:  # what is beyond that, no power cut has done
            self.next = max(self.next, at_least)

    @property
    def last(self) -> bytes | None:
        """The newest line, also a dead writer's; None where there is none."""
        return self._last

    def append(self, lines: Sequence[bytes]) -> None:
        """Write whole lines, all or none. Raises LedgerError where the disk does not take them."""
        if not lines:
            return
        data = b"\n".join(lines) + b"\n"
        try:
            fd = self._fd
            # Without a name: somebody has cleared the spool by hand, and nobody would ever read it.
            if fd is None or self._size >= self._segment_bytes or not os.fstat(fd).st_nlink:
                fd = self._begin_segment()
            self._write(fd, data)
        except OSError as e:
            hint = "see that there is room" if e.errno in _FULL else "see its owner and mode"
            raise LedgerError(f"cannot write to the spool {self._directory} ({e.strerror}); {hint}") from e
        if not self._size:
            self._kept = self.next
        self._size += len(data)
        self.next += len(lines)
        self._last = lines[-1]

    def _begin_segment(self) -> int:
        if not self._directory.exists():
            make_directory(self._directory, self._group)  # somebody has cleared the spool by hand
        path = self._directory / f"{self.next:020d}.jsonl"
        # There may be one of a dead writer's, without a whole line; somebody may have it open.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(path, flags, 0o600)
        try:
            if self._group is not None:
                os.fchown(fd, -1, self._group)
                os.fchmod(fd, 0o640)
            path.with_suffix(".jsonl.gz").unlink(missing_ok=True)  # likewise without a line; it would hide this one
        except OSError:
            os.close(fd)
            raise
        self.close()
        self._fd, self._size = fd, 0
        return fd

    def _write(self, fd: int, data: bytes) -> None:
        # A full disk would take the beginning, and a reader would have seen whole lines of it before it was cut off.
        try:
            libc.reserve(fd, self._size, len(data))
        except OSError as e:
            if e.errno not in _UNTOLD:
                raise
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(fd, view) :]
        except OSError:
            os.ftruncate(fd, self._size)
            raise

    def full(self) -> list[Segment]:
        """Segments that are written no more, oldest first; not the newest one with a line, whose `last` is wanted."""
        return [segment for segment in segments(self._directory) if segment.first < self._kept]

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def make_directory(directory: Path, group: int | None) -> None:
    """The place of a stream, which root alone writes, and a group reads. Raises OSError and AcctdError."""
    private.make(directory.parent)
    directory.mkdir(mode=0o700, exist_ok=True)
    if group is not None:
        os.chown(directory, -1, group)
        directory.chmod(0o750)


def size(directory: Path) -> int:
    """Bytes on disk of a stream."""
    total = 0
    for segment in segments(directory):
        with suppress(FileNotFoundError):
            total += segment.path.stat().st_size
    return total


def backwards(directory: Path) -> Iterator[bytes]:
    """All lines of a stream, the newest first. Raises OSError."""
    for segment in reversed(segments(directory)):
        yield from reversed(content(segment).split(b"\n")[:-1])


def backlog(directory: Path, position: Position) -> int:
    """Bytes on disk of a stream from a position on; of compressed segments as they are."""
    waiting = 0
    for segment in segments(directory):
        if segment.first >= position.segment:
            with suppress(FileNotFoundError):
                read = position.offset if segment.first == position.segment else 0
                waiting += max(0, segment.path.stat().st_size - read)
    return waiting


def remove(segment: Segment) -> None:
    """Both forms, should whoever compressed it have died in between. Gone already is fine. Raises OSError."""
    raw = segment.path.with_name(f"{segment.first:020d}.jsonl")
    raw.unlink(missing_ok=True)
    raw.with_suffix(".jsonl.gz").unlink(missing_ok=True)


def pack(segment: Segment) -> None:
    """Compress a full segment. Whoever is reading it reads on. Raises OSError; the segment is as it was then."""
    packed = segment.path.with_suffix(".jsonl.gz")
    partial = segment.path.with_suffix(_PARTIAL)
    try:
        data = gzip.compress(segment.path.read_bytes(), compresslevel=1)
        partial.unlink(missing_ok=True)
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as stream:
            stream.write(data)
            stream.flush()
            found = segment.path.stat()
            os.fchown(fd, -1, found.st_gid)
            os.fchmod(fd, found.st_mode & 0o777)
            os.fsync(fd)  # the only copy from now on
        partial.rename(packed)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    segment.path.unlink(missing_ok=True)


class Reader:
    """The reading end of one stream. Keeps the file that is read open; one reader is for one thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._first = -1  # of the segment that is open
        self._fd: int | None = None  # of one that is not compressed
        # Whole lines that were read ahead, and where they begin. Never the piece of a line: its writer may be dead, and
        # another may begin here anew.
        self._ahead, self._start = b"", 0

    def read(self, position: Position, lines: int) -> Batch:
        """At most so many whole lines from a position on; none where there is nothing new. Raises OSError."""
        missing = 0
        while True:
            if self._first != position.segment:
                position, lost = self._open(position)
                missing += lost
                if self._first < 0:
                    return Batch([], position, missing)
            found, end = self._lines(position.offset, lines)
            if found:
                number = position.number + len(found)
                return Batch(found, Position(number, position.segment, end), missing)
            after = next((s for s in segments(self._directory) if s.first > position.segment), None)
            if after is None:
                return Batch([], position, missing)
            # A newer one was there before this look, so this one is written no more: look once again, then go on.
            found, end = self._lines(position.offset, lines)
            if found:
                return Batch(found, Position(position.number + len(found), position.segment, end), missing)
            missing += max(0, after.first - position.number)
            position = Position(after.first, after.first, 0)

    def oldest(self) -> Position:
        """The first line there still is: for whoever is new here."""
        found = segments(self._directory)
        return Position(found[0].first, found[0].first, 0) if found else Position()

    def newest(self) -> Position:
        """The beginning of the newest segment: for whoever wants what is now."""
        found = segments(self._directory)
        return Position(found[-1].first, found[-1].first, 0) if found else Position()

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
        self._fd, self._first = None, -1
        self._ahead, self._start = b"", 0

    def _open(self, position: Position) -> tuple[Position, int]:
        """Open the segment that has a line, or the next one there is; the position in it, and how many lines are gone.

        self._first stays below 0 where there is none.
        """
        self.close()
        for _ in range(10):  # one may be removed, or compressed, between look and open
            found = segments(self._directory)
            at = next((s for s in found if s.first == position.segment), None)
            if at is None:
                # The one in which the line is, if it is anywhere; else the first after it.
                at = next((s for s in reversed(found) if s.first <= position.number), found[0] if found else None)
            if at is None:
                return position, 0
            try:
                if at.packed:
                    data = content(at)
                    self._ahead = data[: data.rfind(b"\n") + 1]
                else:
                    self._fd = os.open(at.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                continue
            self._first = at.first
            if at.first == position.segment:
                return position, 0
            if at.first >= position.number:
                return Position(at.first, at.first, 0), at.first - position.number
            # Its line is in here, and where is not known.
            _, end = self._lines(0, position.number - at.first)
            return Position(position.number, at.first, end), 0
        return position, 0

    def _lines(self, offset: int, most: int) -> tuple[list[bytes], int]:
        """Whole lines from an offset on, and the offset after them."""
        found: list[bytes] = []
        while len(found) < most:
            at = offset - self._start
            if not 0 <= at < len(self._ahead):
                if not self._look(offset):
                    break
                at = 0
            end = self._ahead.index(b"\n", at)
            found.append(self._ahead[at:end])
            offset += end + 1 - at
        return found, offset

    def _look(self, offset: int) -> bool:
        """Read ahead from an offset on; whether there is a whole line."""
        if self._fd is None:
            return False
        pieces: list[bytes] = []
        at = offset
        while piece := os.pread(self._fd, _READ, at):
            if end := piece.rfind(b"\n") + 1:
                self._ahead, self._start = b"".join([*pieces, piece[:end]]), offset
                return True
            pieces.append(piece)
            at += len(piece)
        return False
