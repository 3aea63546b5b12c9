"""What other programs do to one inet table, heard from the kernel as it happens: nf_tables' multicast group.

A rule that is deleted is announced with all it was, its counter's last values included: so the counts of a chain that
somebody flushed are known. What is not announced: that counters were set back without any rule being touched
(NFT_MSG_GETRULE_RESET, `nft reset rules`). Reference: uapi/linux/netfilter/nfnetlink.h, nf_tables.h.

Each transaction ends with NFT_MSG_NEWGEN, which names the thread that made it, and the transactions of a namespace
come one after the other: so those of our own are left out, at the price of a look at each message's first bytes.
A thread is known by its number. If one of ours ends and a foreign program gets that number, what it does goes unheard
here; the ruleset's generation still tells.

The last values are taken while a packet that was let into the old rules may still be on its way through them; what it
adds in these microseconds is not in them. (Of two equal rules in one chain, flushed under 60,000 packets a second, the
values differed by one packet in one of twenty trials.)
"""

import errno
import socket
from collections.abc import Callable, Container
from types import TracebackType
from typing import Generic, NamedTuple, TypeVar

from acctd.errors import UnavailableError
from acctd.kernel.nfnetlink import NETLINK_NETFILTER, NfnetlinkSocket, messages, text
from acctd.kernel.nftmessages import (
    DELRULE,
    DELTABLE,
    INET,
    NEWGEN,
    NEWTABLE,
    NFTABLES,
    Rule,
    incarnation,
    parse_generation,
    parse_rule,
    parse_table,
)

_GROUP = 7  # NFNLGRP_NFTABLES
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_SO_RCVBUFFORCE = 33
_QUEUE = 16 << 20  # bytes the kernel may hold for us; it takes none until there is something
_GETTABLE = NFTABLES | 1
_ROOM = 1 << 17

T = TypeVar("T")


class News(NamedTuple, Generic[T]):
    """What foreign programs did to the table since the last time."""

    changed: bool
    """One of them changed anything in it."""
    deleted: dict[tuple[str, str], dict[str, T]]
    """(chain, incarnation) -> comment -> last count, of the counting rules that a transaction deleted from a chain.

    The incarnation is that of the chain if all of its rules were deleted; otherwise it is no chain's.
    """
    lost: bool
    """The queue ran over: there was more, and nobody knows what."""


class Watch(Generic[T]):
    """Listens in the network namespace of the thread that makes it; then belongs to one thread at a time.

    To be drained when `fileno()` is readable: asyncio's add_reader. A context manager. `own` has the threads whose
    transactions are not news, as nftmessages.Generation names them; `make(bytes, packets)` builds a count.
    """

    def __init__(
        self,
        table: str,
        make: Callable[[int, int], T],
        own: Container[int],
        endpoint: socket.socket | None = None,
        asker: NfnetlinkSocket | None = None,
    ) -> None:
        """`endpoint` and `asker` are where a test puts its own kernel; they are closed with this object.

        Raises UnavailableError where no netlink socket is to be had.
        """
        self._table = table
        self._mark = text(1, table)  # each message about the table has its name as an attribute of type 1
        self._make = make
        self._own = own
        self._room = bytearray(_ROOM)
        # Of the transaction whose end has not come yet.
        self._touched = False
        self._deleted: list[bytes] = []
        self._removed = 0  # handle of the table, if it went
        self._asker = asker or NfnetlinkSocket()
        try:
            self._socket = endpoint or _listen()
        except BaseException:
            self._asker.close()
            raise
        # Asked once we listen: what came in between comes again as news, and changes nothing.
        self._handle = self._ask_handle()

    def fileno(self) -> int:
        return self._socket.fileno()

    def drain(self) -> News[T]:
        """All that has come; never waits. After a loss all that is queued is thrown away: it cannot be trusted."""
        changed = lost = False
        deleted: dict[tuple[str, str], dict[str, T]] = {}
        while (size := self._receive()) != 0:
            if size is None:
                lost = True
            elif not lost:
                changed |= self._take(bytes(memoryview(self._room)[:size]), deleted)
        if lost:
            self._forget()
            self._handle = self._ask_handle()
        return News(changed, deleted, lost)

    def close(self) -> None:
        self._socket.close()
        self._asker.close()

    def __enter__(self) -> "Watch[T]":
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _receive(self) -> int | None:
        """The size of the next part, 0 if there is none, None if some were lost."""
        try:
            size = self._socket.recv_into(self._room, 0, socket.MSG_TRUNC)
        except BlockingIOError:
            return 0
        except OSError as e:
            if e.errno != errno.ENOBUFS:
                raise
            return None
        return size if size <= _ROOM else None

    def _take(self, part: bytes, deleted: dict[tuple[str, str], dict[str, T]]) -> bool:
        """One part: some of a transaction, its end or both. Whether a foreign one that touched the table has ended."""
        changed = False
        for kind, _, start, end in messages(part, len(part)):
            if kind == NEWGEN:
                if self._touched and parse_generation(part, start, end).thread not in self._own:
                    changed = True
                    self._count(deleted)
                self._forget()
            elif part[start + 16] == INET and part.find(self._mark, start, end) >= 0:
                self._touched = True
                if kind == DELRULE:
                    self._deleted.append(part[start:end])
                elif kind == NEWTABLE:
                    self._handle = parse_table(part, start, end).handle
                elif kind == DELTABLE:
                    self._removed = parse_table(part, start, end).handle
        return changed

    def _count(self, deleted: dict[tuple[str, str], dict[str, T]]) -> None:
        """Add up the rules that the transaction deleted, by chain and comment."""
        chains: dict[str, list[tuple[Rule, int, int]]] = {}
        for message in self._deleted:
            rule = parse_rule(message, 0, len(message))
            if rule.table == self._table:
                octets, packets = (
                    (int.from_bytes(message[at : at + 8], "big") for at in rule.counter) if rule.counter else (0, 0)
                )
                chains.setdefault(rule.chain, []).append((rule, octets, packets))
        # NEWTABLE of a table that takes the old one's place comes behind the old one's DELTABLE.
        table = self._removed or self._handle
        for chain, rules in chains.items():
            sums: dict[str, tuple[int, int]] = {}
            for rule, octets, packets in rules:
                if rule.counter and rule.comment:
                    before = sums.get(rule.comment, (0, 0))
                    sums[rule.comment] = before[0] + octets, before[1] + packets
            if sums:
                which = incarnation(table, [rule for rule, _, _ in rules])
                deleted[chain, which] = {comment: self._make(*count) for comment, count in sums.items()}

    def _forget(self) -> None:
        self._touched = False
        self._deleted.clear()
        self._removed = 0

    def _ask_handle(self) -> int:
        answer = self._asker.ask(_GETTABLE, INET, self._mark)
        return parse_table(answer, 0, len(answer)).handle if answer is not None else 0


def _listen() -> socket.socket:
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    try:
        made = socket.socket(socket.AF_NETLINK, kind, NETLINK_NETFILTER)
    except OSError as e:
        raise UnavailableError(f"cannot open a netfilter netlink socket ({e.strerror}); load nfnetlink") from None
    try:
        made.bind((0, 0))
        made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _QUEUE // 2)  # the kernel doubles it
        made.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _GROUP)
    except OSError as e:
        made.close()
        raise UnavailableError(f"cannot listen to the ruleset's events ({e.strerror}); run as root") from None
    return made
