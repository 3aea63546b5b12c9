"""Starting a job's command: a helper process that joins the job by itself and then becomes the command.

Only starts. Waiting, signals and what happens at the end belong to the caller.
"""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from acctd.errors import AcctdError, KernelRefusedError
from acctd.job import Job

_HELPER = Path(__file__).with_name("helper.py")


class CommandError(AcctdError):
    """The command cannot be started; the exit code is the shell's: 127 not found, 126 not executable."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def start(
    job: Job,
    command: Sequence[str],
    *,
    groups: Sequence[int],
    environ: Mapping[str, str],
    blocked: set[signal.Signals],
    isolation: Mapping[str, object] | None = None,
) -> tuple[subprocess.Popen[bytes], int]:
    """Start the command inside the job; gives what to wait for and when it began (CLOCK_BOOTTIME, ns).

    On return it runs. `blocked` is the signal mask it is to have; `isolation` is the plan of enclosure.py, and must be
    given where the job asks for any.

    Raises CommandError where the command is missing or cannot be executed, KernelRefusedError where joining failed;
    the helper is gone then.
    """
    if job.spec.isolation and isolation is None:
        raise AcctdError(f"job {job.spec.id} asks for isolation, and nobody says how to isolate it")
    with job.cgroups.joining() as doors, ExitStack() as opened:
        try:
            (plan_read, plan_write), (status_read, status_write) = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
        except OSError as e:
            raise KernelRefusedError(f"cannot make a pipe to the helper: {e.strerror}; raise ulimit -n") from e
        for fd in (plan_read, plan_write, status_write):
            opened.callback(os.close, fd)
        owner = job.spec.owner
        plan = {
            "netns": job.namespace,
            "join": list(doors.items()),
            "uid": owner.uid,
            "gid": owner.gid,
            "groups": list(groups),
            "blocked": [int(number) for number in blocked],
            "status": status_write,
            "isolation": isolation,
        }
        passed = [plan_read, status_write, *doors] + ([job.namespace] if job.namespace is not None else [])
        try:
            # -I -S: neither the caller's environment nor its site-packages may change what the helper does.
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_HELPER), "exec", "--plan-fd", str(plan_read), "--", *command],
                env=dict(environ),
                pass_fds=passed,
            )
        except OSError as e:
            os.close(status_read)
            # E2BIG, as a rule: the helper's own arguments come on top of the command's.
            raise KernelRefusedError(
                f"cannot start a process for {command[0]!r}: {e.strerror}; shorten its arguments, or see ulimit"
            ) from e
        os.write(plan_write, json.dumps(plan).encode())
    with open(status_read, "rb") as status:
        answers = [json.loads(line) for line in status.read().splitlines()]
    if answers and "started" in answers[-1]:
        return process, int(answers[-1]["started"])
    code = process.wait()
    if not answers:
        raise KernelRefusedError(
            f"the helper that starts {command[0]!r} ended with {code}; is a limit of the job too low?"
        )
    raise _failure(answers[-1], code, command[0])


def _failure(answer: dict[str, object], code: int, command: str) -> AcctdError:
    number = int(str(answer["errno"]))
    reason = os.strerror(number)
    if code == 127:
        return CommandError(f"command {command!r} is not found; check its name and PATH", code)
    if code == 126:
        hint = "is it executable, and for the job's owner?" if number == errno.EACCES else "is it a program?"
        return CommandError(f"command {command!r} cannot be executed: {reason}; {hint}", code)
    return KernelRefusedError(f"cannot {answer['what']}: {reason}")
