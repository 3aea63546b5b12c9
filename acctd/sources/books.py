"""Records from this node's ledger. Each record is held against the signature that it was given.

One record that was altered, or one that is missing between two, and there is no bill: money rests on signed data only.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from acctd.errors import AcctdError, ExhaustedError
from acctd.ledger import Ledger, fits
from acctd.sources.files import BATCH, WRONG, Batch, usage_of
from acctd.sources.looked import Looked, digest
from acctd.usage import Usage

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
                    if not fits(previous, body, signed):
                        raise self._wrong(number, "was altered after it was signed off")
                    try:
                        batch.usages.append(usage_of(body))
                    except WRONG as e:
                        raise self._wrong(number, f"cannot be read ({e})") from e
                    batch.places.append(-number)  # whatever is not below 0 is a place in a file
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


def again(path: Path, number: int) -> Usage:
    """A record that was read before. Raises ExhaustedError where it was archived meanwhile."""
    with Ledger(path) as book:
        for found, _, body in book.records_after(number - 1, 1):
            if found == number:
                return usage_of(body)
    raise ExhaustedError(f"record {number} of {path} was archived while it was read; ask again")


def missing(book: Ledger, since: float) -> str:
    """A sentence where records were taken out that have some of their time after `since`; "" where none were."""
    number, _ = book.anchor()
    # One that took records out and did not note until when is of an older acctd: any of them may be meant.
    until = book.taken_until() or math.inf
    if not number or until + 1 < since:
        return ""
    return f"records up to {number} of {book.path} were archived, and some of them may be of this period"


def numbers(book: Ledger, since: float) -> list[Numbers]:
    """The records there are now, in parts, from the first on that may have ended after `since` (s since the epoch).

    Raises AcctdError where the newest are missing.
    """
    first = next(book.stream(since=since if math.isfinite(since) else None), None)
    newest, _ = book.last()
    if newest and book.digest(newest) is None:
        raise AcctdError(f"record {newest} of {book.path} was signed last and is missing; restore the ledger")
    if first is None or newest < first[0]:
        return []
    starts = range(first[0] - 1, newest, STEP)
    return [Numbers(book.path, after, min(after + STEP, newest)) for after in starts]
