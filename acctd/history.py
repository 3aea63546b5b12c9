"""The kept samples of jobs, for plots: written when there is time, and read. No money rests on them.

What a job used is in the ledger, signed; this says how it went meanwhile. Samples are thinned with age: all of them
for an hour, then the first of each minute for a day, then the first of each hour. Above a bound the oldest go, of ended
jobs first. What cannot be written now waits, and is lost and counted if that takes long. A file that is no longer whole
is put aside and begun anew. Several processes may write.
"""

import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from acctd.errors import AcctdError, ConfigError, LedgerError
from acctd.model import Record
from acctd.points import Point, encode
from acctd.samplefile import FILE, SampleFile, Size, Whose

__all__ = ["FILE", "History", "Point", "Size", "Whose", "kept", "reading"]

_WAITING, _ENDS_WAITING = 60, 10_000  # points of a job, and ends of jobs, that wait for a disk


def kept(path: Path, job: str, started: float) -> list[Point]:
    """The kept points of a job, by its id and the start in its record (`created` in its row while it lives), in order.

    None where there is no such job, or no such file. Raises LedgerError, ConfigError, NotPermittedError for a file that
    cannot be read.
    """
    with reading(path) as samples:
        seq = samples.find(job, started) if samples is not None else None
        return samples.points(seq) if samples is not None and seq is not None else []


@contextmanager
def reading(path: Path) -> Iterator[SampleFile | None]:
    """The file, to look at; None where there is none. Raises LedgerError, NotPermittedError, ConfigError for another
    acctd's.
    """
    if not path.exists():
        yield None
        return
    with SampleFile(path) as samples:
        yield samples


class History:
    """One process's hold on the file. Calls may come from several threads, and wait for each other."""

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int = 2**30,
        full: float = 3600.0,
        minutes: float = 86400.0,
        together: int = 1,
        patience: float = 1.0,
    ) -> None:
        """`full`, `minutes`: ages in s up to which all points are kept, and the first of each minute. Of a job's points
        `together` are written at once, the first ones each. `patience`: s to wait for another writer.

        Raises LedgerError where the file cannot be had.
        """
        self.path, self._max = path, max_bytes
        self._full, self._minutes = full, max(full, minutes)
        self._together, self._patience = together, patience
        self._lock = threading.Lock()
        self._pending: dict[Whose, list[tuple[int, bytes]]] = {}  # at, and the point encoded
        self._ended: list[Record] = []
        self._known: dict[int, int] = {}  # jobs that have their row, and how often points of theirs were written
        self._calls = 0
        self._lost = 0  # points, of which the file has not been told yet
        self.told: list[str] = []
        """What an admin should know, one sentence each; whoever tells of it takes them out."""
        self._file = self._opened()

    def close(self) -> None:
        """Write what waits, if it can be written now, and give the file back."""
        with self._lock:
            with suppress(AcctdError):
                self._write(list(self._pending), time.time())
            self._file.close()

    def append(
        self, points: Iterable[tuple[Whose, Point]], now: float, ended: Iterable[Record] = (), lost: int = 0
    ) -> None:
        """Keep points, the ends of jobs that have some, and how many others were lost. `now`: s since the epoch.

        What cannot be written now is written with the next; LedgerError says so.
        """
        with self._lock:
            self._calls += 1
            for whose, each in points:
                self._pending.setdefault(whose, []).append((each.at, encode(each)))
            self._ended += ended
            self._lost += lost
            over = {(record.id, record.started) for record in self._ended}
            due = [
                whose
                for whose, waiting in self._pending.items()
                if (whose.id, whose.started) in over or self._is_due(whose.seq, len(waiting))
            ]
            try:
                self._write(due, now)
            except AcctdError:
                self._shed()
                raise

    def _is_due(self, seq: int, waiting: int) -> bool:
        """Jobs take turns, that no tick has to write the points of all."""
        young = self._known.get(seq, 0) < self._together
        return young or waiting > self._together or (self._calls + seq) % self._together == 0

    def _write(self, due: list[Whose], now: float) -> None:
        if not (due or self._ended or self._lost):
            return
        points = {whose: self._pending[whose] for whose in due}
        ended: set[int] = set()

        def write(file: SampleFile) -> None:
            new = {whose.seq for whose in due if whose.seq not in self._known}
            ended.update(file.write(points, now, new=new, ended=self._ended, lost=self._lost))

        self._trying(write)
        for whose in due:
            self._known[whose.seq] = self._known.get(whose.seq, 0) + 1
            del self._pending[whose]
        for seq in ended:
            self._known.pop(seq, None)
        self._ended.clear()
        self._lost = 0

    def _shed(self) -> None:
        """Of what waits too long the oldest is lost."""
        for waiting in self._pending.values():
            if (over := len(waiting) - _WAITING) > 0:
                del waiting[:over]
                self._lost += over
        if (over := len(self._ended) - _ENDS_WAITING) > 0:
            del self._ended[:over]
            self._lost += over

    def settle(self, open_jobs: Collection[int], now: float) -> None:
        """Only these jobs (by seq) are there: others that are taken to live have ended. Raises LedgerError."""
        with self._lock:
            self._trying(lambda file: file.settle(open_jobs, now))

    def thin(self, now: float, limit: int = 100) -> int:
        """Thin pieces that have come of age, `limit` at most; how many these were. `now`: s since the epoch.

        A step of the clock thins some pieces early or late, once. Raises LedgerError.
        """
        done: list[int] = []
        with self._lock:
            self._trying(lambda file: done.append(file.thin(now - self._full, now - self._minutes, limit)))
        return done[-1]

    def points(self, seq: int) -> list[Point]:
        """What is written of a job, by its row in the ledger, oldest first. Raises LedgerError."""
        with self._lock:
            return self._file.points(seq)

    def size(self) -> Size:
        """How much is written. Raises LedgerError."""
        with self._lock:
            return self._file.size()

    def _trying(self, act: Callable[[SampleFile], None]) -> None:
        """Do something to the file; to a new one where the old one is gone or shows to be corrupt."""
        if not self._file.is_there():
            self._file.close()
            self._known.clear()
            self._file = self._opened()
            self.told.append(f"samples {self.path} were taken away or emptied by somebody, and are begun anew")
        try:
            act(self._file)
        except LedgerError as e:
            if not e.corrupt:
                raise
            self._file.close()
            self._put_aside(e)
            self._file = self._opened()
            act(self._file)

    def _opened(self) -> SampleFile:
        try:
            return SampleFile(self.path, self._max, patience=self._patience)
        except (LedgerError, ConfigError) as e:
            if isinstance(e, LedgerError) and not e.corrupt:
                raise
            self._put_aside(e)
        return SampleFile(self.path, self._max, patience=self._patience)

    def _put_aside(self, error: AcctdError) -> None:
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
        self.told.append(f"{error}; what was kept of how jobs went is now {aside}, and begun anew")
