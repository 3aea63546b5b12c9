"""The vocabulary: what a job is, what it may use, and what its record says. Pure data, floor 0, no I/O.

Everything that comes from outside becomes one of these types here, or a UsageError that names the field and the value.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from ipaddress import IPv4Network, IPv6Network, ip_network
from itertools import pairwise
from typing import Literal, get_args

from acctd.errors import UsageError
from acctd.policies import Isolation, OomPolicy, Shortage

Network = IPv4Network | IPv6Network
OwnNetwork = Literal["nat", "host", "none"]
MemoryPolicy = Literal["hard", "soft", "custom", "none"]
"""What becomes of the memory that a job asks for, in HTCondor's words: its hard limit; its soft one; both, apart, as
given; or nothing but a line in its record."""
NetworkMode = Literal["nat", "host", "none", "parent"]
"""parent: a family's processes stay in the network of the job they are in, and are counted there alone."""

REMAINDER = "External"
"""The class of every destination that no configured class contains."""

MEMORY_MIN = 1 << 20
"""Below one MiB no command can be started: the limit would be under the usage of the launching process itself."""

INT64_MAX = 2**63 - 1

CLASSES_MAX, NETWORKS_MAX = 64, 1024
"""Of one job: each class is some rules, and each network an element of a set or a rule."""

# HTCondor 12.0, Grid Engine 42.3, Slurm 17_4, Torque 12[3].server.domain: all of these are ids.
_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:+\[\]-]{0,127}\Z")
_CLASS_NAME = re.compile(r"[A-Z][A-Za-z0-9]{0,31}\Z")
_TAG_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}\Z")
_SIZE = re.compile(r"(\d{1,4000}(?:\.\d{1,4000})?)\s*([KMGTP]?)(?:i?B)?\Z", re.IGNORECASE | re.ASCII)
# What chain_name() makes of other ids; an id that looks so itself would take another job's chain.
_HASHED = re.compile(r"_[0-9a-f]{8}\Z")
_LINEAR = re.compile(r"linear:[1-9]\d{0,4}\Z", re.ASCII)
_CPU_LIST = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class DestinationClass:
    """A named set of networks that traffic is billed under."""

    name: str
    networks: tuple[Network, ...]


@dataclass(frozen=True, slots=True)
class Owner:
    """Whom the job belongs to and runs as. `name` is the account's name, or the number where there is none."""

    uid: int
    gid: int
    name: str


