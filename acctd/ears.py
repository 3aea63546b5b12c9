"""Descriptors that a keeper of jobs hears by: one epoll for all of them, and what to do when one is ready.

One that says too much is muted for a while. Knows nothing of what is said, waits for nothing, and knows no event loop.
man 7 epoll.
"""

import os
import select
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass


@dataclass(slots=True)
class _Ear:
    events: int
    heard: Callable[[], None]
    muted: float | None = None  # until then, monotonic
    then: Callable[[], None] | None = None


class Ears:
    """One keeper's. The descriptors are others' to close, once they are dropped."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._ears: dict[int, _Ear] = {}
        self._hearing = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # when due() is another one
        self._epoll.register(self._wake, select.EPOLLIN)

    def fileno(self) -> int:
        """Readable when hear() has something to do."""
        return self._epoll.fileno()

    def due(self) -> float | None:
        """When hear() is to be called though nothing was heard: time.monotonic(), or None."""
        return min((ear.muted for ear in self._ears.values() if ear.muted is not None), default=None)

    def add(self, fd: int, events: int, heard: Callable[[], None]) -> None:
        """Call `heard` when a descriptor is ready for these events."""
        self._ears[fd] = _Ear(events, heard)
        self._epoll.register(fd, events)

    def drop(self, fd: int) -> None:
        """Hear it no more."""
        if self._ears.pop(fd).muted is None:
            self._epoll.unregister(fd)

    def mute(self, fd: int, seconds: float, then: Callable[[], None] | None = None) -> None:
        """Hear nothing of it for a while, then call `then`. What it says meanwhile is heard after that."""
        ear = self._ears[fd]
        ear.then = then or ear.then
        if ear.muted is not None:
            return
        # Not by registering it for nothing: an epoll always tells of errors, as which v2 shows each change.
        self._epoll.unregister(fd)
        ear.muted = time.monotonic() + seconds
        if not self._hearing:
            os.eventfd_write(self._wake, 1)

    def hear(self) -> None:
        """Do what is to be done now."""
        self._hearing = True
        try:
            self._hear()
        finally:
            self._hearing = False

    def _hear(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        now = time.monotonic()
        for fd, ear in list(self._ears.items()):
            if ear.muted is not None and ear.muted <= now and self._ears.get(fd) is ear:
                self._epoll.register(fd, ear.events)
                then, ear.muted, ear.then = ear.then, None, None
                if then is not None:
                    then()
        for fd, _ in self._epoll.poll(0):
            if (found := self._ears.get(fd)) is not None and found.muted is None:
                found.heard()

    def close(self) -> None:
        self._epoll.close()
        os.close(self._wake)
