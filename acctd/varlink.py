"""The varlink protocol as bytes and types: frames, the interface's description, and its errors. No socket in here.

A message is one JSON object and a NUL. Reference: varlink.org, "Wire format" and "Interface definition". The interface
org.acctd.Node is what the agent answers to; its text below is what GetInterfaceDescription gives, and a test holds the
methods it names against those the server has.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from acctd.errors import (
    AcctdError,
    ConfigError,
    ExhaustedError,
    InUseError,
    KernelRefusedError,
    LedgerError,
    NotFoundError,
    NotPermittedError,
    UnavailableError,
    UsageError,
)

FRAME_LIMIT = 1 << 18
"""Bytes of one message at most: above a record with 4096-character tags, below what a flood could cost us."""

READ = 1 << 14
"""Bytes read at a time."""

INTERFACE = "org.acctd.Node"
SERVICE = "org.varlink.service"

DESCRIPTION = """\
# The accounting agent of a batch worker node. Sizes in bytes, times in ns, totals as {metric: {label: number}}.
interface org.acctd.Node

# memory_policy: what becomes of memory: hard, soft, custom (hard, with memory_soft apart) or none. cpu_burst in s.
# cpuset: a CPU list, or linear:N, N cores that no other job has which asks so.
type Limits (
  memory: ?int, memory_soft: ?int, swap: ?int, cpus: ?float, cpu_burst: ?float, cpu_shares: ?int, cpuset: ?string,
  pids: ?int, memory_policy: ?string
)

# What is done when the memory runs out: kernel, kill, hold, grow or exec. ceiling in bytes, step and thresholds in
# percent of the limit, deadline in s.
type Oom (action: ?string, ceiling: ?int, step: ?int, deadline: ?float, thresholds: ?[]int)

# How far the job is shut in; what the configuration asks of all jobs comes on top.
type Isolation (pid_namespace: ?bool, scratch: ?[]string, chroot: ?string, no_new_privs: ?bool)

# shortages: each time that its memory ran out.
# A job's totals include those of the families below it. Of a job that the caller may only see, totals is empty.
type Job (
  id: string,
  parent: ?string,
  owner: string,
  uid: int,
  phase: string,
  network: string,
  started: float,
  wall_ns: int,
  pids: []int,
  limits: Limits,
  tags: [string]string,
  notes: []string,
  shortages: []object,
  totals: [string][string]int
)

# Numbers only grow. `job` is null where the agent itself is meant.
type Event (number: int, time: float, job: ?string, uid: ?int, event: string, text: string)

# A record as it was signed, and its number and digest in the ledger.
type Signed (number: int, digest: string, body: object)

# Make a job's cgroups and pipe. `user` is a name or a number, the caller if absent. With a parent: a family inside that
# job, whose network is then "parent" unless it asks for another. The job is given up when the watcher's process ends,
# and read at least every `interval` seconds. `requests` are limits in a batch system's own words, by system
# (gridengine, slurm, htcondor) and name; what stands in `limits` goes before them.
method Create(
  job: string, user: ?string, limits: ?Limits, network: ?string, classes: ?[string][]string, tags: ?[string]string,
  parent: ?string, watcher: ?int, interval: ?float, oom: ?Oom, isolation: ?Isolation,
  requests: ?[string][string]string
) -> (job: string, netns: ?string, address: ?string, cgroups: []string)

# Take a running process and its descendants as a new family, the caller itself if pid is absent: Create, for the
# network it is in already, and Attach, both or neither.
method Register(
  job: string, pid: ?int, tags: ?[string]string, parent: ?string, watcher: ?int, interval: ?float
) -> (job: string, cgroups: []string)

# From now on take also processes that carry NAME=VALUE in their environment, or belong to a login, or to a
# supplementary group: at once, and at every reading. The pids are those found at once.
method Track(job: string, environment: ?string, login: ?string, group: ?int) -> (pids: []int)

# Change the limits of a job; those not named stay, null takes one away. A memory limit below what is in use is refused,
# unless `reclaim` asks the kernel to make room first. Root's, and the owner's for a family.
method SetLimits(job: string, limits: Limits, reclaim: ?bool) -> (limits: Limits)

# End a family without ending its processes: they go on in the parent. Without a parent only once none is left.
method Unregister(job: string) -> (record: object, classad: string)

# What a launcher needs to enter a job: the name of its network namespace (null: where it is), whom to become, and how
# to shut itself in (isolate.py; null: not at all).
method Entry(job: string) -> (
  netns: ?string, uid: int, gid: int, groups: []int, environment: [string]string, isolation: ?object
)

# Move the job's pipe into the caller's network namespace, which must be a new one of its own user namespace. For
# callers without root; once, before the job runs.
method MovePipe(job: string) -> ()

# Put a process and what it starts from now on into a job; the caller itself if absent. The job runs from then on.
method Attach(job: string, pid: ?int) -> ()

# Read the job now. Without a job: all that the caller may see.
method Usage(job: string) -> (job: Job, classad: string)
method List() -> (jobs: []Job)

