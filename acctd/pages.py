"""What bills and reports are made from, as the agent tells it: records, open jobs so far, a page at a time; samples.

A page is bounded in bytes, and in the records that are looked at for it, and between two readings of the ledger
everybody else is served. Who may see what is decided by the caller: `every`, or own jobs only.
"""

import asyncio
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from acctd import history, views
from acctd.caller import Caller
from acctd.daemon import Daemon
from acctd.errors import AcctdError, ExhaustedError, NotFoundError, UsageError
from acctd.ledger import fits
from acctd.model import INT64_MAX
from acctd.points import Point

_BYTES = 2**18  # of a page, and one record more
_AT_ONCE = 256  # records that are looked at before somebody else has a turn: some ms
_LOOKED = 40 * _AT_ONCE  # records that are looked at for a page
_JOBS = 100  # of a page
_JOBS_AT_ONCE = 10
_COLUMNS = 400  # of a job's time, each with two samples at most: what a page draws
_YEAR_9999 = 253402300799.0
_SAMPLE, _RULE = 256, 48  # bytes of one as JSON, and of each rule in it


class _Whose(msgspec.Struct):
    uid: int


_whose = msgspec.json.Decoder(_Whose)


class Turns:
    """A turn for each user: however many pages one asks for at once, they are made by turns, and one of somebody else
    is as far as all of them together.
    """

    def __init__(self) -> None:
        self._of: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()

    def of(self, caller: Caller) -> asyncio.Lock:
        """To be held for each piece of the work, and for one round of the event loop."""
        return self._of.setdefault(caller.uid, asyncio.Lock())


async def records(daemon: Daemon, caller: Caller, after: int, turn: asyncio.Lock, *, every: bool) -> dict[str, Any]:
    """Signed ones after a number, oldest first. Raises UsageError, LedgerError, AcctdError for one that is not as it
    was signed or is missing, also where it may be somebody else's: who changed it may have changed whose it is.
    """
    _check(after)
    found: list[dict[str, Any]] = []
    last, before, size, looked, more = after, "", 0, 0, True
    own = b'"uid":%d' % caller.uid
    while more and looked < _LOOKED and size < _BYTES:
        async with turn:
            # Asked anew each time: the ledger may be another one by then.
            last, before, rows = daemon.books.read(partial(_signed, daemon, last))
            more = len(rows) == _AT_ONCE
            for number, digest, body in rows:
                if size >= _BYTES:
                    more = True
                    break
                if number != last + 1 or not fits(before, body, digest):
                    raise AcctdError(
                        f"record {number} was altered after it was signed off, or one before it is missing"
                    )
                last, before, looked = number, digest, looked + 1
                # The column `owner` knows no uid. To look for bytes costs a tenth of decoding.
                if every or (own in body and _uid(body) == caller.uid):
                    found.append({"number": number, "digest": digest, "body": msgspec.Raw(body)})
                    size += len(body)
            await asyncio.sleep(0)
    archived = daemon.books.read(partial(_archived, daemon))
    return {"records": found, "last": last, "more": more, "all": every, "archived": archived}


async def interim(daemon: Daemon, caller: Caller, after: int, turn: asyncio.Lock, *, every: bool) -> dict[str, Any]:
    """Open jobs after a number, read now, as records that are final in nothing. Raises UsageError."""
    _check(after)
    jobs = sorted(
        (job.row.seq, name) for name, job in daemon.jobs.items() if job.row.seq > after and (every or caller.owns(job))
    )
    found: list[Any] = []
    for first in range(0, min(len(jobs), _JOBS), _JOBS_AT_ONCE):
        async with turn:
            for _, name in jobs[first : min(first + _JOBS_AT_ONCE, _JOBS)]:
                job = daemon.jobs.get(name)  # it may have ended meanwhile
                if job is not None and job.row.phase == "running":  # else it has not begun, or has its record
                    daemon.read(job)
                    found.append(msgspec.Raw(msgspec.json.encode(views.interim(daemon.jobs, job))))
            await asyncio.sleep(0)
    last = jobs[:_JOBS][-1][0] if jobs else after
    return {"records": found, "last": last, "more": len(jobs) > _JOBS, "all": every}


async def samples(daemon: Daemon, caller: Caller, job: str, started: float, *, every: bool) -> dict[str, Any]:
    """The kept samples of a job, by its id and its start: in each stretch of its time the one with the most memory and
    the last one. Raises NotFoundError, which is also said of a job that is not the caller's, and LedgerError.
    """
    if job in daemon.jobs and daemon.jobs[job].row.created == started:
        uid = daemon.jobs[job].spec.owner.uid
    else:
        record = daemon.record(job)
        uid = record.uid if record.started == started else -1
    if not every and uid != caller.uid:
        raise NotFoundError(f"no job {job!r} of yours (uid {caller.uid}) began at {started}; ask its owner or root")
    path = daemon.agent.config.state_dir / history.FILE
    # A read of a file, which nobody else is to wait for.
    kept = await asyncio.to_thread(history.kept, path, job, started)
    return {"samples": [msgspec.to_builtins(point) for point in _few(kept)]}


def _few(kept: list[Point]) -> list[Point]:
    if not kept:
        return []
    room = 2**20 // (_SAMPLE + _RULE * max(len(point.network) for point in kept))
    columns = max(1, min(_COLUMNS, room // 2))
    most: dict[int, Point] = {}
    last: dict[int, Point] = {}
    length = kept[-1].at + 1
    for point in kept:
        column = point.at * columns // length
        last[column] = point
        if column not in most or _memory(point) > _memory(most[column]):
            most[column] = point
    return sorted({id(point): point for point in (*most.values(), *last.values())}.values(), key=lambda each: each.at)


def _memory(point: Point) -> int:
    return point.memory_anon + point.memory_shmem + point.memory_file + point.memory_kernel + point.memory_swap


def _signed(daemon: Daemon, after: int) -> tuple[int, str, list[tuple[int, str, bytes]]]:
    """The number and digest that the next records come after, and these."""
    book = daemon.agent.ledger
    number, digest = book.anchor()
    if after > number:
        number, digest = after, book.digest(after) or ""
    elif 0 < after < number:
        raise ExhaustedError("records were archived while they were read; ask again")
    newest, _ = book.last()  # before the rest: another process may sign meanwhile
    rows = book.records_after(number, _AT_ONCE)
    if len(rows) < _AT_ONCE and (rows[-1][0] if rows else number) < newest:
        raise AcctdError(f"record {newest} was signed last and is missing; restore the ledger")
    return number, digest, rows


def _archived(daemon: Daemon) -> float | None:
    """Until when jobs went whose records were taken out, s since the epoch; None where none was."""
    book = daemon.agent.ledger
    # An older acctd took some out and did not note until when: any time may be meant.
    return (book.taken_until() or _YEAR_9999) if book.anchor()[0] else None


def _uid(body: bytes) -> int | None:
    """Whose a record is; None of one that a newer acctd wrote."""
    try:
        return _whose.decode(body).uid
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _check(after: int) -> None:
    if not 0 <= after <= INT64_MAX:
        raise UsageError(f"after {after} is out of range; it takes 0 to {INT64_MAX}")
