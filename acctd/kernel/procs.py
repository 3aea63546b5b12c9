"""Facts from /proc and /sys that say who is who: processes, this boot, the disks. Reads only."""

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


def boot_id(root: Path = Path("/")) -> str:
    """This boot's id. man 4 random."""
    return (root / "proc/sys/kernel/random/boot_id").read_text().strip()


def identity(pid: int) -> str:
    """A name for a process that no later one can have: its pid and its start time in ticks since boot."""
    return f"{pid}:{_start_time(pid)}"


def is_alive(identity_: str) -> bool:
    """Whether the process that had this identity still runs (a zombie does not)."""
    pid, _, start = identity_.partition(":")
    return pid.isdecimal() and start != "" and _start_time(int(pid)) == start


def owner(pid: int) -> int | None:
    """The real uid of a process, or None if there is none of that pid."""
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(b"Uid:"))
    except (FileNotFoundError, ProcessLookupError):
        return None


def is_dead(pid: int) -> bool:
    """Gone, or a zombie without living threads: a leader that exited before its threads looks like a zombie too."""
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            if not _is_over(f"/proc/{pid}/task/{task}/stat"):
                return False
    except (FileNotFoundError, ProcessLookupError):
        return not os.path.exists(f"/proc/{pid}")
    return True


def _is_over(path: str) -> bool:
    """Whether the thread that this stat file is of has exited."""
    with open(path, "rb") as stat:
        # The command may hold spaces and parentheses: the state follows the last one.
        return stat.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")


class Credentials(NamedTuple):
    """Whose a process is."""

    uid: int  # real
    groups: frozenset[int]  # supplementary


# /proc/<pid>/status, in part; the name may hold spaces, and newlines are written as \\n:
#   Name:   dd
#   Uid:    1000    1000    1000    1000
#   Groups: 4 24 1000
def credentials(pid: int) -> Credentials | None:
    """Whose a process is, or None if there is none of that pid."""
    uid, groups = None, frozenset[int]()
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            for line in status:
                if line.startswith(b"Uid:"):
                    uid = int(line.split()[1])
                elif line.startswith(b"Groups:"):
                    groups = frozenset(map(int, line.split()[1:]))
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Credentials(uid, groups) if uid is not None else None


def environment(pid: int) -> set[bytes]:
    """The NAME=VALUE entries that a process was started with; none for one that is gone or a kernel thread.

    None either, for now, for one with a thread in state D: that may hold the lock on its memory, as when a file that
    it has mapped does not answer, and whoever reads this file then waits with it.
    """
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/stat", "rb") as stat:
                if stat.read().rpartition(b")")[2].split()[0] == b"D":
                    return set()
    except (FileNotFoundError, ProcessLookupError):
        return set()
    return set(_read_patiently(Path(f"/proc/{pid}/environ")).split(b"\0"))


# /proc/<pid>/cgroup; hierarchy, controllers and path, which may hold colons:
#   9:memory:/acctd/job_42.0
#   0::/acctd/job_42.0
def cgroups(pid: int) -> list[str]:
    """The paths of the cgroups that a process is in, one a hierarchy; none if it is gone."""
    found = _cgroups(f"/proc/{pid}/cgroup")
    if "/" in found:
        # v1 shows a leader that has exited at the top of every hierarchy, whatever its other threads are in.
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                if task != str(pid) and not _is_over(f"/proc/{pid}/task/{task}/stat"):
                    return _cgroups(f"/proc/{pid}/task/{task}/cgroup") or found
        except (FileNotFoundError, ProcessLookupError):
            return found
    return found


def _cgroups(path: str) -> list[str]:
    try:
        # As bytes: a name may be no UTF-8, and what text mode takes for the end of a line, \r, may stand in one.
        with open(path, "rb") as lines:
            return [os.fsdecode(line.rstrip(b"\n").split(b":", 2)[2]) for line in lines]
    except (FileNotFoundError, ProcessLookupError):
        return []


def shares_pids(pid: int) -> bool:
    """Whether a process is in our PID namespace, so that its numbers are ours; False where nobody can say."""
    try:
        return os.path.samestat(os.stat(f"/proc/{pid}/ns/pid"), os.stat("/proc/self/ns/pid"))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False


def network(pid: int) -> tuple[int, int] | None:
    """Which network namespace a process is in, as network_at() names it; None if it is gone."""
    return network_at(f"/proc/{pid}/ns/net")


