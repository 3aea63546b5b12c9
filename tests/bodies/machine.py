"""An agent in this process, for one job after another: no daemon, no loop, no socket, no start of another Python."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from acctd import config as configuration
from acctd import launch
from acctd.agent import Agent
from acctd.job import Ending, Job
from acctd.kernel.cgroupfs import CgroupDir
from acctd.model import JobSpec, Limits, NetworkMode, Owner, Record


@dataclass
class Machine:
    """The host or guest with an agent on it."""

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

    def fifo(self, name: str) -> Path:
        """A named pipe for a job and its test to wait for each other."""
        path = self.directory / name
        os.mkfifo(path)
        return path

    def stop(self) -> None:
        """What a failed test left open: ended and taken down."""
        while self.jobs:
            self.agent.abandon(self.jobs.pop())


@contextmanager
def machine(directory: Path, base: str) -> Iterator[Machine]:
    """One with its state in `directory` and its jobs' cgroups below `base`."""
    config = directory / "acctd.toml"
    config.write_text(
        f'state_dir = "{directory}/state"\nruntime_dir = "{directory}/run"\nsocket = "{directory}/s"\n'
        f'[cgroup]\nbase = "{base}"\n'
    )
    with Agent(configuration.load(str(config), {})) as agent:
        made = Machine(agent, directory)
        try:
            yield made
        finally:
            made.stop()
