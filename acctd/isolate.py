"""Shutting a job's first process in: a PID namespace, a tree of mounts, another root, no new privileges.

Used by what becomes the command: helper.py and hookexec.py, which load it only once something is asked for, because
ctypes costs as much as all else together. Standard library only. Knows neither jobs nor accounts: `shed` is how its
caller gives up its rights. What is left of it while the command runs is outside the job's cgroups, and is told nothing
that the job could want. Every error is an OSError whose `filename` says what was being done. man 7 pid_namespaces, man
7 mount_namespaces, man 2 mount, man 2 pivot_root, man 2 prctl.

The plan is an object: {"pid_namespace": bool, "root": path or null, "binds": [[source, target, read-only]...],
"no_new_privs": bool}. Targets are paths inside the root; binds are made in their order. Another root has a /dev and
a /proc of its own, a PID namespace its own /proc.

The order, because each step takes what the next may need: in_pid_namespace(), build(), join the cgroups, enter(), give
up all rights, forbid_new_privileges().
"""

import ctypes
import errno
import os
import signal
import stat

TYPE_CHECKING = False  # typing itself takes 3 ms; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

Plan = dict[str, "Any"]  # JSON as it came

# Now: whoever the caller becomes may not be able to read Python's library.
_libc = ctypes.CDLL(None, use_errno=True)

