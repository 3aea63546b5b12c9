"""acctd-hook exec: enter a job and become its command; or, where no agent answers, start it unaccounted and say so.

Root enters by setns and becomes the job's owner. The owner enters by a user namespace, see enter.py. How the job is
isolated the agent says, and isolate.py does; what cannot be done is refused before anything is started. Loaded for
`exec` alone. Standard library only.
"""

import os
import sys
import time

# As in hookcall.py: socket itself would cost as much as all else.
from _socket import AF_UNIX, SOCK_DGRAM
from _socket import socket as Socket  # noqa: N812  # a class

from acctd import helper, hookcall

_EX_NOUSER, _EX_OSERR = 66, 71
_LOG = "/dev/log"
_PRIORITY = 28  # daemon.warning, syslog(3)
_UNACCOUNTED = "unaccounted"
_ID_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._@:+[]-")

TYPE_CHECKING = False  # typing itself takes 3 ms; type checkers know the name
if TYPE_CHECKING:
    from acctd import isolate

_SUDOERS = "let job owners run acctd-hook by sudo, see docs/hook.md"


def run(path: str, job: str, command: list[str], *, user: str | None, fail_open: bool) -> int:
    """Become the command, inside the job. Returns an exit code only if the command cannot be started.

    Raises HookError; nothing has been started then.
    """
    if fail_open and os.geteuid() == 0 and user is None and _sudo_uid() is None:
        raise hookcall.UsageError("for root --fail-open needs --user USER: without an agent nobody says who to become")
    way = _Way(path, job)
    try:
        way.go()
    except hookcall.HookError as e:
        if not (e.unreachable and fail_open):
            raise
        if not _ID_CHARACTERS.issuperset(job) or not 0 < len(job) <= 128:
            raise hookcall.UsageError(f"job {job!r} is no job id") from None
        if os.geteuid() == 0 and way.account is None:
            way.account = _account(user)
        unknown = "" if way.asked else "; should it be isolated, it is not"
        _put_on_record(path, job, command, f"{e}{unknown}")
        way.isolate()  # as far as it has not been done on the way
    way.settle()
    code = helper.become(command)
    sys.stderr.write(f"acctd-hook: command {command[0]!r} cannot be started; check its name, PATH and rights\n")
    return code


class _Way:
    """The way into one job, as far as it has been gone."""

    def __init__(self, path: str, job: str) -> None:
        self._path, self._job = path, job
        self.account: tuple[int, int, list[int], dict[str, str]] | None = None
        self.asked = False
        """Whether the agent has said what the job is to be."""
        self._capable = False
        self._plan: isolate.Plan | None = None
        self._isolated = False
        self._root: int | None = None

    def go(self) -> None:
        """Into the network, out of sight, and then into the cgroups."""
        entry = hookcall.call(self._path, "Entry", job=self._job)
        sudo = _sudo_uid()
        if sudo not in (None, entry["uid"]):
            said = f"job {self._job} belongs to uid {entry['uid']}, and sudo was called by uid {sudo}; unset SUDO_UID"
            raise hookcall.HookError(f"{said} to enter it as root", hookcall.EX_NOPERM)
        self.account = (entry["uid"], entry["gid"], entry["groups"], entry["environment"])
        self._plan, self.asked = entry.get("isolation"), True
        # By the time that we knock again something may be mounted over it.
        door = _door(self._path) if self._plan is not None else self._path
        if entry["netns"] is not None:
            self._enter(entry["netns"])
        self.isolate()
        # Last before we give up our rights, so that little of Python's own doing is billed.
        try:
            hookcall.call(door, "Attach", job=self._job)
        except hookcall.HookError as e:
            raise hookcall.HookError(str(e).replace(door, self._path), e.code, unreachable=e.unreachable) from None

    def isolate(self) -> None:
        """Do what the plan says, as far as it can be done before the cgroups are joined.

        With a PID namespace what goes on is a child: see isolate.py.
        """
        plan = self._plan
        if plan is None or self._isolated:
            return
        from acctd import isolate

        try:
            if plan["pid_namespace"] or plan["root"] or plan["binds"]:
                self._be_capable()
            if plan["pid_namespace"]:
                isolate.in_pid_namespace(self._shed)
            self._root = isolate.build(plan)
        except OSError as e:
            raise self._refused(e) from None
        self._isolated = True

    def settle(self) -> None:
        """Be where and who the command is to be. Raises HookError."""
        try:
            if self._plan is not None and self._root is not None:
                from acctd import isolate

                isolate.enter(self._root, changed=self._plan["root"] is not None)
            self._shed()
            if self._plan is not None and self._plan["no_new_privs"]:
                from acctd import isolate

                isolate.forbid_new_privileges()
        except OSError as e:
            raise self._refused(e) from None

    def _be_capable(self) -> None:
        """Have the rights that mounts and namespaces take: the owner has them in a user namespace."""
        if os.geteuid() != 0 and not self._capable:
            from acctd import enter

            try:
                enter.in_own_user_namespace()
            except OSError as e:
                raise OSError(e.errno, e.strerror, "make a user namespace") from None
            self._capable = True

    def _refused(self, error: OSError) -> hookcall.HookError:
        verb = "isolate" if self._plan is not None else "enter"
        said = f"cannot {verb} job {self._job}: cannot {error.filename or 'become its owner'}: {error.strerror}"
        if os.geteuid() == 0:
            return hookcall.HookError(f"{said}; nothing is started", _EX_OSERR)
        return hookcall.HookError(f"{said}; {_SUDOERS}", hookcall.EX_NOPERM)

    def _shed(self) -> None:
        """Root becomes the owner; the owner gives up what the user namespace gave."""
        if os.geteuid() == 0:
            if self.account is None:
                raise hookcall.HookError(f"nobody says whom to become for job {self._job}", hookcall.EX_NOPERM)
            uid, gid, groups, environment = self.account
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            if uid != 0:
                os.environ.update(environment)
        elif self._capable:
            from acctd import enter

            try:
                enter.drop_capabilities()
            except OSError as e:
                said = f"cannot give up the capabilities of a user namespace: {e.strerror}"
                raise hookcall.HookError(f"{said}; {_SUDOERS}", _EX_OSERR) from None

    def _enter(self, name: str) -> None:
        try:
            namespace = _opened(name)
            if os.path.samestat(os.fstat(namespace), os.stat("/proc/self/ns/net")):
                return  # a family that shares its parent's, entered from inside
            if os.geteuid() == 0:
                helper.enter_network(namespace)
                return
        except OSError as e:
            raise hookcall.HookError(
                f"cannot enter the network {name} of job {self._job}: {e.strerror}", _EX_OSERR
            ) from None
        self._enter_as_owner(name, namespace)

    def _enter_as_owner(self, name: str, namespace: int) -> None:
        from acctd import enter

        step = f"read {name}"
        try:
            if not enter.is_ours(namespace):
                step = "make namespaces"
                refusal = enter.in_new_namespaces(self._move_pipe).decode()
                namespace = _opened(name)
                # Whatever it says, if the pipe is ours now: another exec of the same job was first, and is joined.
                if refusal and not enter.is_ours(namespace):
                    code, unreachable, said = refusal.split(" ", 2)
                    raise hookcall.HookError(said, int(code), unreachable=unreachable == "1")
            step = "join the job's"
            enter.join(namespace)
        except OSError as e:
            said = f"cannot enter job {self._job} without root: cannot {step}: {e.strerror}"
            raise hookcall.HookError(f"{said}; {_SUDOERS}", hookcall.EX_NOPERM) from None
        self._capable = True

    def _move_pipe(self) -> bytes:
        """In the child that is in the new namespaces; what to tell its parent."""
        try:
            hookcall.call(self._path, "MovePipe", job=self._job)
        except hookcall.HookError as e:
            return f"{e.code} {int(e.unreachable)} {e}".encode()
        return b""


