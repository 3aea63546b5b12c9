"""Entering a job without root: a user namespace of the caller's own, and no capability left in it.

The job's owner makes a user and a network namespace that map nobody but the owner, and the agent lays the job's pipe
into it. Whoever enters afterwards joins both. A job without a network of its own is isolated in a user namespace that
each who enters makes for itself. A fresh user namespace comes with every capability over it;
drop_capabilities() gives them all up before the command runs. Standard library only; the hook loads this only where it
is needed, because ctypes costs. Talks to nobody. man 7 user_namespaces, man 7 capabilities, man 2 ioctl_ns.
"""

import ctypes
import fcntl
import os
from collections.abc import Callable

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_NS_GET_USERNS = 0xB701
_PR_CAPBSET_DROP, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 24, 47, 4
_CAPABILITY_VERSION_3 = 0x20080522
_EINVAL = 22

_libc = ctypes.CDLL(None, use_errno=True)


def is_ours(namespace: int) -> bool:
    """Whether a network namespace belongs to a user namespace below the caller's own: one that it can join."""
    try:
        users = fcntl.ioctl(namespace, _NS_GET_USERNS)
    except PermissionError:
        return False  # to one that is not below ours
    try:
        return not os.path.samestat(os.fstat(users), os.stat("/proc/self/ns/user"))
    finally:
        os.close(users)


def in_new_namespaces(work: Callable[[], bytes]) -> bytes:
    """Run `work` in a child that has a new user and a new network namespace; gives what it returned.

    Raises OSError where the host does not let this user make them. They go with the child unless something else, such
    as the agent, holds them by then.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _new_namespaces(_CLONE_NEWUSER | _CLONE_NEWNET)
            answer = b"=" + work()
        except OSError as e:
            answer = str(e.errno or _EINVAL).encode()
        try:
            os.write(writer, answer)
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as stream:
        answer = stream.read()
    os.waitpid(pid, 0)
    if not answer.startswith(b"="):
        number = int(answer or _EINVAL)  # nothing at all: it was killed
        raise OSError(number, os.strerror(number))
    return answer[1:]


def join(namespace: int) -> None:
    """Move this process into a network namespace and the user namespace that owns it. Raises OSError."""
    users = fcntl.ioctl(namespace, _NS_GET_USERNS)
    try:
        _check(_libc.setns(users, _CLONE_NEWUSER))
    finally:
        os.close(users)
    _check(_libc.setns(namespace, _CLONE_NEWNET))


def in_own_user_namespace() -> None:
    """Move this process into a new user namespace that maps nobody but its user. Raises OSError."""
    _new_namespaces(_CLONE_NEWUSER)


def drop_capabilities() -> None:
    """Give up every capability for good, the bounding set included, and see that none is left. Raises OSError.

    No securebits are needed: uid 0 is not mapped in here, so neither an exec nor a set-user-id program leads to it.
    """
    with open("/proc/sys/kernel/cap_last_cap") as last:
        for capability in range(int(last.read()) + 1):
            _prctl(_PR_CAPBSET_DROP, capability)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)  # the calling thread
    nothing = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; low halves and high halves
    _check(_libc.capset(header, nothing))
    with open("/proc/self/status") as status:
        left = [line.split()[1] for line in status if line.startswith("Cap") and int(line.split()[1], 16)]
    if left:
        raise OSError(_EINVAL, f"capabilities {', '.join(left)} are left")


def _new_namespaces(kinds: int) -> None:
    uid, gid = os.geteuid(), os.getegid()
    _check(_libc.unshare(kinds))
    # Without "deny" the kernel takes no gid_map from a user: one could leave a group that is refused something.
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _prctl(option: int, argument: int) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(argument), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)))


def _check(result: int) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
