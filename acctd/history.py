"""The kept samples of jobs, for plots: one SQLite file beside the ledger's. No money is in it, and nobody waits for it.

What a job used is in the ledger, signed; this says how it went meanwhile. Samples are thinned with age: all of them for
an hour, then the first of each minute for a day, then the first of each hour. The file is bounded: above that the
oldest go, of ended jobs first, and are counted. A file that is no longer whole is put aside and begun anew.

Several processes may write here. A job's samples lie in pieces of five minutes of its own time, a row each, so that
thinning looks only at pieces that have come of age, and a reader at those of its job.
"""

import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import msgspec

from acctd.errors import LedgerError
from acctd.model import Record
from acctd.points import Point, decode, encode, last_point, packed, unpacked

__all__ = ["FILE", "History", "Point", "Size", "Whose", "kept", "reading"]

FILE = "samples.sqlite"
"""Its name in state_dir."""

_MINUTE, _HOUR = 60 * 10**9, 3600 * 10**9
_PIECE = 300 * 10**9
"""ns of a job's time whose points lie in one row: a minute is a part of it, an hour some of them."""
_BITS = 22  # of a row's key for the number of its piece: 39 years
_PAGE = 4096
_LOG = 4 * 2**20
"""Bytes that SQLite's log is cut to once all in it is in the file, which it sees to every 1000 pages."""
_SPARE = 16  # pages
_AT_ONCE = 500  # jobs or pieces that are dropped in one transaction
_WAITING, _ENDS_WAITING = 60, 10_000  # points of a job, and ends of jobs, that wait for a disk
_CORRUPT = ("malformed", "not a database")

_SCHEMA = 1
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


@dataclass(frozen=True, slots=True)
class Size:
    """How much there is."""

    bytes: int  # on disk
    jobs: int
    points: int
    dropped: int  # points that there was no room for any more, since the file was begun
    lost: int  # points that could not be written


def kept(path: Path, job: str, started: float) -> list[Point]:
    """The kept points of a job, by its id and the start in its record (`created` in its row while it lives), in order.

    None where there is no such job, or no such file. Looks only; raises LedgerError for a file that cannot be read.
    """
    with reading(path) as history:
        seq = history.find(job, started) if history is not None else None
        return history.points(seq) if history is not None and seq is not None else []


@contextmanager
def reading(path: Path) -> Iterator["History | None"]:
    """The file as it is, to look at; None where there is none. Raises LedgerError for one that cannot be read."""
    if not path.exists():
        yield None
        return
    with closing(History(path, looking=True)) as history:
        yield history


