"""What nf_tables says about its objects, in messages of raw netlink: from bytes to names, handles and counters.

Pure functions of a message or a dump: nftrules.py asks for them, nfevents.py hears of them. They raise
KernelRefusedError on bytes that cannot be what the kernel means. Reference: uapi/linux/netfilter/nf_tables.h.
"""

import sys
import zlib
from collections.abc import Collection, Iterator
from hashlib import blake2b
from typing import NamedTuple

from acctd.kernel.nfnetlink import HEADERS, NLM_F_DUMP_INTR, Buffer, attributes, malformed, messages

NFTABLES = 10 << 8  # NFNL_SUBSYS_NFTABLES
NEWTABLE, DELTABLE = NFTABLES | 0, NFTABLES | 2
NEWRULE, DELRULE = NFTABLES | 6, NFTABLES | 8
NEWGEN = NFTABLES | 15
INET = 1  # NFPROTO_INET

_TABLE_FLAGS, _TABLE_HANDLE = 2, 4
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY = 1, 3, 4, 5
_HOOK_NUMBER, _HOOK_PRIORITY = 1, 2
_RULE_TABLE, _RULE_CHAIN, _RULE_HANDLE, _RULE_EXPRESSIONS, _RULE_USERDATA = 1, 2, 3, 4, 7
_LIST_ELEM, _EXPR_NAME, _EXPR_DATA, _COUNTER_BYTES, _COUNTER_PACKETS = 1, 1, 2, 1, 2
_ELEMENTS, _ELEMENT_KEY, _ELEMENT_DATA, _ELEMENT_FLAGS = 3, 1, 2, 3
_DATA_VALUE, _DATA_VERDICT, _VERDICT_CHAIN = 1, 2, 2
_INTERVAL_END = 1
_GEN_ID, _GEN_PROCESS = 1, 2
_USERDATA_COMMENT = 0  # libnftnl/udata.h: one byte type, one byte length, value


class Rule(NamedTuple):
    """One rule. `counter` is where its bytes and its packets (big-endian u64) stand in its message, if it counts."""

    table: str
    chain: str
    comment: str
    counter: tuple[int, int] | None
    handle: int
    content: int  # a checksum of what it does and says, less its counter


class Generation(NamedTuple):
    """A state of all rulesets of the namespace: one more with every transaction, anyone's."""

    number: int
    thread: int  # who asked, or ended the transaction: its number in the first pid namespace


class Base(NamedTuple):
    """Where a base chain is attached, and its policy: hook number, priority, 1 for accept."""

    hook: int
    priority: int
    policy: int


class Table(NamedTuple):
    """Which making of a table this is, the low half of the generation it was seen at, and whether it is asleep."""

    handle: int
    generation: int
    dormant: bool


Known = dict[bytes, Rule]
"""Rules seen before, by their messages less the counter."""

Found = tuple[int, Rule]
"""Where in a dump the message of a rule begins, and the rule."""


def incarnation(table: int, rules: Collection[Rule]) -> str:
    """Another text whenever one of a chain's rules was added, deleted, made anew or replaced by another.

    By handles, mostly: a table's is never given twice in a namespace, nor a rule's in a table, and they only grow, so
    a new rule's is the highest. But a rule that is replaced (`nft replace`) hands its own on: if it is replaced by its
    like, nothing shows but a counter set back. Every reader makes the same text of the same chain.
    """
    content = sum(rule.content for rule in rules) & 0xFFFFFFFF
    return f"{table:x}.{max(rule.handle for rule in rules):x}.{len(rules):x}.{content:08x}"


def parse_rules(buffer: bytes | bytearray, size: int, known: Known | None = None) -> tuple[list[Found], Known]:
    """All rules in a dump of NFT_MSG_NEWRULE messages, in their order. Raises KernelRefusedError on anything else.

    `known` is what an earlier call returned: a message that equals one of then but for its counter is not parsed again.
    """
    rules: list[Found] = []
    seen: Known = {}
    known = known or {}
    for kind, flags, start, end in messages(buffer, size):
        if kind != NEWRULE:
            raise malformed(f"message {kind:#x} among rules", start)
        if flags & NLM_F_DUMP_INTR:
            raise malformed("an interrupted dump", start)
        # Name, header of the data, header and value of bytes, header and value of packets. Where the kernel orders them
        # otherwise, the key holds a live value, is never met again, and the message is parsed every time.
        cut = buffer.find(b"counter\0", start, end)
        if cut < 0:
            text = bytes(buffer[start + HEADERS : end])
        else:
            text = bytes(buffer[start + HEADERS : cut + 16] + buffer[cut + 36 : end])
        # A digest: the texts themselves would be kept for as long as the chains stand.
        key = blake2b(text, digest_size=16).digest()
        rule = known.get(key)
        if rule is None:
            rule = parse_rule(buffer, start, end)
        seen[key] = rule
        rules.append((start, rule))
    return rules, seen


