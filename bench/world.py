"""A node for a benchmark: a namespace of the lab's, an agent of its own, standing jobs; all gone at the end.

State directory, runtime directory and cgroup base are this world's alone, so it runs beside a live agent. Everything
that acts on the network does so between `entered()`'s two ends.
"""

import contextlib
import itertools
import os
import resource
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from acctd import config as configuration
from acctd.agent import Agent
from acctd.cgroup.driver import JobCgroups
from acctd.config import with_default_classes
from acctd.job import Ending, Job
from acctd.kernel import netns
from acctd.model import JobSpec, Limits, NetworkMode, Owner, Record
from lab.topology import Topology

LIMITS = Limits(memory=1 << 30, cpu_shares=512, pids=256)
_serial = itertools.count()


class World:
    """One back end's node. Use as a context manager."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.base = f"acctdbench-{os.getpid()}-{next(_serial)}"
        self.standing: list[Job] = []
        self._open = contextlib.ExitStack()
        self._ids = itertools.count(1)

    def __enter__(self) -> Self:
        enough_descriptors()
        with contextlib.ExitStack() as stack:
            self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="acctdbench-")))
            self.topology = stack.enter_context(Topology())
            self.agent = stack.enter_context(Agent(self._config()))
            stack.callback(self._clear)
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        self._open.__exit__(kind, e, at)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread is on the node."""
        with self.topology.enter(self.topology.node):
            yield

    def spec(self, network: NetworkMode = "nat") -> JobSpec:
        """A job of an ordinary kind, under an id that is new here."""
        spec = JobSpec(f"bench{next(self._ids)}", Owner(0, 0, "root"), LIMITS, network)
        return with_default_classes(spec, self.agent.config)

    def stand(self, number: int, network: NetworkMode = "nat", *, read: bool = True) -> None:
        """Have so many jobs standing, made as any job is.

        Those that nobody will read give their descriptors back: two thousand jobs would need 36,000.
        """
        with self.entered():
            while len(self.standing) < number:
                job = self.agent.create(self.spec(network))
                self.standing.append(job)
                self.agent.begin(job)
                if not read:
                    job.close()

    def whole_life(self, spec: JobSpec) -> Record:
        """All that acctd does around a job: make, sign off, dismantle."""
        job = self.agent.create(spec)
        self.agent.begin(job)
        return self.agent.finish(job, Ending.now(0))

    def _config(self) -> configuration.Config:
        text = (
            f'state_dir = "{self.directory}/state"\nruntime_dir = "{self.directory}/run"\n'
            f'[cgroup]\nbase = "{self.base}"\n[network]\nbackend = "{self.backend}"\n'
        )
        config, mistakes = configuration.parse(text, None)
        if config is None:
            raise RuntimeError("; ".join(mistakes))
        return config

    def _clear(self) -> None:
        """Take all jobs away at once, not one by one: rules and links go with the node's namespace."""
        settle()
        left = []
        for job in self.standing:
            job.close()
        # From the ledger: a job that could not be made, or not be dismantled, is none of the standing.
        for row in self.agent.ledger.open_jobs():
            netns.remove(self.agent.config.runtime_dir / "netns" / row.spec.id)
            cgroups = JobCgroups(self.agent.layout, self.base, f"job_{row.spec.id}")
            if survivors := cgroups.kill():
                left.append(f"{row.spec.id}: processes {sorted(survivors)}")
            elif not cgroups.remove():
                left.append(f"{row.spec.id}: cgroups")
        if left:
            raise RuntimeError(f"left behind below {self.base}: {'; '.join(left)}")


def settle() -> None:
    """Wait until the kernel has finished the link removals that acctd left to threads."""
    for thread in threading.enumerate():
        if thread.name == "link removal":
            thread.join()


def enough_descriptors() -> None:
    """Hundreds of jobs keep some twenty counter files open each."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
