"""Records and open jobs from this node's ledger. Each record is held against the signature that it was given.

One record that was altered, or one that is missing between two, and there is no bill: money rests on signed data only.
"""

import hashlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from acctd.errors import AcctdError
from acctd.ledger import Ledger
from acctd.meter import add
from acctd.rows import OpenJob
from acctd.sources.files import BATCH, WRONG, Batch, usage_of
from acctd.sources.looked import Looked, digest
from acctd.usage import Usage

STEP = 32 * BATCH
"""Records that one reader takes."""

SIZE = 1024
"""Bytes of a record, roughly: by that it is judged how many readers are worth it."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """The records of a ledger after a number that is there, or 0, up to another."""

    path: Path
    after: int
    until: int

    def batches(self, looked: Looked) -> Iterator[Batch]:
        """Raises AcctdError for a record that is not as it was signed."""
        with Ledger(self.path) as book:
            last, previous = self.after, book.digest(self.after) if self.after else None
            while last < self.until and (rows := book.records_after(last, BATCH)):
                rows = [row for row in rows if row[0] <= self.until]
                batch = Batch([], [], [])
                for number, signed, body in rows:
                    # What came before the first of all may be in an archive.
                    if previous is not None and hashlib.sha256(previous.encode() + body).hexdigest() != signed:
                        raise AcctdError(
                            f"record {number} of {self.path}, or the one before it, was altered or removed after it "
                            "was signed off; restore the ledger"
                        )
                    try:
                        batch.usages.append(usage_of(body))
                    except WRONG as e:
                        raise AcctdError(
                            f"record {number} of {self.path} cannot be read ({e}); restore the ledger"
                        ) from e
                    batch.places.append(number)
                    batch.digests.append(digest(body))
                    batch.size += len(body)
                    previous = signed
                if not rows:
                    return
                for number, signed, _ in (rows[0], rows[-1]):
                    looked.first = min(looked.first or (number, signed), (number, signed))
                    looked.last = max(looked.last or (number, signed), (number, signed))
                last = rows[-1][0]
                yield batch


def numbers(book: Ledger) -> list[Numbers]:
    """The whole ledger as it is now, in parts."""
    newest, _, _ = book.newest()
    found, after = [], 0
    oldest = book.records_after(0, 1)
    while after < newest:
        ends = book.records_after(max(after, oldest[0][0] if oldest else 0) + STEP - 1, 1)
        until = min(ends[0][0], newest) if ends else newest
        found.append(Numbers(book.path, after, until))
        after = until
    return found


def living(book: Ledger) -> list[Usage]:
    """The open jobs, as the ledger has them: with what was read when their accounts were last stored."""
    return [_usage(row, socket.gethostname()) for row in book.open_jobs() if row.phase == "running"]


def _usage(row: OpenJob, node: str) -> Usage:
    spec, account = row.spec, row.account
    return Usage(
        id=spec.id,
        owner=spec.owner.name,
        node=node,
        started=row.created,
        wall_ns=max(0, (row.terms.ended_ns or row.seen_ns) - row.boot_ns),
        totals=add(account.meter.totals, account.families),
        tags=dict(spec.tags),
        stacked=tuple(sorted(device for device, stacked in account.stacked.items() if stacked)),
        parent=spec.parent,
    )
