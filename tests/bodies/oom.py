"""The matrix of out-of-memory: what is done x how the memory is used up, on whatever cgroup version is here.

`python -m tests.bodies.oom` plays all of it, as root, and prints what happened to whom, and the record's words.
"""

import itertools
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from acctd.cgroup.layout import discover
from acctd.model import Record
from acctd.policies import OomPolicy
from exporters.classad import record_ad
from tests.bodies.living import MIB, Living

Shape = Literal["one", "many", "family", "pilot"]
"""One process that takes too much; eight that do together; one in a family, that reaches the family's limit; one in a
family that has a higher limit, or none, so that the pilot's is reached."""

SHAPES: tuple[Shape, ...] = get_args(Shape)
MARGIN = 9 * MIB  # v2: by how much a job may be over its limit when it is looked at, see cgroup/memory.py
LIMIT, ABOVE = 24, 96  # MiB: of the job that runs out; of a pilot or a family that does not
CHILDREN = 8
KERNEL = "killed by the kernel"

_WORDS = {
    KERNEL: " and the kernel killed ",
    "killed": " and was ended; ",
    "held": " and was stopped, then ended; ",
    "grown": "; its limit was raised to ",
    "released": ", so the kernel's own killer was let loose",
}
_serial = itertools.count(1)


@dataclass(frozen=True)
class Policy:
    """A row of the matrix: what is asked for, and what must come of it."""

    name: str
    policy: OomPolicy
    acts: tuple[str, ...]  # the actions of the record, each once where it comes several times in a row
    takes: int = 64  # MiB in all
    program: str | None = None  # a shell's lines, with the facts on their input
    oom: str = ""  # more lines of the configuration's table

    @property
    def last(self) -> str:
        return self.acts[-1]


def _exec(answer: str, acts: tuple[str, ...], *, takes: int = 64) -> Policy:
    program = f"cat >/dev/null; printf '%s' '{{\"action\": \"{answer}\"}}'"
    if answer == "grow":
        program = program.replace("}", f', "memory": {(LIMIT * 2) * MIB}}}')
    return Policy(f"exec: {answer}", OomPolicy("exec"), acts, takes, program)


POLICIES = (
    Policy("kernel", OomPolicy(), (KERNEL,)),
    Policy("kill", OomPolicy("kill"), ("killed",)),
    Policy("hold", OomPolicy("hold"), ("held",)),
    Policy("grow, enough", OomPolicy("grow", ceiling=80 * MIB), ("grown",), takes=36),
    Policy("grow, to its ceiling", OomPolicy("grow", ceiling=40 * MIB, step=50), ("grown", "held")),
    Policy("grow, no room", OomPolicy("grow", ceiling=80 * MIB), ("held",), oom='reserve = "1000T"'),
    _exec("kernel", (KERNEL,)),
    _exec("kill", ("killed",)),
    _exec("hold", ("held",)),
    _exec("grow", ("grown",), takes=36),
    Policy("exec: no answer", OomPolicy("exec", deadline=1.0), ("released",), program="exec sleep 1000"),
    Policy("exec: garbage", OomPolicy("exec"), ("held",), program="echo perhaps"),
    Policy("exec: fails", OomPolicy("exec"), ("held",), program='echo \'{"action": "grow"}\'; exit 1'),
    Policy("exec: not there", OomPolicy("exec"), ("held",)),
)


@dataclass(frozen=True)
class Outcome:
    """One field of the matrix."""

    policy: Policy
    shape: Shape
    record: Record  # of the job whose limit was reached
    other: Record | None  # of the pilot or family beside it
    killed: int  # processes of the hog that SIGKILL ended

    def row(self, version: str) -> str:
        """For the table in the docs."""
        ended = f"{self.record.id.partition('-')[0]} {_end(self.record)}"
        if self.other is not None:
            ended += f", {self.other.id.partition('-')[0]} {_end(self.other)}"
        words = " / ".join(shortage.text for shortage in self.record.shortages)
        beside = (
            " / ".join(f"[{shortage.level}] {shortage.text}" for shortage in self.other.shortages) if self.other else ""
        )
        return f"| {self.policy.name} | {self.shape} | {version} | {ended} | {words} | {beside} |"


