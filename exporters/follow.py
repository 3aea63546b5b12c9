"""The spool's newest samples and records, put on the board as they come: a thread of its own.

Keeps no position and holds nothing up: what it does not see in time is not shown, and the sinks have it all the same.
"""

import logging
import threading
from pathlib import Path

import msgspec

from acctd.frames import RECORDS, SAMPLES, decode
from acctd.spool import Position, Reader
from exporters.board import Board

_IDLE = 0.5  # s between two looks
_AGAIN = 5.0  # s until it looks again after a defect of ours
_LINES = 1000  # read at a time

log = logging.getLogger("acctd")


class Follower:
    """Follows one spool. It begins with the newest segments: what ended long ago need not be read."""

    def __init__(self, board: Board, spool_dir: Path) -> None:
        self._board = board
        # Samples first: of a job that has ended meanwhile the record comes after them.
        self._readers = {stream: Reader(spool_dir / stream) for stream in (SAMPLES, RECORDS)}
        self._positions: dict[str, Position] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follow")
        self._trouble: str | None = None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """End, and wait for that."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    more = [self._step(stream, reader) for stream, reader in self._readers.items()]
                except OSError as e:
                    self._tell(f"cannot read the spool ({e})")
                    self._close()  # to look at what is there by then
                    more = []
                except Exception:
                    log.exception("the spool could not be followed; it is looked at again")
                    self._close()
                    self._stop.wait(_AGAIN)
                    continue
                else:
                    self._tell(None)
                if not any(more):
                    self._stop.wait(_IDLE)
        finally:
            self._close()

    def _close(self) -> None:
        for reader in self._readers.values():
            reader.close()

    def _step(self, stream: str, reader: Reader) -> bool:
        """Take in what is new, at most so much; whether there was anything."""
        position = self._positions.get(stream) or reader.newest()
        batch = reader.read(position, _LINES)
        self._positions[stream] = batch.position
        for line in batch.lines:
            try:
                self._board.take(decode(line))
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                self._board.leave_out()
            except Exception:
                log.exception("a line of %s could not be shown", stream)  # a defect of ours; the others are shown
                self._board.leave_out()
        return bool(batch.lines)

    def _tell(self, trouble: str | None) -> None:
        if trouble is not None and trouble != self._trouble:
            log.warning("what is shown to Prometheus is old: %s", trouble)
        self._trouble = trouble
