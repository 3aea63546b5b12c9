"""samples.sqlite: what is kept of how jobs went, in one SQLite file that is bounded.

A job's points lie in pieces of five minutes of its own time, a row each, so that thinning looks only at pieces that
have come of age, and a reader at those of its job. Pages that become free are used again, and SQLite takes none above
the bound. Stores, thins and finds; what is to be done when it cannot, history.py knows.
"""

import os
import time
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import msgspec

from acctd.errors import LedgerError
from acctd.model import Record
from acctd.points import Point, decode, encode, last_point, packed, unpacked
from acctd.sqlitefile import SqliteFile

FILE = "samples.sqlite"
"""Its name in state_dir."""

PIECE = 300 * 10**9
"""ns of a job's time whose points lie in one row: a minute is a part of it, an hour some of them."""

_MINUTE, _HOUR = 60 * 10**9, 3600 * 10**9
_BITS = 22  # of a row's key for the number of its piece: 39 years
_MASK = (1 << _BITS) - 1
_PAGE = 4096
_LOG = 4 * 2**20
"""Bytes that SQLite's log is cut to once all in it is in the file, which it sees to every 1000 pages."""
_SPARE = 16  # pages
_AT_ONCE = 500  # jobs or pieces that are dropped in one transaction

_TABLES = """
CREATE TABLE job (
    seq INTEGER PRIMARY KEY,       -- the ledger's
    id TEXT NOT NULL,
    started REAL NOT NULL,         -- s since the epoch, as its record has it
    ended REAL                     -- s since the epoch, when that was written; NULL while it lives
);
CREATE INDEX job_id ON job (id);
CREATE INDEX job_ended ON job (ended, seq);
CREATE TABLE piece (
    key INTEGER PRIMARY KEY,       -- job and piece, see _key()
    level INTEGER NOT NULL,        -- 0: all points, 1: the first of each minute, 2: of each hour
    written REAL NOT NULL,         -- s since the epoch, when its first point was
    points INTEGER NOT NULL,
    body BLOB NOT NULL             -- MessagePack of Point, one after the other; from level 1 on compressed
);
CREATE INDEX piece_age ON piece (level, written);
CREATE TABLE lost (why TEXT PRIMARY KEY, points INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO lost VALUES ('room', 0), ('disk', 0);
"""


class Whose(NamedTuple):
    """The job that a point is of: its row in the ledger, and what its record says too."""

    seq: int
    id: str
    started: float  # s since the epoch: `created` in its row, `started` in its record


Waiting = list[tuple[int, bytes]]
"""Points of one job: the piece that each is in, and the point encoded."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much there is."""

    bytes: int  # on disk
    jobs: int
    points: int
    dropped: int  # points that there was no room for any more, since the file was begun
    lost: int  # points that could not be written