def _end(record: Record) -> str:
    how = f"exit {record.exit_code}" if record.exit_signal is None else signal.Signals(record.exit_signal).name
    return f"{how}, hold {_hold(record) or 'none'}"


def _hold(record: Record) -> object:
    return record_ad(record).get("HoldReasonCode")


def play(living: Living, policy: Policy, shape: Shape) -> Outcome:
    """Run one field of the matrix, and hold it against what must come of it."""
    living.configure(policy.oom)
    living.program.unlink(missing_ok=True)
    if policy.program is not None:
        living.program.write_text(f"#!/bin/sh\n{policy.program}\n")
        living.program.chmod(0o755)
    number = next(_serial)
    if shape in ("one", "many"):
        outcome = _alone(living, policy, shape, number)
    else:
        outcome = _nested(living, policy, shape, number)
    _check_record(outcome)
    _check_told(living, outcome)
    return outcome


def _alone(living: Living, policy: Policy, shape: Shape, number: int) -> Outcome:
    job = living.job(f"job-{number}", LIMIT, policy.policy)
    hog = living.hog(job)
    hog.tell(f"take {policy.takes}" if shape == "one" else f"many {CHILDREN} {-(-policy.takes // CHILDREN)}", last=True)
    living.until(lambda: hog.code is not None, "its end")
    dead = hog.code == -signal.SIGKILL
    if shape == "one":
        assert dead == (policy.last != "grown")
        killed = int(dead)
    else:
        # Its children are killed by the kernel; itself only if all of the job is ended.
        assert dead == (policy.last in ("killed", "held"))
        killed = CHILDREN + 1 if dead else int(hog.said()[-1].split()[1])
    return Outcome(policy, shape, living.finish(job, hog), None, killed)