def parse_rule(buffer: Buffer, start: int, end: int) -> Rule:
    """One message about a rule: that it is there, or that it was deleted."""
    table = chain = comment = ""
    counter = None
    handle = content = 0
    for kind, first, last in attributes(buffer, start + HEADERS, end):
        if kind == _RULE_TABLE:
            table = _string(buffer, first, last)
        elif kind == _RULE_CHAIN:
            chain = _string(buffer, first, last)
        elif kind == _RULE_HANDLE:
            handle = int.from_bytes(buffer[first:last], "big")
        elif kind == _RULE_USERDATA:
            comment = _comment(buffer, first, last)
            content += zlib.crc32(buffer[first:last])
        elif kind == _RULE_EXPRESSIONS:
            expressions = bytearray(buffer[first:last])
            if b"counter\0" in expressions and (places := _counter(buffer, first, last)):
                counter = places[0] - start, places[1] - start
                for place in places:
                    expressions[place - first : place - first + 8] = bytes(8)
            content += zlib.crc32(expressions)
    return Rule(table, chain, comment, counter, handle, content)


def parse_gotos(buffer: Buffer, size: int) -> Iterator[tuple[str, str]]:
    """Of a dump of a verdict map with text keys: each key and the chain it goes to."""
    for first, last in _elements(buffer, size):
        yield _goto(buffer, first, last)


def parse_bounds(buffer: Buffer, size: int) -> set[tuple[bytes, bool]]:
    """Of a dump of a set of intervals: where each begins (False), and the first value behind it (True)."""
    return {_bound(buffer, first, last) for first, last in _elements(buffer, size)}


def parse_generation(buffer: Buffer, start: int, end: int) -> Generation:
    """One NFT_MSG_NEWGEN message: as an answer, and as the end of every transaction among the events."""
    number = thread = None
    for kind, first, last in attributes(buffer, start + HEADERS, end):
        if kind == _GEN_ID and last - first == 4:
            number = int.from_bytes(buffer[first:last], "big")
        elif kind == _GEN_PROCESS and last - first == 4:
            thread = int.from_bytes(buffer[first:last], "big")
    if number is None or thread is None:
        raise malformed("a generation without its id or its process", start)
    return Generation(number, thread)


def parse_table(buffer: Buffer, start: int, end: int) -> Table:
    """One message about a table."""
    handle = flags = 0
    for kind, first, last in attributes(buffer, start + HEADERS, end):
        if kind == _TABLE_HANDLE:
            handle = int.from_bytes(buffer[first:last], "big")
        elif kind == _TABLE_FLAGS:
            flags = int.from_bytes(buffer[first:last], "big")
    if not handle:
        raise malformed("a table without its handle", start)
    return Table(handle, int.from_bytes(buffer[start + 18 : start + 20], "big"), bool(flags & 1))


def parse_chain(buffer: Buffer, start: int, end: int) -> tuple[str, str, Base | None]:
    """One message about a chain: its table, its name, and where it is attached, None if it is attached nowhere."""
    table = name = ""
    hook = priority = policy = None
    for kind, first, last in attributes(buffer, start + HEADERS, end):
        if kind == _CHAIN_TABLE:
            table = _string(buffer, first, last)
        elif kind == _CHAIN_NAME:
            name = _string(buffer, first, last)
        elif kind == _CHAIN_POLICY:
            policy = int.from_bytes(buffer[first:last], "big")
        elif kind == _CHAIN_HOOK:
            for part, at, to in attributes(buffer, first, last):
                if part == _HOOK_NUMBER:
                    hook = int.from_bytes(buffer[at:to], "big")
                elif part == _HOOK_PRIORITY:
                    priority = int.from_bytes(buffer[at:to], "big", signed=True)
    attached = hook is not None and priority is not None and policy is not None
    return table, name, Base(hook or 0, priority or 0, policy or 0) if attached else None


def _string(buffer: Buffer, first: int, last: int) -> str:
    # Interned: each name stands in a thousand rules.
    return sys.intern(bytes(buffer[first:last]).split(b"\0", 1)[0].decode(errors="replace"))


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


def _elements(buffer: Buffer, size: int) -> Iterator[tuple[int, int]]:
    for _, _, start, end in messages(buffer, size):
        for kind, first, last in attributes(buffer, start + HEADERS, end):
            if kind == _ELEMENTS:
                for _, at, to in attributes(buffer, first, last):
                    yield at, to


def _goto(buffer: Buffer, first: int, last: int) -> tuple[str, str]:
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


def _bound(buffer: Buffer, first: int, last: int) -> tuple[bytes, bool]:
    key, flags = b"", 0
    for kind, start, end in attributes(buffer, first, last):
        if kind == _ELEMENT_KEY:
            key = next((bytes(buffer[a:b]) for k, a, b in attributes(buffer, start, end) if k == _DATA_VALUE), b"")
        elif kind == _ELEMENT_FLAGS:
            flags = int.from_bytes(buffer[start:end], "big")
    return key, bool(flags & _INTERVAL_END)
