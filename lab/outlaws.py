"""Programs that are hard to end: a job command that, once it is what its name says, writes the line "up".

    outlaws.py [--join FILE]... [--uid UID] KIND

bomb      forks without end, and so do its children
comet     forks and exits, without end: whoever looks for it finds it gone
deaf      ignores every signal that can be ignored
stopped   a process that is stopped (SIGSTOP)
traced    a process that its tracer, also here, holds and never lets go, not even at its end (PTRACE_O_TRACEEXIT)
parent    waits in vfork(2) for a child that does nothing
leader    has exited before its other threads, of which there are thirty
hog       takes memory without end
set-uid   root by a set-user-id copy of sleep, if it is started with --uid; says "up" just before
init      the first process of a PID namespace, with two others, all of them deaf

The outlaw is a child of this program, which joins the cgroups whose cgroup.procs are named, and only then begins. What
it leaves behind comes to this program, too, which waits in no cgroup of theirs, exits once the last one has ended, and
so says that nobody is left. x86_64 and aarch64. Standard library only, one file: it must run as any user, anywhere.
"""

import argparse
import ctypes
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable

_PR_SET_CHILD_SUBREAPER = 36
_PTRACE_TRACEME, _PTRACE_SETOPTIONS, _PTRACE_O_TRACEEXIT = 0, 0x4200, 0x40
_SYS_EXIT = 60 if platform.machine() == "x86_64" else 93
_CLONE_NEWPID = 0x20000000

_libc = ctypes.CDLL(None, use_errno=True)


def up() -> None:
    os.write(1, b"up\n")


def bomb() -> None:
    up()
    while True:
        try:
            os.fork()
        except OSError:
            continue  # there is no room at the moment


def comet() -> None:
    up()
    while True:
        try:
            if os.fork():
                os._exit(0)
        except OSError:
            continue  # there is no room at the moment


def deaf() -> None:
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    up()
    _for_ever()


def stopped() -> None:
    pid = os.fork()
    if not pid:
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    up()
    _for_ever()


def traced() -> None:
    pid = os.fork()
    if not pid:
        _libc.ptrace(_PTRACE_TRACEME, 0, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    os.waitpid(pid, 0)
    if _libc.ptrace(_PTRACE_SETOPTIONS, pid, 0, ctypes.c_void_p(_PTRACE_O_TRACEEXIT)):
        raise OSError(ctypes.get_errno(), "ptrace")
    up()
    _for_ever()


def parent() -> None:
    # The child has this program's memory and stack while the parent waits.
    if _libc.vfork() == 0:
        up()
        _for_ever()


def leader() -> None:
    for _ in range(30):
        threading.Thread(target=_for_ever).start()
    up()
    _libc.syscall(_SYS_EXIT, 0)


def hog() -> None:
    up()
    held = []
    while True:
        held.append(bytearray(b"x" * (1 << 20)))


def set_uid() -> None:
    up()
    os.execve(_sleeper, ["sleep", "1000000"], {})  # noqa: S606  # the kernel itself is to see the set-user-id bit


def init() -> None:
    if _libc.unshare(_CLONE_NEWPID):
        raise OSError(ctypes.get_errno(), "unshare")
    if os.fork():
        _for_ever()
    for _ in range(2):
        if not os.fork():
            break
    deaf()


def _for_ever() -> None:
    while True:
        time.sleep(1000)


KINDS: dict[str, Callable[[], None]] = {
    "bomb": bomb, "comet": comet, "deaf": deaf, "stopped": stopped, "traced": traced, "parent": parent,
    "leader": leader, "hog": hog, "set-uid": set_uid, "init": init,
}  # fmt: skip

_sleeper = -1  # of the set-user-id copy


def main() -> None:
    parser = argparse.ArgumentParser(description="Be hard to end.")
    parser.add_argument("--join", action="append", default=[], metavar="FILE")
    parser.add_argument("--uid", type=int, default=0)
    parser.add_argument("kind", choices=KINDS)
    options = parser.parse_args()
    if _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    if options.kind == "set-uid":
        _open_sleeper()
    # Nobody has to wait for a child of ours: it is gone when it ends.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    if not os.fork():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for path in options.join:
            with open(path, "w") as procs:
                procs.write("0")
        if options.uid:
            os.setgroups([])
            os.setgid(options.uid)
            os.setuid(options.uid)
        KINDS[options.kind]()
        os._exit(0)
    os.close(1)
    try:
        os.wait()
    except ChildProcessError:
        return  # nobody is left


def _open_sleeper() -> None:
    """A set-user-id copy of sleep, by its descriptor alone: no user needs a way to it, and no file stays."""
    global _sleeper
    found = shutil.which("sleep")
    if found is None:
        sys.exit("sleep is not in PATH")
    handle, name = tempfile.mkstemp()
    with open(found, "rb") as program, open(handle, "wb") as copy:
        shutil.copyfileobj(program, copy)
        os.fchmod(copy.fileno(), 0o4755)
    _sleeper = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    os.unlink(name)


if __name__ == "__main__":
    main()
