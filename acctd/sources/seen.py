"""Each record once, however often it is delivered: the keys of those seen, in a file of SQLite's that nobody else sees.

Exact, and bounded in memory: what does not fit lies on disk. Knows no records, only their keys and digests.
"""

import sqlite3
from collections.abc import Callable, Iterable
from typing import Self

from acctd.errors import LedgerError
from acctd.sources.looked import Key

_CACHE = 64 * 1024  # KiB of the file that are kept in memory

# The files of a node hold its jobs one after the other, and so do neighbours in this order: most inserts find their
# page in the cache. The key itself, not a hash of it: two jobs are never taken for one.
_TABLE = """
CREATE TABLE seen (
    node INTEGER NOT NULL, started REAL NOT NULL, id TEXT NOT NULL, digest BLOB NOT NULL, place INTEGER NOT NULL,
    PRIMARY KEY (node, started, id)
) WITHOUT ROWID
"""

Differ = Callable[[int, int], None]
"""What is done about two places that have the same key and other bytes: raises, unless they say the same."""


class Seen:
    """Use as a context manager."""

    def __init__(self, differ: Differ) -> None:
        self._differ = differ
        self._nodes: dict[str, int] = {}
        try:
            self._db = sqlite3.connect("", isolation_level=None)  # a file without a name, gone when it is closed
            for statement in (
                "PRAGMA journal_mode = OFF", "PRAGMA synchronous = OFF", f"PRAGMA cache_size = -{_CACHE}", _TABLE,
                "BEGIN",
            ):  # fmt: skip
                self._db.execute(statement)
        except sqlite3.Error as e:
            raise _trouble(e) from e

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def repeated(self, keys: Iterable[Key], digests: Iterable[bytes], places: Iterable[int]) -> list[int]:
        """Which of these, by their position, were seen before. Raises LedgerError where the disk is full."""
        found, nodes = [], self._nodes
        insert = self._db.execute
        try:
            for position, ((node, started, job), body, place) in enumerate(zip(keys, digests, places, strict=True)):
                number = nodes.setdefault(node, len(nodes))
                row = (number, started, job, body, place)
                if not insert("INSERT OR IGNORE INTO seen VALUES (?, ?, ?, ?, ?)", row).rowcount:
                    found.append(position)
                    self._compare(row)
        except sqlite3.Error as e:
            raise _trouble(e) from e
        return found

    def _compare(self, row: tuple[int, float, str, bytes, int]) -> None:
        query = "SELECT digest, place FROM seen WHERE node = ? AND started = ? AND id = ?"
        body, place = self._db.execute(query, row[:3]).fetchone()
        if body != row[3]:
            self._differ(place, row[4])


def _trouble(error: sqlite3.Error) -> LedgerError:
    return LedgerError(f"the file of what was counted cannot be written ({error}); give SQLITE_TMPDIR more room")