@dataclass(frozen=True, slots=True)
class Limits:
    """What the job may use; None means no limit of its own."""

    memory: int | None = None  # bytes, hard unless memory_policy says otherwise
    memory_soft: int | None = None  # bytes
    swap: int | None = None  # bytes of swap, beside the memory
    cpus: float | None = None  # cores, quota
    cpu_burst: float | None = None  # s of CPU beyond the quota that unused quota may save up
    cpu_shares: int | None = None  # cpu.shares, 1024 is one ordinary job
    cpuset: str | None = None  # list format, "0-3,8"; or "linear:N", N cores that no other job has
    pids: int | None = None  # tasks
    memory_policy: MemoryPolicy = "custom"

    def __post_init__(self) -> None:
        _within("memory", self.memory, MEMORY_MIN, INT64_MAX, "bytes")
        _within("memory_soft", self.memory_soft, MEMORY_MIN, INT64_MAX, "bytes")
        _within("swap", self.swap, 0, INT64_MAX, "bytes")
        _within("cpus", self.cpus, 0.01, 65536, "cores")
        _within("cpu_shares", self.cpu_shares, 2, 262144, "shares")
        _within("pids", self.pids, 1, 4194304, "tasks")
        _within("cpu_burst", self.cpu_burst, 0.001, 65536, "seconds")
        if self.cpuset is not None and not _CPU_LIST.match(self.cpuset) and not _LINEAR.match(self.cpuset):
            raise UsageError(f"cpuset {self.cpuset!r} is no CPU list; write it like 0-3 or 0,2,8-11, or linear:N")
        if self.cpu_burst is not None and self.cpus is None:
            raise UsageError(f"cpu_burst {self.cpu_burst} needs a quota to go beyond; set cpus too")
        if self.memory_policy not in get_args(MemoryPolicy):
            known = ", ".join(get_args(MemoryPolicy))
            raise UsageError(f"memory_policy {self.memory_policy!r} is none; it is one of {known}")
        if self.memory_policy != "custom" and self.memory_soft is not None:
            raise UsageError(
                f"memory_soft {self.memory_soft} is for memory_policy custom, not {self.memory_policy}; leave one out"
            )
        if self.memory is not None and self.memory_soft is not None and self.memory_soft > self.memory:
            raise UsageError(
                f"memory_soft {self.memory_soft} is above memory {self.memory}; the soft limit must be the lower one"
            )
        if self.swap is not None and self.memory is None:
            raise UsageError(f"swap {self.swap} needs a memory limit to go with it; set memory too")

    @property
    def hard(self) -> int | None:
        """Bytes of memory that the job can never go over."""
        return self.memory if self.memory_policy in ("hard", "custom") else None

    @property
    def soft(self) -> int | None:
        """Bytes above which the job is the first to be pushed back when memory is short."""
        return self.memory if self.memory_policy == "soft" else self.memory_soft

    def told(self) -> str:
        """Those that are set, as NAME=VALUE, for a sentence."""
        return " ".join(f"{f.name}={value}" for f in fields(self) if (value := getattr(self, f.name)) is not None)

    @property
    def linear(self) -> int | None:
        """How many cores it is to have for itself, where that is what it asks for."""
        return int(self.cpuset[7:]) if self.cpuset is not None and _LINEAR.match(self.cpuset) else None


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What a starter asks for."""

    id: str
    owner: Owner
    limits: Limits = field(default_factory=Limits)
    network: NetworkMode = "nat"
    classes: tuple[DestinationClass, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    parent: str | None = None  # the job that this family is inside of
    oom: OomPolicy = field(default_factory=OomPolicy)
    isolation: Isolation = field(default_factory=Isolation)

    def __post_init__(self) -> None:
        check_job_id(self.id)
        if self.network == "parent" and self.parent is None:
            raise UsageError('network "parent" is for a family inside a job; name the job, or choose nat, host or none')
        check_classes(self.classes)
        folded: dict[str, str] = {}
        for key, value in self.tags.items():
            check_tag(key, value)
            if (other := folded.setdefault(key.lower(), key)) != key:
                raise UsageError(f"tags {other} and {key} differ in case only, which a ClassAd cannot tell; rename one")


@dataclass(frozen=True, slots=True)
class Midnight:
    """What a job had used when it was first read on another day (UTC): a bill tells one month from the next by it."""

    ns: int  # since the job's start, on the boottime clock
    totals: dict[str, dict[str, int]]  # as in Record, of metrics.BILLED those that there were


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A job's final, signed-off account. Durations come from the boottime clock; stamps are labels only."""

    id: str
    owner: str
    uid: int
    node: str
    state: Literal["running", "done", "lost"]  # running: not final, only shown. lost: its exit status is unknown
    started: float  # s since the epoch
    ended: float  # s since the epoch
    wall_ns: int
    exit_code: int | None
    exit_signal: int | None
    network: NetworkMode
    limits: Limits
    tags: dict[str, str]
    totals: dict[str, dict[str, int]]  # metric name -> label ("" where there is only one) -> total
    stacked: tuple[str, ...] = ()  # devices in totals whose I/O is counted again under the device they lie on
    notes: tuple[str, ...] = ()  # what an admin must know about this account, one sentence each
    parent: str | None = None  # the job whose totals include these
    shortages: tuple[Shortage, ...] = ()  # each time that its memory ran out, oldest first
    shortages_dropped: int = 0  # others, which are not kept
    cpus: str = ""  # the cores it had for itself, where it asked for some
    midnights: tuple[Midnight, ...] = ()  # of a job that saw the end of a day, oldest first


def check_job_id(job: str) -> str:
    """The id itself, if it can name a job. It becomes a directory and a chain, so nothing else may pass."""
    if not _JOB_ID.match(job):
        shown = job if len(job) <= 64 else f"{job[:61]}..."
        raise UsageError(
            f"job id {shown!r} ({len(job)} characters) is not usable; it takes 1 to 128 of A-Z a-z 0-9 . _ @ : + [ ] - "
            "and starts with a letter or digit"
        )
    if len(job) > 1 and ".." in job:
        raise UsageError(f"job id {job!r} contains '..'; leave it out")
    return job


