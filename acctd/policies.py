"""What a job asks for beside limits: what is done when it runs out of memory, and how far it is shut in. Pure data.

Floor 0, no I/O. Acting on it is for shortages.py and isolate.py.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from acctd.errors import UsageError

OomAction = Literal["kernel", "kill", "hold", "grow", "exec"]
"""kernel: its own killer takes a process, and that is told. kill: the whole job ends at once. hold: the job is stopped,
evidence is taken, then it ends. grow: its limit is raised in steps up to a ceiling, then as hold. exec: the program of
the site's configuration decides."""

OOM_ACTIONS: tuple[OomAction, ...] = get_args(OomAction)


@dataclass(frozen=True, slots=True)
class OomPolicy:
    """What happens when a job reaches its memory limit and nothing can be reclaimed."""

    action: OomAction = "kernel"
    ceiling: int | None = None  # bytes; how far grow may raise the limit, and a program's answer
    step: int = 25  # percent of the limit, by which it grows at a time
    deadline: float = (
        10.0  # s that its processes may wait for somebody to act; then the kernel's own killer is let loose
    )
    thresholds: tuple[int, ...] = (80, 90, 95)  # percent of the limit at which there is a warning

    def __post_init__(self) -> None:
        if self.action not in OOM_ACTIONS:
            raise UsageError(f"oom action {self.action!r} is none; it is one of {', '.join(OOM_ACTIONS)}")
        if self.action == "grow" and self.ceiling is None:
            raise UsageError("oom action grow needs a ceiling, the bytes that the limit may grow to; give one")
        if self.ceiling is not None and not 1 << 20 <= self.ceiling < 1 << 63:
            raise UsageError(f"oom ceiling {self.ceiling} is out of range; it takes {1 << 20} to {(1 << 63) - 1} bytes")
        if not 1 <= self.step <= 1000:
            raise UsageError(f"oom step {self.step} is out of range; it takes 1 to 1000 percent")
        if not 0.1 <= self.deadline <= 3600:
            raise UsageError(f"oom deadline {self.deadline} is out of range; it takes 0.1 to 3600 seconds")
        if len(self.thresholds) > 8 or any(not 1 <= each <= 99 for each in self.thresholds):
            raise UsageError(
                f"oom thresholds {list(self.thresholds)} are not usable; it takes 8 at most, of 1 to 99 percent"
            )
        if list(self.thresholds) != sorted(set(self.thresholds)):
            raise UsageError(f"oom thresholds {list(self.thresholds)} do not rise; write each once, the lowest first")


@dataclass(frozen=True, slots=True)
class Isolation:
    """How far a job's processes are shut in. Nothing is the default."""

    pid_namespace: bool = False  # they see no process but each other, and end with their first one
    scratch: tuple[str, ...] = ()  # directories that become the job's own, empty at first and gone with it
    chroot: str | None = None  # the name of a root directory in the configuration
    no_new_privs: bool = False  # no set-user-id program gives them rights

    def __post_init__(self) -> None:
        for path in self.scratch:
            parts = path.split("/")
            if not path.startswith("/") or path == "/" or "\0" in path or {"", ".", ".."} & set(parts[1:]):
                raise UsageError(
                    f"scratch {path!r} is not usable; it takes an absolute path without . and .., like /tmp"
                )
            if parts[1] in ("proc", "sys") or path == "/dev":
                raise UsageError(f"scratch {path!r} is the kernel's own and cannot be replaced; leave it out")
            if (other := next((each for each in self.scratch if each.startswith(f"{path}/")), None)) is not None:
                raise UsageError(
                    f"scratch {other!r} lies inside {path!r}, which is the job's own already; leave it out"
                )
        if len(self.scratch) > 64 or len(set(self.scratch)) < len(self.scratch):
            raise UsageError(f"scratch takes each directory once, and 64 at most; it has {len(self.scratch)}")
        if self.chroot is not None and (not self.chroot or "/" in self.chroot or "\0" in self.chroot):
            raise UsageError(
                f"chroot {self.chroot!r} is no name; give one that isolation.chroots of the configuration has"
            )

    def __bool__(self) -> bool:
        """Whether anything is asked for."""
        return bool(self.pid_namespace or self.scratch or self.chroot or self.no_new_privs)


OomLevel = Literal["job", "family", "parent", "host"]
"""Whose memory ran out, seen from one job: its own limit was reached; that of a family inside it; that of a job it is
inside of; or neither, and the node had none left (or a cgroup above acctd's)."""


@dataclass(frozen=True, slots=True)
class LargeProcess:
    """One of the largest processes of a job when its memory ran out."""

    pid: int
    name: str  # /proc/PID/comm
    resident: int  # bytes
    started: float  # s since the epoch


@dataclass(frozen=True, slots=True)
class Shortage:
    """One time that a job's memory ran out, and what was done: evidence that outlives the cgroup."""

    time: float  # s since the epoch, a label
    level: OomLevel
    whose: str | None  # the job whose limit was reached; None for the host
    action: str  # what was done: "killed by the kernel", "killed", "held", "grown", "released", "undecided"
    limit: int | None  # bytes, of the job whose limit it was; for the host of the job that this is about
    usage: int | None  # bytes
    kills: int = 0  # processes of this job that the kernel killed for it
    memory: dict[str, int] | None = (
        None  # bytes by kind, named as in memory.stat; None where it could not be read any more
    )
    processes: tuple[LargeProcess, ...] = ()  # the ten largest, largest first
    waited: float | None = None  # s that it had waited when it was released, where that is known
    text: str = ""  # one sentence for its owner
