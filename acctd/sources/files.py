"""Records in files: lines of JSON as a sink writes them and `acctd ledger archive` does, and bare records.

Read as a stream, in pieces of a bounded size, so that it does not matter how much there is. A line that is no record
and should be one is told with its file and number; only at the very end of a file that has no newline there it is
somebody's who is still writing. Events and samples are skipped. Whether a record was seen before is not known here.
Whoever may write into a directory of records names the files: their names are shown as wording.clean() has them.
"""

import io
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
from msgspec import Meta

from acctd.errors import ExhaustedError, NotFoundError, NotPermittedError, UsageError
from acctd.model import INT64_MAX
from acctd.sources.looked import Looked, digest
from acctd.sources.unpack import MAGIC, TORN, Unpacked, skip
from acctd.usage import Usage
from acctd.wording import clean

BATCH = 2048
"""Records handed on at a time."""

PIECE = 64 * 2**20
"""Bytes of a plain file that one reader takes; a packed one cannot be parted."""

LINE_MOST = 16 * 2**20
"""Bytes of a line, or of a file that holds one record over many lines."""

_OFFSET = 40  # bits of a place, which is one of SQLite's integers; a file has 1 TiB at most
FILES_MOST = 2 ** (63 - _OFFSET)
"""Files that one bill is made from."""

_YEAR_9999 = 253402300799.0
_COUNT_MOST = 2**80  # ns of a million cores for a million years; pricing reckons with many more digits

_Count = Annotated[int, Meta(ge=0, le=INT64_MAX)]
_Large = Annotated[int, Meta(ge=0)]
WRONG = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What is no record raises one of these."""


class _Body(Usage, frozen=True, kw_only=True):
    """A Usage of which no number is out of the world, which a signed one never is."""

    started: Annotated[float, Meta(ge=0, le=_YEAR_9999)]
    wall_ns: _Count
    totals: dict[str, dict[str, _Count]]


class _LargeBody(_Body, frozen=True, kw_only=True):
    """One with a counter that msgspec cannot bound: 1000 cores come to 2^63 ns in 107 days."""

    totals: dict[str, dict[str, _Large]]


class _Line(msgspec.Struct):
    """frames.RecordFrame, or another kind; of a bare record neither key is there."""

    kind: str | None = None
    body: msgspec.Raw = msgspec.Raw()


_line = msgspec.json.Decoder(_Line)
_body = msgspec.json.Decoder(_Body)
_large_body = msgspec.json.Decoder(_LargeBody)


@dataclass(frozen=True, slots=True)
class File:
    """One file as it was found."""

    number: int
    path: Path
    size: int  # bytes; what is written later is of another bill
    identity: tuple[int, int]
    packed: bool


@dataclass(slots=True)
class Batch:
    """Some records, where each stands (see place()), and their digests."""

    usages: list[Usage]
    places: list[int]
    digests: list[bytes]
    size: int = 0  # bytes read for them


def find(directories: Iterable[Path]) -> list[File]:
    """Every ordinary file below; a name that begins with a dot is nobody's business. Raises NotFoundError."""
    found: dict[tuple[int, int], File] = {}
    for top in directories:
        for path in _walk(top):
            try:
                with _opened(path) as stream:
                    about = os.fstat(stream.fileno())
                    head = stream.read(2)
            except FileNotFoundError:
                raise _moved(path) from None
            identity = about.st_dev, about.st_ino
            if identity not in found and about.st_size:
                if len(found) == FILES_MOST:
                    raise UsageError(f"there are more than {FILES_MOST} files; put many records into one")
                found[identity] = File(len(found), path, about.st_size, identity, head == MAGIC)
    return list(found.values())


def _walk(top: Path) -> Iterator[Path]:
    try:
        mode = os.stat(top).st_mode
    except (OSError, ValueError) as e:
        raise NotFoundError(f"{_named(top)}: {getattr(e, 'strerror', e)}; name a directory of records") from None
    if not stat.S_ISDIR(mode):
        yield top
        return

    def refuse(error: OSError) -> None:
        raise NotPermittedError(f"{_named(error.filename)}: {error.strerror}; see its owner and mode") from error

    for place, directories, names in os.walk(top, onerror=refuse):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for name in sorted(names):
            path = Path(place, name)
            if not name.startswith(".") and _is_file(path):
                yield path