def check_tag(key: str, value: str) -> None:
    """A tag's key becomes a ClassAd attribute; its value may be any text without NUL."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UsageError(f"tag {key} {value!r} is no UTF-8 text; encode it") from None
    if not _TAG_KEY.match(key):
        raise UsageError(f"tag key {key!r} is not usable; it takes letters, digits and _, 64 at most, no digit first")
    if "\0" in value or len(value) > 4096:
        raise UsageError(f"tag {key} holds a NUL or more than 4096 characters; shorten it")


def parse_class(name: str, cidrs: list[str]) -> DestinationClass:
    """One destination class from configuration or command line. Host bits must be zero."""
    if not _CLASS_NAME.match(name):
        raise UsageError(
            f"class name {name!r} is not usable; it takes a capital letter, then letters and digits, 32 at most"
        )
    if name.lower() == REMAINDER.lower():
        raise UsageError(f"class {name}: this name stands for whatever no class contains; choose another")
    if not cidrs:
        raise UsageError(f"class {name} is empty; give it at least one network, like 10.0.0.0/8")
    networks = []
    for text in cidrs:
        try:
            networks.append(ip_network(text.strip()))
        except ValueError as e:
            raise UsageError(f"class {name}: {text!r} is no CIDR network ({e}); write it like 10.0.0.0/8") from None
    return check_class(DestinationClass(name, tuple(networks)))


def check_class(cls: DestinationClass) -> DestinationClass:
    """A class may not overlap itself: whoever wrote it meant something else."""
    for version in (4, 6):
        ordered = sorted(
            (n for n in cls.networks if n.version == version), key=lambda n: (int(n.network_address), n.prefixlen)
        )
        for outer, inner in pairwise(ordered):
            if int(inner.network_address) <= int(outer.broadcast_address):
                raise UsageError(f"class {cls.name} overlaps itself: {inner} lies inside {outer}; drop one of them")
    return cls


def check_classes(classes: tuple[DestinationClass, ...]) -> None:
    """Classes may nest in each other (the longest prefix wins) but not claim the same network twice."""
    owners: dict[Network, str] = {}
    names: set[str] = set()
    if len(classes) > CLASSES_MAX or sum(len(cls.networks) for cls in classes) > NETWORKS_MAX:
        raise UsageError(
            f"there are too many classes or networks; a job takes {CLASSES_MAX} and {NETWORKS_MAX} at most"
        )
    for cls in classes:
        # In any case: the name becomes part of a ClassAd attribute, and those ignore it.
        if cls.name.lower() in names:
            raise UsageError(f"class {cls.name} is given twice; join its networks with commas")
        names.add(cls.name.lower())
        for network in cls.networks:
            if network in owners:
                raise UsageError(f"network {network} is in class {owners[network]} and in class {cls.name}; choose one")
            owners[network] = cls.name


def parse_size(name: str, text: str) -> int:
    """A size in bytes from text such as 512M, 1.5G or 1073741824; K, M, G, T, P are powers of 1024."""
    match = _SIZE.match(text.strip())
    if not match:
        raise UsageError(f"{name} {text!r} is no size; write it like 512M or 2G")
    number, unit = match.groups()
    factor: int = 1024 ** " KMGTP".index(unit.upper() or " ")
    whole, _, fraction = number.partition(".")
    size = int(whole) * factor + (int(fraction) * factor // 10 ** len(fraction) if fraction else 0)
    if size > INT64_MAX:
        raise UsageError(f"{name} {text!r} is above 2^63-1 bytes; leave the limit out if there is to be none")
    return size


def chain_name(job: str) -> str:
    """The name of a job's chain: JOB_<id>, at most 28 characters (xtables' limit) of A-Z a-z 0-9 _ and '.'.

    An id with other characters, a longer one, or one that ends like a hash, is shortened and made unique again by a
    hash of the whole id.
    """
    plain = re.sub(r"[^A-Za-z0-9_.]", "_", job)
    if plain == job and len(job) <= 24 and not _HASHED.search(job):
        return f"JOB_{job}"
    return f"JOB_{plain[:15]}_{hashlib.sha256(job.encode()).hexdigest()[:8]}"


def _within(name: str, value: float | None, low: float, high: float, unit: str) -> None:
    if value is not None and not low <= value <= high:
        raise UsageError(f"{name} {value} is out of range; it takes {low} to {high} {unit}")
