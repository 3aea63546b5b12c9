"""A job's memory, kind by kind, by the real CLI on the real kernel; and what summing its processes would have said.

The job (lab/load.py) keeps what it has until its standard input ends. The test ends it when acctd has seen all of it,
which the ledger tells: it has the totals of a running job. So no peak is caught by luck, however late the kernel
brings its statistics up to date.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

from acctd.cgroup.layout import discover
from acctd.ledger import FILE, Ledger
from acctd.metrics import Readings
from collectors.memory import MemoryReader
from tests.kernel.conftest import REPO, Node

MIB = 1 << 20
LOAD = str(REPO / "lab" / "load.py")
PATIENCE = 60.0  # s until a wait is a failure; nothing is concluded from how long it took


@pytest.fixture
def sampling(node: Node) -> Node:
    """A node whose acctd polls ten times a second."""
    node.config.write_text(f"poll_interval = 0.1\n{node.config.read_text()}")
    # The interpreter's own files are to be in the page cache already: who reads them first is charged for them.
    subprocess.run([sys.executable, LOAD, "--help"], check=True, capture_output=True)
    return node


class Held:
    """A job that runs and holds its memory."""

    def __init__(self, node: Node, job: str, says: dict[str, Any]) -> None:
        self.node, self.job, self.says = node, job, says

    def stored(self) -> dict[str, dict[str, int]]:
        """Its totals in the ledger, as of now."""
        with Ledger(self.node.directory / "state" / FILE) as ledger:
            (row,) = [row for row in ledger.open_jobs() if row.spec.id == self.job]
        return row.account.meter.totals

    def until(self, seen: Callable[[dict[str, dict[str, int]]], bool]) -> None:
        """Wait until the ledger's totals of the job satisfy this."""
        deadline = time.monotonic() + PATIENCE
        while not seen(totals := self.stored()):
            assert time.monotonic() < deadline, {name: totals.get(name) for name in totals if "memory" in name}
            time.sleep(0.02)

    def readings(self) -> Readings:
        """What the kernel says of it now."""
        hierarchy = discover().of("memory")
        assert hierarchy is not None
        reader = MemoryReader(hierarchy.job(self.node.base, f"job_{self.job}"))
        try:
            return reader.read()
        finally:
            reader.close()

    def record(self) -> dict[str, Any]:
        """Its record, once it has ended."""
        record: dict[str, Any] = json.loads(self.node.acctd("show", self.job, "--json").stdout)
        return record


