"""How far each sink is in the spool, and what it has counted: one small file a sink, replaced as a whole.

Written by `acctd export`, read by the agent (which removes what all have read) and by whoever asks how sinks stand. A
sink that was renamed in the configuration takes its file along; that of one that was taken out stays, should it return.
"""

import errno
import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from acctd.errors import AcctdError, NotPermittedError
from acctd.frames import STREAMS
from acctd.spool import Position

_SUFFIX = ".json"
QUARANTINE, OLD_QUARANTINE = ".quarantine", ".quarantine.old"
LOCK = ".lock"
"""Held by the one exporter that these are for."""

_BYTES_MOST = 2**20


class Counts(msgspec.Struct):
    """Since the sink is there, over all restarts. Points are what the sink takes: lines of its own format."""

    sent: int = 0  # points it has accepted
    requests: int = 0  # that it has accepted
    failures: int = 0  # requests that went wrong and were made again
    quarantined: int = 0  # points it will never accept
    dropped: dict[str, int] = {}  # lines of each stream that went from a full spool before they were read
    unreadable: int = 0  # lines of the spool that are none


class State(msgspec.Struct):
    """One sink's file."""

    identity: str  # where it leads: a sink that leads there under another name is the same one
    positions: dict[str, Position] = {}
    counts: Counts = msgspec.field(default_factory=Counts)
    quarantine_bytes: int = 0  # of its quarantine, as of this position
    target: dict[str, Any] = {}  # what the target itself wants to find again
    accepted: float = 0.0  # s since the epoch, when a request was accepted last
    trouble: str | None = None  # why nothing is accepted at the moment


def load(directory: Path, name: str) -> State | None:
    """None where there is none. Raises AcctdError for one that cannot be read: a sink must not begin anew unasked."""
    path = directory / f"{name}{_SUFFIX}"
    try:
        return msgspec.json.decode(_content(path), type=State)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise AcctdError(
            f"the position {path} is damaged ({e}); remove it to begin with all that the spool has"
        ) from None
    except OSError as e:
        kind = NotPermittedError if isinstance(e, PermissionError) else AcctdError
        raise kind(f"the position {path} cannot be read ({e.strerror}); see its owner and mode") from e


def _content(path: Path) -> bytes:
    """The agent, which is root, reads what a user of lesser rights may have put here. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb", buffering=0) as stream:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size > _BYTES_MOST:
            raise OSError(errno.EINVAL, f"it is no file of at most {_BYTES_MOST} bytes")
        return stream.read(_BYTES_MOST)


def store(directory: Path, name: str, state: State) -> None:
    """Replace it. Raises OSError, and the old one is there then."""
    path = directory / f"{name}{_SUFFIX}"
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as stream:
            stream.write(msgspec.json.encode(state))
            stream.flush()
            os.fsync(stream.fileno())  # else a power cut can leave an empty file under the name
        partial.rename(path)
        # Else a power cut brings the old one back, after the agent has removed what lies between.
        _sync(directory)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def names(directory: Path) -> list[str]:
    """Of all sinks that ever had a position here."""
    try:
        return sorted(name.removesuffix(_SUFFIX) for name in os.listdir(directory) if name.endswith(_SUFFIX))
    except (FileNotFoundError, NotADirectoryError):
        return []


def adopt(directory: Path, wanted: Mapping[str, str]) -> list[tuple[str, str]]:
    """Let sinks go on where they were under another name: (old name, new name) of each.

    `wanted` has the identity of every configured sink by name. A name whose sink now leads elsewhere goes on where it
    was, unless that place was given another name. Raises as load() does, and OSError.
    """
    known = {name: state.identity for name in names(directory) if (state := _known(directory, name))}
    strays = [name for name in known if wanted.get(name) != known[name]]
    moves: dict[str, str] = {}  # new name -> old name
    for name, identity in wanted.items():
        if known.get(name) != identity:
            old = next((old for old in strays if known[old] == identity and old not in moves.values()), None)
            if old is not None:
                moves[name] = old
    renamed = [(old, name) for name, old in moves.items()]
    while moves:
        # One at a time, so that whoever dies in between finds each under a name that says where it leads.
        free = next((name for name in moves if name not in moves.values()), None)
        if free is None:  # they change places
            free = next(iter(moves))
            aside = f"{free}~"  # no sink has such a name
            _move(directory, free, aside)
            moves = {name: aside if old == free else old for name, old in moves.items()}
        _move(directory, moves.pop(free), free)
    return renamed


def _move(directory: Path, old: str, new: str) -> None:
    """All of a sink's files, its position last: until then it is known under the old name."""
    for suffix in (QUARANTINE, OLD_QUARANTINE, _SUFFIX):
        with suppress(FileNotFoundError):
            (directory / f"{old}{suffix}").rename(directory / f"{new}{suffix}")


def _known(directory: Path, name: str) -> State | None:
    """None also for one that is damaged: that is told where its own sink begins, and keeps no other from its turn."""
    try:
        return load(directory, name)
    except AcctdError:
        return None


def consumed(directory: Path, sinks: Iterable[str]) -> dict[str, int] | None:
    """Of each stream the number of the first line that some sink still wants; None where that is not known.

    A stream that no sink reads is not named.
    """
    lowest: dict[str, int] = {}
    for name in sinks:
        state = _known(directory, name)
        if state is None:
            return None
        for stream, position in state.positions.items():
            lowest[stream] = min(lowest.get(stream, position.number), position.number)
    return lowest


def furthest(directory: Path, sinks: Iterable[str]) -> dict[str, int]:
    """Of each stream the number behind the last line that a sink has read: a new writer begins there at least."""
    most = dict.fromkeys(STREAMS, 0)
    for name in sinks:
        if (state := _known(directory, name)) is not None:
            for stream, position in state.positions.items():
                most[stream] = max(most.get(stream, 0), position.number)
    return most
