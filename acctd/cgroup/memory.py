"""The memory of one job as whoever decides about it sees it: its use, what cannot be reclaimed, how often it ran out.

One small class for both versions. Metering is the collectors', limits are limits.py's. Kernel docs:
admin-guide/cgroup-v1/memory.rst (10 "OOM Control"), admin-guide/cgroup-v2.rst ("Memory Interface Files").
"""

import mmap
from typing import NamedTuple

from acctd.kernel import procs
from acctd.kernel.cgroupfs import CgroupDir


class Troubles(NamedTuple):
    """What has befallen one cgroup so far."""

    waiting: bool  # v1: its tasks wait for somebody to act, at its own limit and not at that of a cgroup above
    ooms: int  # v2: times that nothing could be reclaimed at its own limit; 0 on v1, which does not count them
    kills: int  # of its own processes, by the kernel for want of memory, its own or another's
    high: int  # v2: times it went over memory.high


class JobMemory:
    """The memory cgroup of a job: `directory`, and `own`, where its processes are (v2) or the same one (v1)."""

    def __init__(self, directory: CgroupDir, own: CgroupDir) -> None:
        self.directory = directory
        self._own = own
        self.v1 = directory.has("memory.oom_control")

    def usage(self) -> int:
        """Bytes charged to it now, page cache included."""
        text = self._text("memory.usage_in_bytes" if self.v1 else "memory.current")
        return int(text) if text.isdecimal() else 0

    def held(self) -> int:
        """Bytes charged to it that dropping page cache would not free."""
        lines = dict(
            line.split(b" ", 1) for line in (self.directory.read("memory.stat") or b"").splitlines() if b" " in line
        )
        total = b"total_" if self.v1 else b""
        cache = sum(int(lines.get(total + name, 0)) for name in (b"inactive_file", b"active_file"))
        if not self.v1:
            cache += int(lines.get(b"slab_reclaimable", 0))
        return max(0, self.usage() - cache)

    def troubles(self) -> Troubles:
        """What has befallen it so far; all 0 once it is gone."""
        if self.v1:
            control = _counts(self.directory.read("memory.oom_control"))
            waiting = control.get("under_oom") == 1
            if waiting:  # all cgroups below the one whose limit was reached say so too
                waiting = _counts(self.directory.parent.read("memory.oom_control")).get("under_oom") != 1
            return Troubles(waiting, 0, control.get("oom_kill", 0), 0)
        if (local := self.directory.read("memory.events.local")) is None:
            # Before 5.2. What befalls a family is not told from what befalls its parent there.
            events = _counts(self.directory.read("memory.events"))
            kills = events.get("oom_kill", 0)
        else:
            events = _counts(local)
            # Its processes are counted by its own directory, until a family is made and they get controllers apart.
            kills = events.get("oom_kill", 0) + _counts(self._own.read("memory.events.local")).get("oom_kill", 0)
        return Troubles(False, events.get("oom", 0), kills, events.get("high", 0))

    def arm(self, limit: int) -> None:
        """Let acctd act before the kernel does, at this limit.

        v1: tasks wait for it. v2: the job is slowed down from its limit on, and the kernel ends it as a whole a little
        above, so that the job has all that it asked for.
        """
        if self.v1:
            self.directory.write("memory.oom_control", "1")
            return
        if self.directory.has("memory.oom.group"):  # from 4.19 on
            self.directory.write("memory.oom.group", "1")
        self.directory.write("memory.high", str(limit))
        self.directory.write("memory.max", str(limit + margin(limit)))

    def disarm(self) -> None:
        """Let the kernel's own killer act, on a process at a time.

        v2: at the end of the margin. Were memory.max set to the limit again, the kernel would kill within this very
        write until the use is below it, and whoever writes waits for that.
        """
        if self.v1:
            self.directory.write("memory.oom_control", "0")
            return
        if self.directory.has("memory.oom.group"):
            self.directory.write("memory.oom.group", "0")
        self.directory.write("memory.high", "max")

    def let_inner_go(self) -> None:
        """v1: what the job makes inside its cgroup inherits that tasks wait, and nobody would hear of a limit there."""
        for child in self.directory.children():
            if not child.marked():
                for inner in child.subtree():
                    if inner.has("memory.oom_control"):
                        inner.write("memory.oom_control", "0")

    def is_well_below(self, limit: int) -> bool:
        """Whether a shortage that there was is over, and the next one is another one."""
        return not self.troubles().waiting and self.held() < limit - limit // 16

    def is_exhausted(self, limit: int) -> bool:
        """v2: whether it is at its limit, and dropping page cache or swapping would not help."""
        return self.held() >= limit - limit // 64 and self._swap_left() < margin(limit)

    def _swap_left(self) -> int:
        used, most = self._text("memory.swap.current"), self._text("memory.swap.max")
        free = procs.meminfo().get("SwapFree", 0)
        if most == "max":
            return free
        return min(free, int(most) - int(used)) if most.isdecimal() and used.isdecimal() else 0

    def _text(self, file: str) -> str:
        return (self.directory.read(file) or b"").decode().strip()


def margin(limit: int) -> int:
    """Bytes between a job's limit and where the kernel kills, on v2: the room that acctd has to act in.

    A sixteenth: at its end the kernel makes a process wait some 250 ms for each 256 KiB. 512 MiB at most, which no job
    fills in the time that acctd takes; and 8 MiB at least, since each process takes 256 KiB before it waits at all.
    """
    return max(8 << 20, min(limit // 16, 512 << 20) // mmap.PAGESIZE * mmap.PAGESIZE)


def _counts(text: bytes | None) -> dict[str, int]:
    """Lines of a name and a number."""
    pairs = (line.split() for line in (text or b"").decode().splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
