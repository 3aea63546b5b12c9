"""One sink's way from the spool to its target: read, encode, send until it is taken; then the position is stored.

A target is asked with batches, and answers with an exception where something is wrong. What it will never take goes to
quarantine with its own words, found by halving the batch, and the rest goes on. A batch is stored as done only as a
whole: whoever is killed meanwhile sends it again, so a target must take the same points twice and keep them once.
"""

import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec

from acctd.errors import AcctdError, NotPermittedError, UsageError
from acctd.frames import EVENTS, RECORDS, SAMPLES, Frame, decode
from acctd.spool import Reader, backlog
from exporters import positions
from exporters.positions import Counts, State

_ORDER = (RECORDS, EVENTS, SAMPLES)
"""A record does not wait behind days of samples."""

_IDLE = 0.5  # s between two looks at a spool that had nothing new
_BACKOFF, _BACKOFF_MOST = 0.5, 60.0  # s
_SMALL = 65536  # bytes; a point of so many is taken by whoever takes any
_FULL_DISK = 5.0  # s between two attempts at one's own disk
_RETRY_AFTER_MOST = 600.0  # s; a server that asks for more is asked again then
_POINTS_A_LINE = 8  # about, of a sample
_GROW_AFTER = 32  # requests accepted in a row, until one that had to be smaller is twice as large again
_QUARANTINE_MOST = 64 * 2**20  # bytes; then it is begun anew, and one old file is kept

_T = TypeVar("_T")

log = logging.getLogger("acctd")


class UnavailableError(Exception):
    """Nothing can be said against the points: the same once more, later. `retry_after` is what the server asked for."""

    def __init__(self, words: str, retry_after: float | None = None) -> None:
        super().__init__(words)
        self.retry_after = retry_after


class RefusedError(Exception):
    """The target takes the batch not at all, or not all of it. `bad`: which, by index, with its words; None: not told.

    What is not bad is sent again. Without a usable index the batch is halved until what is bad stands alone.
    """

    def __init__(self, words: str, bad: Mapping[int, str] | None = None) -> None:
        super().__init__(words)
        self.bad = bad


class TooLargeError(Exception):
    """Fewer points at a time, please."""


class Item(NamedTuple):
    """One point: in the target's own format, and which of its places it goes to."""

    to: str
    data: bytes


class Target(Protocol):
    """Where one sink leads. All but encode() may block; a sink has a thread of its own."""

    @property
    def identity(self) -> str:
        """Where it leads, without secrets."""

    @property
    def streams(self) -> tuple[str, ...]:
        """What it takes of the spool."""

    @property
    def batch(self) -> int:
        """Points a request at most."""

    def encode(self, frame: Frame) -> list[Item]:
        """What a frame is there; none for what means nothing to it. UsageError for what it cannot express."""

    def send(self, to: str, data: Sequence[bytes]) -> None:
        """Store points, for good. Raises UnavailableError, RefusedError or TooLargeError."""

    def state(self) -> dict[str, Any]:
        """What it wants to find again, beside the position; plain JSON."""

    def resume(self, state: Mapping[str, Any]) -> None:
        """The state as of the stored position: what was sent after that will be sent again. Called once, first."""

    def close(self) -> None:
        """Give everything back. Called in the sink's thread."""


class _StoppedError(Exception):
    """It is told to end."""


