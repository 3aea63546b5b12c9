"""A SQLite file of acctd's: opened by one or many, written in transactions, found altered, copied and moved aside.

Knows nothing of what is in it: who derives from it declares that. Whatever SQLite says comes out as a LedgerError, or
NotPermittedError.
"""

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import ClassVar, Self

from acctd.errors import AcctdError, ConfigError, LedgerError, NotPermittedError

_PATIENCE = 30.0
"""s that one waits for what another process writes."""

_CORRUPT = ("malformed", "not a database")


class SqliteFile:
    """The open file. Use as a context manager."""

    kind: ClassVar[str]
    """What it is called in sentences."""
    schema: ClassVar[int]
    tables: ClassVar[str]
    """The SQL that makes an empty file one of this schema."""

    def __init__(self, path: Path, *, patience: float = _PATIENCE, any_thread: bool = False) -> None:
        """`patience`: s to wait for a lock. `any_thread`: the caller sees that one thread at a time calls."""
        self.path, self._patience = path, patience
        self.closed = False
        try:
            with ExitStack() as undo:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._db = sqlite3.connect(
                    path, timeout=patience, isolation_level=None, check_same_thread=not any_thread
                )
                undo.callback(self.close)
                os.chmod(path, 0o600)
                found = os.stat(path)
                self._file = found.st_dev, found.st_ino
                self._before_tables()
                self._use_wal()
                self._migrate()
                # NORMAL: a commit survives kill -9, and a power cut takes the jobs themselves along. Records use FULL.
                self._db.execute("PRAGMA synchronous = NORMAL")
                undo.pop_all()
        except (sqlite3.Error, OSError) as e:
            raise self._trouble(e) from e

    def _before_tables(self) -> None:
        """Say what must be said before there is anything in the file."""

    def _use_wal(self) -> None:
        """SQLite does not wait for its lock here as it does elsewhere: two who make a new file meet at once."""
        until = time.monotonic() + self._patience
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as e:
                if e.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                    raise
            time.sleep(0.01)

    def _migrate(self) -> None:
        if self._row("PRAGMA user_version") == (self.schema,):
            return  # and who only reads waits for no one who writes
        with self._writing() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > self.schema:
                raise ConfigError(
                    f"{self.path} has schema {version} and this acctd knows {self.schema}; use the newer acctd that "
                    "wrote it"
                )
            if 0 < version < self.schema:
                raise ConfigError(
                    f"{self.path} has schema {version}, of an acctd before its first release; move the file away"
                )
            if version == 0:
                for statement in self.tables.split(";\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {self.schema}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the file back."""
        self.closed = True
        self._db.close()

    def check(self) -> None:
        """Read the whole file. Raises LedgerError if it is corrupt."""
        if (found := self._rows("PRAGMA quick_check(1)")) != [("ok",)]:
            raise LedgerError(f"{self.kind} {self.path} is corrupt ({found[0][0]})", corrupt=True)

    def is_there(self) -> bool:
        """Whether the file that is open is still the one of its name, and not empty."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return False
        return (found.st_dev, found.st_ino) == self._file and found.st_size > 0

    def copy_to(self, path: Path) -> None:
        """Write all that this file has into a new one. Raises LedgerError."""
        try:
            with closing(sqlite3.connect(path)) as new:
                self._db.backup(new)
        except sqlite3.Error as e:
            raise self._trouble(e) from e

    def rows(self) -> dict[str, int]:
        """How many rows each table has; goes through all of them. Raises LedgerError."""
        query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY name"
        names = [name for (name,) in self._rows(query)]
        return {name: self._rows(f"SELECT count(*) FROM {name}")[0][0] for name in names}  # noqa: S608  # tables above

    def disk_bytes(self) -> int:
        """On disk, with what SQLite keeps beside the file."""
        paths = [Path(f"{self.path}{suffix}") for suffix in ("", "-wal", "-shm")]
        return sum(path.stat().st_size for path in paths if path.exists())

    def used_bytes(self) -> int:
        """Of the file without the pages that are free: what a new one would have. Raises LedgerError."""
        pages, free, size = (
            self._rows(f"PRAGMA {name}")[0][0] for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)

    def vacuum(self) -> None:
        """Write the file anew without free pages. Others read meanwhile, and cannot write. Raises LedgerError."""
        try:
            self._db.execute("VACUUM")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error as e:
            raise self._trouble(e) from e

    @contextmanager
    def _synchronous(self, mode: str) -> Iterator[None]:
        """FULL: a commit waits for stable storage."""
        try:
            self._db.execute(f"PRAGMA synchronous = {mode}")
            try:
                yield
            finally:
                self._db.execute("PRAGMA synchronous = NORMAL")
        except sqlite3.Error as e:
            raise self._trouble(e) from e

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                # On some errors, a full disk among them, SQLite has rolled back by itself.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as e:
            raise self._trouble(e) from e

    def _rows(self, query: str, *values: object) -> list[tuple]:  # type: ignore[type-arg]  # columns differ by query
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as e:
            raise self._trouble(e) from e

    def _row(self, query: str, *values: object) -> tuple | None:  # type: ignore[type-arg]
        rows = self._rows(query, *values)
        return rows[0] if rows else None

    def _trouble(self, error: Exception) -> AcctdError:
        text, what = str(error), f"{self.kind} {self.path}"
        if isinstance(error, PermissionError) or (
            os.geteuid() != 0 and ("readonly" in text or "unable to open" in text)
        ):
            return NotPermittedError(f"cannot open the {what}: {error}; run as root or set state_dir")
        if isinstance(error, sqlite3.DatabaseError) and any(word in text for word in _CORRUPT):
            return LedgerError(f"{what} is corrupt ({error}); acctd serve moves it aside", corrupt=True)
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
            return LedgerError(f"{what} cannot be used now ({error}): another program writes to it; try again")
        return LedgerError(f"{what} cannot be used now ({error}); see that the disk is not full")


def move_aside(path: Path) -> Path:
    """Rename a file that is of no use any more, with all that SQLite keeps beside it; its new name."""
    aside = path.with_name(f"{path.name}.corrupt-{time.time_ns()}")
    for suffix in ("", "-wal", "-shm"):
        if os.path.exists(f"{path}{suffix}"):
            os.rename(f"{path}{suffix}", f"{aside}{suffix}")
    return aside


def successor(path: Path) -> Path:
    """Where a file is written that is to replace another one."""
    return path.with_name(f"{path.name}.new")


def empty_successor(path: Path) -> Path:
    """The same, with nothing there."""
    for suffix in ("", "-wal", "-shm"):
        Path(f"{successor(path)}{suffix}").unlink(missing_ok=True)
    return successor(path)


def take_successor(path: Path) -> None:
    """Put it into its place, if that is empty: whoever was to do so may have died."""
    if not path.exists() and successor(path).exists():
        successor(path).rename(path)