_CLONE_NEWNS, _CLONE_NEWPID = 0x20000, 0x20000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 1, 2, 4, 8, 32
_MS_NOATIME, _MS_NODIRATIME, _MS_BIND, _MS_REC = 0x400, 0x800, 0x1000, 0x4000
_MS_SLAVE, _MS_RELATIME, _MS_STRICTATIME = 0x80000, 0x200000, 0x1000000
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NAME, _PR_SET_NO_NEW_PRIVS = 1, 4, 15, 38
_SI_KERNEL = 0x80
_STOPS = {signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
_FLAGS = {
    "ro": _MS_RDONLY, "nosuid": _MS_NOSUID, "nodev": _MS_NODEV, "noexec": _MS_NOEXEC, "noatime": _MS_NOATIME,
    "nodiratime": _MS_NODIRATIME, "relatime": _MS_RELATIME,
}  # fmt: skip
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "ptmx")
_DEVICE_DIRECTORIES = ("pts", "shm")
_DEVICE_LINKS = {"fd": "fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}  # into /proc/self


# The PID namespace


def in_pid_namespace(shed: "Callable[[], None]") -> None:
    """Go on in a child that is in a PID namespace of its own, though not as its first process. Raises OSError.

    The caller itself stays what its starter waits for: it passes signals on, stops as the command stops, and ends as
    the command ends, with whatever is left in the namespace ended before. It never returns. The namespace's first
    process reaps orphans and ends when the caller is gone, however that went. Neither of the two joins anything, so
    neither is billed to the job.
    """
    _call("make a PID namespace", "unshare", _CLONE_NEWPID)
    # Before there is a child, so that no signal finds nobody to pass it on.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a starter may ignore it, and then no end is told
    reader, writer = os.pipe()
    first = os.fork()
    if first == 0:
        _reap(reader, shed)
    command = os.fork()
    if command == 0:
        os.close(reader)
        os.close(writer)
        signal.signal(signal.SIGCHLD, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return
    _retire(writer, shed)
    status = _watch(command)
    os.close(0)
    os.waitpid(first, 0)  # returns when all that was in the namespace is gone
    _end_as(status)


def _reap(lifeline: int, shed: "Callable[[], None]") -> "NoReturn":
    """The life of the namespace's first process. The other end of the lifeline is held by the caller alone."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps, whoever is left to it
        _retire(lifeline, shed)
        # For the case that it was stopped from outside: then it does not see the end of the lifeline.
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.read(0, 1)
    finally:
        os._exit(0)


def _retire(kept: int, shed: "Callable[[], None]") -> None:
    """Become a process that only waits: no rights, no files but one, no directory, not to be traced by its user."""
    shed()
    # Also against a core dump when it ends by the command's signal.
    _prctl(_PR_SET_DUMPABLE, 0)
    _name_process(b"acctd-init")
    os.chdir("/")
    os.dup2(kept, 0)
    _close({int(name) for name in os.listdir("/proc/self/fd")} - {0})


def _watch(command: int) -> int:
    """Wait for the command's end, passing on what comes; its wait status.

    Stops as the command stops if that is what we were asked for, by a terminal or a starter, who will have us go on. A
    command that was stopped by others is continued by others, and nobody would think of us.
    """
    asked = False
    while True:
        event = signal.sigwaitinfo(signal.valid_signals())
        asked = asked or event.si_signo in _STOPS or bool(signal.sigpending() & _STOPS)
        if event.si_signo == signal.SIGCHLD:
            pid, status = os.waitpid(command, os.WNOHANG | os.WUNTRACED)
            if pid and not os.WIFSTOPPED(status):
                return status
            if pid and asked:
                asked = False
                os.kill(os.getpid(), signal.SIGSTOP)  # whoever waits for us is to see it
        elif event.si_code != _SI_KERNEL:  # the terminal's reach the whole group by themselves
            try:
                os.kill(command, event.si_signo)
            except PermissionError:
                continue  # it has become somebody else, as sudo does; its starter could not reach it either


def _end_as(status: int) -> "NoReturn":
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number in signal.valid_signals() and number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


# Mounts


def build(plan: Plan) -> int | None:
    """Make the mounts that the plan wants, in a mount namespace of this process's own; its root as a descriptor.

    None where there is nothing to mount. Until enter() this process still sees its old root. The host's later mounts
    show up inside, and nothing of inside shows up on the host. Raises OSError.
    """
    if not (plan["root"] or plan["binds"] or plan["pid_namespace"]):
        return None
    _call("make a mount namespace", "unshare", _CLONE_NEWNS)
    _mount("keep mounts to itself", None, "/", _MS_SLAVE | _MS_REC)
    # Opened before anything is mounted: one may be hidden by another's target. Not before the namespace, whose own
    # mounts alone can be bound.
    sources = [_opened(source) for source, _, _ in plan["binds"]]
    # Nor may the root that pivot_root leaves be the one to which it goes: it has to be a mount.
    root = _own_root(plan["root"]) if plan["root"] else _opened("/")
    if plan["root"]:
        _make_devices(root)
    for source, (name, target, read_only) in zip(sources, plan["binds"], strict=True):
        what = f"bind {name} on {target}"
        place = _walk(root, target, what)
        _bind(what, source, place)
        os.close(source)
        os.close(place)
        if read_only:
            place = _walk(root, target, what)
            _make_read_only(what, place)
            os.close(place)
    if plan["pid_namespace"]:
        _mount_own_proc(root)
    elif plan["root"]:
        source, place = _opened("/proc"), _walk(root, "/proc", "bind /proc")
        _bind("bind /proc", source, place)
        os.close(source)
        os.close(place)
    return root


def enter(root: int, *, changed: bool) -> None:
    """Go into what build() made, to the directory of the same path, or / where there is none. Raises OSError.

    `changed`: its root is another one. The old one is then no part of the mount namespace any more.
    """
    try:
        here = os.getcwd()
    except FileNotFoundError:
        here = "/"  # it has been removed
    os.fchdir(root)
    os.close(root)
    if changed:
        _call("change the root", "pivot_root", b".", b".")
        _call("leave the old root", "umount2", b".", _MNT_DETACH)
        os.chdir("/")
        _close_directories()
    try:
        # By its name: the directory that we are in may lie below a mount by now.
        os.chdir(here)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        os.chdir("/")


def forbid_new_privileges() -> None:
    """From here on no program gives more rights than its caller has. Raises OSError."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _own_root(path: str) -> int:
    """The directory as a mount of its own, with all that is mounted in it."""
    what = f"use {path} as the root"
    place = _opened(path)
    if not stat.S_ISDIR(os.fstat(place).st_mode):
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), what)
    _bind(what, place, place)
    os.close(place)
    return _opened(path)


def _make_devices(root: int) -> None:
    """A /dev that has what a program can expect of any, each the host's own; nothing can be made in it."""
    what = "make /dev"
    flags = _MS_NOSUID | _MS_NOEXEC
    place = _walk(root, "/dev", what)
    _mount(what, "tmpfs", _name(place), flags, "tmpfs", "mode=755,size=64k")
    os.close(place)
    place = _walk(root, "/dev", what)
    for name in (*_DEVICES, *_DEVICE_DIRECTORIES):
        if not os.path.exists(f"/dev/{name}"):
            continue
        if name in _DEVICES:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600, dir_fd=place))
        else:
            os.mkdir(name, dir_fd=place)
        source, target = _opened(f"/dev/{name}"), _walk(place, name, what)
        _bind(what, source, target)
        os.close(source)
        os.close(target)
    for name, target_name in _DEVICE_LINKS.items():
        os.symlink(f"/proc/self/{target_name}", name, dir_fd=place)
    _mount(what, None, _name(place), _MS_REMOUNT | _MS_BIND | _MS_RDONLY | flags)
    os.close(place)


