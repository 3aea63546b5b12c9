"""Counts of every job's chain out of a filter table's bytes, quickly: the layout is remembered, and proven each time.

Reads bytes and nothing else. A table is walked once; after that, as long as it has the same size and every byte of
every job's chain except its counters is where it was (so each count still lies under its own chain's name and its own
comment), counters are taken at their remembered places. Otherwise the table is walked again, and a chain that is byte
for byte the remembered one is stepped over in one go. What the last rule of a chain counts is no packets, but tells
which making of the chain it is: see xtplan.rules.
Layout: include/uapi/linux/netfilter/x_tables.h; a user chain begins with an entry whose target is ERROR with its name.
"""

import struct
from dataclasses import dataclass
from functools import partial
from operator import add

from acctd.kernel.xtables import Family
from acctd.network.backend import PREFIX, Count, Counts

_HEAD = struct.Struct("=H29sB")
_OFFSETS = struct.Struct("=HH")
ERROR_SIZE = 64
ERROR = struct.pack("=H29sB", ERROR_SIZE, b"ERROR", 0)
_JOB_HEAD = ERROR + b"JOB_"
_RETURN = struct.pack("=H29sBi4x", 40, b"", 0, -5)
_COUNTERS = 16
MAKING = "making"
"""What the last rule's packets are called among a chain's counts."""

_count = partial(tuple.__new__, Count)  # what Count._make does, without a Python frame for each of thousands


@dataclass(frozen=True, slots=True)
class Chain:
    """One job's chain from its head to the next chain's, wherever it lies in the table."""

    name: str
    rules: tuple[str, ...]  # comments in order; one that stands for several networks is there several times
    length: int
    around: str  # struct format of all that lies around the counters
    counters: str  # struct format of the counters of the rules that count
    frame: struct.Struct
    expected: tuple[bytes, ...]  # what `around` gave


@dataclass(frozen=True, slots=True)
class Layout:
    """A table with its jobs' chains in it, and where each begins."""

    size: int
    chains: tuple[Chain, ...]
    places: tuple[int, ...]
    rules: tuple[tuple[str, tuple[str, ...], bool], ...]  # chain, comments, whether each is there once
    frame: struct.Struct
    expected: tuple[bytes, ...]
    counters: struct.Struct


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading of one table: (chain, comments, whether each is there once), and each rule's packets and bytes."""

    rules: tuple[tuple[str, tuple[str, ...], bool], ...]
    values: tuple[int, ...]


class Sampler:
    """Takes samples of one family's filter table."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._layout: Layout | None = None

    def layout(self, blob: memoryview) -> Layout:
        """Where what is in `blob`. It may come from any namespace: nothing remembered is believed unseen."""
        layout = self._layout
        if layout is None or layout.size != len(blob) or layout.frame.unpack_from(blob) != layout.expected:
            layout = self._layout = _survey(self._family, bytes(blob), layout)
        return layout

    def take(self, blob: memoryview) -> Sample:
        """The counts in `blob`."""
        layout = self.layout(blob)
        return Sample(layout.rules, layout.counters.unpack_from(blob))


def total(samples: list[Sample], only: str | None = None) -> dict[str, Counts]:
    """All samples' counts, or those of `only` one chain, added up by chain and rule name."""
    if only is not None:
        samples = [_part(sample, only) for sample in samples]
    if len(samples) == 2 and samples[0].rules == samples[1].rules:
        # The usual case, IPv4 and IPv6 built alike: added up without a look at each rule.
        samples = [Sample(samples[0].rules, tuple(map(add, samples[0].values, samples[1].values)))]
    result: dict[str, Counts] = {}
    for sample in samples:
        counts = map(_count, zip(sample.values[1::2], sample.values[0::2], strict=True))
        for chain, names, once in sample.rules:
            # zip asks for the name first and stops there: no count is taken that belongs to the next chain.
            pairs = zip(names, counts, strict=False)
            if once and chain not in result:
                result[chain] = dict(pairs)
                continue
            into = result.setdefault(chain, {})
            for name, count in pairs:
                have = into.get(name)
                into[name] = Count(have.bytes + count.bytes, have.packets + count.packets) if have else count
    return result


def _part(sample: Sample, only: str) -> Sample:
    at = 0
    for rule in sample.rules:
        chain, names, _ = rule
        if chain == only:
            return Sample((rule,), sample.values[at : at + 2 * len(names)])
        at += 2 * len(names)
    return Sample((), ())


