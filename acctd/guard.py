"""The keeper's side of the guardian: what lets a job go on when its keeper, an agent or `acctd run`, does not act.

On cgroup v1 a job that waits in OOM, and on both versions a frozen one, waits until somebody acts. Before a keeper
brings a job into such a state it says so here, and a process beside it (guardian.py) undoes the state at the deadline:
also while the keeper hangs, is stopped, or is dead. The order is always: say it, then do it; undo it, then say so.

Starts the guardian when it is first needed and again when it dies. Waits for nothing, but for a process to start and,
in close(), for an idle one to end. Decides nothing: what a released job means is its keeper's. Descriptors and lines
as in guardian.py.
"""

import json
import logging
import os
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, cast

from acctd.errors import AcctdError, KernelRefusedError
from acctd.kernel import private
from acctd.model import check_job_id

log = logging.getLogger("acctd")

_PLACE = str(Path(__file__).parent)
_PROGRAM = "import sys; sys.path.append(sys.argv.pop(1)); from guardian import main; main()"
"""Imported, for its compiled form: a file that is run is compiled anew, whose memory, 1.2 MB, is not given back."""

_STARTS, _WITHIN = 5, 10.0  # so many starts in so many seconds, then it is left until somebody asks again
_PATIENCE = 5.0  # s for an idle guardian to end

What = Literal["released", "thawed", "unguarded"]
"""released: the job waited in OOM, and the kernel's killer is on again. thawed: it was frozen, and goes on. unguarded:
no guardian watches it any more; its keeper must not let it wait (0 is to be in its memory.oom_control)."""


@dataclass(frozen=True, slots=True)
class Deed:
    """Something the guardian did to a job, or could not do for it."""

    name: str  # the job
    what: What
    time: float  # s since the epoch, a label
    text: str  # why, for people
    trace: Path | None  # the file that tells of it until somebody does

    def remove(self) -> None:
        """It has been told and is on record: take its trace away. Gone already is fine."""
        if self.trace is not None:
            self.trace.unlink(missing_ok=True)


class _Guardian(NamedTuple):
    """A guardian that runs, as far as we know."""

    process: subprocess.Popen[bytes]
    to: int
    from_: int


