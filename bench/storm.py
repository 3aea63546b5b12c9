"""`python -m bench.storm`: 64 callers at a time make and finish 2000 jobs as fast as they can, on either back end.

Once by real `acctd-hook` processes, two a job, as a starter does it; once by plain calls, each caller over a connection
that it keeps, which leaves the agent as the only thing to wait for. Afterwards every job must have exactly one record,
with its own tags and exit code, the same that its Finish answered, each signed onto its predecessor; and no cgroup,
namespace, link, rule or lease may be left. What is not so ends the benchmark with an error.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from acctd.cgroup.layout import discover
from acctd.ledger import Ledger
from bench.report import machine, spread, table
from bench.served import Connection, RefusedError, Served, Weight

BACKENDS = ("nftables", "iptables")
_SECONDS = 30.0  # for the kernel to finish the last removals


class Wanted(NamedTuple):
    """One job of a storm."""

    id: str
    tags: dict[str, str]
    exit_code: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What its caller was told of it."""

    id: str
    create: float  # s
    finish: float  # s
    record: dict[str, Any]


Call = Callable[[Wanted], Outcome]
Means = Callable[[Path], Iterator[Call]]
"""How a caller calls: a context manager for the agent's socket that gives the function for one job's life."""


@dataclass(frozen=True, slots=True)
class Storm:
    """One storm that is over."""

    seconds: float
    outcomes: list[Outcome]


def wanted(prefix: str, number: int) -> list[Wanted]:
    """Jobs that can be told from each other by all that a record says of them."""
    return [Wanted(f"{prefix}{n}", {"Number": str(n), "Storm": prefix}, n % 200) for n in range(number)]


@contextmanager
def by_socket(path: Path) -> Iterator[Call]:
    """Plain calls over one connection."""
    with Connection(path) as connection:

        def life(job: Wanted) -> Outcome:
            began = time.perf_counter()
            connection.call("Create", job=job.id, tags=job.tags)
            made = time.perf_counter()
            record = connection.call("Finish", job=job.id, exit_code=job.exit_code)["record"]
            return Outcome(job.id, made - began, time.perf_counter() - made, record)

        yield life