def _survey(family: Family, raw: bytes, before: Layout | None) -> Layout:
    """Walk a whole table; what was known of it `before` saves most of the way."""
    known = {chain.name: chain for chain in before.chains} if before else {}
    offsets_at, bare, end, unpack = family.offsets_at, family.size, len(raw), _OFFSETS.unpack_from
    head = bare + ERROR_SIZE
    frames: dict[str, struct.Struct] = {}
    comments: dict[bytes, str | None] = {}
    chains: list[Chain] = []
    places: list[int] = []
    around, counters = ["="], ["="]
    gap = position = 0  # `gap`: where the stretch of other entries began that the walk is in
    while position < end:
        _, following = unpack(raw, position + offsets_at)
        if following != head or not raw.startswith(_JOB_HEAD, position + bare):
            position += following or end  # never 0, says the kernel; a short answer would be better than a long loop
            continue
        name = raw[position + bare + _HEAD.size : position + head].split(b"\0", 1)[0].decode("ascii", "replace")
        chain = known.get(name)
        if (
            chain is None
            or not raw.startswith(ERROR, position + chain.length + bare)  # or it has grown
            or chain.frame.unpack_from(raw, position) != chain.expected
        ):
            chain = _walk(family, raw, position, name, frames, comments)
        chains.append(chain)
        places.append(position)
        skip = f"{position - gap}x"
        around += (skip, chain.around)
        counters += (skip, chain.counters)
        gap = position = position + chain.length
    frame = struct.Struct("".join(around))
    return Layout(
        end,
        tuple(chains),
        tuple(places),
        tuple((chain.name, chain.rules, len(set(chain.rules)) == len(chain.rules)) for chain in chains),
        frame,
        frame.unpack_from(raw),
        struct.Struct("".join(counters)),
    )


def _walk(
    family: Family,
    raw: bytes,
    start: int,
    name: str,
    frames: dict[str, struct.Struct],
    comments: dict[bytes, str | None],
) -> Chain:
    """The chain whose head lies at `start`, up to the next head. The table's own last entry looks like one.

    `frames` and `comments` hold what other chains had already: most chains of a node are of one shape.
    """
    around, counters = "", ""
    rules: list[str] = []
    done = start  # end of what both formats cover
    position = start + _OFFSETS.unpack_from(raw, start + family.offsets_at)[1]
    while position < len(raw):
        to, following = _OFFSETS.unpack_from(raw, position + family.offsets_at)
        if raw.startswith(ERROR, position + to):
            break
        here = position + family.counters_at
        around += f"{here - done}s{_COUNTERS}x"
        comment = None
        if to == family.size:
            # Every chain is closed by one like it, which then comes before the next chain's head.
            if raw.startswith(_RETURN, position + to) and not raw.startswith(ERROR, position + following + family.size):
                comment = MAKING
        elif _ours(family, raw, position):
            matches = raw[position + family.size : position + to]
            if matches not in comments:
                comments[matches] = _comment(matches)
            comment = comments[matches]
        if comment is None:  # the REJECT at the end: its counters move, and are nobody's
            counters += f"{here - done + _COUNTERS}x"
        else:
            counters += f"{here - done}xQQ"
            rules.append(comment)
        done = here + _COUNTERS
        position += max(following, family.size)
    around += f"{position - done}s"
    counters += f"{position - done}x"
    frame = frames.get(around)
    if frame is None:
        frame = frames[around] = struct.Struct("=" + around)
    expected = frame.unpack_from(raw, start)
    return Chain(name, tuple(rules), position - start, around, counters, frame, expected)


def _ours(family: Family, raw: bytes, position: int) -> bool:
    """Whether the rule is about the outer end of a pipe; other rules have no comment that is ours."""
    ifaces, mark = position + family.ifaces_at, PREFIX.encode()
    return raw.startswith(mark, ifaces) or raw.startswith(mark, ifaces + 16)


def _comment(matches: bytes) -> str | None:
    at = 0
    while at + _HEAD.size <= len(matches):
        size, name, _ = _HEAD.unpack_from(matches, at)
        if name.split(b"\0", 1)[0] == b"comment":
            return matches[at + _HEAD.size : at + size].split(b"\0", 1)[0].decode("utf-8", "replace")
        at += max(size, _HEAD.size)
    return None