class Delivery:
    """One sink. run() is its thread's; numbers() may be called from others."""

    def __init__(self, name: str, target: Target, spool_dir: Path, positions_dir: Path) -> None:
        self.name = name
        self._target = target
        self._directory = positions_dir
        self._spool_dir = spool_dir
        self._readers = {stream: Reader(spool_dir / stream) for stream in _ORDER if stream in target.streams}
        self._quarantine = quarantine(positions_dir, name)
        self._stop = threading.Event()
        self._finite = threading.Event()
        self._woken = threading.Event()
        self._batch = target.batch
        self._fitted = 0  # requests since the last that was too large
        self._held: list[bytes] = []  # what goes to quarantine with the position of this batch
        self._done = Counts()  # what is counted with the position of this batch
        self._state = positions.load(positions_dir, name) or State(identity=target.identity)
        self._state.identity = target.identity
        self._state.trouble = None  # of before; today's is told when it comes
        for stream, reader in self._readers.items():
            self._state.positions.setdefault(stream, reader.oldest())
        self._state.positions = {stream: self._state.positions[stream] for stream in self._readers}

    def run(self, *, until_empty: bool = False) -> None:
        """Deliver until stop(); with `until_empty`, or after end_when_empty(), until nothing is left in the spool."""
        if until_empty:
            self._finite.set()
        try:
            self._target.resume(self._state.target)
            self._state.target = self._target.state()  # what the first batch of all begins with
            self._patiently(self._cut_quarantine)
            self._store()  # the agent sees from now on that this sink wants what there is
            while not self._stop.is_set():
                finite = self._finite.is_set()  # asked before the look: what was written before is found by it
                if self._step():
                    continue
                if finite:
                    return
                self._woken.wait(_IDLE)
                self._woken.clear()
        except _StoppedError:
            return
        finally:
            for reader in self._readers.values():
                reader.close()
            self._target.close()

    def end_when_empty(self) -> None:
        """Nothing more will be written to the spool: have run() return once it has delivered what there is."""
        self._finite.set()
        self._woken.set()

    def stop(self) -> None:
        """Have run() return soon: a request under way is waited for."""
        self._stop.set()
        self._woken.set()

    def numbers(self) -> State:
        """How it stands; not to be changed."""
        return self._state

    def backlog(self) -> int:
        """Bytes of the spool that it has not read; of compressed segments as they are."""
        return sum(backlog(self._spool_dir / stream, at) for stream, at in self._state.positions.items())

    def _step(self) -> bool:
        """Deliver one batch; False where there is nothing."""
        for stream, reader in self._readers.items():
            before = self._state.positions[stream]
            batch = self._patiently(lambda: reader.read(before, max(1, self._batch // _POINTS_A_LINE)))  # noqa: B023
            if batch.missing:
                self._done.dropped = {stream: batch.missing}
                log.warning(
                    "sink %s: %d %s went from a full spool before they were sent", self.name, batch.missing, stream
                )
            if batch.lines:
                self._deliver(stream, batch.lines)
            if batch.lines or batch.missing:
                self._state.positions[stream] = batch.position
                self._finish_batch()
            if batch.lines:
                return True
        return False

    def _deliver(self, stream: str, lines: Sequence[bytes]) -> None:
        by_place: dict[str, list[bytes]] = {}
        for line in lines:
            try:
                items = self._target.encode(decode(line))
            except (msgspec.MsgspecError, UnicodeDecodeError, UsageError) as e:
                self._done.unreadable += 1
                self._set_aside(stream, line, str(e))
                continue
            except Exception as e:  # a frame that an encoder does not survive would hold up all after it for ever
                log.exception("sink %s: a line of %s could not be encoded", self.name, stream)
                self._done.unreadable += 1
                self._set_aside(stream, line, repr(e))
                continue
            for to, data in items:
                by_place.setdefault(to, []).append(data)
        for to, points in by_place.items():
            start = 0
            while start < len(points):
                size = self._batch  # which a request may change
                self._send(to, points[start : start + size])
                start += size

    def _send(self, to: str, points: Sequence[bytes]) -> None:
        """Have all points of a batch accepted, or set aside."""
        waiting = [points]
        while waiting:
            part = waiting.pop()
            try:
                self._persist(to, part)
            except RefusedError as e:
                bad = {index: words for index, words in (e.bad or {}).items() if 0 <= index < len(part)}
                if not bad and len(part) == 1:
                    bad = {0: str(e)}
                if bad:
                    for index, words in bad.items():
                        self._set_aside(to, part[index], words)
                    if rest := [point for index, point in enumerate(part) if index not in bad]:
                        waiting.append(rest)
                else:
                    waiting += [part[len(part) // 2 :], part[: len(part) // 2]]
            except TooLargeError as e:
                self._fitted = 0
                if len(part) == 1:
                    self._set_aside(to, part[0], str(e))
                else:
                    self._batch = len(part) // 2
                    waiting += [part[self._batch :], part[: self._batch]]
            else:
                self._done.sent += len(part)
                self._done.requests += 1
                self._state.accepted = time.time()
                self._fitted += 1
                if self._fitted >= _GROW_AFTER and self._batch < self._target.batch:
                    self._batch, self._fitted = min(2 * self._batch, self._target.batch), 0

    def _persist(self, to: str, points: Sequence[bytes]) -> None:
        """Ask until there is an answer to the points themselves."""
        pause, unforeseen = _BACKOFF, False
        while not self._stop.is_set():
            try:
                self._target.send(to, points)
            except RefusedError:
                self._tell(None)
                raise
            except Exception as e:
                if isinstance(e, TooLargeError) and (len(points) > 1 or len(points[0]) > _SMALL):
                    self._tell(None)
                    raise
                # What a target did not foresee says nothing against the points: they wait, and it is shown. Nor does
                # one small point that is too large: then something on the way takes nothing at all.
                foreseen = isinstance(e, UnavailableError | OSError | TooLargeError)
                if not foreseen and not unforeseen:
                    log.exception("sink %s: a request failed for a reason of its own", self.name)
                unforeseen = unforeseen or not foreseen
                self._state.counts.failures += 1
                self._tell(str(e) if foreseen else repr(e)[:500])
                wait = pause * random.uniform(0.5, 1.0)  # noqa: S311  # a thousand nodes are not to come at once
                if isinstance(e, UnavailableError) and e.retry_after is not None:
                    wait += max(0.0, min(e.retry_after, _RETRY_AFTER_MOST))
                pause = min(2 * pause, _BACKOFF_MOST)
                self._stop.wait(wait)
            else:
                self._tell(None)
                return
        raise _StoppedError

    def _tell(self, trouble: str | None) -> None:
        """Say once that nothing is accepted, and once that it is again."""
        if trouble is not None and self._state.trouble is None:
            log.warning("sink %s: %s; what it is to get waits in the spool", self.name, trouble)
        elif trouble is None and self._state.trouble is not None:
            log.info("sink %s takes points again", self.name)
        if trouble != self._state.trouble:
            self._state.trouble = trouble
            if trouble is not None:
                self._store()

    def _finish_batch(self) -> None:
        """What was done, what was set aside and the position after it become true together."""
        counts, done = self._state.counts, self._done
        counts.sent += done.sent
        counts.requests += done.requests
        counts.quarantined += done.quarantined
        counts.unreadable += done.unreadable
        for stream, lines in done.dropped.items():
            counts.dropped[stream] = counts.dropped.get(stream, 0) + lines
        self._done = Counts()
        self._state.target = self._target.state()
        self._patiently(self._write_quarantine)
        self._store()
        if self._state.quarantine_bytes > _QUARANTINE_MOST:
            # Only now, with nothing in it that is not stored: who dies after this line finds no file, and knows.
            self._patiently(self._turn_quarantine)
            self._state.quarantine_bytes = 0
            self._store()

    def _store(self) -> None:
        self._patiently(lambda: positions.store(self._directory, self.name, self._state))

    def _patiently(self, act: Callable[[], _T]) -> _T:
        """One's own disk is waited for: to go on without it would lose lines, or send all of them twice."""
        before, told = self._state.trouble, None
        while True:
            self._state.trouble = before  # the act may store it
            try:
                result = act()
            except OSError as e:
                words = f"{e.filename or self._directory}: {e.strerror or e}"
                if words != told:
                    log.error("sink %s: %s; waiting for it", self.name, words)
                self._state.trouble = told = words
                if self._stop.wait(_FULL_DISK):
                    raise _StoppedError from e
            else:
                if told is not None:
                    log.info("sink %s goes on", self.name)
                return result

    def _set_aside(self, to: str, point: bytes, words: str) -> None:
        entry = {
            "time": round(time.time(), 3),
            "to": to,
            "point": point.decode(errors="replace"),
            "words": words[:2000],
        }
        self._held.append(json.dumps(entry).encode() + b"\n")
        self._done.quarantined += 1

    def _write_quarantine(self) -> None:
        if not self._held:
            return
        with open(self._quarantine, "ab", opener=_private) as stream:
            # Somebody may have looked at it and removed it.
            self._state.quarantine_bytes = min(self._state.quarantine_bytes, stream.tell())
            stream.truncate(self._state.quarantine_bytes)
            stream.write(b"".join(self._held))
            stream.flush()
            os.fsync(stream.fileno())  # as the position is
            size = stream.tell()
        self._state.quarantine_bytes = size
        self._held.clear()

    def _turn_quarantine(self) -> None:
        with suppress(FileNotFoundError):
            os.replace(self._quarantine, self._directory / f"{self.name}{positions.OLD_QUARANTINE}")

    def _cut_quarantine(self) -> None:
        """What was set aside after the stored position will be set aside again."""
        size = self._quarantine.stat().st_size if self._quarantine.exists() else 0
        self._state.quarantine_bytes = min(self._state.quarantine_bytes, size)
        if size:
            os.truncate(self._quarantine, self._state.quarantine_bytes)


def _private(path: str, flags: int) -> int:
    """Not for everybody on this node: it holds what others' jobs did."""
    return os.open(path, flags, 0o640)


def quarantine(directory: Path, name: str) -> Path:
    """Where what a sink does not take is kept: JSON lines of time, to, point and the server's words."""
    return directory / f"{name}{positions.QUARANTINE}"


def check_directory(directory: Path) -> None:
    """Raises AcctdError where positions could not be stored, NotPermittedError where they are another user's.

    Root must not write where others may have laid symbolic links.
    """
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        owner = directory.stat().st_uid
        writable = os.access(directory, os.W_OK | os.X_OK)
    except OSError as e:
        raise AcctdError(
            f"export.positions_dir {directory} cannot be made ({e.strerror}); see its owner, or name another one"
        ) from e
    if owner != os.geteuid() or not writable:
        raise NotPermittedError(
            f"export.positions_dir {directory} is uid {owner}'s and you are uid {os.geteuid()}; run acctd export as "
            "that user, or name another directory"
        )
