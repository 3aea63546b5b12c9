"""The ledger's old records in files: one a month, packed lines of JSON as exporters/jsonlines.py writes them.

A file has records of consecutive numbers with their digests, so that the chain of signatures can be followed from the
first file on into the ledger. What is there is compared, and never written again. Records leave the ledger only after
they were read back from files that are on stable storage: who dies in between loses nothing, and does it again.
"""

import gzip
import heapq
import os
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from acctd import spool
from acctd.errors import AcctdError, NotFoundError, NotPermittedError, UsageError
from acctd.frames import RECORDS, Mark, RecordFrame, decode
from acctd.ledger import Ledger, fits
from acctd.sinks import ExportConfig
from exporters.jsonlines import line

_AT_ONCE = 1000  # records taken out in one transaction: whoever else writes to the ledger does so in between
_NAME = re.compile(r"(?P<node>.+)-(?P<month>\d{4}-\d\d)-(?P<first>\d+)\.jsonl\.gz\Z")
_MONTH = re.compile(r"[1-9]\d{3}-(0[1-9]|1[0-2])\Z")
_YEAR_9999 = 253402300799.0
_BROKEN = (EOFError, gzip.BadGzipFile, zlib.error, msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

Signed = tuple[int, str, bytes]
"""Number, digest and JSON of a record."""

Done = Callable[[int, int], object]
"""Told of records and bytes that were dealt with."""


class Body(msgspec.Struct):
    """Of a record as much as is asked here."""

    id: str
    node: str
    started: float
    wall_ns: int
    ended: float  # a label

    @classmethod
    def of(cls, body: bytes) -> "Body":
        """Raises AcctdError for what nobody has signed."""
        try:
            return msgspec.json.decode(body, type=cls)
        except (msgspec.MsgspecError, UnicodeDecodeError) as e:
            raise AcctdError(f"a record is altered beyond reading ({e}); see `acctd ledger verify`") from e


@dataclass(frozen=True, slots=True)
class Month:
    """Records of consecutive numbers that go into one month's file."""

    month: str  # YYYY-MM, UTC
    node: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be archived."""

    months: tuple[Month, ...]
    stays: str = ""  # a sentence, where a record of a time to come keeps others back

    @property
    def records(self) -> int:
        return self.months[-1].last - self.months[0].first + 1 if self.months else 0


def beginning(month: str, now: datetime) -> datetime:
    """When a month begins, in UTC. Raises UsageError for what is none, and for one that has not begun."""
    if not _MONTH.match(month):
        raise UsageError(f"--before {month!r} is no month; write it like 2026-01")
    begin = datetime(int(month[:4]), int(month[5:]), 1, tzinfo=UTC)
    if begin > now:
        raise UsageError(f"--before {month} has not begun; whole months are archived, so use {now:%Y-%m} at most")
    return begin


def plan(ledger: Ledger, before: datetime, now: datetime, done: Done) -> Plan:
    """The records before the first one of a job that ended later; what is signed after that one stays, too.

    One that was signed after a record of the next month goes into that month's file. Raises AcctdError for a record
    that is not as it was signed, and for one that is missing.
    """
    months: list[Month] = []
    at, previous = ledger.anchor()
    for number, digest, body in ledger.stream():
        if number != at + 1 or not fits(previous, body, digest):
            raise AcctdError(f"record {number} or one before it is not as it was signed; see `acctd ledger verify`")
        at, previous = number, digest
        read = Body.of(body)
        ended = read.started + read.wall_ns / 1e9
        if ended >= before.timestamp():
            return Plan(tuple(months), _early(number, read.id, ended, now))
        month = f"{datetime.fromtimestamp(max(0.0, ended), UTC):%Y-%m}"
        if not months or month > months[-1].month:
            months.append(Month(month, read.node, number, number))
        months[-1] = replace(months[-1], last=number)
        done(1, len(body))
    return Plan(tuple(months))


def write(ledger: Ledger, month: Month, directory: Path, done: Done) -> list[Path]:
    """Write those of a month's records that no file there has; the files, which are on stable storage.

    Raises AcctdError for files that hold other records, and for a disk that does not take them.
    """
    written = []
    missing = _missing(ledger, month, directory, done)
    row = next(missing, None)
    while row is not None:
        path = directory / f"{_plain(month.node)}-{month.month}-{row[0]}.jsonl.gz"
        row = _write(path, row, missing)
        written.append(path)
    return written


def take_out(ledger: Ledger, months: Iterable[Month], directory: Path, upto: int, done: Done) -> int:
    """Remove the records up to a number, as far as they are in files, which are read for it; how many."""
    removed = 0
    for month in months:
        last = min(month.last, upto)
        for row in _missing(ledger, month, directory, done):
            last = min(last, row[0] - 1)
            break
        for end in (*range(month.first + _AT_ONCE - 1, last, _AT_ONCE), last):
            began = time.monotonic()
            removed += ledger.take_out(end)
            time.sleep(min(0.1, time.monotonic() - began))  # for others, who wait for their turn
        if last < month.last:
            break
    return removed


def spooled(config: ExportConfig, ledger: Ledger) -> int | None:
    """The last record that the spool for exporters has: later ones are only in the ledger. None where none is needed.

    A spool that is not begun will begin with what is signed then. Raises AcctdError where the spool cannot be read.
    """
    if not config.active or not spool.segments(config.spool_dir / RECORDS):
        return None
    try:
        for text in spool.backwards(config.spool_dir / RECORDS):
            with suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                frame = decode(text)
                if isinstance(frame, RecordFrame | Mark):
                    return frame.number if not frame.number or ledger.digest(frame.number) == frame.digest else 0
    except OSError as e:
        raise AcctdError(f"cannot read the spool {config.spool_dir}: {e.strerror}; see export.spool_dir") from e
    return 0


@dataclass(frozen=True, slots=True)
class Chain:
    """Records of one node in files, all as they were signed, but that nothing may be known of the first."""

    node: str
    first: int
    last: int
    joins: bool  # whether it has the record that the ledger goes on from
    proved: bool  # whether the first one is as it was signed: it is, if the digest of the one before is known


def follow(directory: Path, ledger: Ledger, done: Done) -> list[Chain]:
    """Follow the chain of digests through each node's files, up to the record that left the ledger last.

    Raises AcctdError for the first record that is not as it was signed, for one that is missing, and where two files
    differ in one.
    """
    upto = ledger.anchor()
    chains: list[Chain] = []
    ends: dict[int, list[str]] = {0: [""]}  # digests that a first record may follow
    begins: list[Signed] = []
    for node in sorted({match["node"] for match, _ in _names(directory)}):
        begin: Signed | None = None
        last: Signed = (0, "", b"")
        joins = False
        for path, row in _merged(directory, node):
            number, signed, body = row
            if number == last[0]:
                if row != last:
                    raise AcctdError(f"{path} has another record {number} than a file beside it; restore both")
                continue
            if begin is None:
                begin = row  # what it follows may stand somewhere else
            elif number != last[0] + 1:
                raise AcctdError(f"record {last[0] + 1} is missing before {path}; restore its file")
            elif not fits(last[1], body, signed):
                raise _altered(row, f"in {path}")
            last = row
            joins = joins or (number, signed) == upto
            done(1, len(body))
        if begin is not None:
            begins.append(begin)
            chains.append(Chain(node, begin[0], last[0], joins, proved=False))
            ends.setdefault(last[0], []).append(last[1])
    if upto[0] and not any(chain.joins for chain in chains):
        raise AcctdError(f"record {upto[0]}, after which the ledger goes on, is in no file of {directory}; restore it")
    return [_proved(chain, begin, ends, ledger) for chain, begin in zip(chains, begins, strict=True)]


def _proved(chain: Chain, begin: Signed, ends: dict[int, list[str]], ledger: Ledger) -> Chain:
    """Hold the first record of a chain against the one before, if that is known: a node may have been renamed."""
    number, signed, body = begin
    # Another node's ledger may have given the same number, and then says nothing of this one.
    known = ledger.digest(number - 1) if ledger.digest(number) == signed else None
    if any(fits(before, body, signed) for before in (known, *ends.get(number - 1, ()))):
        return replace(chain, proved=True)
    if number == 1 or known is not None:
        raise _altered(begin, f"of {chain.node}")
    return chain


def _altered(row: Signed, where: str) -> AcctdError:
    return AcctdError(
        f"record {row[0]} of job {Body.of(row[2]).id!r} {where} was altered after it was signed; restore it"
    )


def _merged(directory: Path, node: str) -> Iterator[tuple[Path, Signed]]:
    """A node's records in order of their numbers, those of files that overlap side by side; each with its file."""
    waiting = [(int(match["first"]), directory / name) for match, name in _names(directory) if match["node"] == node]
    waiting.sort(reverse=True)
    open_files: list[tuple[int, Path, Signed, Iterator[Signed]]] = []
    while waiting or open_files:
        if waiting and (not open_files or waiting[-1][0] <= open_files[0][0]):
            number, path = waiting.pop()
            rows = _content(path)
            if (row := next(rows, None)) is None or row[0] < number:
                raise AcctdError(f"{path} does not begin with the record that its name says; restore it")
            heapq.heappush(open_files, (row[0], path, row, rows))
            continue
        number, path, row, rows = open_files[0]
        yield path, row
        if (following := next(rows, None)) is None:
            heapq.heappop(open_files)
        elif following[0] <= number:
            raise AcctdError(f"record {following[0]} comes after record {number} in {path}; restore it")
        else:
            heapq.heapreplace(open_files, (following[0], path, following, rows))


def _missing(ledger: Ledger, month: Month, directory: Path, done: Done) -> Iterator[Signed]:
    """The records of a month that no file has. Raises AcctdError for a file that has another one in its place."""
    rows = ledger.stream(after=month.first - 1, upto=month.last)
    row = next(rows, None)
    for path in _files(directory, month.node, month.month):
        for found in _content(path):
            while row is not None and row[0] < found[0]:
                yield row
                row = next(rows, None)
            if row is None:
                return
            if found[0] < row[0]:
                continue  # it was taken out before
            if found != row:
                raise AcctdError(f"{path} has another record {row[0]} than the ledger; choose another directory")
            done(1, len(row[2]))
            row = next(rows, None)
    if row is not None:
        yield row
        yield from rows


def _write(path: Path, row: Signed | None, rows: Iterator[Signed]) -> Signed | None:
    """Put records of consecutive numbers into a new file; the first one that is of another file."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.unlink(missing_ok=True)  # of one who was killed
        with open(part, "xb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o600)) as raw:
            with gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=6, mtime=0) as packed:
                last = None
                while row is not None and (last is None or row[0] == last + 1):
                    packed.write(_line(row) + b"\n")
                    last, row = row[0], next(rows, None)
            raw.flush()
            os.fsync(raw.fileno())
        if path.exists():  # with other records: what has these was compared
            raise FileExistsError(0, "it is there, with other records")
        os.rename(part, path)
        _sync(path.parent)
    except OSError as e:
        with suppress(OSError):
            part.unlink()
        raise AcctdError(f"cannot write {path}: {e.strerror}; see the disk, or choose another directory") from e
    return row


def _line(row: Signed) -> bytes:
    number, digest, body = row
    # The time when it was signed: the same whenever it is archived.
    signed = Body.of(body).ended
    at = round(min(max(0.0, signed), _YEAR_9999) * 10**6) * 1000
    return line(RecordFrame(number, digest, at, msgspec.Raw(body)))


def _content(path: Path) -> Iterator[Signed]:
    try:
        with gzip.open(path) as stream:
            for text in stream:
                frame = decode(text)
                if isinstance(frame, RecordFrame):
                    yield frame.number, frame.digest, bytes(frame.body)
    except _BROKEN as e:
        raise AcctdError(f"{path} is not whole ({e}); move it away and archive again, or restore it") from e
    except OSError as e:
        raise AcctdError(f"cannot read {path}: {e.strerror}; see its owner") from e


def _files(directory: Path, node: str, month: str | None = None) -> list[Path]:
    """A node's archives in a directory, in order of their numbers; of one month."""
    wanted = [
        (int(match["first"]), name)
        for match, name in _names(directory)
        if match["node"] == _plain(node) and month in (None, match["month"])
    ]
    return [directory / name for _, name in sorted(wanted)]


def _names(directory: Path) -> list[tuple[re.Match[str], str]]:
    try:
        return [(match, name) for name in os.listdir(directory) if (match := _NAME.match(name))]
    except OSError as e:
        raise NotFoundError(f"cannot read {directory}: {e.strerror}; name a directory of archives") from e


def make(directory: Path) -> None:
    """For archives, which hold what the ledger does: for root alone. Raises NotPermittedError, AcctdError."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sync(directory.parent)
    except OSError as e:
        kind = NotPermittedError if isinstance(e, PermissionError) else AcctdError
        raise kind(f"cannot make {directory}: {e.strerror}; name a directory for archives") from e


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _early(number: int, job: str, ended: float, now: datetime) -> str:
    """Why much may stay, where a clock was wrong; "" for an ordinary record of the month that goes on."""
    if ended <= now.timestamp():
        return ""
    at = datetime.fromtimestamp(min(ended, _YEAR_9999), UTC)
    return f"record {number} of job {job!r} says that it ended on {at:%Y-%m-%d}; it and all after it stay"


def _plain(node: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", node) or "node"
