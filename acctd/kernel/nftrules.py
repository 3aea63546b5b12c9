"""One nf_tables table of family inet, read over raw netlink: its rules' counters, chains, sets and verdict maps.

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
    Buffer,
    Dump,
    NfnetlinkSocket,
    attribute,
    malformed,
    messages,
    nested,
)
from acctd.kernel.nfnetlink import text as text_attribute
from acctd.kernel.nftmessages import (
    INET,
    NFTABLES,
    Base,
    Found,
    Generation,
    Known,
    Rule,
    Table,
    incarnation,
    parse_bounds,
    parse_chain,
    parse_generation,
    parse_gotos,
    parse_rules,
    parse_table,
)

_GETTABLE = NFTABLES | 1
_GETCHAIN = NFTABLES | 4
_GETRULE = NFTABLES | 7
_DELSET = NFTABLES | 11
_GETSETELEM = NFTABLES | 13
_GETGEN = NFTABLES | 16
_UNSPEC = 0

_TABLE_NAME = 1
_CHAIN_TABLE, _CHAIN_NAME = 1, 3
_RULE_TABLE, _RULE_CHAIN = 1, 2
_SET_TABLE, _SET_NAME = 1, 2
_ELEMENTS_TABLE, _ELEMENTS_SET, _ELEMENTS = 1, 2, 3
_LIST_ELEM, _ELEMENT_KEY, _DATA_VALUE = 1, 1, 1
_IFNAMSIZ = 16
_ATTEMPTS = 20

T = TypeVar("T")


class Shape(NamedTuple):
    """What one chain consists of: its rules' comments in order, "" for none, and which making of it this is."""

    comments: tuple[str, ...]
    incarnation: str