@contextmanager
def running(node: Node, job: str, *command: str) -> Iterator[Held]:
    """A job that says on its standard output, in JSON, what it holds, and ends when its input does."""
    argv = node.argv("run", "-q", "--network", "none", "--id", job, "--", *command)
    child = node.topology.popen(
        node.topology.node, argv, env=node.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdin is not None
    try:
        yield Held(node, job, json.loads(child.stdout.readline()))
    finally:
        child.stdin.close()
        assert child.wait(timeout=PATIENCE) == 0
        child.stdout.close()


def load(node: Node, *arguments: str) -> list[str]:
    return [sys.executable, LOAD, "--directory", str(node.directory), "--hold", *arguments]


def near(value: int, wanted: int) -> bool:
    """Within 1 %."""
    return abs(value - wanted) <= wanted // 100


def test_each_kind_is_reported_apart(sampling: Node) -> None:
    wanted = {"memory_anon_peak": 200 * MIB, "memory_shmem_peak": 50 * MIB, "memory_file_peak": 100 * MIB}
    with running(sampling, "kinds", *load(sampling, "--anon", "200M", "--shm", "50M", "--file", "100M")) as held:
        # The kernel's count by process, not by cgroup, says the job holds what it was asked to.
        assert held.says["anon"] == wanted["memory_anon_peak"]
        held.until(lambda totals: all(near(totals.get(name, {}).get("", 0), size) for name, size in wanted.items()))
    record = held.record()
    totals = record["totals"]
    for name, size in wanted.items():
        assert near(totals[name][""], size), name
        print(f"\n{name}: asked for {size}, reported {totals[name]['']}, off by {totals[name][''] / size - 1:.3%}")
    resident = totals["memory_resident_peak"][""]
    assert near(resident, 250 * MIB)
    # The kernel's own peak is that of the whole charge, page cache and kernel memory included.
    assert totals["memory_peak"][""] >= 350 * MIB * 99 // 100
    ad = dict(line.split(" = ") for line in sampling.acctd("show", "kinds", "--classad").stdout.splitlines())
    assert int(ad["ResidentSetSize"]) == -(-resident // 1024)
    assert int(ad["MemoryUsage"]) == -(-resident // MIB)
    assert int(ad["ImageSize"]) == -(-totals["memory_peak"][""] // 1024)


def test_page_cache_is_not_resident(sampling: Node) -> None:
    with running(sampling, "cache", *load(sampling, "--file", "100M")) as held:
        held.until(lambda totals: near(totals.get("memory_file_peak", {}).get("", 0), 100 * MIB))
    totals = held.record()["totals"]
    assert totals["memory_peak"][""] >= 99 * MIB
    assert totals["memory_resident_peak"][""] < 20 * MIB


def test_a_peak_outlives_the_memory(sampling: Node) -> None:
    """What was held and given back stays in the record, and the gauge of the moment is not in it."""
    script = (
        "import sys, mmap, json\n"
        "m = mmap.mmap(-1, 64 << 20)\n"
        "for i in range(0, len(m), 4096): m[i] = 1\n"
        "print(json.dumps({}), flush=True); sys.stdin.readline()\n"
    )
    with running(sampling, "peak", sys.executable, "-c", script) as held:
        held.until(lambda totals: near(totals.get("memory_shmem_peak", {}).get("", 0), 64 * MIB))
    totals = held.record()["totals"]
    assert near(totals["memory_shmem_peak"][""], 64 * MIB)
    assert "memory_shmem" not in totals


def test_what_summing_processes_would_have_said(sampling: Node) -> None:
    """Six processes that share 100 MiB anonymous (copy on write) and 50 MiB shared memory: 150 MiB, not 900."""
    arguments = ("--anon", "100M", "--shm", "50M", "--children", "5")
    with running(sampling, "family", *load(sampling, *arguments)) as held:
        held.until(lambda totals: near(totals.get("memory_shmem_peak", {}).get("", 0), 50 * MIB))
        processes = [psutil.Process(pid) for pid in held.says["pids"]]
        rss = sum(process.memory_info().rss for process in processes)
        pss = sum(process.memory_full_info().pss for process in processes)
    resident = held.record()["totals"]["memory_resident_peak"][""]
    print(f"\nMiB: sum of RSS {rss / MIB:.1f}, of PSS {pss / MIB:.1f}; the job's anon+shmem {resident / MIB:.1f}")
    assert 150 * MIB <= resident < 165 * MIB
    assert rss > 5 * resident
    # Even the proportional sizes of all processes, which cost a walk over every page table, do not say less.
    assert pss > 150 * MIB


def test_the_footprint_of_sleep(sampling: Node) -> None:
    """The source document's question: what is the memory footprint of `sleep 5m`?

    ps says its RSS, nearly all of it the C library's pages, which every process of the node shares.
    """
    # The shell stands in for the line of JSON; exec leaves nothing but sleep in the job.
    with running(sampling, "sleep", "sh", "-c", "echo '{}'; sleep 5m & read line; kill $!") as held:
        hierarchy = discover().of("memory")
        assert hierarchy is not None
        directory = hierarchy.job(sampling.base, "job_sleep")
        deadline = time.monotonic() + PATIENCE
        # Asleep: then it has been started for good, and touches nothing more.
        while not (asleep := [p for p in map(psutil.Process, directory.procs()) if _sleeps(p)]):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        memory = asleep[0].memory_full_info()
        job = {metric.name: value for (metric, _), value in held.readings().items()}
    print(f"\nsleep 5m: RSS {memory.rss >> 10} KiB, USS {memory.uss >> 10}, PSS {memory.pss >> 10}")
    print(f"the job (sh and sleep): anon+shmem {job['memory_resident'] >> 10} KiB, file {job['memory_file'] >> 10} KiB")
    # Two processes, and yet less than ps says of the one.
    assert 0 < job["memory_resident"] < memory.rss


def _sleeps(process: psutil.Process) -> bool:
    return bool(process.name() == "sleep" and process.status() == psutil.STATUS_SLEEPING)