@contextmanager
def by_hook(path: Path) -> Iterator[Call]:
    """A process a call, as installed; else as a module."""
    installed = Path(sys.executable).parent / "acctd-hook"
    hook = [str(installed)] if installed.exists() else [sys.executable, "-m", "acctd.hook"]

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [*hook, "--socket", str(path), *arguments], capture_output=True, text=True, check=False
        )  # fmt: skip
        if done.returncode:
            raise RefusedError(f"{arguments[0]} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def life(job: Wanted) -> Outcome:
        tags = [word for key, value in job.tags.items() for word in ("--tag", f"{key}={value}")]
        began = time.perf_counter()
        run("create", "--job", job.id, *tags)
        made = time.perf_counter()
        record = json.loads(run("finish", "--job", job.id, "--exit-code", str(job.exit_code), "--json"))
        return Outcome(job.id, made - began, time.perf_counter() - made, record)

    yield life


MEANS = {"acctd-hook": by_hook, "socket": by_socket}


def storm(path: Path, jobs: list[Wanted], callers: int, means: str) -> Storm:
    """Let so many processes make and finish the jobs, all starting at once. Raises RefusedError for what failed."""
    context = multiprocessing.get_context("fork")
    start = context.Barrier(callers + 1)
    children, pipes = [], []
    for number in range(callers):
        receiver, sender = context.Pipe(duplex=False)
        argument = (path, jobs[number::callers], means, start, sender)
        child = context.Process(target=_caller, args=argument, daemon=True)
        child.start()
        sender.close()
        children.append(child)
        pipes.append(receiver)
    try:
        start.wait(60)
        began = time.perf_counter()
        # In the order of the callers; none waits for being asked but the last byte of its answer.
        answers: list[list[Outcome] | str] = [pipe.recv() for pipe in pipes]
        seconds = time.perf_counter() - began
    finally:
        for child in children:
            child.join(5)
            if child.is_alive():
                child.terminate()
                child.join()
    failed = [answer for answer in answers if isinstance(answer, str)]
    if failed:
        raise RefusedError(f"{len(failed)} of {callers} callers failed; the first: {failed[0]}")
    return Storm(seconds, [outcome for answer in answers for outcome in answer if isinstance(outcome, Outcome)])


def _caller(path: Path, jobs: list[Wanted], means: str, start: Any, answer: Pipe) -> None:
    """One caller's whole life, in a process of its own."""
    try:
        with MEANS[means](path) as life:
            start.wait(60)
            answer.send([life(job) for job in jobs])
    except (RefusedError, OSError) as e:
        answer.send(f"{type(e).__name__}: {e}")


def mistakes(ledger: Ledger, jobs: list[Wanted], outcomes: list[Outcome]) -> list[str]:
    """What is wrong with the records of a storm's jobs, a sentence each."""
    found = []
    counted: dict[str, int] = {}
    for record in ledger.records():
        counted[record.id] = counted.get(record.id, 0) + 1
    told = {outcome.id: outcome.record for outcome in outcomes}
    for job in jobs:
        if counted.get(job.id) != 1:
            found.append(f"job {job.id} has {counted.get(job.id, 0)} records")
            continue
        record = ledger.record(job.id)  # raises AcctdError where its digest does not follow from its predecessor's
        if (record.tags, record.exit_code, record.state) != (job.tags, job.exit_code, "done"):
            found.append(f"job {job.id} is recorded as {record.tags}, exit {record.exit_code}, {record.state}")
        if told.get(job.id) != json.loads(msgspec.json.encode(record)):
            found.append(f"the record of job {job.id} is not what its caller was told")
    return found


def leftovers(served: Served) -> list[str]:
    """Everything of a job that is still in the kernel or leased; the kernel may take a while over the last links."""
    deadline = time.monotonic() + _SECONDS
    while (left := _left(served)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _left(served: Served) -> list[str]:
    left = [str(h.top.path / served.base) for h in discover().hierarchies if (h.top.path / served.base).exists()]
    left += os.listdir(served.directory / "run" / "netns")
    inside = {
        "links": ["ip", "-o", "link"],
        "nft": ["nft", "list", "ruleset"],
        "iptables": ["iptables-legacy-save"],
        "ip6tables": ["ip6tables-legacy-save"],
    }
    for name, argv in inside.items():
        done = served.topology.run(served.topology.node, argv, text=True, capture_output=True)
        lines = done.stdout.splitlines()
        if name == "links":
            left += [line for line in lines if line.split(": ")[1].startswith("ac")]
        else:
            left += [line for line in lines if "acctd" in line.lower() or "JOB_" in line]
    left += [f"job {job['id']}" for job in served.call("List")["jobs"]]
    with served.ledger() as ledger:
        return left + [f"lease {row.slot} of {row.spec.id}" for row in ledger.open_jobs()]


def measure(backend: str, callers: int, number: int) -> list[list[object]]:
    """Both storms on one agent: rows for the table. Raises RuntimeError for what is not as it must be."""
    rows: list[list[object]] = []
    with Served(backend) as served:
        with by_socket(served.socket) as life:  # what the agent loads with its first job is no leak
            life(Wanted("first", {}, 0))
        for means in MEANS:
            before = Weight.of(served.pid)
            jobs = wanted(f"{means}-", number)
            over = storm(served.socket, jobs, callers, means)
            with served.ledger() as ledger:
                wrong = mistakes(ledger, jobs, over.outcomes) + [f"left behind: {each}" for each in leftovers(served)]
            if wrong:
                raise RuntimeError(f"{backend}, {means}: {len(wrong)} mistakes; the first: {'; '.join(wrong[:5])}")
            after = Weight.of(served.pid)
            rows.append([
                f"{backend}, {means}", number, f"{over.seconds:.1f}", f"{number / over.seconds:.1f}",
                spread([outcome.create * 1000 for outcome in over.outcomes]),
                spread([outcome.finish * 1000 for outcome in over.outcomes]),
                f"{(after.cpu - before.cpu) * 1000 / number:.1f}",
                f"{before.resident / 1024:.1f}", f"{after.resident / 1024:.1f}", before.descriptors, after.descriptors,
            ])  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.storm", description="many callers at once")
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--quick", action="store_true", help="small figures: does it run at all?")
    options = parser.parse_args()
    if options.quick:
        options.callers, options.jobs = 4, 12
    rows = [row for backend in BACKENDS for row in measure(backend, options.callers, options.jobs)]
    print(f"{options.callers} callers; ms: median (90th percentile); agent: CPU ms a job, RSS in MiB and open "
          f"descriptors before and after. {machine()}\n")  # fmt: skip
    head = ["storm", "jobs", "s", "jobs/s", "create, ms", "finish, ms", "CPU", "RSS", "after", "open", "after"]
    print(table(head, rows))
    print(f"\nEvery job has one record, with its own tags and exit code; all {2 * len(BACKENDS)} storms left nothing.")


if __name__ == "__main__":
    main()