def _nested(living: Living, policy: Policy, shape: Shape, number: int) -> Outcome:
    # Who is not concerned would be held, were it taken for the other one.
    beside = OomPolicy("hold")
    pilot_short = shape == "pilot"
    pilot = living.job(
        f"pilot-{number}",
        *((LIMIT, policy.policy) if pilot_short else (ABOVE if number // len(SHAPES) % 2 else None, beside)),
    )
    waits = living.hog(pilot)
    family = living.job(
        f"family-{number}",
        *((ABOVE if number // len(SHAPES) % 2 else None, beside) if pilot_short else (LIMIT, policy.policy)),
        parent=pilot.spec.id,
    )
    hog = living.hog(family)
    hog.tell(f"take {policy.takes}", last=True)
    living.until(lambda: hog.code is not None, "its end")
    dead = hog.code == -signal.SIGKILL
    assert dead == (policy.last != "grown")
    with_pilot = pilot_short and policy.last in ("killed", "held")
    if with_pilot:
        living.until(lambda: waits.code is not None, "the pilot's end")
    else:
        assert waits.code is None
        living.tick()
        assert waits.code is None
    inner = living.finish(family, hog)
    if not with_pilot:
        waits.tell("take 1", last=True)
        living.until(lambda: waits.code is not None, "the pilot's end")
    assert waits.code == (-signal.SIGKILL if with_pilot else 0)
    outer = living.finish(pilot, waits)
    record, other = (outer, inner) if pilot_short else (inner, outer)
    return Outcome(policy, shape, record, other, int(dead) + int(with_pilot))


def _check_record(outcome: Outcome) -> None:
    policy, record, other = outcome.policy, outcome.record, outcome.other
    own = record.shortages
    assert {(shortage.level, shortage.whose) for shortage in own} == {("job", record.id)}
    assert tuple(action for action, _ in itertools.groupby(own, lambda each: each.action)) == policy.acts
    assert own[0].limit == LIMIT * MIB
    assert f"its memory limit of {LIMIT} MB" in own[0].text
    for shortage in own:
        assert shortage.text.startswith(f"Job {record.id} "), shortage.text
        assert _WORDS[shortage.action] in shortage.text
        if shortage.action != KERNEL:
            # The job stood still: what it had was there to be seen. The kernel's victim may be gone by then.
            assert shortage.processes or "not looked at" in shortage.text  # an emulated CPU is slow
            assert shortage.usage is not None and shortage.limit is not None
            assert shortage.limit * 0.9 <= shortage.usage <= shortage.limit + MARGIN, own
            # What is in cgroups below may be many MB behind in their parent's memory.stat.
            assert shortage.memory is not None
            assert outcome.shape == "pilot" or shortage.memory["anon"] > shortage.usage // 2
    by_kernel = policy.last in (KERNEL, "released")
    counted = own if outcome.shape != "pilot" or other is None else other.shortages
    kills, killed = sum(shortage.kills for shortage in counted), outcome.killed if by_kernel else 0
    # Where the kernel ends a cgroup as a whole (v2, memory.oom.group) it counts the one that it chose twice.
    assert kills == killed or (version() == "v2" and killed and kills == killed + 1), outcome
    if policy.last in ("killed", "held", "grown") and outcome.shape != "pilot":
        # Of the moment itself, and not of a poll before it.
        assert record.totals["memory_anon_peak"][""] >= (LIMIT - 2) * MIB
    # HTCondor holds a job that was ended for it, and no other.
    dead = record.exit_signal == signal.SIGKILL
    assert _hold(record) == (34 if dead else None)
    if other is not None:
        _check_other(outcome, other)


def _check_other(outcome: Outcome, other: Record) -> None:
    """What the record says of a pilot whose family ran out, or a family whose pilot did."""
    record, told = outcome.record, other.shortages
    assert _hold(other) is None
    if outcome.shape == "family":
        assert [(s.level, s.whose) for s in told] == [("family", record.id)] * len(record.shortages)
        assert all(
            f"Job {record.id}, inside job {other.id}, " in s.text and "its own memory limit" in s.text for s in told
        )
    elif outcome.policy.last == "grown":
        assert told == ()
    else:
        assert {(s.level, s.whose, s.action) for s in told} == {("parent", record.id, outcome.policy.last)}
        assert all(f"Job {record.id}, which job {other.id} is inside of, " in s.text for s in told)


def _check_told(living: Living, outcome: Outcome) -> None:
    """Each shortage is told of when it is there; what the kernel does after that is in the record."""
    told = living.told(outcome.record.id, "out-of-memory")
    assert len(told) == len(outcome.record.shortages)
    assert not living.told(outcome.record.id, "trouble") or outcome.policy.name in (
        "exec: garbage", "exec: fails", "exec: not there",
    )  # fmt: skip


def fields() -> list[tuple[Policy, Shape]]:
    """The whole matrix."""
    return list(itertools.product(POLICIES, SHAPES))


def few() -> list[tuple[Policy, Shape]]:
    """What an emulated CPU has time for: every policy, and the shapes for those that act differently on them."""
    throughout = ("kernel", "kill", "hold", "grow, to its ceiling", "exec: grow")
    return [(policy, shape) for policy, shape in fields() if shape == "one" or policy.name in throughout]


def named(policy: Policy, shape: Shape) -> str:
    return f"{policy.name}, {shape}".replace(": ", "-").replace(", ", "-").replace(" ", "-")


def version() -> str:
    """Which one the memory controller has here."""
    hierarchy = discover().of("memory")
    return f"v{hierarchy.version}" if hierarchy is not None else "none"


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        living = Living(Path(directory), f"acctdtest-{os.getpid()}-matrix")
        try:
            print("| policy | memory used up by | version | ended | record | the other's record |")
            print("|---|---|---|---|---|---|")
            for policy, shape in fields():
                print(play(living, policy, shape).row(version()), flush=True)
        finally:
            living.close()


if __name__ == "__main__":
    sys.exit(main())
