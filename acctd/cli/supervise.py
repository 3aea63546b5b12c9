"""Watching one job from the terminal it was started on: its signals, its polls, its live line, its course, its end.

One thread, no handlers: all signals are blocked, and taken one by one once a signalfd says that there is one. The wait
for it ends earlier for the next poll, or when the kernel says that the job's memory runs out.
"""

import math
import os
import select
import signal
import sys
import termios
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

from acctd.agent import Agent
from acctd.cli.summary import size
from acctd.errors import AcctdError
from acctd.job import Job
from acctd.kernel import libc
from acctd.meter import State
from acctd.model import Record
from acctd.shortages import Shortages

if TYPE_CHECKING:
    from acctd.samples import Samples

_FORWARDED = {
    signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2,
    signal.SIGALRM, signal.SIGCONT, signal.SIGXCPU, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO, signal.SIGPWR,
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
}  # fmt: skip
_TAKEN = _FORWARDED | {signal.SIGCHLD, signal.SIGTSTP, signal.SIGTTOU}
_SI_KERNEL = 0x80
_FIRST_POLL = 0.001  # s after the start
_LIVE_EVERY = 1.0  # s
_ERASE = "\x1b[J"  # from the cursor to the end of the screen
_BELOW = "\x1bD\x1b[A\x1b7\x1b[B\r{}\x1b8"
"""Make sure that there is a line below, go there, write, come back: the job's output goes on where it was."""
_STORE_EVERY = 1.0  # s at least between two stores: each waits for the disk
_PATIENCE = 0.05  # s for samples.sqlite, in which the agent writes too; the job's signals wait meanwhile


class Signals:
    """Blocks what is forwarded to a job. Where a job was refused, the caller's mask comes back; where one was accounted
    for, it stays: a signal that comes too late for the job must not replace its exit status by ours.
    """

    def __enter__(self) -> Self:
        # A starter may ignore SIGCHLD, which comes through exec: then the kernel would keep the job's end from us.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.before: set[signal.Signals] = set(signal.pthread_sigmask(signal.SIG_BLOCK, _TAKEN))  # type: ignore[arg-type]
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, self.before)


