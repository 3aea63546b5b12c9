"""acctd-hook monitor: what condor_startd's custom machine resource monitors print, one ad a slot. For this verb alone.

A SUM metric is what was used since the last report, a PEAK metric the job's highest value so far. What was reported is
kept in a state file, replaced in one piece; whoever dies in between has at worst not said something, and never says it
twice. Standard library only. Formats: STARTD_CRON_<JobName>_METRICS in HTCondor's manual; page: docs/htcondor.md.
"""

import fcntl
import json
import math
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field

from acctd import hookcall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from acctd.hook import Given

_EX_NOINPUT, _EX_OSERR = 66, 71
_TAG = "slotname"
_METRICS = (
    "SUM:RemoteUserCpu,SUM:RemoteSysCpu,SUM:BlockReadKbytes,SUM:BlockWriteKbytes,"
    "SUM:NetworkIncomingExternal,SUM:NetworkOutgoingExternal,PEAK:ResidentSetSize,PEAK:NumPids"
)
_SLOTS = 1024  # remembered
_LONGEST = 128  # characters of a name
_NAME = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_")
_SLOT = _NAME | frozenset(".-")

Number = int | float
Metric = tuple[str, str]  # SUM or PEAK, and an attribute of the job's ClassAd


@dataclass(frozen=True)
class Seen:
    """A job as of now. `key` is no other job's, also when its id is given again."""

    key: str
    slot: str
    started: float
    numbers: dict[str, Number]  # of its ClassAd, by name in lower case


@dataclass
class State:
    """What was reported: of each job the metrics' values by name, and the slots that had one."""

    jobs: dict[str, dict[str, Number]] = field(default_factory=dict)
    slots: list[str] = field(default_factory=list)


def run(given: "Given") -> int:
    """The verb. Raises HookError."""
    path = given.one("state")
    if not path:
        raise hookcall.UsageError("monitor needs --state PATH, a file to keep what it has reported")
    metrics = parse_metrics(given.one("metrics") or _METRICS)
    wanted = [slot for text in given.options.get("slot", []) for slot in parse_slots(text)]
    with _alone(path):
        after, text = report(_load(path), list(_jobs(given)), metrics, wanted)
        # Before it is printed: what is not said is missing from a rate, what is said twice would be wrong.
        _store(path, after)
    sys.stdout.write(text)
    return 0


def parse_metrics(text: str) -> list[Metric]:
    """SUM:NAME,PEAK:NAME,... as in STARTD_CRON_<JobName>_METRICS. Raises UsageError."""
    found: list[Metric] = []
    for word in text.replace(",", " ").split():
        kind, colon, name = word.partition(":")
        if kind.upper() not in ("SUM", "PEAK") or not colon or not _is_of(name, _NAME) or name[0].isdecimal():
            raise hookcall.UsageError(f"--metrics {word!r} is not SUM:NAME or PEAK:NAME, of `usage --classad`")
        if name.lower() in (other.lower() for _, other in found):
            raise hookcall.UsageError(f"--metrics names {name} twice; once is enough")
        found.append((kind.upper(), name))
    if not found:
        raise hookcall.UsageError("--metrics names none; write it like SUM:RemoteUserCpu,PEAK:NumPids")
    return found


def parse_slots(text: str) -> list[str]:
    """A slot's name, or several: slot1_1-64. Raises UsageError."""
    first, dash, last = text.rpartition("-")
    stem = first.rstrip("0123456789")
    if not dash or not last.isdecimal() or stem == first:
        if not _is_of(text, _SLOT):
            raise hookcall.UsageError(f"--slot {text!r} is no slot's name; write it like slot1_1, or slot1_1-64")
        return [text]
    low, high = first[len(stem) :], last
    if not _is_of(first, _SLOT) or len(high) > 6 or not int(low) <= int(high) < int(low) + _SLOTS:
        raise hookcall.UsageError(f"--slot {text!r} is no range of 1 to {_SLOTS} slots; write it like slot1_1-64")
    return [f"{stem}{number}" for number in range(int(low), int(high) + 1)]


def report(
    before: State | None, jobs: "Sequence[Seen]", metrics: "Sequence[Metric]", wanted: "Iterable[str]"
) -> tuple[State, str]:
    """What is to be kept, and printed. Without a state (None) all that was used before now is left out."""
    after = State()
    sums: dict[str, dict[str, Number]] = {}
    newest: dict[str, Seen] = {}
    for job in jobs:
        told = before.jobs.get(job.key, {}) if before is not None else {}
        known = before is None or job.key in before.jobs
        values = after.jobs[job.key] = {}
        for kind, name in metrics:
            value = job.numbers.get(name.lower())
            if kind != "SUM" or value is None:
                continue
            # A metric that was not asked for until now begins here; a job that was not there began at 0.
            last = told.get(name, value) if known else 0
            values[name] = max(value, last)
            of_slot = sums.setdefault(job.slot, {})
            of_slot[name] = of_slot.get(name, 0) + max(value - last, 0)
        sums.setdefault(job.slot, {})
        if job.slot not in newest or job.started > newest[job.slot].started:
            newest[job.slot] = job
    old = before.slots if before is not None else []
    # A slot without a job is reported, too: a startd gives a rate only to a job whose slot it had heard of before.
    after.slots = sorted(dict.fromkeys([*sums, *wanted, *old][:_SLOTS]), key=_natural)
    text = "".join(_ad(slot, metrics, sums.get(slot), newest.get(slot)) for slot in after.slots)
    return after, text


