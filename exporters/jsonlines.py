"""Frames as lines of JSON, for any log shipper: into a file that is rotated here, or over a stream socket.

A line is the frame as it was in the spool, a record's body byte for byte as it was signed, with the time in words
before it. A file has each line exactly once, whoever is killed when: what was written after the stored position is cut
off, and written again. So nobody else may write to it. A socket cannot be cut: where a connection breaks, what was on
its way comes a second time. What a receiver far away had in its kernel and never read, no sender can know of.
"""

import errno
import fcntl
import os
import select
import socket
import stat
import struct
import termios
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from acctd.frames import EventFrame, Frame, Mark, encode
from acctd.sinks import JsonSink
from exporters.delivery import Item, UnavailableError

BATCH = 1024  # lines
_TIMEOUT = 10.0  # s for a receiver to take a batch
_PAUSE = 0.002  # s between two looks at whether it has, at first
_MODE = 0o640


class JsonTarget:
    """One sink; delivery.Target."""

    batch = BATCH

    def __init__(self, sink: JsonSink) -> None:
        self.identity = sink.identity
        self.streams: tuple[str, ...] = sink.streams
        self._to: _File | _Socket
        if sink.path is not None:
            self._to = _File(sink.path, sink.rotate, sink.keep)
        elif sink.address is not None:
            self._to = _Socket(sink.address)

    def encode(self, frame: Frame) -> list[Item]:
        """One line; none of a mark, which is between acctd and itself."""
        return [] if isinstance(frame, Mark) else [Item("", line(frame))]

    def send(self, to: str, data: Sequence[bytes]) -> None:
        """Raises UnavailableError where the disk or the receiver does not take it."""
        self._to.send(b"\n".join(data) + b"\n")

    def state(self) -> dict[str, Any]:
        """Of a file which one it is, and its size."""
        return self._to.state()

    def resume(self, state: Mapping[str, Any]) -> None:
        """Cut off what was written after the state was stored."""
        self._to.resume(state)

    def close(self) -> None:
        self._to.close()


