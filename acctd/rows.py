"""What the ledger's rows hold: open jobs, their accounts and terms, events; as types, and as bytes.

Pure data and its encoding; ledger.py stores it, and a job's cgroups carry a copy of its row.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import msgspec

from acctd.integrals import Sums
from acctd.meter import State, Stored
from acctd.model import DestinationClass, JobSpec, Limits, Midnight, Owner, parse_class
from acctd.policies import Isolation, OomPolicy, Shortage

Phase = Literal["making", "made", "running", "closed"]
"""making: kernel objects may be half there. made: all there, and the agent waits for somebody to enter. running: the
command has been started. closed: record written, objects not yet all removed."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a job's kernel objects are, as configured when it was made; a later configuration may say otherwise."""

    base: str  # cgroup.base
    backend: str | None = None  # which netfilter back end made the chain, None without a pipe
    pool4: str = ""  # networks in which the slot's addresses lie
    pool6: str = ""  # "" without IPv6
    controllers: tuple[str, ...] = ()  # cgroup.controllers
    cpus: str = ""  # the cores that this job has for itself, a CPU list; "" where it asked for none
    mems: str = ""  # and the memory nodes beside them
    scratch: str = ""  # its scratch directory, see scratch.py; "" without


@dataclass(frozen=True, slots=True)
class Rule:
    """Which processes a job takes beside those put into it: one of the three."""

    environment: str | None = None  # NAME=VALUE
    login: str | None = None
    group: int | None = None  # a supplementary group's gid


@dataclass(frozen=True, slots=True)
class Proxy:
    """Where a job's starter listens for Chirp. Who has the cookie may change the job's ad: it is told to nobody."""

    host: str
    port: int
    cookie: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms the agent holds a job; condor_procd's words. Processes are named by procs.identity."""

    watcher: str | None = None  # the job is given up when this process ends
    interval: float | None = None  # s; read at least so often
    rules: tuple[Rule, ...] = ()
    member: str | None = None  # a process of the job that is waited for
    ended_ns: int | None = None  # CLOCK_BOOTTIME when the job was seen to have no process any more
    families: bool = False  # one was ever inside it: from then on it is read so that they are not in its own counts
    run: bool = False  # by an `acctd run`, which alone would have finished it
    moved: bool = False  # the pipe leads into a namespace of the owner's own, see pipe.move
    chirp: Proxy | None = None


@dataclass(frozen=True, slots=True)
class Account:
    """What is known of a job's use so far."""

    meter: Stored = field(default_factory=Stored)
    incarnation: str | None = None  # of its chain, as of the last reading
    notes: tuple[str, ...] = ()
    stacked: dict[str, bool] = field(default_factory=dict)  # block device -> whether it lies on another one
    families: State = field(default_factory=dict)  # of ended families inside it, what is not in its own counts
    shortages: tuple[Shortage, ...] = ()  # the first and the newest
    shortages_dropped: int = 0  # others, not kept
    kills_told: int = 0  # processes killed by the kernel for want of memory, as far as they are in a shortage
    integrals: Sums = field(default_factory=Sums)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a job, or to the agent itself where job is None."""

    number: int
    time: float  # s since the epoch, a label
    job: str | None
    uid: int | None  # of its owner; ids are given again, and then are another's
    event: str
    text: str


@dataclass(frozen=True, slots=True)
class OpenJob:
    """One row of the open jobs."""

    seq: int
    phase: Phase
    slot: int | None
    place: Place
    spec: JobSpec
    created: float
    boot_id: str
    boot_ns: int
    seen_ns: int
    keeper: str
    account: Account = field(default_factory=Account)
    parent: int | None = None
    terms: Terms = field(default_factory=Terms)
    midnights: tuple[Midnight, ...] = ()  # oldest first


def encode_row(row: OpenJob) -> bytes:
    """A row in one piece, for a place outside the ledger, where more than root may read it: without the secret.

    Without the midnights, too: there is no room for a year of them.
    """
    return msgspec.json.encode(replace(row, terms=replace(row.terms, chirp=None), midnights=()), enc_hook=str)


def decode_row(text: bytes) -> OpenJob:
    """The reverse. Raises MsgspecError, KeyError, TypeError or UsageError for what encode_row did not write."""
    kinds: dict[str, Any] = {"place": Place, "account": Account, "terms": Terms, "midnights": tuple[Midnight, ...]}
    try:
        raw = msgspec.json.decode(text, type=dict[str, Any])
        return OpenJob(
            **{name: msgspec.convert(value, kinds[name]) for name, value in raw.items() if name in kinds},
            **{name: value for name, value in raw.items() if name not in kinds and name != "spec"},
            spec=_spec(raw["spec"]),
        )
    except (AttributeError, UnicodeDecodeError, RecursionError) as e:  # no table where one must be; no UTF-8
        raise TypeError(str(e)) from None


def decode_columns(row: tuple) -> OpenJob:  # type: ignore[type-arg]  # columns of different types
    """The reverse of what ledger.py writes. Raises as decode_row() does."""
    seq, phase, slot, place, spec, created, boot_id, boot_ns, seen_ns, keeper, account, parent, terms = row
    return OpenJob(
        *(seq, phase, slot, msgspec.json.decode(place, type=Place), _spec(msgspec.json.decode(spec))),
        *(created, boot_id, boot_ns, seen_ns, keeper),
        account=msgspec.json.decode(account, type=Account),
        parent=parent,
        terms=msgspec.json.decode(terms, type=Terms),
    )


def _spec(raw: dict[str, Any]) -> JobSpec:
    """A JobSpec whose networks were written as text."""
    return JobSpec(
        id=raw["id"],
        owner=Owner(**raw["owner"]),
        limits=Limits(**raw["limits"]),
        network=raw["network"],
        classes=tuple(_class(cls["name"], *cls["networks"]) for cls in raw["classes"]),
        tags=raw["tags"],
        parent=raw.get("parent"),
        oom=msgspec.convert(raw.get("oom", {}), OomPolicy),
        isolation=msgspec.convert(raw.get("isolation", {}), Isolation),
    )


@lru_cache(maxsize=64)
def _class(name: str, *networks: str) -> DestinationClass:
    """One object for all jobs that have the same."""
    return parse_class(name, list(networks))