def _ad(slot: str, metrics: "Sequence[Metric]", sums: "Mapping[str, Number] | None", job: Seen | None) -> str:
    lines = [f'SlotMergeConstraint = substr(TARGET.Name, 0, {len(slot) + 1}) == "{slot}@"']
    for kind, name in metrics:
        if kind == "SUM":
            value = 0 if sums is None else sums.get(name)
            attribute = f"Uptime{name}Seconds"
        else:
            value = None if job is None else job.numbers.get(name.lower())
            attribute = f"Uptime{name}PeakUsage"
        if value is not None:
            # An integer above that is read as 0.
            lines.append(f"{attribute} = {value if value < 1 << 63 else float(value)!r}")
    return "".join(f"{line}\n" for line in (*lines, f"- {slot}"))


def _jobs(given: "Given") -> "Iterator[Seen]":
    """The jobs of slots, read now. One inside another of the same slot is in that one's numbers already."""
    listed = {job["id"]: job for job in given.call("List")["jobs"]}
    slots = {name: slot for name, job in listed.items() if (slot := _slot_of(job))}
    own = os.geteuid()
    if own != 0 and any(job["uid"] != own and _is_sketch(job) for job in listed.values()):
        sys.stderr.write(f"acctd-hook: uid {own} sees what its own jobs use, and no other's; see docs/htcondor.md\n")
    for name, slot in slots.items():
        above = listed[name]["parent"]
        while above in listed and slots.get(above) != slot:
            above = listed[above]["parent"]
        if above in listed:
            continue
        try:
            answer = given.call("Usage", job=name)
        except hookcall.HookError as e:
            if e.code == _EX_NOINPUT:
                continue  # it was finished meanwhile
            raise
        started = answer["job"]["started"]
        yield Seen(f"{name} {started!r}", slot, started, _numbers(answer["classad"]))


def _is_sketch(job: hookcall.Answer) -> bool:
    """Whether no more is shown of it than ps(1) would: to whoever is neither its owner nor of access.read."""
    return not job["totals"] and not job["tags"]


def _slot_of(job: hookcall.Answer) -> str | None:
    """The slot that a job's tag SlotName names, with or without @HOST."""
    for key, value in job["tags"].items():
        if key.lower() == _TAG:
            slot: str = value.partition("@")[0]
            if _is_of(slot, _SLOT) and len(slot) <= 64:
                return slot
            sys.stderr.write(f"acctd-hook: job {job['id']} is left out: its tag {key} {value!r} names no slot\n")
    return None


def _numbers(classad: str) -> dict[str, Number]:
    """The numbers of an ad in long form; text, and what is computed, is passed over."""
    found: dict[str, Number] = {}
    for line in classad.split("\n"):
        name, _, text = line.partition(" = ")
        if text and text[0] in "-0123456789":
            found[name.lower()] = int(text) if text.lstrip("-").isdecimal() else float(text)
    return found


@contextmanager
def _alone(path: str) -> "Iterator[None]":
    """Hold off another one with the same state, until this one has stored its own."""
    with _telling(f"{path}.lock"):
        fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _load(path: str) -> State | None:
    """None where nothing has been reported yet, or nobody knows what."""
    with _telling(path):
        try:
            with open(path, encoding="utf-8") as file:
                raw = json.load(file)
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            raw = None
    try:
        jobs = {
            str(key): {str(name): _number(value) for name, value in job.items()} for key, job in raw["jobs"].items()
        }
        return State(jobs, [slot for slot in raw["slots"] if _is_of(slot, _SLOT)])
    except (TypeError, KeyError, AttributeError):
        sys.stderr.write(f"acctd-hook: {path} holds no state; what was used until now is left out\n")
        return None


def _number(value: object) -> Number:
    if isinstance(value, int | float) and 0 <= value < math.inf:
        return value
    raise TypeError(value)


def _store(path: str, state: State) -> None:
    """Put it into the place of the old one, whole. A name that is always the same leaves nothing behind."""
    with _telling(path):
        fd = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            json.dump({"jobs": state.jobs, "slots": state.slots}, file)
            file.flush()
            os.fsync(fd)
        os.replace(f"{path}.new", path)


@contextmanager
def _telling(path: str) -> "Iterator[None]":
    try:
        yield
    except OSError as e:
        said = f"state {path} cannot be used: {e.strerror}; name a file in a directory of your own by --state"
        raise hookcall.HookError(said, _EX_OSERR) from None


def _is_of(text: object, characters: frozenset[str]) -> bool:
    return isinstance(text, str) and text != "" and len(text) <= _LONGEST and characters.issuperset(text)


def _natural(slot: str) -> list[tuple[int, str]]:
    """slot1_2 before slot1_10."""
    parts = "".join(c if c.isdecimal() else f" {c} " for c in slot).split()
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