class LiveLine:
    """One line below the cursor that says how the job stands. Shown only while it disturbs nobody.

    It stands at the right: what the job prints over it before it is drawn again stays legible.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._tty = (
            sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb")
        )
        self._started = self._drawn = time.monotonic()
        self._shown = False

    def due(self) -> float | None:
        """When to draw next, or None if never."""
        return self._drawn + _LIVE_EVERY if self._tty else None

    def draw(self) -> None:
        self._drawn = time.monotonic()
        if not self._quiet_terminal():
            return
        state = self._job.meter.now()
        text = f"acctd: job {self._job.spec.id}  {self._drawn - self._started:.0f} s  {_live(state)}"
        try:
            width = os.get_terminal_size(sys.stderr.fileno()).columns
        except OSError:
            width = 80
        self._write(_ERASE + _BELOW.format(text[: width - 1].rjust(width - 1)))
        self._shown = True

    def clear(self) -> None:
        if self._shown:
            self._write(_ERASE)
            self._shown = False

    def _write(self, text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:
            self._tty = False  # the terminal was hung up; the job and its account go on

    def _quiet_terminal(self) -> bool:
        """No program is drawing on it (those switch echo off) and we are in the foreground."""
        try:
            fd = sys.stderr.fileno()
            return bool(termios.tcgetattr(fd)[3] & termios.ECHO) and os.tcgetpgrp(fd) == os.getpgrp()
        except (OSError, termios.error):
            return False


class Course:
    """How a job goes, kept for plots from its first store on: of a shorter one the record says enough."""

    def __init__(self, agent: Agent, job: Job, ended: Iterable[Record]) -> None:
        """`ended`: jobs that were finished in place of a dead acctd."""
        self._job, self._ended = job, ended
        self._config, self._state_dir = agent.config.samples, agent.config.state_dir
        self._samples: Samples | None = None
        self.troubles: dict[str, None] = {}
        """What could not be kept, one sentence each."""

    def read(self) -> None:
        """The job has been read."""
        if not self._config.max:
            return
        if self._samples is None:
            from acctd.samples import Samples  # most jobs of acctd run are too short to need it

            self._samples = Samples(self._config, self._state_dir, patience=_PATIENCE)
            for record in self._ended:
                self._samples.finished(record)
        self._samples.sample({self._job.spec.id: self._job}, [self._job])
        self._note(self._samples.write(self._samples.take()))

    def finish(self, record: Record) -> None:
        """The job has its record."""
        if self._samples is not None:
            self._samples.finished(record)
            self._note(self._samples.close())

    def _note(self, troubles: Iterable[object]) -> None:
        self.troubles |= dict.fromkeys(map(str, troubles))


def supervise(agent: Agent, job: Job, pid: int, live: LiveLine | None, shortages: Shortages, course: Course) -> int:
    """Wait for the job's main process, polling the job meanwhile. Returns its exit status, or -n after signal n.

    Polls come at gaps of 1, 2, 4, ... ms and then of the configured interval, so that a short job is sampled too.
    """
    interval = agent.config.poll_interval
    started = time.monotonic()
    step, next_poll, stored = _FIRST_POLL, started + _FIRST_POLL, started
    poller = select.poll()
    poller.register(pending := libc.signalfd(_TAKEN), select.POLLIN)
    poller.register(shortages.fileno(), select.POLLIN)
    while True:
        wanted = (next_poll, live.due() if live else None, shortages.due())
        wait = min(at for at in wanted if at is not None) - time.monotonic()
        poller.poll(max(0, math.ceil(wait * 1000)))
        shortages.hear()
        event = signal.sigtimedwait(_TAKEN, 0)
        if event is not None:
            if event.si_signo == signal.SIGCHLD:
                if (code := _ended(pid)) is not None:
                    if live:
                        live.clear()
                    os.close(pending)
                    return code
            else:
                _pass_on(event, pid)
        now = time.monotonic()
        if now >= next_poll:
            _poll(agent, job, store=now - stored >= _STORE_EVERY)
            if now - stored >= _STORE_EVERY:
                course.read()
                stored = now
            step = min(step * 2, interval)
            next_poll = now + step
        if live and (at := live.due()) is not None and now >= at:
            live.draw()


def _poll(agent: Agent, job: Job, *, store: bool) -> None:
    """Trouble with one reading must not end the job: it is noted once, and the next reading makes up for it."""
    try:
        agent.poll([job])
        if store:
            agent.store([job])
    except (AcctdError, OSError) as e:
        job.note(f"at least one reading failed or could not be stored ({e})")


def _ended(pid: int) -> int | None:
    """The exit status, or None while it runs (SIGCHLD also tells of stops)."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def _pass_on(event: signal.struct_siginfo, pid: int) -> None:
    """A signal from a process goes on to the job; one from the terminal has reached the job already, as it did us."""
    if event.si_signo in (signal.SIGTSTP, signal.SIGTTOU):
        # The job has been stopped by the terminal too: the shell gets it back only if we stop as well.
        os.kill(os.getpid(), signal.SIGSTOP)
    elif event.si_code != _SI_KERNEL:
        try:
            os.kill(pid, event.si_signo)
        except ProcessLookupError:
            return  # it has just ended; SIGCHLD says so next


def _live(state: State) -> str:
    def total(name: str) -> int:
        return sum(state.get(name, {}).values())

    parts = [
        f"cpu {(total('cpu_user') + total('cpu_system')) / 1e9:.1f} s",
        f"resident {size(total('memory_resident'))}",
    ]
    if moved := total("block_read") + total("block_write"):
        parts.append(f"disk {size(moved)}")
    if "network" in state:
        parts.append(f"network {size(total('network'))}")
    return "  ".join(parts)
