"""A living agent in this process, and hogs in its jobs: as `acctd serve` has it, without the start of another Python,
which costs an emulated CPU seconds. The test waits while the agent's loop runs, and the loop stands while it looks.
"""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from acctd import config as configuration
from acctd.agent import Agent
from acctd.config import Config
from acctd.daemon import Daemon
from acctd.job import Ending, Job
from acctd.model import JobSpec, Limits, Owner, Record
from acctd.policies import OomPolicy

MIB = 1 << 20
PATIENCE = 90.0
"""s until something that must happen counts as not happening; only a failing test waits so long."""

_TICKS = 0.5  # s between readings; what the kernel tells is heard without one
_HOG = str(Path(__file__).with_name("hog.py"))

_T = TypeVar("_T")


class Hog:
    """A process inside a job: see hog.py."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process, self.pid = process, process.pid
        self._said = b""
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)

    def tell(self, *lines: str, last: bool = False) -> None:
        """What it is to do; it ends with the `last`."""
        assert self.process.stdin is not None
        self.process.stdin.write("".join(f"{line}\n" for line in lines).encode())
        self.process.stdin.flush()
        if last:
            self.process.stdin.close()

    def said(self) -> list[str]:
        """All lines so far."""
        assert self.process.stdout is not None
        self._said += self.process.stdout.read() or b""
        return self._said.decode().splitlines()

    @property
    def code(self) -> int | None:
        """Its exit status, or -n after signal n; None while it lives."""
        return self.process.poll()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


class Living:
    """The agent. Close it: all jobs are finished, and the loop ends."""

    def __init__(self, directory: Path, base: str) -> None:
        self.directory, self.base = directory, base
        self.program = directory / "decide"
        """What the site decides by; written by who needs it."""
        self._config = self._configuration("")
        self._hogs: list[Hog] = []
        self._loop = asyncio.new_event_loop()
        self.begin()

    def _configuration(self, oom: str) -> Config:
        config = self.directory / "living.toml"
        config.write_text(
            f'state_dir = "{self.directory}/state"\nruntime_dir = "{self.directory}/run"\n'
            f'socket = "{self.directory}/run/s"\n[cgroup]\nbase = "{self.base}"\n'
            f'[oom]\nprogram = "{self.program}"\n{oom}\n'
        )
        return configuration.load(str(config), {})

    def configure(self, oom: str = "") -> None:
        """Other lines in the configuration's table [oom], from now on."""
        self._config = self._configuration(oom)
        self.run(self._configured())

    async def _configured(self) -> None:
        self.daemon.reconfigure(self._config)

    def begin(self) -> None:
        """Start the agent, which takes over what another one left."""
        self.agent = Agent(self._config, lasting=True)
        self._loop.run_until_complete(self._started())

    async def _started(self) -> None:
        self.daemon = Daemon(self.agent)
        self.daemon.start()

    def stop(self) -> None:
        """The agent goes; the jobs go on without it."""
        self.run(self._stopped())
        self.agent.__exit__(None, None, None)

    async def _stopped(self) -> None:
        self.daemon.stop()

    def clear(self) -> None:
        """Finish what is still open."""
        try:
            while self.daemon.jobs:
                self.run(self.daemon.finish(next(iter(self.daemon.jobs.values())), Ending()))
        finally:
            while self._hogs:
                self._hogs.pop().close()

    def close(self) -> None:
        try:
            self.clear()
            self.stop()
        finally:
            self._loop.close()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return self._loop.run_until_complete(work)

    def until(self, done: Callable[[], object], what: str = "") -> None:
        """Let the agent live until something is so."""
        self.run(self._until(done, what))

    async def _until(self, done: Callable[[], object], what: str) -> None:
        began = ticked = time.monotonic()
        while not done():
            now = time.monotonic()
            assert now - began < PATIENCE, f"{what or 'it'} did not happen within {PATIENCE:.0f} s: {self.told()}"
            if now - ticked >= _TICKS:
                await self.daemon.tick()
                ticked = time.monotonic()
            await asyncio.sleep(0.005)

    def tick(self) -> None:
        self.run(self.daemon.snapshot())

    # Jobs

    def job(self, name: str, memory: int | None = None, oom: OomPolicy | None = None, parent: str | None = None) -> Job:
        """A job of root's with a memory limit in MiB."""
        limits = Limits(memory=memory * MIB if memory is not None else None)
        spec = JobSpec(name, Owner(0, 0, "root"), limits, "host", parent=parent, oom=oom or OomPolicy())
        return self.run(self._create(spec))

    async def _create(self, spec: JobSpec) -> Job:
        return self.daemon.create(spec)

    def hog(self, job: Job) -> Hog:
        """A new process inside a job, which waits to be told what to do."""
        hog = self.outside()
        self.attach(job, hog.pid)
        return hog

    def outside(self) -> Hog:
        """The same, in no job."""
        hog = Hog(subprocess.Popen([sys.executable, "-I", "-S", _HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        self._hogs.append(hog)
        hog.tell("take 0")  # it has come to its loop, and all that Python itself takes is not the job's
        self.until(lambda: hog.said() == ["has 0"], "a hog")
        return hog

    def attach(self, job: Job, pid: int) -> None:
        """Put any process into a job."""
        self.run(self._attach(job, pid))

    async def _attach(self, job: Job, pid: int) -> None:
        self.daemon.attach(job, pid)

    def set_limit(self, job: Job, memory: int) -> None:
        """As SetLimits does."""
        self.run(self.daemon.set_limits(job, Limits(memory=memory * MIB), reclaim=False))

    def finish(self, job: Job, hog: Hog | None = None) -> Record:
        """The job's record; `hog` is what it was all about."""
        code = hog.code if hog is not None else None
        return self.run(self.daemon.finish(job, Ending.now(code) if code is not None else Ending()))

    def told(self, job: str | None = None, event: str | None = None) -> list[str]:
        """What the agent has told so far, oldest first."""
        events = self.agent.ledger.events(job=job)
        return [f"{each.event}: {each.text}" for each in events if event in (None, each.event)]