def _is_file(path: Path) -> bool:
    """Also by a link; what is a file under two names is read once."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as e:
        raise NotFoundError(f"{_named(path)}: {e.strerror}; remove it, or what it leads to") from e


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a file: the lines that begin in [start, end)."""

    file: File
    start: int
    end: int
    sought: bytes = b""  # some bytes of a line: whether there is one with them is told

    def batches(self, looked: Looked) -> Iterator[Batch]:
        """The records in it; what is wrong with lines is said to `looked`."""
        batch, before = Batch([], [], []), self.start
        for offset, usage, body in self._records(looked):
            batch.usages.append(usage)
            batch.places.append(place(self.file, offset))
            batch.digests.append(body)
            if len(batch.usages) == BATCH:
                if not self.file.packed:  # of a packed file it is not known before its end
                    batch.size, before = offset - before, offset
                yield batch
                batch = Batch([], [], [])
        batch.size = self.file.size if self.file.packed else max(0, self.end - before)
        yield batch

    def _records(self, looked: Looked) -> Iterator[tuple[int, Usage, bytes]]:
        for offset, line in self._lines(looked):
            try:
                found = decoded(line)
            except WRONG as e:
                if offset == 0 and (whole := self._whole()) is not None:
                    yield 0, *whole
                    return
                if offset and line.startswith(b"{") and not line.endswith(b"\n") and not self.file.packed:
                    looked.unfinished.append(str(self.file.path))
                else:
                    looked.complain(partial(_is_none, self.file, offset, str(e)))
                continue
            if self.sought and self.sought in line:
                looked.found = True
            if found is not None:
                yield offset, *found

    def _lines(self, looked: Looked) -> Iterator[tuple[int, bytes]]:
        """Offset and line, of those that hold anything."""
        file, number, at = self.file, 0, self.start
        try:
            with _content(file) as stream:
                if at:
                    stream.seek(at - 1)
                    at = self._past_the_end_of_a_line(stream, at - 1)
                while at < self.end or file.packed:
                    line = stream.readline(LINE_MOST)
                    if not line:
                        return
                    start, at, number = at, at + len(line), number + 1
                    if len(line) == LINE_MOST and not line.endswith(b"\n"):
                        looked.complain(partial(_is_long, file, start))
                        at = self._past_the_end_of_a_line(stream, at)
                    elif not line.isspace():
                        yield start, line
        except TORN as e:
            read = f"what is behind line {number} of it is not in the bill"
            looked.torn.append(f"{_named(file.path)} is packed and not whole ({e}); {read}")

    def _past_the_end_of_a_line(self, stream: BinaryIO, at: int) -> int:
        """Where it is then. What lies behind the end of this piece is not looked at."""
        while (at < self.end or self.file.packed) and (part := stream.readline(LINE_MOST)):
            at += len(part)
            if part.endswith(b"\n"):
                break
        return at

    def _whole(self) -> tuple[Usage, bytes] | None:
        """Of a file that is one record over many lines, as `acctd run --json` writes it."""
        try:
            with _content(self.file) as stream:
                text = stream.read(LINE_MOST + 1)
            found = decoded(text) if len(text) <= LINE_MOST else None
        except (*WRONG, *TORN):
            return None
        return found


def pieces(files: Iterable[File], sought: bytes = b"") -> list[Piece]:
    """What readers can take one by one, the largest first: so they end together."""
    found = []
    for file in files:
        step = file.size if file.packed else PIECE
        found += [Piece(file, start, min(start + step, file.size), sought) for start in range(0, file.size, step)]
    return sorted(found, key=lambda piece: piece.start - piece.end)


def decoded(line: bytes) -> tuple[Usage, bytes] | None:
    """What is billed of a record, and its digest; None for a line of another kind. Raises msgspec.DecodeError."""
    found = _line.decode(line)
    if found.kind is None:
        text = line.strip()
        return usage_of(text), digest(text)
    if found.kind != "record":
        return None
    return usage_of(found.body), digest(memoryview(found.body))


def usage_of(body: bytes | msgspec.Raw) -> Usage:
    """Of a record's JSON. Raises what WRONG has, also for numbers that no agent signs."""
    try:
        return _body.decode(body)
    except msgspec.ValidationError:
        usage = _large_body.decode(body)
        if any(count > _COUNT_MOST for labels in usage.totals.values() for count in labels.values()):
            raise
        return usage


def place(file: File, offset: int) -> int:
    """File and offset in one number."""
    return file.number << _OFFSET | offset


def at(files: list[File], number: int) -> tuple[File, int]:
    """The reverse of place()."""
    return files[number >> _OFFSET], number & (1 << _OFFSET) - 1


def again(file: File, offset: int) -> Usage:
    """A record that was read before."""
    try:
        with _content(file) as stream:
            skip(stream, offset) if file.packed else stream.seek(offset)
            found = decoded(stream.readline(LINE_MOST))
    except WRONG:
        with _content(file) as stream:
            found = decoded(stream.read(LINE_MOST))
    if found is None:
        raise _moved(file.path)
    return found[0]


def where(file: File, offset: int) -> str:
    """FILE:LINE, for a sentence. Reads all before it."""
    number, left = 1, offset
    with _content(file) as stream:
        while left > 0 and (text := stream.read(min(left, 2**20))):
            number += text.count(b"\n")
            left -= len(text)
    return f"{_named(file.path)}:{number}"


def _is_none(file: File, offset: int, why: str) -> str:
    return f"{where(file, offset)} is no record ({why})"


def _is_long(file: File, offset: int) -> str:
    return f"{where(file, offset)} has more than {LINE_MOST} bytes in a line"


def _content(file: File) -> BinaryIO:
    """Unpacked, as far as it was there when it was found. Raises ExhaustedError for another file in its place."""
    try:
        stream = _opened(file.path)
    except FileNotFoundError:
        raise _moved(file.path) from None
    about = os.fstat(stream.fileno())
    if (about.st_dev, about.st_ino) != file.identity or about.st_size < file.size:
        stream.close()
        raise _moved(file.path)
    return io.BufferedReader(Unpacked(stream), 2**18) if file.packed else stream


def _opened(path: Path) -> BinaryIO:
    try:
        # Not blocking: what was a file a moment ago may be a pipe by now.
        stream = open(path, "rb", buffering=2**18, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except FileNotFoundError:
        raise
    except PermissionError as e:
        raise NotPermittedError(f"{_named(path)}: {e.strerror}; see its owner and mode") from e
    except OSError as e:
        raise UsageError(f"{_named(path)} cannot be read ({e.strerror}); name a directory of records") from e
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise UsageError(f"{_named(path)} is neither a file nor a directory; name a directory of records")
    return stream


def _moved(path: Path) -> ExhaustedError:
    return ExhaustedError(f"{_named(path)} was moved or cut while it was read; ask again when that is over")


def _named(path: Path | str) -> str:
    return clean(str(path))
