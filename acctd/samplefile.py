"""samples.sqlite: what is kept of how jobs went, in one SQLite file that is bounded.

A job's points lie in pieces, a row each: all of five minutes of its own time, the first of each minute of an hour, the
first of each hour of a day. So thinning looks only at pieces that have come of age, and a reader at those of its job.
Pages that become free are used again, and SQLite takes none above the bound. Stores, thins and finds; what is to be
done when it cannot, history.py knows.
"""

import sqlite3
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import msgspec

from acctd.errors import AcctdError, LedgerError
from acctd.model import Record
from acctd.points import Point, decode, encode, last_point, packed, pressed, unpressed
from acctd.sqlitefile import SqliteFile

FILE = "samples.sqlite"
"""Its name in state_dir."""

_MINUTE, _HOUR = 60 * 10**9, 3600 * 10**9
_PIECES = (300 * 10**9, _HOUR, 24 * _HOUR)
"""ns of a job's time whose points lie in one row, by level. Each is a whole number of those before."""
_UNITS = (1, _MINUTE, _HOUR)
"""ns of which the first point is kept, by level."""
_BITS = 22  # of a row's key for the number of its piece: 39 years
_PAGE = 4096
_LOG = 8 * 2**20
"""Bytes of SQLite's log of what is not yet in the file, at most: it is written there when half of that is full."""
_SPARE = 16  # pages
_INCREMENTAL = 2
"""The auto_vacuum of a file that gives free pages back on demand."""
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
    written REAL NOT NULL,         -- s since the epoch, when its first point was written
    points INTEGER NOT NULL,
    body BLOB NOT NULL             -- points.packed, or pressed once it is full or has been thinned
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
        self._log = min(max_bytes // 4, _LOG)
        self._pages = (max_bytes - self._log) // _PAGE
        super().__init__(path, patience=patience, any_thread=True)
        self._bound()

    def _before_tables(self) -> None:
        self._db.execute("PRAGMA cache_size = -512")  # KiB: each row is written once, and seldom read
        self._db.execute(f"PRAGMA page_size = {_PAGE}")
        if self._pragma("auto_vacuum") != _INCREMENTAL:  # in a file that has it already, this would wait for who writes
            self._db.execute(f"PRAGMA auto_vacuum = {_INCREMENTAL}")
        self._db.execute(f"PRAGMA wal_autocheckpoint = {self._log // _PAGE // 2}")
        self._db.execute(f"PRAGMA journal_size_limit = {self._log // 2}")

    def _trouble(self, error: Exception) -> AcctdError:
        if "no such" in str(error):  # table or column: somebody else has changed it
            return LedgerError(f"{self.kind} {self.path} is corrupt ({error})", corrupt=True)
        told = super()._trouble(error)
        if isinstance(told, LedgerError) and not told.corrupt:
            return LedgerError(f"samples for plots wait, and are lost later: {self.path} cannot be written ({error})")
        return told

    # Writing

    def write(
        self,
        points: Mapping[Whose, Sequence[tuple[int, bytes]]],
        now: float,
        *,
        new: Collection[int] = (),
        ended: Iterable[Record] = (),
        lost: int = 0,
    ) -> set[int]:
        """Keep points (`at` and the point encoded), ends of jobs, and how many points were lost; the jobs that ended.

        `new`: jobs that may have no row yet. `now`: s since the epoch.
        """
        size = sum(len(body) for waiting in points.values() for _, body in waiting)
        with self._writing() as db:
            self._make_room(len(points) + size // _PAGE + _SPARE)
            for whose, waiting in points.items():
                if whose.seq in new:
                    self._begin(whose)
                for key, group in groupby(waiting, key=lambda each: _key(whose.seq, 0, each[0])):
                    self._add(key, now, [body for _, body in group])
            if lost:
                db.execute("UPDATE lost SET points = points + ? WHERE why = 'disk'", (lost,))
            return {seq for record in ended if (seq := self._finish(record, now)) is not None}

    def _begin(self, whose: Whose) -> None:
        row = self._db.execute("SELECT id, started FROM job WHERE seq = ?", (whose.seq,)).fetchone()
        if row == (whose.id, whose.started):
            self._db.execute("UPDATE job SET ended = NULL WHERE seq = ?", (whose.seq,))
            return
        if row is not None:
            self._drop_job(whose.seq)  # another ledger gave this number to another job
        self._db.execute("INSERT INTO job (seq, id, started) VALUES (?, ?, ?)", whose)

    def _add(self, key: int, now: float, bodies: list[bytes]) -> None:
        row = self._db.execute("SELECT points, body FROM piece WHERE key = ?", (key,)).fetchone()
        if row is None:
            self._press(key)
            self._put(key, 0, now, len(bodies), packed(bodies))
        else:
            points, body = row
            body = packed([unpressed(body), *bodies])
            self._db.execute("UPDATE piece SET points = ?, body = ? WHERE key = ?", (points + len(bodies), body, key))

    def _put(self, key: int, level: int, written: float, points: int, body: bytes) -> None:
        values = (key, level, written, points, body)
        self._db.execute("INSERT INTO piece (key, level, written, points, body) VALUES (?, ?, ?, ?, ?)", values)

    def _press(self, before: int) -> None:
        """Another piece of the same job is begun: nothing is added to the one before any more."""
        query = "SELECT key, body FROM piece WHERE key >= ? AND key < ? ORDER BY key DESC LIMIT 1"
        row = self._db.execute(query, (_key(_seq(before), 0, 0), before)).fetchone()
        if row is not None:
            self._db.execute("UPDATE piece SET body = ? WHERE key = ?", (pressed(row[1]), row[0]))

    def _finish(self, record: Record, now: float) -> int | None:
        """A job that was never read has no points, and needs none: its record says it all."""
        seq = self.find(record.id, record.started)
        if seq is None:
            return None
        end = last_point(record)
        newest = self.points(seq, "DESC LIMIT 1")
        if newest and newest[-1].at >= end.at:
            # It was read once more before somebody said that it had ended.
            end = msgspec.structs.replace(end, at=newest[-1].at + 1)
        self._add(_key(seq, 0, end.at), now, [encode(end)])
        self._press(_first(seq + 1))
        self._db.execute("UPDATE job SET ended = ? WHERE seq = ?", (now, seq))
        return seq

    def settle(self, open_jobs: Collection[int], now: float) -> None:
        """Only these jobs (by seq) are there: others that are taken to live have ended."""
        with self._writing() as db:
            living = db.execute("SELECT seq FROM job WHERE ended IS NULL").fetchall()
            ended = [(now, seq) for (seq,) in living if seq not in open_jobs]
            db.executemany("UPDATE job SET ended = ? WHERE seq = ?", ended)

    # Thinning

    def thin(self, full: float, minutes: float, limit: int) -> int:
        """Leave of what is from before `full` the first point of each minute, of what is from before `minutes` that of
        each hour (s since the epoch); of `limit` pieces at most. How many these were.
        """
        done = 0
        with self._writing() as db:
            for level, before in ((0, full), (1, minutes)):
                query = "SELECT key, written, points, body FROM piece WHERE level = ? AND written <= ?"
                values = (level, before - _PIECES[level] / 10**9, limit - done)
                rows = db.execute(f"{query} ORDER BY written, key LIMIT ?", values).fetchall()
                for key, written, count, body in rows:
                    self._raise(key, level + 1, written, self._points_in(count, body))
                    db.execute("DELETE FROM piece WHERE key = ?", (key,))
                done += len(rows)
        self._shrink()
        return done

    def _raise(self, key: int, level: int, written: float, points: list[Point]) -> None:
        """Put of a piece what is left at the next level into its piece there."""
        unit = _UNITS[level]
        to = _key(_seq(key), level, points[0].at)
        row = self._db.execute("SELECT written, points, body FROM piece WHERE key = ?", (to,)).fetchone()
        few = self._points_in(row[1], row[2]) if row is not None else []
        for each in points:
            if not few or each.at // unit != few[-1].at // unit:
                few.append(each)
        if points[-1] != few[-1] and not self._is_any(key + 1, _first(_seq(key) + 1)):
            few.append(points[-1])  # the job's last one
        self._db.execute("DELETE FROM piece WHERE key = ?", (to,))
        self._put(to, level, row[0] if row is not None else written, len(few), pressed(packed(map(encode, few))))

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
        span = _first(seq), _first(seq + 1)
        row = self._db.execute("SELECT total(points) FROM piece WHERE key >= ? AND key < ?", span).fetchone()
        self._db.execute("DELETE FROM piece WHERE key >= ? AND key < ?", span)
        self._db.execute("DELETE FROM job WHERE seq = ?", (seq,))
        self._count_dropped(int(row[0]))

    def _count_dropped(self, points: int) -> None:
        self._db.execute("UPDATE lost SET points = points + ? WHERE why = 'room'", (points,))

    def _shrink(self) -> None:
        """Free pages are used again. Where many are free, or the bound was set lower, the file system gets them."""
        total, free = self._pragma("page_count"), self._pragma("freelist_count")
        if free > max(self._log // _PAGE, total // 2) or (free and total > self._pages):
            try:
                # Not execute(), which would take its first step alone: one page.
                self._db.executescript(f"PRAGMA incremental_vacuum({_AT_ONCE})")
            except sqlite3.Error as e:
                raise self._trouble(e) from e
            self._bound()

    def _bound(self) -> None:
        """SQLite itself takes no page above it, whatever happens here."""
        self._db.execute(f"PRAGMA max_page_count = {self._pages}")

    def _pragma(self, name: str) -> int:
        return int(self._db.execute(f"PRAGMA {name}").fetchone()[0])

    # Reading

    def points(self, seq: int, which: str = "") -> list[Point]:
        """The points of a job by its row in the ledger, oldest first."""
        rows = self._rows(
            f"SELECT points, body FROM piece WHERE key >= ? AND key < ? ORDER BY key {which}",  # noqa: S608  # ours
            *(_first(seq), _first(seq + 1)),
        )
        return sorted((each for row in rows for each in self._points_in(*row)), key=lambda each: each.at)

    def _points_in(self, count: int, body: bytes) -> list[Point]:
        try:
            return decode(count, body)
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
        return Size(self.disk_bytes(), jobs, int(points), lost["room"], lost["disk"])


def _key(seq: int, level: int, at: int) -> int:
    """A piece's place: by job, then by level, the oldest first, then by time."""
    slot = min(at // _PIECES[level], (1 << _BITS) - 1)
    return (seq << 2 | 2 - level) << _BITS | slot


def _first(seq: int) -> int:
    """Below all keys of a job."""
    return seq << _BITS + 2


def _seq(key: int) -> int:
    return key >> _BITS + 2