def _mount_own_proc(root: int) -> None:
    """The namespace's own processes on /proc, and wherever else the host's are seen, as in a chroot of the admin's."""
    top = _path(root).rstrip("/")
    seen = [path for _, _, path, _, kind in _mounts() if kind == "proc" and path.startswith(f"{top}/")]
    for path in dict.fromkeys([f"{top}/proc", *seen]):
        inside = path[len(top) :]
        what = f"mount {inside}"
        try:
            place = _walk(root, inside, what)
        except FileNotFoundError:
            if inside == "/proc":
                raise
            continue  # below another mount: nobody gets there
        _mount(what, "proc", _name(place), _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "proc")
        os.close(place)


def _make_read_only(what: str, place: int) -> None:
    """A mount and all that is mounted in it. Its other flags stay: the kernel would drop what is not said again."""
    with open(f"/proc/self/fdinfo/{place}") as file:
        found = {int(line.split()[1]) for line in file if line.startswith("mnt_id:")}
    for mount, above, path, options, _ in _mounts():  # those above come first
        if mount not in found and above not in found:
            continue
        found.add(mount)
        flags = _MS_REMOUNT | _MS_BIND | _MS_RDONLY
        for option in options:
            flags |= _FLAGS.get(option, 0)
        if not flags & (_MS_NOATIME | _MS_RELATIME):
            flags |= _MS_STRICTATIME
        _mount(what, None, path, flags)


def _mounts() -> "list[tuple[int, int, str, list[str], str]]":
    """Of each mount its number, that of the one it lies on, its point, its options, its kind. man 5 proc."""
    found = []
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            words = line.split()
            path = os.fsdecode(_unescaped(words[4]))
            kind = words[words.index(b"-") + 1].decode()
            found.append((int(words[0]), int(words[1]), path, words[5].decode().split(","), kind))
    return found


def _unescaped(text: bytes) -> bytes:
    """What the kernel writes as a backslash and three octal digits: blanks, line ends, the backslash itself."""
    first, *rest = text.split(b"\\")
    return first + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in rest)


def _walk(root: int, path: str, what: str) -> int:
    """Open what a path inside a root leads to, by no symbolic link: one that somebody planted there leads nowhere."""
    place = os.dup(root)
    for part in path.strip("/").split("/"):
        above = place
        try:
            place = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
        except OSError as e:
            raise OSError(e.errno, e.strerror, f"{what} (at {part!r} of {path})") from None
        finally:
            os.close(above)
        if part == ".." or stat.S_ISLNK(os.fstat(place).st_mode):
            os.close(place)
            said = f"{what} ({part!r} of {path} is a symbolic link; name where it leads)"
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), said)
    return place


def _opened(path: str) -> int:
    try:
        return os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as e:
        raise OSError(e.errno, e.strerror, f"open {path}") from None


def _close_directories() -> None:
    """Of those that our starter left open: each would be a way back to the old root."""
    _close(
        {
            int(name)
            for name in os.listdir("/proc/self/fd")
            if int(name) > 2 and os.path.isdir(_name(int(name)))  # the link leads there whatever the root is
        }
    )


def _close(descriptors: "set[int]") -> None:
    for descriptor in descriptors:
        try:
            os.close(descriptor)
        except OSError as e:
            if e.errno != errno.EBADF:  # the one by which they were listed
                raise


def _name(fd: int) -> str:
    """What an open file can be mounted by and on, wherever it is."""
    return f"/proc/self/fd/{fd}"


def _path(fd: int) -> str:
    return os.readlink(_name(fd))


def _bind(what: str, source: int, target: int) -> None:
    _mount(what, _name(source), _name(target), _MS_BIND | _MS_REC)


# System calls that Python does not have


def _mount(
    what: str, source: str | None, target: str, flags: int, kind: str | None = None, data: str | None = None
) -> None:
    texts = [text.encode("utf-8", "surrogateescape") if text is not None else None for text in (source, kind, data)]
    _call(what, "mount", texts[0], os.fsencode(target), texts[1], flags, texts[2])


def _prctl(option: int, argument: int) -> None:
    _call("change its own rights", "prctl", option, argument, 0, 0, 0)


def _name_process(name: bytes) -> None:
    _call("name itself", "prctl", _PR_SET_NAME, name, 0, 0, 0)


def _call(what: str, name: str, *arguments: "int | bytes | None") -> None:
    """A function of libc that returns 0 when it worked."""
    words = [ctypes.c_ulong(each) if isinstance(each, int) else each for each in arguments]
    if getattr(_libc, name)(*words) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), what)
