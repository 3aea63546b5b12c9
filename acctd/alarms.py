"""Shortages of memory, heard on the living agent's event loop. What is done about them is shortages.py's."""

import asyncio
import time

from acctd.shortages import Shortages


class Alarms(Shortages):
    """For one event loop: between start() and close() nobody needs to call hear()."""

    _again: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Hear from now on. Call it inside the running event loop."""
        asyncio.get_running_loop().add_reader(self.fileno(), self._listen)

    def close(self) -> None:
        """Hear no more, as Shortages.close()."""
        if self._again is not None:
            self._again.cancel()
        asyncio.get_running_loop().remove_reader(self.fileno())
        super().close()

    def _listen(self) -> None:
        """Something is to be heard; or it is time to listen again to a job that said too much."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        self.hear()
        if (due := self.due()) is not None:
            loop = asyncio.get_running_loop()
            self._again = loop.call_later(max(0.0, due - time.monotonic()), self._listen)
