"""Watching processes end: one pidfd each, on the agent's event loop. What an end means is not decided here.

pidfd_open(2). A pidfd is readable once its process has ended, zombies included, and stands for that process alone: its
pid may be given to another one.
"""

import asyncio
import os
from collections.abc import Callable

from acctd.kernel import procs


class Vigil:
    """The processes that one event loop waits for. Close it when the loop ends."""

    def __init__(self) -> None:
        self._watched: dict[tuple[str, str], int] = {}

    def watch(self, name: str, process: str, ended: Callable[[], None]) -> None:
        """Call `ended` once the process of this identity (procs.identity) has ended; soon, if it has already.

        `name` says whose watch it is: forget() takes it back.
        """
        loop = asyncio.get_running_loop()
        key = name, process
        if key in self._watched:
            return
        try:
            fd = os.pidfd_open(int(process.partition(":")[0]))
        except ProcessLookupError:
            loop.call_soon(ended)
            return
        if not procs.is_alive(process):
            os.close(fd)  # of a later process under the same pid, or of a zombie
            loop.call_soon(ended)
            return
        self._watched[key] = fd

        def readable() -> None:
            self._drop(key)
            ended()

        loop.add_reader(fd, readable)

    def forget(self, name: str) -> None:
        """Take back every watch of this name."""
        for key in [key for key in self._watched if key[0] == name]:
            self._drop(key)

    def close(self) -> None:
        """Take back every watch."""
        for key in list(self._watched):
            self._drop(key)

    def _drop(self, key: tuple[str, str]) -> None:
        fd = self._watched.pop(key)
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)