# Where the job's starter listens for Chirp, as it says itself in the job's .chirp.config: an address of this host. From
# now on it is told what the job uses, and at the end. Nobody is told the cookie.
method Chirp(job: string, host: string, port: int, cookie: string) -> ()

# Act on every process of a job.
method Signal(job: string, signal: int) -> (pids: []int)
method Suspend(job: string) -> ()
method Continue(job: string) -> ()
method Kill(job: string) -> (survivors: []int)

# End what is left of a job, read it for the last time, sign its record. Twice is fine: the record is the same.
method Finish(job: string, exit_code: ?int, exit_signal: ?int) -> (record: object, classad: string)

# Read all jobs now, as a tick does.
method Snapshot() -> (seconds: float)

# What happened, oldest first, from the ledger: the first `limit` events (1000) after a number, or the newest ones; of
# one job where it is named.
method Events(since: ?int, job: ?string, limit: ?int) -> (events: []Event)

# What bills are made from, some at a time, of own jobs; of all for root and who may read all, which `all` says: signed
# records after a number (0), oldest first, and the open jobs after a number (0), read now, as records that are not
# final. `last` is what to go on with while there is more. `archived`: until when jobs went (s since the epoch) whose
# records were taken out of the ledger, and are in files only.
method Records(after: ?int) -> (records: []Signed, last: int, more: bool, all: bool, archived: ?float)
method Interim(after: ?int) -> (records: []object, last: int, more: bool, all: bool)

# How a job of one's own went, by its id and `started` as its record has it: some hundred samples, each a list as
# acctd/points.py declares it.
method Samples(job: string, started: float) -> (samples: []object)

# With `more`: one reply an event, from now on.
method Watch() -> (event: Event)

# The agent's own cost.
method Cost() -> (cost: [string]float)

# Read the configuration again. No job is disturbed.
method Reload() -> ()

# Stop the agent; jobs go on.
method Quit() -> ()

error UsageError (message: string)
error NotFound (message: string)
error NotPermitted (message: string)
error InUse (message: string)
error Exhausted (message: string)
error Unavailable (message: string)
error KernelRefused (message: string)
error LedgerFailed (message: string)
error ConfigError (message: string)
error Failed (message: string)
"""

ERRORS: tuple[tuple[type[AcctdError], str], ...] = (
    (UsageError, "UsageError"),
    (LedgerError, "LedgerFailed"),
    (ConfigError, "ConfigError"),
    (NotFoundError, "NotFound"),
    (NotPermittedError, "NotPermitted"),
    (InUseError, "InUse"),
    (ExhaustedError, "Exhausted"),
    (UnavailableError, "Unavailable"),
    (KernelRefusedError, "KernelRefused"),
)


class FrameError(ValueError):
    """What came is no message, or too long for one. The connection is of no use any more."""


class Call(msgspec.Struct, frozen=True):
    """One request. `more` asks for several replies, `oneway` for none."""

    method: str
    parameters: dict[str, Any] | None = None  # some clients send null for none
    more: bool = False
    oneway: bool = False


class Decoder:
    """Bytes in, calls out. Keeps what was pushed and not taken yet, at most one message and one read."""

    def __init__(self, limit: int = FRAME_LIMIT) -> None:
        self._limit = limit
        self._rest = bytearray()
        self._searched = 0  # so many bytes hold no NUL: a message that comes in crumbs is searched once, not each time

    @property
    def pending(self) -> int:
        """How many bytes are kept."""
        return len(self._rest)

    def push(self, data: bytes) -> None:
        """Take in what came, READ bytes at most. Raises FrameError where calls pile up that nobody takes."""
        if len(self._rest) + len(data) > self._limit + READ:
            raise FrameError(f"more than {self._limit} bytes behind a call that is not answered yet")
        self._rest += data

    def calls(self) -> Iterator[Call]:
        """The calls that are complete now. Raises FrameError."""
        while (end := self._rest.find(0, self._searched)) >= 0:
            self._searched = 0
            frame = bytes(self._rest[:end])
            del self._rest[: end + 1]
            if end > self._limit:
                raise FrameError(f"a message of {end} bytes is above the {self._limit} allowed")
            try:
                yield msgspec.json.decode(frame, type=Call)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
                raise FrameError(f"not a varlink call: {e}") from None
        self._searched = len(self._rest)
        if len(self._rest) > self._limit:
            raise FrameError(f"a message of more than {self._limit} bytes")


def reply(parameters: Mapping[str, Any], *, continues: bool = False) -> bytes:
    """One answer as a frame."""
    body: dict[str, Any] = {"parameters": parameters}
    if continues:
        body["continues"] = True
    return msgspec.json.encode(body) + b"\0"


def failure(error: str, **parameters: str) -> bytes:
    """One error as a frame; `error` is its whole name."""
    return msgspec.json.encode({"error": error, "parameters": parameters}) + b"\0"


def refusal(error: AcctdError) -> bytes:
    """One of acctd's own errors as a frame."""
    name = next((name for kind, name in ERRORS if isinstance(error, kind)), "Failed")
    return failure(f"{INTERFACE}.{name}", message=str(error))
