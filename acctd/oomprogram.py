"""The site's program that decides about a job whose memory has run out: facts in as JSON, an answer out as JSON.

Runs it beside the agent, for as long as the job may wait. Decides and does nothing itself; what an answer means is
shortages.py's. Nothing goes through a shell.
"""

import os
import select
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from acctd.errors import AcctdError

_ANSWER_BYTES = 1 << 16
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


class Answer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the program wrote. `memory` is the new limit in bytes, for grow."""

    action: Literal["kernel", "kill", "hold", "grow"]
    memory: int | None = None
    reason: str = ""  # for the job's owner


@dataclass(slots=True)
class Asking:
    """One run of the program. `fileno` becomes readable when it has ended."""

    process: subprocess.Popen[bytes]
    _ended: int  # eventfd
    _outcome: Answer | AcctdError | None = None

    def fileno(self) -> int:
        return self._ended

    def has_ended(self) -> bool:
        """Whether there is an answer, or will be none; asked once."""
        try:
            os.eventfd_read(self._ended)
        except BlockingIOError:
            return False
        return True

    def answer(self) -> Answer | None:
        """What it answered; None where it had no answer in time. Raises AcctdError for what is no answer."""
        if isinstance(self._outcome, AcctdError):
            raise self._outcome
        return self._outcome

    def close(self) -> None:
        """It is not wanted any more; a program that still runs is ended."""
        _end(self.process)
        os.close(self._ended)


def ask(program: str, facts: Mapping[str, Any], timeout: float) -> Asking:
    """Start the program; it has `timeout` seconds. Raises AcctdError where it cannot be started."""
    if (why := unusable(program)) is not None:
        raise AcctdError(why)
    try:
        # In a session of its own, so that what it starts can be ended with it.
        process = subprocess.Popen(
            # setpriv: a program that hangs is not to outlive an agent that was killed.
            ["setpriv", "--pdeathsig", "KILL", "--", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            env=_ENVIRONMENT,
            start_new_session=True,
        )
    except OSError as e:
        raise AcctdError(f"oom.program {program} cannot be started: {e.strerror}; see the configuration") from e
    asking = Asking(process, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    told = msgspec.json.encode(facts) + b"\n"
    threading.Thread(target=_wait, args=(asking, program, told, timeout, os.dup(asking.fileno())), daemon=True).start()
    return asking


def unusable(program: str) -> str | None:
    """Why root should not run it, as a sentence; None where it may."""
    try:
        found = os.stat(program)
    except OSError as e:
        return f"oom.program {program} cannot be looked at: {e.strerror}; see the configuration"
    if found.st_uid != 0 or found.st_mode & 0o022:
        return f"oom.program {program} can be changed by others than root; give it to root, with mode 0755"
    for directory in Path(program).resolve().parents:
        place = os.stat(directory)
        if place.st_uid != 0 or (place.st_mode & 0o022 and not place.st_mode & stat.S_ISVTX):
            return f"oom.program {program} lies in {directory}, which others than root can change; move it"
    if not os.access(program, os.X_OK):
        return f"oom.program {program} is not executable; give it mode 0755"
    return None


def _wait(asking: Asking, program: str, facts: bytes, timeout: float, ended: int) -> None:
    """In a thread of its own: its only way back is the outcome, and then the eventfd."""
    process = asking.process
    try:
        with process:
            said = _exchange(process, facts, time.monotonic() + timeout)
            if said is None:
                _end(process)
            elif len(said) > _ANSWER_BYTES:
                _end(process)
                asking._outcome = AcctdError(f"oom.program {program} wrote more than {_ANSWER_BYTES} bytes")
            else:
                asking._outcome = _decoded(program, process.wait(), said)
    except OSError as e:
        asking._outcome = AcctdError(f"oom.program {program} cannot be spoken to: {e.strerror}")
    finally:
        os.eventfd_write(ended, 1)
        os.close(ended)


def _exchange(process: subprocess.Popen[bytes], facts: bytes, deadline: float) -> bytes | None:
    """Give it the facts and take what it has written when it ends; no more than is good. None where time is up.

    What it has started may go on, and hold its output open.
    """
    assert process.stdin is not None and process.stdout is not None  # noqa: S101  # both were asked for
    said, poll, ended = b"", select.poll(), os.pidfd_open(process.pid)
    try:
        for fd, events in ((process.stdin.fileno(), select.POLLOUT), (process.stdout.fileno(), select.POLLIN)):
            os.set_blocking(fd, False)
            poll.register(fd, events)
        poll.register(ended, select.POLLIN)
        while len(said) <= _ANSWER_BYTES:
            left = deadline - time.monotonic()
            ready = dict(poll.poll(left * 1000)) if left > 0 else {}
            if not ready:
                return None
            if process.stdout.fileno() in ready:
                if piece := os.read(process.stdout.fileno(), 1 << 16):
                    said += piece
                else:
                    poll.unregister(process.stdout)
            elif ended in ready:
                break
            elif facts:
                try:
                    facts = facts[os.write(process.stdin.fileno(), facts) :]
                except BrokenPipeError:
                    facts = b""  # it does not want to know
                if not facts:
                    poll.unregister(process.stdin)
                    process.stdin.close()
    finally:
        os.close(ended)
    return said


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started, unless it has ended by itself and was waited for."""
    if process.returncode is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has just been waited for


def _decoded(program: str, code: int, said: bytes) -> Answer | AcctdError:
    if code != 0:
        return AcctdError(f"oom.program {program} ended with {code}; it is to end with 0 and to write its answer")
    try:
        return msgspec.json.decode(said, type=Answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        return AcctdError(f'oom.program {program} gave no answer such as {{"action": "hold"}}: {e}')
