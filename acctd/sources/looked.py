"""What a bill rests on, so that its header can say it: where records came from, how many, and what they were.

Pure data, and what is done to put the counts of several readers together. Reads nothing.
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from acctd.usage import Usage

Key = tuple[str, float, str]
"""node, started, id: what makes two records one. The agent gives no two jobs of a node the same."""

NAMED_MOST = 20
"""Lines that could not be read and are named; the others are counted."""

_DIGEST = 2**128
_NEWLINE = re.compile(b"\n")
"""What signed bytes have none of."""


def key(usage: Usage) -> Key:
    """Of the job that a record is about."""
    return usage.node, usage.started, usage.id


def digest(body: bytes | memoryview) -> bytes:
    """16 bytes of the SHA-256 of a record without the blanks that a person's eye likes: the same in every file."""
    if _NEWLINE.search(body):
        body = msgspec.json.format(bytes(body), indent=-1)
    return hashlib.sha256(body).digest()[:16]


@dataclass(slots=True)
class Looked:
    """What was looked at. Each reader has its own; add() puts them together."""

    records: int = 0  # counted; those inside others among them
    repeated: int = 0  # delivered again, and not counted
    sum: int = 0  # of the digests of those that count: the same in whatever order they come
    nodes: set[str] = field(default_factory=set)
    broken: int = 0  # lines that could not be read
    told: list[str] = field(default_factory=list)  # the first of them, a sentence each
    torn: list[str] = field(default_factory=list)  # packed files of which the rest cannot be read, a sentence each
    unfinished: list[str] = field(default_factory=list)  # files at whose end somebody writes
    found: bool = False  # the line that was sought
    missing: str = ""  # a sentence on records that were archived, and may be of the period
    first: tuple[int, str] | None = None  # number and digest of the ledger's first record that was looked at
    last: tuple[int, str] | None = None

    def count(self, usage: Usage, body: bytes) -> None:
        """One more record; `body` is its digest()."""
        self.records += 1
        self.sum = (self.sum + int.from_bytes(body)) % _DIGEST
        self.nodes.add(usage.node)

    def complain(self, sentence: Callable[[], str]) -> None:
        """A line that could not be read. It is only asked what to say of it where that is told: it may take long."""
        self.broken += 1
        if len(self.told) < NAMED_MOST:
            self.told.append(sentence())

    def add(self, other: "Looked") -> None:
        """What another reader looked at."""
        self.records += other.records
        self.repeated += other.repeated
        self.sum = (self.sum + other.sum) % _DIGEST
        self.nodes |= other.nodes
        self.broken += other.broken
        self.told = sorted({*self.told, *other.told})[:NAMED_MOST]
        self.torn = sorted({*self.torn, *other.torn})
        self.unfinished = sorted({*self.unfinished, *other.unfinished})
        self.found = self.found or other.found
        self.missing = self.missing or other.missing
        self.first = _least(self.first, other.first)
        self.last = _most(self.last, other.last)

    @property
    def digest(self) -> str:
        """Of all records that count together, 32 hex digits; "" of none."""
        return f"{self.sum:032x}" if self.records else ""


def _least(*ends: tuple[int, str] | None) -> tuple[int, str] | None:
    return min(_there(ends), default=None)


def _most(*ends: tuple[int, str] | None) -> tuple[int, str] | None:
    return max(_there(ends), default=None)


def _there(ends: Iterable[tuple[int, str] | None]) -> list[tuple[int, str]]:
    return [end for end in ends if end is not None]