class History:
    """One process's hold on the file. Each call may come from another thread, and they wait for each other."""

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int = 2**30,
        full: float = 3600.0,
        minutes: float = 86400.0,
        together: int = 1,
        patience: float = 1.0,
        looking: bool = False,
    ) -> None:
        """`full`, `minutes`: ages in s up to which all points are kept, and the first of each minute. Of a job's points
        `together` are written at once, the first ones each. `patience`: s for a lock. `looking`: nothing is written.

        Raises LedgerError where it cannot be had.
        """
        self.path, self._full, self._minutes = path, full, max(full, minutes)
        self._together, self._patience, self._looking = together, patience, looking
        # Beside the file lies SQLite's log of what is not yet in it.
        self._pages = (max_bytes - min(max_bytes // 4, _LOG)) // _PAGE
        self._lock = threading.Lock()
        self._pending: dict[Whose, list[tuple[int, bytes]]] = {}  # piece and encoded point
        self._finished: list[Record] = []
        self._known: dict[int, int] = {}  # jobs that have their row, and how often their points were written
        self._calls = 0
        self._unsaid = 0  # points lost, which the file has not been told yet
        self.told: list[str] = []
        """What an admin should know, one sentence each; whoever tells of it takes them out."""
        self._open()

    def close(self) -> None:
        """Write what waits, if it can be written now, and give the file back."""
        with self._lock:
            if self._pending or self._finished:
                with suppress(LedgerError):
                    self._trying(lambda: self._write(list(self._pending)))
            self._db.close()

    # Writing

    def append(self, points: Iterable[tuple[Whose, Point]], finished: Iterable[Record] = (), lost: int = 0) -> None:
        """Keep points, the ends of jobs that have some, and how many others are lost. What cannot be written now is
        written with the next.

        Raises LedgerError for that.
        """
        with self._lock:
            self._calls += 1
            for whose, each in points:
                self._pending.setdefault(whose, []).append((each.at // _PIECE, encode(each)))
            self._finished += finished
            self._unsaid += lost
            ended = {(record.id, record.started) for record in self._finished}
            due = [
                whose
                for whose, waiting in self._pending.items()
                if (whose.id, whose.started) in ended or self._is_due(whose.seq, len(waiting))
            ]
            if not (due or self._finished or self._unsaid):
                return
            try:
                self._trying(lambda: self._write(due))
            except LedgerError:
                self._shed()
                raise

    def _is_due(self, seq: int, waiting: int) -> bool:
        """Jobs take turns, that no tick has to write the points of all."""
        young = self._known.get(seq, 0) < self._together
        return young or waiting > self._together or (self._calls + seq) % self._together == 0

    def _write(self, due: list[Whose]) -> None:
        with self._writing() as db:
            new = sum(len(body) for whose in due for _, body in self._pending[whose])
            self._make_room(len(due) + new // _PAGE + _SPARE)
            for whose in due:
                if whose.seq not in self._known:
                    self._begin(whose)
                for slot, group in groupby(self._pending[whose], key=lambda each: each[0]):
                    self._add(_key(whose.seq, slot), [body for _, body in group])
            ended = [seq for record in self._finished if (seq := self._finish(record)) is not None]
            if self._unsaid:
                db.execute("UPDATE lost SET points = points + ? WHERE why = 'disk'", (self._unsaid,))
        # Only now: a transaction that fails leaves all as it was.
        for whose in due:
            self._known[whose.seq] = self._known.get(whose.seq, 0) + 1
            del self._pending[whose]
        for seq in ended:
            self._known.pop(seq, None)
        self._finished.clear()
        self._unsaid = 0

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
        seq = self._find(record.id, record.started)
        if seq is None:
            return None
        end = last_point(record)
        newest = self._points(seq, "ORDER BY key DESC LIMIT 1")
        if newest and newest[-1].at >= end.at:
            # It was read once more before somebody said that it had ended.
            end = msgspec.structs.replace(end, at=newest[-1].at + 1)
        self._add(_key(seq, end.at // _PIECE), [encode(end)])
        self._db.execute("UPDATE job SET ended = ? WHERE seq = ?", (time.time(), seq))
        return seq

    def settle(self, open_jobs: Collection[int]) -> None:
        """Only these jobs (by seq) are there: others that are taken to live have ended. Raises LedgerError."""
        with self._lock:
            self._trying(lambda: self._settle(open_jobs))

    def _settle(self, open_jobs: Collection[int]) -> None:
        with self._writing() as db:
            living = db.execute("SELECT seq FROM job WHERE ended IS NULL").fetchall()
            ended = [(time.time(), seq) for (seq,) in living if seq not in open_jobs]
            db.executemany("UPDATE job SET ended = ? WHERE seq = ?", ended)

    def _shed(self) -> None:
        """Of what waits too long the oldest is lost."""
        for waiting in self._pending.values():
            if (over := len(waiting) - _WAITING) > 0:
                del waiting[:over]
                self._unsaid += over
        if (over := len(self._finished) - _ENDS_WAITING) > 0:
            del self._finished[:over]
            self._unsaid += over

    # Thinning

    def thin(self, now: float, limit: int = 100) -> int:
        """Thin pieces that have come of age, `limit` at most; how many these were. `now`: s since the epoch.

        A step of the clock thins some pieces early or late, once. Raises LedgerError.
        """
        with self._lock:
            done: list[int] = []
            self._trying(lambda: done.append(self._thin(now, limit)))
            return done[-1]

    def _thin(self, now: float, limit: int) -> int:
        done = 0
        with self._writing() as db:
            for level, age, unit in ((0, self._full, _MINUTE), (1, self._minutes, _HOUR)):
                query = "SELECT key, points, body FROM piece WHERE level = ? AND written <= ? ORDER BY written, key"
                values = (level, now - age - _PIECE / 10**9, limit - done)
                rows = db.execute(f"{query} LIMIT ?", values).fetchall()
                for key, count, body in rows:
                    self._thin_piece(key, level, decode(count, unpacked(body, compressed=level > 0)), unit)
                done += len(rows)
            self._shrink()
        return done

    def _thin_piece(self, key: int, level: int, points: list[Point], unit: int) -> None:
        few: list[Point] = []
        for each in points:
            if not few or each.at // unit != few[-1].at // unit:
                few.append(each)
        if unit > _PIECE and self._is_any(key - (key & _MASK) % (unit // _PIECE), key):
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

    def points(self, seq: int) -> list[Point]:
        """The points of a job by its row in the ledger, oldest first. Raises LedgerError."""
        with self._lock, self._explained():
            return self._points(seq, "ORDER BY key")

    def _points(self, seq: int, clause: str) -> list[Point]:
        rows = self._db.execute(
            f"SELECT level, points, body FROM piece WHERE key >= ? AND key < ? {clause}",  # noqa: S608  # our own words
            (_key(seq, 0), _key(seq + 1, 0)),
        )
        found = [each for level, count, body in rows for each in decode(count, unpacked(body, compressed=level > 0))]
        return sorted(found, key=lambda each: each.at)

    def find(self, job: str, started: float) -> int | None:
        """The row in the ledger that a job had, by what its record says; None where nothing is kept of it."""
        with self._lock, self._explained():
            return self._find(job, started)

    def _find(self, job: str, started: float) -> int | None:
        row = self._db.execute("SELECT seq FROM job WHERE id = ? AND started = ?", (job, started)).fetchone()
        return row[0] if row is not None else None

    def size(self) -> Size:
        """How much there is now; goes through all rows. Raises LedgerError."""
        with self._lock, self._explained():
            jobs = self._db.execute("SELECT count(*) FROM job").fetchone()[0]
            points = self._db.execute("SELECT total(points) FROM piece").fetchone()[0]
            lost = dict(self._db.execute("SELECT why, points FROM lost"))
        size = sum(os.path.getsize(path) for path in self._paths() if os.path.exists(path))
        return Size(size, jobs, int(points), lost["room"], lost["disk"] + self._unsaid)

    # The file

    def _paths(self) -> list[str]:
        return [f"{self.path}{suffix}" for suffix in ("", "-wal", "-shm")]

    def _open(self) -> None:
        try:
            self._connect()
        except _UnusableError as e:
            if self._looking:
                raise LedgerError(f"samples {self.path} are of no use ({e}); acctd serve begins them anew") from e
            self._put_aside(e)
            self._connect()

    def _connect(self) -> None:
        uri = f"file:{quote(str(self.path))}?mode={'rw' if self._looking else 'rwc'}"
        with self._explained():
            self._db = sqlite3.connect(
                uri, uri=True, timeout=self._patience, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def _prepare(self) -> None:
        db = self._db
        version, empty = self._pragma("user_version"), self._pragma("page_count") == 0
        if version != _SCHEMA and (self._looking or not empty):
            raise _UnusableError(f"schema {version}, this acctd knows {_SCHEMA}")
        if self._looking:
            db.execute("PRAGMA query_only = 1")
            return
        os.chmod(self.path, 0o600)
        found = os.stat(self.path)
        self._file = found.st_dev, found.st_ino
        if empty:
            db.execute(f"PRAGMA page_size = {_PAGE}")
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")  # a power cut costs some points and not the file
        db.execute(f"PRAGMA journal_size_limit = {_LOG}")
        self._bound()
        with self._writing():
            if self._pragma("user_version") == 0:  # nobody else was first
                for statement in _TABLES.split(";\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {_SCHEMA}")

    def _put_aside(self, error: Exception) -> None:
        """One such file is kept, the newest: who wants to know why looks at it soon."""
        aside = f"{self.path}.corrupt"
        try:
            for suffix in ("", "-wal", "-shm"):
                Path(f"{aside}{suffix}").unlink(missing_ok=True)
                with suppress(FileNotFoundError):
                    os.rename(f"{self.path}{suffix}", f"{aside}{suffix}")
        except OSError as e:
            raise LedgerError(f"samples {self.path} cannot be begun anew: {e.strerror}; see its directory") from e
        self._known.clear()
        self.told.append(f"the kept samples were of no use ({error}); they are now {aside}, and are begun anew")

    def _trying(self, act: Callable[[], None]) -> None:
        """Do something to the file; to a new one where the old one is gone or shows to be corrupt."""
        if not self._is_there():
            self._db.close()
            self._known.clear()
            self._open()
        try:
            act()
        except _UnusableError as e:
            self._db.close()
            self._put_aside(e)
            self._connect()
            act()

    def _is_there(self) -> bool:
        try:
            found = os.stat(self.path)
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._file

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._explained():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as e:
            if any(word in str(e) for word in _CORRUPT):
                raise _UnusableError(str(e)) from e
            raise LedgerError(f"samples {self.path} cannot be used now ({e}); see that the disk is not full") from e
        except (msgspec.MsgspecError, zlib.error) as e:
            raise _UnusableError(str(e)) from e
        except OSError as e:
            raise LedgerError(f"samples {self.path} cannot be used now ({e.strerror}); see its directory") from e


class _UnusableError(LedgerError):
    """The file is no longer whole, or none of ours."""


_MASK = (1 << _BITS) - 1


def _key(seq: int, slot: int) -> int:
    """A piece's place: by job, then by time."""
    return (seq << _BITS) + min(slot, _MASK)