def network_at(path: str) -> tuple[int, int] | None:
    """Device and inode of a network namespace's file; None if there is none. man 7 namespaces."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return found.st_dev, found.st_ino


def send(pid: int, number: int, still: Callable[[int], bool]) -> bool:
    """Signal a process, if it is `still` who it was; whether it got it. pidfd_send_signal(2): no other can be meant."""
    try:
        fd = os.pidfd_open(pid)
    except (ProcessLookupError, OSError):
        return False
    try:
        if is_dead(pid) or not still(pid):
            return False
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False  # it ended by itself
    finally:
        os.close(fd)
    return True


class Stuck(NamedTuple):
    """A process that is still there, and what it waits for. As text, a part of a sentence."""

    pid: int
    name: str
    state: str  # man 5 proc_pid_stat
    function: str  # of the kernel, that it waits in; "" where that is not told
    callers: tuple[str, ...]  # of that function, the innermost first
    tracer: str  # who traces it, "" if nobody

    def __str__(self) -> str:
        text = f"process {self.pid} ({self.name}) is in state {self.state}"
        if self.function:
            text += f", waiting in {self.function}"
        if self.callers:
            text += f", called by {', '.join(self.callers)}"
        if self.state == "t" and self.tracer:
            text += f", held by its tracer, process {self.tracer}, which has to end or let it go"
        return text


# /proc/<pid>/task/<tid>/wchan, without an end of line, "0" for one that runs; stack, for root alone:
#   percpu_rwsem_wait
#   [<0>] percpu_rwsem_wait+0x116/0x140
#   [<0>] __percpu_down_read+0x5e/0x90
#   [<0>] ext4_buffered_write_iter+0x9a/0x130
def stuck(pid: int, root: Path = Path("/")) -> Stuck | None:
    """Why a process does not end: its thread in state D, else one that a tracer holds, else any that lives.

    None if it is gone, or a zombie. What the kernel does not tell is left out. Documentation/filesystems/proc.rst.
    """
    threads: dict[str, tuple[Path, bytes]] = {}
    try:
        for task in sorted((root / f"proc/{pid}/task").iterdir(), key=lambda each: int(each.name)):
            name, _, rest = (task / "stat").read_bytes().partition(b"(")[2].rpartition(b")")
            if (state := rest.split()[0].decode()) not in "ZX":
                threads.setdefault(state, (task, name))
        if not threads:
            return None
        state = next((each for each in "Dt" if each in threads), next(iter(threads)))
        task, name = threads[state]
        status = (task / "status").read_bytes().split(b"\n")
    except (FileNotFoundError, ProcessLookupError):
        return None
    tracer = next((int(line.split()[1]) for line in status if line.startswith(b"TracerPid:")), 0)
    frames = _read_patiently(task / "stack").decode().split("\n")
    functions = [frame.split()[1].partition("+")[0] for frame in frames if frame.startswith("[<") and " " in frame]
    function = _read_patiently(task / "wchan").decode().strip().removeprefix("0") or next(iter(functions), "")
    # The scheduler's own, above the one that waits, are left out.
    callers = functions[functions.index(function) + 1 :] if function in functions else functions
    return Stuck(pid, _shown(name), state, function, tuple(callers[:3]), _named(tracer, root) if tracer else "")


def _read_patiently(path: Path) -> bytes:
    """A file of /proc that not everybody may read, and whose reading may have to wait for the process it is about: its
    stack cannot be read in the middle of an execve(2). Nothing after 50 ms; the thread is left to itself then.
    """
    found = [b""]

    def read() -> None:
        with suppress(OSError):  # not told, or not to us
            found[0] = path.read_bytes()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(0.05)
    return found[0]


def _named(pid: int, root: Path) -> str:
    """A process as "4242 (gdb)"."""
    try:
        name = (root / f"proc/{pid}/comm").read_bytes().removesuffix(b"\n")
    except (FileNotFoundError, ProcessLookupError):
        return str(pid)
    return f"{pid} ({_shown(name)})"


def _shown(name: bytes) -> str:
    """A command's name, which a process can set to any bytes, for a line of text."""
    return "".join(c if c.isprintable() else "?" for c in name.decode(errors="replace"))


