"""Hearing soon that another program changed the chains: at once where the kernel tells, within a second elsewhere.

nf_tables tells of each deleted rule with its last count, so that a flush loses nothing that was counted before it; the
legacy tables tell nobody, and are asked for their size. What is to be done about it is agent.py's.
"""

import asyncio
from collections.abc import Callable

from acctd.errors import AcctdError
from acctd.kernel.nfevents import News, Watch
from acctd.network.backend import Chains, Count

_LOOK_EVERY = 1.0  # s; a look costs some microseconds


class Sentry:
    """Listens for one event loop. `heard` is called with the back end and what is known: None where that is nothing."""

    def __init__(
        self, heard: Callable[[Chains, News[Count] | None], None], trouble: Callable[[Exception], None]
    ) -> None:
        self._heard, self._trouble = heard, trouble
        self._watches: dict[Chains, Watch[Count] | None] = {}
        self._looking: asyncio.TimerHandle | None = None

    def guard(self, chains: Chains) -> None:
        """Listen for changes of this back end's chains, if that is not done already."""
        if chains in self._watches:
            return
        watch = chains.watch()
        self._watches[chains] = watch
        loop = asyncio.get_running_loop()
        if watch is not None:
            loop.add_reader(watch.fileno(), self._drain, chains, watch)
        elif self._looking is None:
            self._looking = loop.call_later(_LOOK_EVERY, self._look)

    def close(self) -> None:
        """Stop listening; guard() may begin anew."""
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None
        for watch in self._watches.values():
            if watch is not None:
                asyncio.get_running_loop().remove_reader(watch.fileno())
                watch.close()
        self._watches.clear()

    def _drain(self, chains: Chains, watch: Watch[Count]) -> None:
        try:
            news = watch.drain()
        except (AcctdError, OSError) as e:
            self._trouble(e)
            return
        if news.changed or news.lost:
            self._heard(chains, news)

    def _look(self) -> None:
        self._looking = asyncio.get_running_loop().call_later(_LOOK_EVERY, self._look)
        for chains, watch in self._watches.items():
            try:
                if watch is None and chains.changed():
                    self._heard(chains, None)
            except (AcctdError, OSError) as e:
                self._trouble(e)
