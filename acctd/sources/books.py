"""Records from this node's ledger. Each record is held against the signature that it was given.

One record that was altered, or one that is missing between two, and there is no bill: money rests on signed data only.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from acctd.errors import AcctdError, ExhaustedError
from acctd.ledger import Ledger
from acctd.sources.files import BATCH, WRONG, Batch, usage_of
from acctd.sources.looked import Looked, digest

STEP = 32 * BATCH
"""Records that one reader takes."""

SIZE = 1024
"""Bytes of a record, roughly: by that it is judged how many readers are worth it."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """The records of a ledger after a number, which is there or 0 or was archived last, up to another."""

    path: Path
    after: int
    until: int

    def batches(self, looked: Looked) -> Iterator[Batch]:
        """Raises AcctdError for a record that is not as it was signed, and for one that is missing."""
        with Ledger(self.path) as book:
            last, previous = self.after, book.digest(self.after) if self.after else ""
            if previous is None:
                raise self._lost(book, self.after)
            while last < self.until:
                batch = Batch([], [], [])
                for number, signed, body in book.records_after(last, min(BATCH, self.until - last)):
                    if number != last + 1:
                        raise self._lost(book, last + 1)
                    # One that somebody changed by SQL may be text: SQLite keeps what it is given.
                    if type(body) is not bytes or hashlib.sha256(previous.encode() + body).hexdigest() != signed:
                        raise self._wrong(number, "was altered after it was signed off")
                    try:
                        batch.usages.append(usage_of(body))
                    except WRONG as e:
                        raise self._wrong(number, f"cannot be read ({e})") from e
                    batch.places.append(number)
                    batch.digests.append(digest(body))
                    batch.size += len(body)
                    last, previous = number, signed
                    looked.first = min(looked.first or (number, signed), (number, signed))
                if not batch.usages:
                    raise self._lost(book, last + 1)
                looked.last = max(looked.last or (0, ""), (last, previous))
                yield batch

    def _lost(self, book: Ledger, number: int) -> AcctdError:
        if book.anchor()[0] >= number:
            return ExhaustedError(f"records of {self.path} were archived while they were read; ask again")
        return self._wrong(number, "is missing")

    def _wrong(self, number: int, what: str) -> AcctdError:
        return AcctdError(f"record {number} of {self.path} {what}; restore the ledger")


def numbers(book: Ledger, since: float) -> list[Numbers]:
    """The records there are now, in parts, from the first on that may have ended after `since` (s since the epoch)."""
    first = next(book.stream(since=since if math.isfinite(since) else None), None)
    newest, _, _ = book.newest()
    if first is None or newest < first[0]:
        return []
    starts = range(first[0] - 1, newest, STEP)
    return [Numbers(book.path, after, min(after + STEP, newest)) for after in starts]