def end(pid: int, still: Callable[[int], bool]) -> bool:
    """SIGKILL to a process, if it is `still` who it was; whether it got it. Zombies may count as having got it."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    except OSError:
        # A thread of a threaded cgroup, too few descriptors, or a kernel before 5.3: as safe as can be without.
        if still(pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return True
        return False
    try:
        if not still(pid):
            return False
        signal.pidfd_send_signal(fd, signal.SIGKILL)
    except ProcessLookupError:
        return False  # it ended by itself
    finally:
        os.close(fd)
    return True


def pids() -> list[int]:
    """Every process there is."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def is_kernel_thread(pid: int) -> bool:
    """Whether it has no program at all; PF_KTHREAD in the flags, the 9th field of its stat. include/linux/sched.h."""
    fields = _stat(pid)
    return fields is not None and bool(int(fields[6]) & 0x00200000)


def descendants(root: int) -> set[int]:
    """A process and all that come from it, as far as their parents live."""
    children: dict[int, list[int]] = {}
    for pid in pids():
        if (parent := _parent(pid)) is not None:
            children.setdefault(parent, []).append(pid)
    found, waiting = {root}, [root]
    while waiting:
        new = [pid for pid in children.get(waiting.pop(), []) if pid not in found]
        found.update(new)
        waiting += new
    return found


# /proc/self/statm, in pages; the second number is what is resident:
#   24107 9120 3310 1 0 7411 0
def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_descriptors() -> int:
    """How many files this process has open."""
    # Since 6.2 the directory's size says it; to list twenty thousand takes 15 ms.
    return os.stat("/proc/self/fd").st_size or len(os.listdir("/proc/self/fd")) - 1  # less the one that lists


# /proc/<pid>/stat; the command, in parentheses, may hold anything; state and start time are the 3rd and 22nd fields:
#   4242 (dd) R 4241 4242 4200 34816 4242 4194304 117 0 0 0 2 11 0 0 20 0 1 0 881231 6021120 ...
def _stat(pid: int) -> list[bytes] | None:
    """From the third field on; None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _start_time(pid: int) -> str | None:
    fields = _stat(pid)
    return None if fields is None or is_dead(pid) else fields[19].decode()


def _parent(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[1]) if fields is not None else None


def lies_on_others(device: str, root: Path = Path("/")) -> bool:
    """Whether a block device's I/O is done by another one, and counted there once more.

    True for what the kernel says has slaves (device mapper, RAID), and for a loop device on a file of a file system
    that has a device. `device` is "major:minor"; one that is gone lies on nothing. The file itself is not touched:
    it may lie on a server that does not answer.
    """
    entry = root / "sys/dev/block" / device
    try:
        if any((entry / "slaves").iterdir()):
            return True
        backing = (entry / "loop/backing_file").read_text().strip()
    except OSError:
        return False
    return not _device_of(backing, root).startswith("0:")


# /proc/self/mountinfo: the third field is the file system's device, the fifth where it is mounted:
#   27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
def _device_of(path: str, root: Path) -> str:
    """The device of the mount that a path lies on; major 0 is a file system without one."""
    best, device = "", "0:0"
    for line in (root / "proc/self/mountinfo").read_bytes().split(b"\n")[:-1]:
        fields = os.fsdecode(line).split(" ")
        mount = fields[4]
        if (path == mount or path.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(best):
            best, device = mount, fields[2]
    return device


# /sys/block/<name>/queue/scheduler; the one in use stands in brackets:
#   [none] mq-deadline kyber bfq
def schedulers(root: Path = Path("/")) -> set[str]:
    """The I/O schedulers that the disks of this host use."""
    found = set()
    for path in (root / "sys/block").glob("*/queue/scheduler"):
        try:
            found.add(path.read_text().partition("[")[2].partition("]")[0])
        except OSError:
            continue  # unplugged since it was listed
    return found


def disks(root: Path = Path("/")) -> dict[str, str]:
    """Whole block devices that hold something: "major:minor", what block I/O is counted by, and the kernel's serial
    number of the disk (since 5.15, "" before), which tells a later disk under the same number.
    """
    found = {}
    block = root / "sys/block"
    for name in sorted(os.listdir(block)) if block.is_dir() else []:
        try:
            if (block / name / "size").read_text().strip() != "0":
                serial = block / name / "diskseq"
                device = (block / name / "dev").read_text().strip()
                found[device] = serial.read_text().strip() if serial.exists() else ""
        except FileNotFoundError:
            continue  # unplugged since it was listed
    return found


def meminfo() -> dict[str, int]:
    """The node's memory, bytes by name: MemAvailable, SwapFree, ... filesystems/proc.rst, "meminfo"."""
    found = {}
    with open("/proc/meminfo") as lines:
        for line in lines:
            name, _, rest = line.partition(":")
            amount = rest.split()
            if len(amount) == 2 and amount[1] == "kB":
                found[name] = int(amount[0]) * 1024
    return found
