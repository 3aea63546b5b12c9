"""How much of the agent's door each user may take, and trouble that is told once instead of a thousand times.

Plain bookkeeping, without sockets: server.py asks here before it lets somebody in or keeps something for them. Root is
counted and never refused, so that an admin gets through whatever the users do.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

CONNECTIONS = 512
"""Of all ordinary users together; hooks are short-lived, so a node with a thousand jobs sees a handful."""

PER_USER = 128
"""Connections of one ordinary user. A hook storm of 64 callers fits in twice."""

WATCHES, WATCHES_PER_USER = 64, 16
"""Connections that hear every event; each costs a queue of its own and a look at every event."""

HELD_PER_USER = 4 << 20
"""Bytes kept for one ordinary user: half messages that came, and answers that are not read."""

_CALM = 60.0  # s without any of a kind, after which the next one is told again


@dataclass(slots=True, eq=False)
class Share:
    """What one user has of the door now."""

    uid: int
    connections: int = 0
    watches: int = 0
    held: int = 0  # bytes
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held for one round of the event loop before each call: so many calls a user sends, one is begun a round."""

    @property
    def is_root(self) -> bool:
        """Whether no bound applies."""
        return self.uid == 0

    def is_too_much(self, own: int) -> bool:
        """Whether more than HELD_PER_USER bytes are kept for the user beside `own`: one large answer may pass alone."""
        return not self.is_root and self.held - own > HELD_PER_USER


class Shares:
    """The users who are connected, and what they have together."""

    def __init__(self) -> None:
        self._by_uid: dict[int, Share] = {}
        self._connections = 0  # of ordinary users
        self._watches = 0

    @property
    def is_full(self) -> bool:
        """Whether the connections of ordinary users together are as many as may be."""
        return self._connections >= CONNECTIONS

    def of(self, uid: int) -> Share:
        """A user's share, which may be empty so far. Not remembered until something is entered."""
        return self._by_uid.get(uid) or Share(uid)

    def enter(self, share: Share) -> None:
        """One connection more."""
        self._by_uid[share.uid] = share
        share.connections += 1
        self._connections += not share.is_root

    def leave(self, share: Share) -> None:
        """One connection less; with the last one the user is forgotten."""
        share.connections -= 1
        self._connections -= not share.is_root
        if not share.connections:
            del self._by_uid[share.uid]

    def watch(self, share: Share) -> bool:
        """Enter one watch more; False where that would be too many, and nothing is entered."""
        if not share.is_root:
            if share.watches >= WATCHES_PER_USER or self._watches >= WATCHES:
                return False
            self._watches += 1
        share.watches += 1
        return True

    def unwatch(self, share: Share) -> None:
        """One watch less."""
        self._watches -= not share.is_root
        share.watches -= 1


class Once:
    """Tells of each kind of trouble once, and again when there was none of it for a minute.

    Kinds are few and ours: never made of what a peer sent, which could be new each time.
    """

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._clock = log, clock
        self._last: dict[str, float] = {}
        self._untold: dict[str, int] = {}

    def tell(self, kind: str, sentence: str, error: BaseException | None = None) -> None:
        """A warning; with `error`, an error with its traceback."""
        now = self._clock()
        last, self._last[kind] = self._last.get(kind), now
        if last is not None and now - last < _CALM:
            self._untold[kind] = self._untold.get(kind, 0) + 1
            return
        before = self._untold.pop(kind, 0)
        more = f" ({before} of the kind were not told after the last one)" if before else ""
        self._log.log(logging.WARNING if error is None else logging.ERROR, "%s%s", sentence, more, exc_info=error)