class SampleFile(SqliteFile):
    """The open file. Every call may raise LedgerError; a transaction that does has changed nothing."""

    kind, schema, tables = "samples", 1, _TABLES

    def __init__(self, path: Path, max_bytes: int = 2**30, *, patience: float = 1.0) -> None:
        # Beside the file lies SQLite's log of what is not yet in it.
        self._pages = (max_bytes - min(max_bytes // 4, _LOG)) // _PAGE
        super().__init__(path, patience=patience, any_thread=True)
        self._bound()

    def _before_tables(self) -> None:
        self._db.execute(f"PRAGMA page_size = {_PAGE}")
        self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        self._db.execute(f"PRAGMA journal_size_limit = {_LOG}")

    # Writing

    def write(self, points: dict[Whose, Waiting], new: Collection[int], ended: Iterable[Record], lost: int) -> set[int]:
        """Keep points, ends of jobs, and how many points were lost; the jobs that ended. `new` may have no row yet."""
        size = sum(len(body) for waiting in points.values() for _, body in waiting)
        with self._writing() as db:
            self._make_room(len(points) + size // _PAGE + _SPARE)
            for whose, waiting in points.items():
                if whose.seq in new:
                    self._begin(whose)
                for slot, group in groupby(waiting, key=lambda each: each[0]):
                    self._add(_key(whose.seq, slot), [body for _, body in group])
            if lost:
                db.execute("UPDATE lost SET points = points + ? WHERE why = 'disk'", (lost,))
            return {seq for record in ended if (seq := self._finish(record)) is not None}

    def _begin(self, whose: Whose) -> None:
        row = self._db.execute("SELECT id, started FROM job WHERE seq = ?", (whose.seq,)).fetchone()
        if row == (whose.id, whose.started):
            self._db.execute("UPDATE job SET ended = NULL WHERE seq = ?", (whose.seq,))
            return
        if row is not None:
            self._drop_job(whose.seq)  # another ledger gave this number to another job
        self._db.execute("INSERT INTO job (seq, id, started) VALUES (?, ?, ?)", whose)

    def _add(self, key: int, bodies: list[bytes]) -> None:
        row = self._db.execute("SELECT level, points, body FROM piece WHERE key = ?", (key,)).fetchone()
        if row is None:
            values = (key, time.time(), len(bodies), packed(bodies, compressed=False))
            self._db.execute("INSERT INTO piece (key, level, written, points, body) VALUES (?, 0, ?, ?, ?)", values)
            return
        level, points, body = row
        bodies = [unpacked(body, compressed=level > 0), *bodies]
        self._put(key, level, points + len(bodies) - 1, packed(bodies, compressed=level > 0))

    def _put(self, key: int, level: int, points: int, body: bytes) -> None:
        self._db.execute("UPDATE piece SET level = ?, points = ?, body = ? WHERE key = ?", (level, points, body, key))

    def _finish(self, record: Record) -> int | None:
        """A job that was never read has no points, and needs none: its record says it all."""
        seq = self.find(record.id, record.started)
        if seq is None:
            return None
        end = last_point(record)
        newest = self.points(seq, "ORDER BY key DESC LIMIT 1")
        if newest and newest[-1].at >= end.at:
            # It was read once more before somebody said that it had ended.
            end = msgspec.structs.replace(end, at=newest[-1].at + 1)
        self._add(_key(seq, end.at // PIECE), [encode(end)])
        self._db.execute("UPDATE job SET ended = ? WHERE seq = ?", (time.time(), seq))
        return seq

    def settle(self, open_jobs: Collection[int]) -> None:
        """Only these jobs (by seq) are there: others that are taken to live have ended."""
        with self._writing() as db:
            living = db.execute("SELECT seq FROM job WHERE ended IS NULL").fetchall()
            ended = [(time.time(), seq) for (seq,) in living if seq not in open_jobs]
            db.executemany("UPDATE job SET ended = ? WHERE seq = ?", ended)

    # Thinning

    def thin(self, full: float, minutes: float, limit: int) -> int:
        """Leave of pieces from before `full` the first point of each minute, of those from before `minutes` that of
        each hour (s since the epoch), in `limit` pieces at most; how many these were.
        """
        done = 0
        with self._writing() as db:
            for level, before, unit in ((0, full, _MINUTE), (1, minutes, _HOUR)):
                query = "SELECT key, points, body FROM piece WHERE level = ? AND written <= ? ORDER BY written, key"
                values = (level, before - PIECE / 10**9, limit - done)
                rows = db.execute(f"{query} LIMIT ?", values).fetchall()
                for key, count, body in rows:
                    self._thin_piece(key, level, self._points_in(level, count, body), unit)
                done += len(rows)
            self._shrink()
        return done

    def _thin_piece(self, key: int, level: int, points: list[Point], unit: int) -> None:
        few: list[Point] = []
        for each in points:
            if not few or each.at // unit != few[-1].at // unit:
                few.append(each)
        if unit > PIECE and self._is_any(key - (key & _MASK) % (unit // PIECE), key):
            del few[0]  # an earlier piece has the first of this hour
        if points[-1] not in few and not self._is_any(key + 1, (key | _MASK) + 1):
            few.append(points[-1])
        if few:
            self._put(key, level + 1, len(few), packed(map(encode, few), compressed=True))
        else:
            self._db.execute("DELETE FROM piece WHERE key = ?", (key,))

    def _is_any(self, first: int, end: int) -> bool:
        """Whether there are pieces from one key up to before another."""
        query = "SELECT 1 FROM piece WHERE key >= ? AND key < ? LIMIT 1"
        return self._db.execute(query, (first, end)).fetchone() is not None

    # Room

    def _make_room(self, need: int) -> None:
        """Drop what is oldest until so many pages are free, of ended jobs first; not all at once."""
        need = min(need, self._pages // 2)
        if self._excess(need) <= 0:
            return
        query = "SELECT seq FROM job WHERE ended IS NOT NULL ORDER BY ended, seq LIMIT ?"
        ended = self._db.execute(query, (_AT_ONCE,)).fetchall()
        for (seq,) in ended:
            self._drop_job(seq)
            if self._excess(need) <= 0:
                return
        query = "SELECT key, points FROM piece WHERE level = ? ORDER BY written, key LIMIT ?"
        for level in (2, 1, 0) if len(ended) < _AT_ONCE else ():
            for key, points in self._db.execute(query, (level, _AT_ONCE)).fetchall():
                self._db.execute("DELETE FROM piece WHERE key = ?", (key,))
                self._count_dropped(points)
                if self._excess(need) <= 0:
                    return

    def _excess(self, need: int) -> int:
        """Pages above the bound, were so many more taken."""
        return self._pragma("page_count") - self._pragma("freelist_count") + need - self._pages

    def _drop_job(self, seq: int) -> None:
        span = _key(seq, 0), _key(seq + 1, 0)
        row = self._db.execute("SELECT total(points) FROM piece WHERE key >= ? AND key < ?", span).fetchone()
        self._db.execute("DELETE FROM piece WHERE key >= ? AND key < ?", span)
        self._db.execute("DELETE FROM job WHERE seq = ?", (seq,))
        self._count_dropped(int(row[0]))

    def _count_dropped(self, points: int) -> None:
        self._db.execute("UPDATE lost SET points = points + ? WHERE why = 'room'", (points,))

    def _shrink(self) -> None:
        """Free pages are used again. Where many are free, or the bound was set lower, the file system gets them."""
        total, free = self._pragma("page_count"), self._pragma("freelist_count")
        if free > max(_LOG // _PAGE, total // 2) or (free and total > self._pages):
            self._db.execute(f"PRAGMA incremental_vacuum({_AT_ONCE})").fetchall()
            self._bound()

    def _bound(self) -> None:
        """SQLite itself takes no page above it, whatever happens here."""
        self._db.execute(f"PRAGMA max_page_count = {self._pages}")

    def _pragma(self, name: str) -> int:
        return int(self._db.execute(f"PRAGMA {name}").fetchone()[0])

    # Reading

    def points(self, seq: int, clause: str = "ORDER BY key") -> list[Point]:
        """The points of a job by its row in the ledger, oldest first."""
        rows = self._rows(
            f"SELECT level, points, body FROM piece WHERE key >= ? AND key < ? {clause}",  # noqa: S608  # our own words
            *(_key(seq, 0), _key(seq + 1, 0)),
        )
        return sorted((each for row in rows for each in self._points_in(*row)), key=lambda each: each.at)

    def _points_in(self, level: int, count: int, body: bytes) -> list[Point]:
        try:
            return decode(count, unpacked(body, compressed=level > 0))
        except (msgspec.MsgspecError, zlib.error) as e:
            raise LedgerError(f"{self.kind} {self.path} is corrupt ({e})", corrupt=True) from e

    def find(self, job: str, started: float) -> int | None:
        """The row in the ledger that a job had, by what its record says; None where nothing is kept of it."""
        row = self._row("SELECT seq FROM job WHERE id = ? AND started = ?", job, started)
        return row[0] if row is not None else None

    def size(self) -> Size:
        """How much there is now; goes through all rows."""
        jobs, points = self._rows("SELECT (SELECT count(*) FROM job), (SELECT total(points) FROM piece)")[0]
        lost = dict(self._rows("SELECT why, points FROM lost"))
        files = [f"{self.path}{suffix}" for suffix in ("", "-wal", "-shm")]
        size = sum(os.path.getsize(path) for path in files if os.path.exists(path))
        return Size(size, jobs, int(points), lost["room"], lost["disk"])


def _key(seq: int, slot: int) -> int:
    """A piece's place: by job, then by time."""
    return (seq << _BITS) + min(slot, _MASK)