def _door(path: str) -> str:
    """A name of the agent's socket that leads there whatever is mounted where; the same one if it is not there."""
    try:
        return f"/proc/self/fd/{os.open(path, os.O_PATH | os.O_CLOEXEC)}"
    except OSError:
        return path  # the next call says what is wrong


def _opened(name: str) -> int:
    return os.open(name, os.O_RDONLY | os.O_CLOEXEC)  # the exec closes it


def _sudo_uid() -> int | None:
    """Who called sudo, where root is root by it: root then acts for that user, and enters no other's job."""
    text = os.environ.get("SUDO_UID", "")
    return int(text) if os.geteuid() == 0 and text.isascii() and text.isdecimal() and int(text) != 0 else None


def _account(user: str | None) -> tuple[int, int, list[int], dict[str, str]]:
    """Whom to become where no agent says. Raises HookError."""
    import pwd

    sudo = _sudo_uid()
    name = user if user is not None else str(sudo)
    try:
        entry = pwd.getpwuid(int(name)) if name.isascii() and name.isdecimal() else pwd.getpwnam(name)
    except (KeyError, OverflowError):
        raise hookcall.HookError(f"user {name!r} does not exist on this host; name one that does", _EX_NOUSER) from None
    if sudo not in (None, entry.pw_uid):
        raise hookcall.HookError(f"user {name!r} is not who called sudo (uid {sudo})", hookcall.EX_NOPERM)
    environment = {"HOME": entry.pw_dir, "SHELL": entry.pw_shell, "USER": entry.pw_name, "LOGNAME": entry.pw_name}
    return entry.pw_uid, entry.pw_gid, os.getgrouplist(entry.pw_name, entry.pw_gid), environment


# The record of what went unaccounted: needs no agent


def _put_on_record(path: str, job: str, command: list[str], reason: str) -> None:
    said = f"job {job} starts unaccounted, as --fail-open asks: {reason}"
    logged, kept = _log(said), _keep(path, job, command, reason)
    places = [place for place, done in (("the system log", logged), (kept or "", kept)) if done]
    sys.stderr.write(f"acctd-hook: {said}; on record in {' and '.join(places) or 'no other place than here'}\n")


def _log(said: str) -> bool:
    """One line in the system log, if there is one that takes it now."""
    log = Socket(AF_UNIX, SOCK_DGRAM)
    try:
        log.setblocking(False)
        log.connect(_LOG)
        log.send(f"<{_PRIORITY}>acctd-hook[{os.getpid()}]: {said}".encode())
    except OSError:
        return False
    finally:
        log.close()
    return True


def _keep(path: str, job: str, command: list[str], reason: str) -> str | None:
    """A file for the agent to find when it starts, beside its socket. Root's alone; None where it could not be made.

    The directory is the agent's to make, and must be one that only root can change: the socket's path may come from
    a job's environment.
    """
    if os.geteuid() != 0:
        return None
    directory, name = os.path.join(os.path.dirname(path), _UNACCOUNTED), f"{job}.{os.getpid()}"
    fact = {"job": job, "time": time.time(), "pid": os.getpid(), "command": command[0], "reason": reason}
    try:
        place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        found = os.fstat(place)
        if found.st_uid != 0 or found.st_mode & 0o022:
            return None
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        os.write(os.open(name, flags, 0o600, dir_fd=place), hookcall.to_json(fact).encode() + b"\n")
    except OSError:
        return None
    return os.path.join(directory, name)