def line(frame: Frame) -> bytes:
    """A frame as it stands in a file, without its newline: the time in words before all else."""
    ns = round(frame.time * 10**6) * 1000 if isinstance(frame, EventFrame | Mark) else frame.time
    at = datetime.fromtimestamp(ns // 10**9, UTC).replace(microsecond=ns % 10**9 // 1000)
    head = f'{{"at":"{at.isoformat(timespec="microseconds").removesuffix("+00:00")}Z",'
    return head.encode() + encode(frame)[1:]


class _File:
    """A file and the older ones beside it: NAME.1 is the newest of them."""

    def __init__(self, path: Path, rotate: int, keep: int) -> None:
        self._path, self._rotate, self._keep = path, rotate, keep
        self._fd: int | None = None
        self._resuming: Mapping[str, Any] | None = None  # the state that it is still to be brought back to

    def send(self, data: bytes) -> None:
        try:
            self._settle()
            self._prune()
            fd = self._opened()
            size = os.fstat(fd).st_size
            if size and size + len(data) > self._rotate:
                # Once a batch at most, so that resume() need look for what was the file in one more place only.
                self._shift()
                fd, size = self._opened(), 0
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
                os.fdatasync(fd)
            except OSError:
                os.ftruncate(fd, size)  # a full disk takes the beginning
                raise
        except OSError as e:
            raise UnavailableError(f"cannot write {self._path} ({e.strerror})") from e

    def state(self) -> dict[str, Any]:
        if self._fd is None:
            return dict(self._resuming or {})
        found = os.fstat(self._fd)
        return {"device": found.st_dev, "inode": found.st_ino, "size": found.st_size}

    def resume(self, state: Mapping[str, Any]) -> None:
        self._resuming = state
        with suppress(OSError):  # nothing is written before it has succeeded, and send() will say why it does not
            self._settle()

    def _settle(self) -> None:
        if (state := self._resuming) is None:
            return
        if state and not self._cut(self._path, state) and self._cut(self._older(1), state):
            # It was rotated for a batch that was never stored as done; what is in the new one is that batch.
            with suppress(FileNotFoundError):
                os.truncate(self._path, 0)
        self._opened()
        self._resuming = None

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _cut(self, path: Path, state: Mapping[str, Any]) -> bool:
        """Whether it is the file that was written, which ends then where it did."""
        try:
            fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        except OSError as e:
            if e.errno in (errno.ENXIO, errno.ELOOP, errno.EISDIR):
                return False  # a FIFO, a link or a directory: whatever it is now, it is not that file
            raise
        try:
            found = os.fstat(fd)
            if (found.st_dev, found.st_ino) != (state.get("device"), state.get("inode")):
                return False
            if found.st_size > state["size"]:  # a smaller one was emptied by somebody; it is gone on with
                os.ftruncate(fd, state["size"])
            return True
        finally:
            os.close(fd)

    def _opened(self) -> int:
        """The file that has the name; a new one where the old one was moved away."""
        if self._fd is not None:
            try:
                there, mine = os.stat(self._path, follow_symlinks=False), os.fstat(self._fd)
                if (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):
                    return self._fd
            except FileNotFoundError:
                pass
            self.close()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(self._path, flags, _MODE)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "it is no ordinary file")
        self._fd = fd
        return fd

    def _shift(self) -> None:
        """NAME becomes NAME.1, and so on up to the first number that is free."""
        free = 1
        while self._older(free).exists():
            free += 1
        for number in range(free, 0, -1):
            os.rename(self._older(number - 1), self._older(number))

    def _prune(self) -> None:
        """Remove those above `keep`; only now, when the batch for which it was rotated is done."""
        number = self._keep + 1
        while self._older(number).exists():
            number += 1
        while (number := number - 1) > self._keep:
            os.unlink(self._older(number))

    def _older(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}") if number else self._path


class _Socket:
    """A receiver of lines, which never answers. A batch is done when it has read all; over TCP, when its kernel has."""

    def __init__(self, address: str | tuple[str, int]) -> None:
        self._address = address
        self._connection: socket.socket | None = None

    def send(self, data: bytes) -> None:
        try:
            connection = self._connected()
            deadline = time.monotonic() + _TIMEOUT
            connection.sendall(data)
            pause = _PAUSE
            while _unread(connection):
                if time.monotonic() >= deadline:
                    raise TimeoutError(0, "it does not read")
                time.sleep(pause)
                pause = min(2 * pause, 0.1)
            if _hung_up(connection):
                raise ConnectionResetError(0, "it closed the connection")
        except OSError as e:
            self.close()
            raise UnavailableError(f"{self._address} does not take lines ({e.strerror or e})") from e

    def state(self) -> dict[str, Any]:
        return {}

    def resume(self, state: Mapping[str, Any]) -> None:
        """There is nothing that could be taken back."""

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connected(self) -> socket.socket:
        if self._connection is not None and _hung_up(self._connection):
            self.close()
        if self._connection is None:
            if isinstance(self._address, str):
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                connection.settimeout(_TIMEOUT)
                try:
                    connection.connect(self._address)
                except OSError:
                    connection.close()
                    raise
            else:
                connection = socket.create_connection(self._address, _TIMEOUT)
            self._connection = connection
        return self._connection


def _unread(connection: socket.socket) -> int:
    """Bytes under way: of TCP those not acknowledged, of a unix socket what was not read. tcp(7), unix(7): SIOCOUTQ."""
    answer = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, b"\0" * 4)
    return int(struct.unpack("i", answer)[0])


def _hung_up(connection: socket.socket) -> bool:
    """Whether the receiver has closed it; what it may have said is thrown away."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    while poll.poll(0):
        if not connection.recv(4096):
            return True
    return False
