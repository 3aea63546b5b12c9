"""Several processes read at once: each has a tally of its own, and one of them all says what was counted before.

A reader takes a part of the work, shows the keys of each batch to the parent and adds what that has not seen. So the
parent alone knows what counts, and its memory does not grow with the records. One reader needs no process at all.
"""

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import msgspec

from acctd.bill import Tally
from acctd.errors import AcctdError
from acctd.sources.files import Batch
from acctd.sources.looked import Key, Looked, key
from acctd.usage import Usage

WORTH = 32 * 2**20
"""Bytes that one process reads before another would have begun."""

Check = Callable[[list[Key], list[bytes], list[int]], Sequence[int]]
"""Positions of those that were counted before."""


class Task(Protocol):
    """Some of the records."""

    def batches(self, looked: Looked) -> Iterator[Batch]:
        """What is in it; what cannot be read is said to `looked`."""


@dataclass(slots=True)
class Reader:
    """One process's part of the bill. Goes from one process to another when it is done."""

    tally: Tally
    needed_from: float  # s since the epoch: what ended before is counted as looked at and adds nothing
    watched: frozenset[Key] = frozenset()  # open jobs; those that have a record by now
    looked: Looked = field(default_factory=Looked)
    ended: set[Key] = field(default_factory=set)

    def read(self, task: Task, check: Check | None, progress: Callable[[int, int], None]) -> None:
        """All of a task. `progress` gets records and bytes."""
        for batch in task.batches(self.looked):
            keys = [key(usage) for usage in batch.usages]
            seen = frozenset(check(keys, batch.digests, batch.places) if check is not None and keys else ())
            for position, usage in enumerate(batch.usages):
                if position in seen:
                    self.looked.repeated += 1
                    continue
                self.looked.count(usage, batch.digests[position])
                self._take(usage)
            if self.watched:
                self.ended |= self.watched.intersection(keys)
            progress(len(keys), batch.size)

    def _take(self, usage: Usage) -> None:
        if usage.started + usage.wall_ns / 1e9 + 1 >= self.needed_from:  # one second more than enough for rounding
            self.tally.add(usage)

    def add(self, other: "Reader") -> None:
        """What another process read."""
        self.tally.merge(other.tally)
        self.looked.add(other.looked)
        self.ended |= other.ended


def read(
    tasks: Sequence[Task],
    make: Callable[[], Reader],
    *,
    size: int,
    check: Check | None,
    progress: Callable[[int, int], None],
) -> Reader:
    """Read all tasks, of `size` bytes together, by as many processes as are worth it. Raises what a reader raised."""
    number = min(len(os.sched_getaffinity(0)), len(tasks), size // WORTH)
    whole = make()
    _read(tasks, make, whole, number, check, progress)
    whole.looked.told.sort()
    return whole


def _read(
    tasks: Sequence[Task],
    make: Callable[[], Reader],
    whole: Reader,
    number: int,
    check: Check | None,
    progress: Callable[[int, int], None],
) -> None:
    if number < 2:
        with _uncollected():
            for task in tasks:
                whole.read(task, check, progress)
        return
    context = multiprocessing.get_context("fork")  # the tasks and the tariff come along; no thread has begun yet
    links: dict[Connection, Any] = {}
    try:
        for _ in range(number):
            mine, its = context.Pipe()
            process = context.Process(target=_work, args=(its, [*links, mine], make, tasks), daemon=True)
            process.start()
            its.close()
            links[mine] = process
        waiting = iter(range(len(tasks)))
        while links:
            for link in wait(list(links)):
                if isinstance(link, Connection) and _served(link, waiting, whole, check, progress):
                    links.pop(link).join()
                    link.close()
    finally:
        for process in links.values():
            process.kill()
            process.join()


def _served(
    link: Connection,
    waiting: Iterator[int],
    whole: Reader,
    check: Check | None,
    progress: Callable[[int, int], None],
) -> bool:
    """Answer one message of a reader; whether it was the last one."""
    try:
        kind, *values = link.recv()
    except EOFError:
        raise AcctdError("a process that read records was ended from outside; see that there is memory") from None
    match kind:
        case "next":
            link.send(next(waiting, None))
        case "seen":
            link.send(list(check(*values)) if check is not None else [])
        case "read":
            progress(*values)
        case "done":
            whole.add(values[0])
            return True
        case "failed":
            raise values[0]
    return False


def _work(link: Connection, others: Iterable[Connection], make: Callable[[], Reader], tasks: Sequence[Task]) -> None:
    """A reader's life. It ends with its parent: nobody else answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is asked too, and ends us
    for other in others:
        other.close()

    def asked(*message: object) -> Any:
        link.send(message)
        return link.recv()

    def check(keys: list[Key], digests: list[bytes], places: list[int]) -> Sequence[int]:
        found: Sequence[int] = asked("seen", keys, digests, places)
        return found

    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            reader = make()
            gc.disable()
            while (number := asked("next")) is not None:
                reader.read(tasks[number], check, lambda records, size: link.send(("read", records, size)))
            link.send(("done", reader))
        except AcctdError as e:
            link.send(("failed", e))
        except (OSError, MemoryError, msgspec.MsgspecError) as e:
            if not isinstance(e, BrokenPipeError | ConnectionResetError):
                link.send(("failed", AcctdError(f"a process that read records failed ({e}); see disk and memory")))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Records come and go without circles: looking for some costs more than reading them."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
