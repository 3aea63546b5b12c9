"""Whether the ledger's records are as they were signed, and all there. Reads; repairs nothing. Floor 3.

A digest says that a record and all before it are as they were. What it cannot say is held beside it: that the columns
by which records are found say what the record says, and that the newest one is the one that was signed last.
"""

from collections.abc import Iterator

import msgspec

from acctd.errors import AcctdError
from acctd.ledger import Ledger, fits

_CHUNK = 256  # records
_NEAR = 1e-3  # s


class _Body(msgspec.Struct):
    """Of a record what the ledger has columns of."""

    id: str
    owner: str
    started: float
    wall_ns: int


def verify(ledger: Ledger) -> Iterator[int]:
    """Follow the chain of digests from the first record to the last one that is there now.

    Gives the number up to which all is well, now and then. Raises AcctdError at the first record that was altered, is
    not found by what is in it, or has one missing before it, and where the newest are missing.
    """
    upto, (at, before) = ledger.last()[0], ledger.anchor()
    while at < upto:
        rows = ledger.signed_after(at, _CHUNK)
        if (out := ledger.anchor())[0] > at:
            at, before = out  # somebody has taken records out meanwhile
            continue
        if not rows:
            raise AcctdError(f"records {at + 1} to {upto} were signed and are missing; restore {ledger.path}")
        for number, job, owner, ended, digest, body in rows:
            if number > upto:
                break
            if number != at + 1:
                raise AcctdError(f"record {at + 1} is missing, {number} comes next; restore {ledger.path}")
            if not fits(before, body, digest):
                raise AcctdError(
                    f"record {number} of job {job!r} was altered after it was signed off, or one before it is missing; "
                    f"restore {ledger.path}"
                )
            if not _is_found(job, owner, ended, body):
                raise AcctdError(
                    f"record {number} is as it was signed, but what it is found by was altered: id {job!r}, owner "
                    f"{owner!r}, ended {ended!r}; restore {ledger.path}"
                )
            before, at = digest, number
        yield at


def _is_found(job: object, owner: object, ended: object, body: bytes) -> bool:
    try:
        read = msgspec.json.decode(body, type=_Body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return (
        (job, owner) == (read.id, read.owner)
        and isinstance(ended, float)
        and abs(ended - (read.started + read.wall_ns / 1e9)) < _NEAR
    )