class Layout(Generic[T]):
    """Where the counters of one generation's dump stand, and what they are called: the commented rules only.

    `shapes` has every chain with all of its rules. `table` is the handle of the table that they are of.
    """

    def __init__(self, rules: list[Found], size: int, make: Callable[[int, int], T], table: int) -> None:
        self.size = size
        self._make = make
        places: list[int] = []
        # chain -> comment -> places of the (bytes, packets) pairs to add up: a rule a family makes two of most.
        chains: dict[str, dict[str, list[tuple[int, int]]]] = {}
        whole: dict[str, list[Rule]] = {}
        for start, rule in rules:
            _, chain, comment, counter, _, _ = rule
            whole.setdefault(chain, []).append(rule)
            if counter and comment:
                pair = start + counter[0], start + counter[1]
                places += pair
                chains.setdefault(chain, {}).setdefault(comment, []).append(pair)
        places.sort()
        index = {place: number for number, place in enumerate(places)}
        form, at = [">"], 0
        for place in places:
            form.append(f"{place - at}xQ")
            at = place + 8
        self._values = struct.Struct("".join(form))
        # The same as the loop of `read` wants it: the first pair taken apart, since it is mostly the only one.
        self._chains = [
            (
                chain,
                [
                    (comment, index[first[0]], index[first[1]], [(index[k], index[m]) for k, m in more])
                    for comment, (first, *more) in comments.items()
                ],
            )
            for chain, comments in chains.items()
        ]
        self.shapes = {
            chain: Shape(tuple([rule.comment for rule in of_chain]), incarnation(table, of_chain))
            for chain, of_chain in whole.items()
        }

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
        self._verdicts: dict[str, tuple[bytes, dict[str, str]]] = {}
        self._socket = netlink or NfnetlinkSocket()

    def read(self) -> tuple[dict[str, dict[str, T]], dict[str, Shape]]:
        """Chain -> comment -> count, and each chain's shape, from one dump; both empty if there is no such table."""
        # Asked before the dump: if a change slips in between, the dump's parts carry another generation.
        generation = self.generation().number
        layout = self._layout
        if layout is not None and generation == self._layout_generation:
            dump = self._dump_rules()
            if dump is not None and dump.uniform == generation & 0xFFFF and dump.size == layout.size:
                return layout.read(dump.buffer), layout.shapes
            generation = self.generation().number
        dump, table = self._dump_with_table()
        if dump is None or not dump.size:
            return {}, {}
        rules, self._known = parse_rules(dump.buffer, dump.size, self._known)
        layout = Layout(rules, dump.size, self._make, table)
        self._layout = layout if dump.uniform == generation & 0xFFFF else None
        self._layout_generation = generation
        return layout.read(dump.buffer), layout.shapes

    def shapes(self) -> dict[str, Shape]:
        """Each chain's shape; from memory, if nothing has changed since read()."""
        layout = self._layout
        if layout is None or self.generation().number != self._layout_generation:
            return self.read()[1]
        return layout.shapes

    def read_chain(self, chain: str) -> tuple[dict[str, T], Shape] | None:
        """Comment -> count of one chain alone, and its shape; None if it is gone or has no rules.

        The cost does not grow with the other chains.
        """
        dump, table = self._dump_with_table(chain)
        if dump is None or not dump.size:
            return None
        rules, _ = parse_rules(dump.buffer, dump.size)
        layout = Layout(rules, dump.size, self._make, table)
        shape = layout.shapes.get(chain)
        return (layout.read(dump.buffer).get(chain, {}), shape) if shape else None

    def shape(self, chain: str) -> Shape:
        """One chain's shape; of one without rules, or that is not there, an empty one."""
        found = self.read_chain(chain)
        return found[1] if found else Shape((), "")

    def generation(self) -> Generation:
        """The namespace's ruleset of the moment, and the calling thread. Costs a few microseconds."""
        answer = self._socket.ask(_GETGEN, _UNSPEC)
        if answer is None:
            raise malformed("no generation", 0)
        return parse_generation(answer, 0, len(answer))

    def table(self) -> Table | None:
        """None if there is no such table."""
        answer = self._socket.ask(_GETTABLE, INET, text_attribute(_TABLE_NAME, self._table))
        return None if answer is None else parse_table(answer, 0, len(answer))

    def chains(self) -> list[str]:
        """The names of the table's chains."""
        dump = self._socket.dump(_GETCHAIN, INET)  # the kernel filters by family alone
        if dump is None:
            return []
        found = [parse_chain(dump.buffer, start, end) for _, _, start, end in messages(dump.buffer, dump.size)]
        return [name for table, name, _ in found if table == self._table]

    def chain_exists(self, chain: str) -> bool:
        return self._ask_chain(chain) is not None

    def base(self, chain: str) -> Base | None:
        """Where a chain is attached; None if it is attached nowhere, or not there."""
        answer = self._ask_chain(chain)
        return parse_chain(answer, 0, len(answer))[2] if answer is not None else None

    def gotos(self, name: str) -> Iterator[tuple[str, str]]:
        """Each interface name in a verdict map and the chain it goes to; to be used before the next call."""
        dump = self._dump_elements(name)
        return parse_gotos(dump.buffer, dump.size) if dump else iter(())

    def verdicts(self, name: str) -> dict[str, str]:
        """All of `gotos`; what did not change since the last time is not parsed again."""
        dump = self._dump_elements(name)
        if dump is None:
            return {}
        heads = messages(dump.buffer, dump.size)
        content = b"".join(bytes(dump.buffer[start + HEADERS : end]) for _, _, start, end in heads)
        known, verdicts = self._verdicts.get(name, (b"", {}))
        if known != content:
            verdicts = dict(parse_gotos(dump.buffer, dump.size))
            self._verdicts[name] = content, verdicts
        return verdicts

    def goto_of(self, name: str, ifname: str) -> str | None:
        """The chain one interface name goes to in a verdict map; None if it is not in there, or there is no map."""
        key = nested(_ELEMENT_KEY, attribute(_DATA_VALUE, ifname.encode().ljust(_IFNAMSIZ, b"\0")))
        request = text_attribute(_ELEMENTS_TABLE, self._table) + text_attribute(_ELEMENTS_SET, name)
        answer = self._socket.ask(_GETSETELEM, INET, request + nested(_ELEMENTS, nested(_LIST_ELEM, key)))
        return next((chain for _, chain in parse_gotos(answer, len(answer))), None) if answer is not None else None

    def bounds(self, name: str) -> set[tuple[bytes, bool]]:
        """What is in a set of intervals, see parse_bounds; empty if there is no such set.

        libnftables also writes an end at zero, behind a range that is none; it says nothing and is left out.
        """
        dump = self._dump_elements(name)
        found = parse_bounds(dump.buffer, dump.size) if dump else set()
        return {(bound, is_end) for bound, is_end in found if any(bound) or not is_end}

    def mentions(self, name: str, chain: str | None = None) -> bool:
        """Whether a rule, of one chain or of any, speaks of a set of this name."""
        dump = self._dump_rules(chain)
        return dump is not None and dump.buffer.find(name.encode() + b"\0", 0, dump.size) >= 0

    def delete_set(self, name: str) -> bool:
        """Remove a set; False, and nothing is changed, if a rule looks into it or it is gone already.

        A refusal costs some 20 ms: the kernel waits for its readers before it takes a transaction back.
        """
        request = text_attribute(_SET_TABLE, self._table) + text_attribute(_SET_NAME, name)
        error = self._socket.transaction(_DELSET, INET, request)
        if error not in (0, errno.EBUSY, errno.ENOENT):
            raise KernelRefusedError(f"cannot remove the set {name} of table inet {self._table}: {os.strerror(error)}")
        return error == 0

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> "TableReader[T]":
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _dump_rules(self, chain: str | None = None) -> Dump | None:
        """The rules of one chain, or of all."""
        request = text_attribute(_RULE_TABLE, self._table)
        if chain is not None:
            request += text_attribute(_RULE_CHAIN, chain)
        return self._socket.dump(_GETRULE, INET, request)

    def _dump_with_table(self, chain: str | None = None) -> tuple[Dump | None, int]:
        """The rules of one chain, or of all, and the handle of the table that they are of."""
        table = self.table()
        for _ in range(_ATTEMPTS):
            if table is None:
                return None, 0
            dump = self._dump_rules(chain)
            if dump is None or not dump.size or dump.uniform == table.generation:
                return dump, table.handle
            # Asked again, for which the dump must make room.
            kept = Dump(bytearray(memoryview(dump.buffer)[: dump.size]), dump.size, dump.uniform)
            before, table = table, self.table()
            if table is not None and table.handle == before.handle:
                return kept, table.handle  # things changed, but it has been the same table throughout
        raise KernelRefusedError(f"table inet {self._table} was made anew during each of {_ATTEMPTS} dumps")

    def _dump_elements(self, name: str) -> Dump | None:
        request = text_attribute(_ELEMENTS_TABLE, self._table) + text_attribute(_ELEMENTS_SET, name)
        return self._socket.dump(_GETSETELEM, INET, request)

    def _ask_chain(self, chain: str) -> bytes | None:
        request = text_attribute(_CHAIN_TABLE, self._table) + text_attribute(_CHAIN_NAME, chain)
        return self._socket.ask(_GETCHAIN, INET, request)
