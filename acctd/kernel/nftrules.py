"""One nf_tables table of family inet, read over raw netlink: its rules' counters, chains and verdict maps.

Reads; changes are libnftables' part, but for sets that may be in use, which it cannot try to remove cheaply. Why not
libnftables here too: its JSON listing of 1000 jobs costs ten times as much.
Reference: uapi/linux/netfilter/nf_tables.h.

What makes it fast: nf_tables numbers its generations, so between two changes of the ruleset (anyone's) a dump differs
in nothing but counter values. The places of all counters are remembered as one struct format for that generation, and
a dump of the same generation and size is read by one unpack.
"""

import errno
import os
import struct
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, NamedTuple, TypeVar

from acctd.errors import KernelRefusedError
from acctd.kernel.nfnetlink import (
    HEADERS,
    NLM_F_DUMP_INTR,
    Buffer,
    Dump,
    NfnetlinkSocket,
    attribute,
    attributes,
    malformed,
    messages,
    nested,
)
from acctd.kernel.nfnetlink import text as text_attribute

_NFTABLES = 10 << 8  # NFNL_SUBSYS_NFTABLES
_GETTABLE = _NFTABLES | 1
_GETCHAIN = _NFTABLES | 4
_NEWRULE = _NFTABLES | 6
_GETRULE = _NFTABLES | 7
_DELSET = _NFTABLES | 11
_GETSETELEM = _NFTABLES | 13
_GETGEN = _NFTABLES | 16
_INET = 1  # NFPROTO_INET
_UNSPEC = 0

_TABLE_NAME = 1
_CHAIN_TABLE, _CHAIN_NAME = 1, 3
_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS, _RULE_USERDATA = 1, 2, 4, 7
_LIST_ELEM, _EXPR_NAME, _EXPR_DATA, _COUNTER_BYTES, _COUNTER_PACKETS = 1, 1, 2, 1, 2
_SET_TABLE, _SET_NAME = 1, 2
_ELEMENTS_TABLE, _ELEMENTS_SET, _ELEMENTS = 1, 2, 3
_ELEMENT_KEY, _ELEMENT_DATA, _DATA_VALUE, _DATA_VERDICT, _VERDICT_CHAIN = 1, 2, 1, 2, 2
_GEN_ID = 1
_IFNAMSIZ = 16
_USERDATA_COMMENT = 0  # libnftnl/udata.h: one byte type, one byte length, value

T = TypeVar("T")


class Rule(NamedTuple):
    """One rule of a dump. `counter` is where its bytes and its packets (big-endian u64) stand in the buffer, if any."""

    chain: str
    comment: str
    counter: tuple[int, int] | None


Known = dict[bytes, tuple[str, str, int, int]]
"""Rules seen before: message less its counter -> chain, comment, places of bytes and packets within the message."""


def parse_rules(buffer: bytes | bytearray, size: int, known: Known | None = None) -> tuple[list[Rule], Known]:
    """All rules in a dump of NFT_MSG_NEWRULE messages, in their order. Raises KernelRefusedError on anything else.

    `known` is what an earlier call returned: a message that equals one of then but for its counter is not parsed again.
    """
    rules: list[Rule] = []
    seen: Known = {}
    known = known or {}
    for kind, flags, start, end in messages(buffer, size):
        if kind != _NEWRULE:
            raise malformed(f"message {kind:#x} among rules", start)
        if flags & NLM_F_DUMP_INTR:
            raise malformed("an interrupted dump", start)
        # Name, header of the data, header and value of bytes, header and value of packets. Where the kernel orders them
        # otherwise, the key holds a live value, is never met again, and the message is parsed every time.
        cut = buffer.find(b"counter\0", start, end)
        if cut < 0:
            continue  # nothing counted here
        key = bytes(buffer[start + HEADERS : cut + 16] + buffer[cut + 36 : end])
        found = known.get(key)
        if found is None:
            rule = _parse_rule(buffer, start, end)
            if rule.counter is None:
                continue
            found = rule.chain, rule.comment, rule.counter[0] - start, rule.counter[1] - start
        seen[key] = found
        chain, comment, octets, packets = found
        rules.append(Rule(chain, comment, (start + octets, start + packets)))
    return rules, seen


def parse_comments(buffer: Buffer, size: int) -> list[str]:
    """The comments of all rules in a dump, in their order, "" for none."""
    return [_parse_rule(buffer, start, end).comment for _, _, start, end in messages(buffer, size)]


def parse_gotos(buffer: Buffer, size: int) -> Iterator[tuple[str, str]]:
    """Of a dump of a verdict map with text keys: each key and the chain it goes to."""
    for _, _, start, end in messages(buffer, size):
        for kind, first, last in attributes(buffer, start + HEADERS, end):
            if kind == _ELEMENTS:
                for _, at, to in attributes(buffer, first, last):
                    yield _element(buffer, at, to)