class Guard:
    """One keeper's guardian. `trouble` hears what went wrong and is being mended."""

    def __init__(self, runtime_dir: Path, trouble: Callable[[Exception], None]) -> None:
        self._traces = runtime_dir / "released"
        self._trouble = trouble
        self._wanted: dict[tuple[str, str], bytes] = {}  # what the guardian is to watch, as it is told
        self._guardian: _Guardian | None = None
        self._starts = deque[float](maxlen=_STARTS)
        self._unsent, self._heard = b"", b""
        self._poll = select.epoll()

    def watch(self, name: str, directory: Path, deadline: float) -> None:
        """From now on the memory cgroup of a job (v1) may wait in OOM, but never longer than `deadline` seconds.

        Call it before 1 is written to its memory.oom_control. Once more renews it: what waits has its whole deadline
        again, and a guardian that another keeper left behind lets the job be.

        Raises KernelRefusedError where no guardian can be started: the kernel's killer must stay on then.
        """
        self._want("watch", name, str(deadline), f"{directory}/memory.oom_control")

    def forget(self, name: str) -> None:
        """The job is gone, or 0 is in its memory.oom_control again."""
        self._drop("watch", "forget", name)

    def frozen(self, name: str, file: Path, value: str, deadline: float) -> None:
        """The job will be frozen, for `deadline` seconds at most; then `value` is written to `file`.

        Call it before freezing; errors as from watch(): it must not be frozen then. A keeper that thaws what another
        one left frozen calls this and thawed(), or the guardian left behind would thaw it once more.
        """
        self._want("freeze", name, str(deadline), str(file), value)

    def thawed(self, name: str) -> None:
        """The job is frozen no more, or gone."""
        self._drop("freeze", "thawed", name)

    def fileno(self) -> int:
        """The same for its whole life; readable when news() has something to do, for add_reader or a poll loop."""
        return self._poll.fileno()

    def news(self) -> list[Deed]:
        """What the guardian has done since. A guardian that died is replaced. Never waits; call it at each tick too."""
        deeds = self._read()
        if self._guardian is None and self._wanted:
            try:
                self._start()
            except AcctdError as e:
                self._trouble(e)
        self._flush()
        return deeds

    def close(self) -> None:
        """The keeper goes. A guardian that still watches something stays until that is gone, or another keeper's."""
        self.news()
        if self._guardian is not None:
            process = self._guardian.process
            if self._unsent:
                select.select([], [self._guardian.to], [], _PATIENCE)
                self._flush()
            self._hang_up()
            if not self._wanted:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_PATIENCE)
        self._poll.close()

    # What it is to watch

    def _want(self, verb: str, name: str, *fields: str) -> None:
        line = b"\0".join(os.fsencode(field) for field in (verb, check_job_id(name), *fields)) + b"\n"
        before = self._wanted.get((verb, name))
        self._wanted[verb, name] = line
        if self._guardian is not None:
            self._send(line)
            return
        try:
            self._start()
        except AcctdError:
            if before is None:
                del self._wanted[verb, name]
            raise

    def _drop(self, verb: str, word: str, name: str) -> None:
        if self._wanted.pop((verb, name), None) is not None and self._guardian is not None:
            self._send(f"{word}\0{name}\n".encode())

    # The process

    def _start(self) -> None:
        """A guardian that watches all that is wanted."""
        now = time.monotonic()
        if len(self._starts) == _STARTS and now - self._starts[0] < _WITHIN:
            raise KernelRefusedError(
                f"the guardian died {_STARTS} times in {_WITHIN:g} s; see the system log for what ends it"
            )
        self._starts.append(now)
        private.make(self._traces)
        self._traces.chmod(0o700)
        try:
            # -I -S: neither the caller's environment nor its site-packages may change what it does. In a session of
            # its own, so that no terminal's signals and no starter's kill of its group reach it.
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _PROGRAM, _PLACE, str(self._traces)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                cwd="/",
                start_new_session=True,
            )
        except OSError as e:
            raise KernelRefusedError(f"cannot start the guardian: {e.strerror}; see ulimit") from e
        assert process.stdin is not None and process.stdout is not None  # noqa: S101  # both were asked for
        self._guardian = _Guardian(process, process.stdin.fileno(), process.stdout.fileno())
        for fd in (self._guardian.to, self._guardian.from_):
            os.set_blocking(fd, False)
        self._poll.register(self._guardian.from_, select.EPOLLIN)
        # Only once the pipe is full, see _flush().
        self._poll.register(self._guardian.to, 0)
        self._unsent, self._heard = b"", b""
        self._send(b"".join(self._wanted.values()))

    def _send(self, text: bytes) -> None:
        self._unsent += text
        self._flush()

    def _flush(self) -> None:
        """Write what the pipe takes. While there is more, fileno() is readable as soon as it takes more."""
        if self._guardian is None:
            return
        try:
            self._unsent = self._unsent[os.write(self._guardian.to, self._unsent) :] if self._unsent else b""
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._unsent = b""  # it is dead; news() finds that out, and starts another one with all of this
        self._poll.modify(self._guardian.to, select.EPOLLOUT if self._unsent else 0)

    def _read(self) -> list[Deed]:
        """What it said, up to its end if that has come."""
        if self._guardian is None:
            return []
        while True:
            try:
                received = os.read(self._guardian.from_, 1 << 16)
            except BlockingIOError:
                break
            if not received:
                process = self._guardian.process
                self._hang_up()
                code = process.wait()  # its descriptors are closed: it has ended but for this
                self._trouble(AcctdError(f"the guardian ended with {code}; another one is started"))
                break
            self._heard += received
        *lines, self._heard = self._heard.split(b"\n")
        return [_deed(line) for line in lines]

    def _hang_up(self) -> None:
        if self._guardian is not None:
            process = self._guardian.process
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    self._poll.unregister(stream.fileno())
                    stream.close()
            self._guardian = None


def released(runtime_dir: Path) -> list[Deed]:
    """What guardians have done that nobody has told yet, oldest first. Who tells it calls remove() on each.

    A job's id may have been given anew since: `time` says which one it was.

    A file there that is none of theirs is put out of sight, and logged.
    """
    found = []
    for path in sorted((runtime_dir / "released").glob("[!.]*")):
        try:
            fact = json.loads(path.read_bytes())
            found.append(Deed(fact["name"], fact["what"], fact["time"], fact["text"], path))
        except FileNotFoundError:
            continue  # another keeper has just told it
        except (OSError, ValueError, LookupError) as e:
            log.error("cannot read %s, which should tell of a job let go: %s; it is now .%s", path, e, path.name)
            path.rename(path.with_name(f".{path.name}"))
    return sorted(found, key=lambda deed: deed.time)


def _deed(line: bytes) -> Deed:
    what, name, time_, text, trace = (os.fsdecode(field) for field in line.split(b"\0"))
    return Deed(name, cast(What, what), float(time_), text, Path(trace) if trace else None)
