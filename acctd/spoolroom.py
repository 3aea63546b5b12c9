"""The spool of one agent: a writer for each stream, and how much room they may take together.

Removes segments that every sink has read, compresses those that wait, and above the bound removes the oldest samples,
then the oldest events; records never. Whoever had not read what goes sees from the numbers how many lines it was.
"""

import grp
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from acctd import spool
from acctd.errors import AcctdError, ExhaustedError, InUseError, NotFoundError
from acctd.frames import EVENTS, SAMPLES, STREAMS
from acctd.kernel import filelock, private
from acctd.sinks import ExportConfig
from exporters import positions

_LOCK = ".lock"
_SEGMENTS_A_BOUND = 32  # a bound is kept to within one of so many parts
_one_at_a_time = threading.Lock()  # a room that was closed may still be at it, in the same place
_PACK_AFTER = 120.0  # s; a sink that is up has read a segment long before


class SpoolRoom:
    """What is on disk. tidy() is for a thread of its own; the writers are for the one that writes."""

    def __init__(self, config: ExportConfig) -> None:
        """Raises AcctdError for a place that cannot be written, NotFoundError for a group that is not there."""
        self._config = config
        self.bytes = 0
        """As of the last tidy()."""
        group = _gid(config.group)
        furthest = positions.furthest(config.positions_dir, config.names)
        private.make(config.spool_dir)
        with ExitStack() as stack:
            try:
                stack.enter_context(filelock.held(str(config.spool_dir / _LOCK), patience=0.0))
                self.writers = {
                    stream: self._writer(config.spool_dir / stream, furthest[stream], group) for stream in STREAMS
                }
            except ExhaustedError as e:
                said = f"another agent writes the spool {config.spool_dir}; choose another export.spool_dir"
                raise InUseError(said) from e
            except OSError as e:
                said = f"cannot use the spool {config.spool_dir} ({e}); choose another export.spool_dir"
                raise AcctdError(said) from e
            self._open = stack.pop_all()

    def _writer(self, directory: Path, at_least: int, group: int | None) -> spool.Writer:
        spool.make_directory(directory, group)
        most = min(spool.SEGMENT_BYTES, self._config.spool_max // _SEGMENTS_A_BOUND)
        return spool.Writer(directory, at_least=at_least, group=group, segment_bytes=most)

    def tidy(self) -> None:
        """Make room. Raises OSError where a file can be neither removed nor compressed; the rest is done then."""
        with _one_at_a_time:
            self._tidy()

    def _tidy(self) -> None:
        wanted = positions.consumed(self._config.positions_dir, self._config.names)
        failed: list[OSError] = []
        sizes = {stream: self._tidy_stream(stream, wanted, failed) for stream in STREAMS}
        for stream in (SAMPLES, EVENTS):
            for segment in self.writers[stream].full():
                if sum(sizes.values()) <= self._config.spool_max:
                    break
                size = _size(segment)
                if _tried(lambda: spool.remove(segment), failed):  # noqa: B023  # called at once
                    sizes[stream] -= size
        self.bytes = sum(sizes.values())
        if failed:
            raise failed[0]

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()
        self._open.close()

    def _tidy_stream(self, stream: str, wanted: dict[str, int] | None, failed: list[OSError]) -> int:
        """Remove what is read, compress what is not; bytes that are left."""
        full = self.writers[stream].full()
        firsts = [segment.first for segment in spool.segments(self._config.spool_dir / stream)]
        for segment in full:
            after = next((first for first in firsts if first > segment.first), None)
            if after is None:
                continue  # somebody has cleared the spool by hand
            if wanted is not None and after <= wanted.get(stream, self._unread(full)):
                _tried(lambda: spool.remove(segment), failed)  # noqa: B023  # called at once
            elif not segment.packed and time.time() - _changed(segment) > _PACK_AFTER:
                _tried(lambda: spool.pack(segment), failed)  # noqa: B023
        return spool.size(self._config.spool_dir / stream)

    def _unread(self, full: list[spool.Segment]) -> int:
        """Of a stream without a sink the newest full segment stays a while: /metrics is made from what is new."""
        return full[-1].first if full else 0


def _tried(act: Callable[[], None], failed: list[OSError]) -> bool:
    try:
        act()
    except OSError as e:
        failed.append(e)
        return False
    return True


def _changed(segment: spool.Segment) -> float:
    with suppress(FileNotFoundError):
        return segment.path.stat().st_mtime
    return time.time()


def _size(segment: spool.Segment) -> int:
    with suppress(FileNotFoundError):
        return segment.path.stat().st_size
    return 0


def _gid(group: str | None) -> int | None:
    if group is None:
        return None
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise NotFoundError(f"export.group {group!r} does not exist on this host; make it, or name another") from None