class Layout(Generic[T]):
    """Where the counters of one generation's dump stand, and what they are called: the commented rules only."""

    def __init__(self, rules: list[Rule], size: int, make: Callable[[int, int], T]) -> None:
        self.size = size
        self._make = make
        counted = sorted((rule for rule in rules if rule.counter and rule.comment), key=lambda rule: rule.counter or ())
        places = sorted(place for rule in counted for place in rule.counter or ())
        index = {place: number for number, place in enumerate(places)}
        form, at = [">"], 0
        for place in places:
            form.append(f"{place - at}xQ")
            at = place + 8
        self._values = struct.Struct("".join(form))
        # chain -> comment -> indices of the (bytes, packets) pairs to add up: a rule a family makes two of most.
        chains: dict[str, dict[str, list[tuple[int, int]]]] = {}
        for rule in counted:
            octets, packets = rule.counter or (0, 0)
            pairs = chains.setdefault(rule.chain, {}).setdefault(rule.comment, [])
            pairs.append((index[octets], index[packets]))
        # The same as the loop of `read` wants it: the first pair taken apart, since it is mostly the only one.
        self._chains = [
            (chain, [(comment, *first, more) for comment, (first, *more) in comments.items()])
            for chain, comments in chains.items()
        ]

    def read(self, buffer: Buffer) -> dict[str, dict[str, T]]:
        """The counters of a dump of this generation, rules of one chain and comment added up."""
        values = self._values.unpack_from(buffer)
        make = self._make
        result: dict[str, dict[str, T]] = {}
        for chain, comments in self._chains:
            counts = result[chain] = {}
            for comment, i, j, more in comments:
                octets, packets = values[i], values[j]
                for k, m in more:
                    octets += values[k]
                    packets += values[m]
                counts[comment] = make(octets, packets)
        return result


class TableReader(Generic[T]):
    """Reads one inet table in the calling thread's network namespace; a context manager.

    `make(bytes, packets)` builds what `read` returns for each counter.
    """

    def __init__(self, table: str, make: Callable[[int, int], T], netlink: NfnetlinkSocket | None = None) -> None:
        """`netlink` is where a test puts its own kernel; it is closed with this object."""
        self._table = table
        self._make = make
        self._layout: Layout[T] | None = None
        self._layout_generation = -1
        self._known: Known = {}
        self._socket = netlink or NfnetlinkSocket()

    def read(self) -> dict[str, dict[str, T]]:
        """Chain -> comment -> count, from one dump; empty if there is no such table."""
        # Asked before the dump: if a change slips in between, the dump's parts carry another generation.
        generation = self._generation()
        dump = self._socket.dump(_GETRULE, _INET, text_attribute(_RULE_TABLE, self._table))
        if dump is None or not dump.size:
            return {}
        settled = dump.uniform == generation & 0xFFFF
        layout = self._layout
        if layout is None or not settled or generation != self._layout_generation or layout.size != dump.size:
            rules, self._known = parse_rules(dump.buffer, dump.size, self._known)
            layout = Layout(rules, dump.size, self._make)
            self._layout = layout if settled else None
            self._layout_generation = generation
        return layout.read(dump.buffer)

    def read_chain(self, chain: str) -> dict[str, T] | None:
        """Comment -> count of one chain alone, at a cost that does not grow with the others; None if it is gone."""
        dump = self._dump_rules(chain)
        if dump is None or not dump.size:
            return None
        rules, _ = parse_rules(dump.buffer, dump.size)
        return Layout(rules, dump.size, self._make).read(dump.buffer).get(chain, {})

    def comments(self, chain: str) -> list[str]:
        """The comments of one chain's rules, in their order; empty if there is no such chain."""
        dump = self._dump_rules(chain)
        return parse_comments(dump.buffer, dump.size) if dump else []

    def chains(self) -> list[str]:
        """The names of the table's chains."""
        dump = self._socket.dump(_GETCHAIN, _INET)  # the kernel filters by family alone
        names: list[str] = []
        if dump:
            for _, _, start, end in messages(dump.buffer, dump.size):
                found = dict.fromkeys((_CHAIN_TABLE, _CHAIN_NAME), "")
                for kind, first, last in attributes(dump.buffer, start + HEADERS, end):
                    if kind in found:
                        found[kind] = _string(dump.buffer, first, last)
                if found[_CHAIN_TABLE] == self._table:
                    names.append(found[_CHAIN_NAME])
        return names

    def chain_exists(self, chain: str) -> bool:
        request = text_attribute(_CHAIN_TABLE, self._table) + text_attribute(_CHAIN_NAME, chain)
        return self._socket.ask(_GETCHAIN, _INET, request) is not None

    def gotos(self, name: str) -> Iterator[tuple[str, str]]:
        """Each interface name in a verdict map and the chain it goes to; to be used before the next call."""
        request = text_attribute(_ELEMENTS_TABLE, self._table) + text_attribute(_ELEMENTS_SET, name)
        dump = self._socket.dump(_GETSETELEM, _INET, request)
        return parse_gotos(dump.buffer, dump.size) if dump else iter(())

    def goto_of(self, name: str, ifname: str) -> str | None:
        """The chain one interface name goes to in a verdict map; None if it is not in there, or there is no map."""
        key = nested(_ELEMENT_KEY, attribute(_DATA_VALUE, ifname.encode().ljust(_IFNAMSIZ, b"\0")))
        request = text_attribute(_ELEMENTS_TABLE, self._table) + text_attribute(_ELEMENTS_SET, name)
        answer = self._socket.ask(_GETSETELEM, _INET, request + nested(_ELEMENTS, nested(_LIST_ELEM, key)))
        if answer is not None:
            for kind, first, last in attributes(answer, HEADERS, len(answer)):
                if kind == _ELEMENTS:
                    return next((_element(answer, at, to)[1] for _, at, to in attributes(answer, first, last)), None)
        return None

    def table_exists(self) -> bool:
        return self._socket.ask(_GETTABLE, _INET, text_attribute(_TABLE_NAME, self._table)) is not None

    def mentions(self, name: str, chain: str | None = None) -> bool:
        """Whether a rule, of one chain or of any, speaks of a set of this name."""
        dump = self._dump_rules(chain)
        return dump is not None and dump.buffer.find(name.encode() + b"\0", 0, dump.size) >= 0

    def delete_set(self, name: str) -> bool:
        """Remove a set; False, and nothing is changed, if a rule looks into it or it is gone already.

        A refusal costs some 20 ms: the kernel waits for its readers before it takes a transaction back.
        """
        request = text_attribute(_SET_TABLE, self._table) + text_attribute(_SET_NAME, name)
        error = self._socket.transaction(_DELSET, _INET, request)
        if error not in (0, errno.EBUSY, errno.ENOENT):
            raise KernelRefusedError(f"cannot remove the set {name} of table inet {self._table}: {os.strerror(error)}")
        return error == 0

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> "TableReader[T]":
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _dump_rules(self, chain: str | None) -> Dump | None:
        """The rules of one chain, or of all."""
        request = text_attribute(_RULE_TABLE, self._table)
        if chain is not None:
            request += text_attribute(_RULE_CHAIN, chain)
        return self._socket.dump(_GETRULE, _INET, request)

    def _generation(self) -> int:
        """The ruleset's generation: 32 bits, one more with every transaction in this namespace."""
        answer = self._socket.ask(_GETGEN, _UNSPEC)
        if answer is not None:
            for kind, first, last in attributes(answer, HEADERS, len(answer)):
                if kind == _GEN_ID and last - first == 4:
                    return int.from_bytes(answer[first:last], "big")
        raise malformed("a generation without its id", 0)


