"""What bills are made from, as the agent tells it: signed records and open jobs so far, a page at a time.

A page is bounded in bytes, and in the records that are looked at for it, and between two readings of the ledger
everybody else is served. Who may see what is decided by the caller: `every`, or own jobs only.
"""

import asyncio
from functools import partial
from typing import Any

import msgspec

from acctd import views
from acctd.caller import Caller
from acctd.daemon import Daemon
from acctd.errors import UsageError
from acctd.model import INT64_MAX

_BYTES = 2**18  # of a page, and one record more
_AT_ONCE = 256  # records that are looked at before somebody else has a turn: some ms
_LOOKED = 40 * _AT_ONCE  # records that are looked at for a page
_JOBS = 100  # of a page
_JOBS_AT_ONCE = 10


class _Whose(msgspec.Struct):
    uid: int


_whose = msgspec.json.Decoder(_Whose)


async def records(daemon: Daemon, caller: Caller, after: int, *, every: bool) -> dict[str, Any]:
    """Signed ones after a number, oldest first. Raises UsageError, and what the ledger does."""
    _check(after)
    found: list[dict[str, Any]] = []
    last, size, looked, more = after, 0, 0, True
    while more and looked < _LOOKED and size < _BYTES:
        # Asked anew each time: the ledger may be another one by then.
        rows = daemon.books.read(partial(_signed, daemon, last))
        more = len(rows) == _AT_ONCE
        for number, digest, body in rows:
            if size >= _BYTES:
                more = True
                break
            last, looked = number, looked + 1
            if every or _uid(body) == caller.uid:
                found.append({"number": number, "digest": digest, "body": msgspec.Raw(body)})
                size += len(body)
        await asyncio.sleep(0)
    return {"records": found, "last": last, "more": more, "all": every}


async def interim(daemon: Daemon, caller: Caller, after: int, *, every: bool) -> dict[str, Any]:
    """Open jobs after a number, read now, as records that are final in nothing. Raises UsageError."""
    _check(after)
    jobs = sorted(
        (job.row.seq, name) for name, job in daemon.jobs.items() if job.row.seq > after and (every or caller.owns(job))
    )
    found: list[Any] = []
    for number, (_, name) in enumerate(jobs[:_JOBS]):
        job = daemon.jobs.get(name)  # it may have ended meanwhile
        if job is not None and job.row.phase == "running":  # else it has not begun, or has its record
            daemon.read(job)
            found.append(msgspec.Raw(msgspec.json.encode(views.interim(daemon.jobs, job))))
        if number % _JOBS_AT_ONCE == _JOBS_AT_ONCE - 1:
            await asyncio.sleep(0)
    last = jobs[:_JOBS][-1][0] if jobs else after
    return {"records": found, "last": last, "more": len(jobs) > _JOBS, "all": every}


def _signed(daemon: Daemon, after: int) -> list[tuple[int, str, bytes]]:
    return daemon.agent.ledger.records_after(after, _AT_ONCE)


def _uid(body: bytes) -> int | None:
    """Whose a record is; None of one that cannot be read, which is nobody's but root's."""
    try:
        return _whose.decode(body).uid
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _check(after: int) -> None:
    if not 0 <= after <= INT64_MAX:
        raise UsageError(f"after {after} is out of range; it takes 0 to {INT64_MAX}")
