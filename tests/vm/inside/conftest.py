"""What the tests inside a guest share: an agent in this process (a fresh Python costs seconds there), and a reporter.

The whole machine is the test's: `left` compares all of it. Collected by name from the outside, never by `pytest tests`.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from acctd import config as configuration
from acctd import launch
from acctd.agent import Agent
from acctd.cgroup.layout import CONTROLLERS, discover
from acctd.job import Ending, Job
from acctd.kernel.cgroupfs import CgroupDir
from acctd.model import JobSpec, Limits, NetworkMode, Owner, Record

BASE = "acctdvm/jobs"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One JSON line a phase: what is known survives a guest that dies in the middle."""
    if path := os.environ.get("ACCTD_VM_REPORT"):
        line: dict[str, object] = {
            "name": report.nodeid.rpartition("::")[2],
            "when": report.when,
            "outcome": report.outcome,
        }
        line |= {"seconds": round(report.duration, 1), "text": report.longreprtext}
        with open(path, "a") as out:
            out.write(json.dumps(line) + "\n")


@dataclass
class Machine:
    """The guest with an agent on it."""

    agent: Agent
    directory: Path
    jobs: list[Job] = field(default_factory=list)

    def create(
        self, name: str, limits: Limits | None = None, network: NetworkMode = "host", parent: Job | None = None
    ) -> Job:
        above = parent.spec.id if parent else None
        spec = JobSpec(name, Owner(0, 0, "root"), limits or Limits(), network, parent=above)
        job = self.agent.create(spec, parent)
        self.jobs.append(job)
        return job

    def start(self, job: Job, *command: str) -> "subprocess.Popen[bytes]":
        process, at = launch.start(job, command, groups=[], environ=os.environ, isolation=None, blocked=set())
        self.agent.begin(job, at)
        return process

    def finish(self, job: Job, code: int) -> Record:
        record = self.agent.finish(job, Ending.now(code))
        self.jobs.remove(job)
        return record

    def run(self, name: str, command: Sequence[str], limits: Limits | None = None) -> Record:
        """A job from its start to its record."""
        job = self.create(name, limits)
        return self.finish(job, self.start(job, *command).wait())

    def cgroup(self, job: Job, controller: str) -> CgroupDir:
        directory = job.cgroups.directory(controller)
        assert directory is not None, controller
        return directory

    def stop(self) -> None:
        """What a failed test left open: ended and taken down."""
        while self.jobs:
            self.agent.abandon(self.jobs.pop())


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Cgroups of every hierarchy, links, namespaces and rules are as before."""
    before = _left()
    yield
    assert _left() == before


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    config = tmp_path / "acctd.toml"
    config.write_text(
        f'state_dir = "{tmp_path}/state"\nruntime_dir = "{tmp_path}/run"\nsocket = "{tmp_path}/s"\n'
        f'[cgroup]\nbase = "{BASE}"\n'
    )
    with Agent(configuration.load(str(config), {})) as agent:
        made = Machine(agent, tmp_path)
        try:
            yield made
        finally:
            made.stop()


@pytest.fixture
def fifo(tmp_path: Path) -> Callable[[str], Path]:
    """A named pipe for a job and its test to wait for each other."""

    def make(name: str) -> Path:
        path = tmp_path / name
        os.mkfifo(path)
        return path

    return make


def _left() -> dict[str, object]:
    tops = [hierarchy.top for hierarchy in discover(CONTROLLERS).hierarchies]
    netns = Path("/run/netns")
    return {
        "cgroups": sorted(str(cgroup.path) for top in tops for cgroup in top.subtree()),
        "links": sorted(os.listdir("/sys/class/net")),
        "namespaces": sorted(os.listdir(netns)) if netns.exists() else [],
        "processes": _sleepers(),
    }


def _sleepers() -> list[str]:
    """Processes of tests: all of them run sleep, dd or a shell that waits, by these names."""
    if shutil.which("pgrep") is None:
        raise RuntimeError("pgrep is missing; install procps")
    return subprocess.run(["pgrep", "-x", "sleep|dd"], capture_output=True, text=True, check=False).stdout.split()