def _parse_rule(buffer: Buffer, start: int, end: int) -> Rule:
    chain = comment = ""
    counter = None
    for kind, first, last in attributes(buffer, start + HEADERS, end):
        if kind == _RULE_CHAIN:
            chain = _string(buffer, first, last)
        elif kind == _RULE_USERDATA:
            comment = _comment(buffer, first, last)
        elif kind == _RULE_EXPRESSIONS:
            counter = _counter(buffer, first, last)
    return Rule(chain, comment, counter)


def _string(buffer: Buffer, first: int, last: int) -> str:
    return bytes(buffer[first:last]).split(b"\0", 1)[0].decode(errors="replace")


def _comment(buffer: Buffer, first: int, last: int) -> str:
    while first + 2 <= last:
        kind, length = buffer[first], buffer[first + 1]
        if first + 2 + length > last:
            raise malformed(f"rule user data of {length} bytes with {last - first - 2} left", first)
        if kind == _USERDATA_COMMENT:
            return _string(buffer, first + 2, first + 2 + length)
        first += 2 + length
    return ""


def _counter(buffer: Buffer, first: int, last: int) -> tuple[int, int] | None:
    """Where the (only) counter of a list of expressions keeps its bytes and its packets."""
    for kind, start, end in attributes(buffer, first, last):
        if kind != _LIST_ELEM:
            continue
        name, data = b"", (0, 0)
        for part, at, to in attributes(buffer, start, end):
            if part == _EXPR_NAME:
                name = bytes(buffer[at:to])
            elif part == _EXPR_DATA:
                data = (at, to)
        if name == b"counter\0":
            octets = packets = 0
            for part, at, to in attributes(buffer, *data):
                if to - at == 8 and part == _COUNTER_BYTES:
                    octets = at
                elif to - at == 8 and part == _COUNTER_PACKETS:
                    packets = at
            if not octets or not packets:
                raise malformed("a counter without bytes or packets", start)
            return octets, packets
    return None


def _element(buffer: Buffer, first: int, last: int) -> tuple[str, str]:
    key = chain = ""
    for kind, start, end in attributes(buffer, first, last):
        if kind not in (_ELEMENT_KEY, _ELEMENT_DATA):
            continue
        for part, at, to in attributes(buffer, start, end):
            if kind == _ELEMENT_KEY and part == _DATA_VALUE:
                key = _string(buffer, at, to)
            elif kind == _ELEMENT_DATA and part == _DATA_VERDICT:
                chain = next(
                    (_string(buffer, a, b) for k, a, b in attributes(buffer, at, to) if k == _VERDICT_CHAIN), ""
                )
    return key, chain
