"""The launched helper: what a job's first process is before it is the command. Standard library only, and little of it.

Run as a file, `helper.py exec --plan-fd N -- COMMAND...`: it enters the job's network namespace and cgroups by itself,
becomes the job's owner, and then becomes the command. It joins after its own exec, because a child that joins
a cgroup which is out of memory before exec would hang together with its parent. Nothing here is imported by the agent,
and nothing of the agent is imported here, and isolate.py only where it is wanted: a job waits for every module.

The plan is one JSON object on the descriptor: {"netns": fd or null, "join": [[fd, path]...], "uid", "gid", "groups",
"blocked": [signal...], "status": fd, "isolation": what isolate.py takes, or null}. A line {"started": CLOCK_BOOTTIME in
ns} goes to `status` right before the exec, which closes it; where something fails a line {"what", "errno"} follows or
stands alone.
"""

import errno
import json
import os
import select
import signal
import sys
import time
import warnings  # noqa: F401  # os.execvp loads it when called; the owner may not be able to read Python's library then

EXIT_USAGE = 64
EXIT_LAUNCH = 125  # as env(1) and timeout(1): the helper itself failed
EXIT_CANNOT_EXECUTE = 126
EXIT_NOT_FOUND = 127
_CLONE_NEWNET = 0x40000000
_PLAN = {"netns", "join", "uid", "gid", "groups", "blocked", "status", "isolation"}

TYPE_CHECKING = False  # typing itself takes 3 ms; type checkers know the name
if TYPE_CHECKING:
    from types import ModuleType

USAGE = "usage: helper.py exec --plan-fd N -- COMMAND..."


def main() -> None:
    """Entry point. Does not return when the command could be started."""
    arguments = sys.argv[1:]
    if (
        len(arguments) < 5
        or arguments[:2] != ["exec", "--plan-fd"]
        or arguments[3] != "--"
        or not arguments[2].isdigit()
    ):
        sys.stderr.write(f"acctd helper: {' '.join(arguments)!r} is not a call it knows; {USAGE}\n")
        sys.exit(EXIT_USAGE)
    try:
        with open(int(arguments[2]), "rb") as stream:
            plan = json.load(stream)
        if not isinstance(plan, dict) or not plan.keys() >= _PLAN:
            raise ValueError(f"it needs {', '.join(sorted(_PLAN))}")
    except (OSError, ValueError) as e:
        sys.stderr.write(f"acctd helper: no plan on descriptor {arguments[2]}: {e}; acctd run makes one\n")
        sys.exit(EXIT_USAGE)
    sys.exit(launch(plan, arguments[4:]))


def launch(plan: dict, command: list[str]) -> int:  # type: ignore[type-arg]  # JSON as it came
    """Follow the plan and become the command. Returns an exit code only if that fails."""
    what = "enter the job's network"
    # It came through one exec and must not come through the next: its closing says that the command runs.
    os.set_inheritable(plan["status"], False)
    isolation, root = plan["isolation"], None
    isolate = _isolate() if isolation is not None else None

    def become_owner() -> None:
        os.setgroups(plan["groups"])
        os.setresgid(plan["gid"], plan["gid"], plan["gid"])
        os.setresuid(plan["uid"], plan["uid"], plan["uid"])

    try:
        if plan["netns"] is not None:
            enter_network(plan["netns"])
            os.close(plan["netns"])
        if isolate is not None:
            if isolation["pid_namespace"]:
                isolate.in_pid_namespace(become_owner)
            root = isolate.build(isolation)
        what = "become the job's owner"
        # Groups need privilege and so does joining; the cgroups come last, so that little of the helper is billed.
        os.setgroups(plan["groups"])
        for door, path in plan["join"]:
            what = f"join {path}"
            os.write(door, b"0")  # the writer itself, in whatever PID namespace it is
            os.close(door)
        if isolate is not None and root is not None:
            isolate.enter(root, changed=isolation["root"] is not None)
        what = "become the job's owner"
        become_owner()
        if isolate is not None and isolation["no_new_privs"]:
            isolate.forbid_new_privileges()
        what = f"start {command[0]}"
        # Python ignores these two for itself; the command must not inherit that.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, plan["blocked"])
        poller = select.poll()
        poller.register(plan["status"], 0)
        if poller.poll(0):
            # Nobody reads it any more: whoever would account for us has died, and may have been succeeded already.
            return EXIT_LAUNCH
        started = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        os.write(plan["status"], json.dumps({"started": started}).encode() + b"\n")
        if not command[0]:
            raise FileNotFoundError(errno.ENOENT, "an empty name")  # execvp would trip over it in its own way
        os.execvp(command[0], command)  # noqa: S606  # this is what the helper is for
    except OSError as e:
        # What isolate.py was at, it says itself; the name of a command is nothing of the kind.
        what = what if e.filename is None or what.startswith("start ") else e.filename
        os.write(plan["status"], json.dumps({"what": what, "errno": e.errno}).encode())
        if not what.startswith("start "):
            return EXIT_LAUNCH
        return EXIT_NOT_FOUND if isinstance(e, (FileNotFoundError, NotADirectoryError)) else EXIT_CANNOT_EXECUTE


def _isolate() -> "ModuleType":
    """isolate.py, which lies beside this file. Run as -I, a file finds none of its neighbours by itself."""
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from acctd import isolate

    return isolate


def become(command: list[str]) -> int:
    """Replace this process by a command. Returns an exit code only if that fails."""
    # Python ignores these two for itself; the command must not inherit that.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        if not command[0]:
            return EXIT_NOT_FOUND  # execvp would trip over it in its own way
        os.execvp(command[0], command)  # noqa: S606  # this is what the helper is for
    except (FileNotFoundError, NotADirectoryError):
        return EXIT_NOT_FOUND
    except OSError:
        return EXIT_CANNOT_EXECUTE


def enter_network(fd: int) -> None:
    """Move this process into the network namespace behind a descriptor. Raises OSError."""
    if hasattr(os, "setns"):
        os.setns(fd, _CLONE_NEWNET)
        return
    import ctypes  # only before Python 3.12: it costs as much as all else together

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


if __name__ == "__main__":
    main()
