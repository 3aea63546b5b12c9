"""NFS traffic of one job by mount, from the mountstats of its mount namespaces.

Reads only: it mounts nothing and asks no server anything. The kernel counts by superblock and not by process, so a
number is a job's only where the superblock is: one that this process, the host's first one or another job has mounted
too is not counted at all. docs/nfs.md says which mounts are a job's own and what remains unseen. Kernel source:
fs/nfs/super.c nfs_show_stats(), net/sunrpc/stats.c rpc_clnt_show_stats().

The counters go away with the last process of the namespace; an open table keeps them, so the last reading is whole.
"""

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from acctd.kernel.mntns import Id, Mount, Tables, namespace, printable
from acctd.metrics import NFS, Readings
from collectors.parse import MalformedFile, number

METRICS = NFS

Counts = tuple[int, ...]
"""One number for each of METRICS, in their order."""

_KINDS = ("nfs", "nfs4")

# Requests that keep a client known to its server. Of all mounts of one server they are made in common, and each mount
# shows them all (rpc_clnt_show_stats adds up the parents of its client): they are nobody's own.
_COMMON = frozenset(
    b"NULL RENEW SETCLIENTID SETCLIENTID_CONFIRM EXCHANGE_ID CREATE_SESSION DESTROY_SESSION SEQUENCE GET_LEASE_TIME "
    b"RECLAIM_COMPLETE BIND_CONN_TO_SESSION DESTROY_CLIENTID".split()
)
_NEVER = b": 0 0 0 0 0 0 0 0"
"""In the line of a request that was never made; most of seventy never are."""

_FRESH = 0.01  # s
_ROUNDING = 1.0  # s; an age is in whole seconds, cut off


class MountStats(NamedTuple):
    """What the kernel counts for one NFS mount; mounts of one superblock show the same."""

    point: str
    age: int  # s since its superblock was made
    counts: Counts


# mountstats (6.1), one block a mount; lines of one word for what keeps no statistics:
#   device /dev/vda mounted on / with fstype ext4
#   device 127.0.0.1:/a mounted on /mnt/data with fstype nfs4 statvers=1.1
#   	age:	13
#   	bytes:	8388608 1001000 0 4194304 4194304 5195304 1024 245
#   	xprt:	tcp 0 0 2 0 0 71 71 0 564 0 30 253 337
#   	per-op statistics
#   	        READ: 32 32 0 5632 4197632 13 45 64 0
# bytes: by read(2) and write(2), by those with O_DIRECT, with the server; then pages. A request: how often, sent how
# often, timed out, bytes sent, bytes received; ms queued, from sending to the reply, in all; failed (since 5.3).
def parse_mountstats(text: bytes, path: str) -> list[MountStats]:
    """The NFS mounts, in the kernel's order. A version of the statistics other than 1.x is passed over."""
    found = []
    for block in text.split(b"\ndevice "):
        head, _, body = block.partition(b"\n")
        rest = head.rpartition(b" mounted on ")[2]
        point, _, kind = rest.partition(b" with fstype ")
        name, _, version = kind.partition(b" ")
        if name.decode("ascii", "replace") in _KINDS and version.startswith(b"statvers=1."):
            found.append(_mount(printable(point), head, body, path))
    return found


def _mount(point: str, head: bytes, body: bytes, path: str) -> MountStats:
    age, transfers, requests = None, None, False
    totals = {b"READ": 0, b"WRITE": 0}
    operations = milliseconds = server = 0
    for line in body.split(b"\n"):
        if _NEVER in line:
            continue
        words = line.split()
        if not words:
            continue
        name = words[0]
        if requests and name.endswith(b":"):
            if len(words) < 9:
                raise MalformedFile(path, line)
            numbers = [number(word, path, line) for word in words[1:9]]
            operation = name[:-1]
            if operation in totals:
                totals[operation] = numbers[0]
            if operation not in _COMMON:
                operations += numbers[0]
                server += numbers[6]
                milliseconds += numbers[7]
        elif name == b"age:" and len(words) == 2:
            age = number(words[1], path, line)
        elif name == b"bytes:" and len(words) >= 7:
            transfers = number(words[5], path, line), number(words[6], path, line)
        elif name == b"per-op":
            requests = True
        elif name in (b"age:", b"bytes:"):
            raise MalformedFile(path, line)
    if age is None or transfers is None or not requests:
        raise MalformedFile(path, head)
    return MountStats(point, age, (*transfers, totals[b"READ"], totals[b"WRITE"], operations, milliseconds, server))


class NfsHost:
    """What the readers of one agent share: whose each superblock is. Close it last."""

    def __init__(self) -> None:
        self._host: dict[Id, Tables] = {}
        self._foreign, self._asked = True, 0.0
        self._mounted: tuple[list[list[Mount]], frozenset[str]] = [], frozenset()
        self._devices: dict[str, frozenset[str]] = {}
        self._parents: dict[str, str | None] = {}
        self._counted: dict[str, Superblock] = {}
        self._parted: dict[tuple[str, str], str] = {}  # (job, device) -> another job that had it too

    def loaded(self) -> bool:
        """Whether the kernel's NFS client is there at all; without it there is nothing to look for."""
        return os.path.lexists("/proc/fs/nfsfs")

    def foreign(self) -> bool:
        """Whether a file system may be mounted somewhere that is not mounted here, as far as NFS is among such.

        The kernel lists what writes back by itself, in every namespace; NFS by its device. An answer serves for a
        while, so that a tick over a thousand jobs asks some times and not a thousand.
        """
        if (now := time.monotonic()) > self._asked + _FRESH:
            try:
                devices = {name for name in os.listdir("/sys/class/bdi") if name.startswith("0:")}
            except FileNotFoundError:
                devices = {"?"}  # no sysfs here: it cannot be told
            self._foreign, self._asked = bool(devices - self.mounted()), now
        return self._foreign

    def is_ours(self, found: Id) -> bool:
        """Whether a mount namespace is this process's or that of the host's first one."""
        return found in self._tables()

    def mounted(self) -> frozenset[str]:
        """The devices that are mounted there."""
        now = [tables.mounts() for tables in self._tables().values()]
        before, devices = self._mounted
        # A table that has not changed is the very same list.
        if len(now) != len(before) or any(table is not old for table, old in zip(now, before, strict=True)):
            devices = frozenset(mount.device for table in now for mount in table)
            self._mounted = now, devices
        return devices

    def enter(self, job: str, parent: str | None) -> None:
        """A job begins to be read."""
        self._parents[job] = parent
        self._devices[job] = frozenset()

    def leave(self, job: str) -> None:
        """It is read no more."""
        self.has(job, frozenset())
        self._parents.pop(job, None)
        self._devices.pop(job, None)
        for key in [key for key in self._parted if key[0] == job]:
            del self._parted[key]

    def has(self, job: str, devices: frozenset[str]) -> None:
        """What superblocks of NFS a job's processes see."""
        for device in self._devices.get(job, devices) - devices:
            for other, theirs in self._devices.items():
                if device in theirs and not self._in(job, other):
                    self._parted[other, device] = job
        self._devices[job] = devices

    def sharers(self, device: str, job: str) -> list[str]:
        """The jobs that see it too, or did since this was asked last; less those inside this one, which it includes."""
        others = [other for other, devices in self._devices.items() if device in devices and not self._in(other, job)]
        parted = self._parted.pop((job, device), None)
        return others if parted is None else [*others, parted]

    def counted(self, device: str, superblock: "Superblock") -> None:
        """A job has counted it up to where it stands."""
        self._counted[device] = superblock

    def last_counted(self, device: str) -> "Superblock | None":
        """How far a superblock of this device number was counted for some job, which may have ended."""
        return self._counted.get(device)

    def close(self) -> None:
        """Give the host's tables back."""
        for tables in self._host.values():
            tables.close()
        self._host.clear()

    def _in(self, inner: str | None, job: str) -> bool:
        while inner is not None and inner != job:
            inner = self._parents.get(inner)
        return inner == job

    def _tables(self) -> Mapping[Id, Tables]:
        if not self._host:
            for pid in ("self", "1"):
                try:
                    tables = Tables(pid)
                except PermissionError:
                    continue  # a container's first process may have rights that we have not
                if self._host.setdefault(tables.id, tables) is not tables:
                    tables.close()
        return self._host


class Superblock:
    """One mounted file system that a job sees, and where its counters stood when they were read last."""

    __slots__ = ("born", "counted", "hosted", "label", "last")

    def __init__(self, label: str, born: float, last: Counts) -> None:
        self.label = label
        self.born = born  # CLOCK_MONOTONIC, the latest that it can have been
        self.last = last
        self.counted = False
        self.hosted = False  # at that reading the host had it too

    def is_still(self, born: float, counts: Counts) -> bool:
        """Whether this is the one read before: a device number is soon given again."""
        return born <= self.born + _ROUNDING and all(
            now >= before for now, before in zip(counts, self.last, strict=True)
        )


class NfsReader:
    """Reads one job's own NFS mounts. Totals by mount point, as the first of its processes seen with it sees it."""

    def __init__(
        self,
        host: NfsHost,
        *,
        job: str,
        parent: str | None,
        pids: Callable[[], Iterable[int]],
        age: Callable[[], float],
        note: Callable[[str], None],
        last: Readings,
    ) -> None:
        """`pids`: the job's processes less those of jobs inside it. `age`: s since it began.

        `last`: its totals so far, for a job that was read before by somebody who is gone.
        """
        self._host, self._job, self._pids, self._age, self._note = host, job, pids, age, note
        self._held: dict[Id, Tables] = {}
        self._looked = False  # at any process
        self._known: dict[str, Superblock] = {}
        # Outlives a call that raises: what was read before the bad table must not be lost.
        self._changed: Readings = {}
        self._totals: dict[str, list[int]] = {}
        for (metric, label), value in last.items():
            self._totals.setdefault(label, [0] * len(METRICS))[METRICS.index(metric)] = value
        # What stands in the totals from before this reader, until a superblock comes that it can be of.
        self._claimable = {label: tuple(totals) for label, totals in self._totals.items()}
        host.enter(job, parent)

    def changes(self) -> list[Readings]:
        """What changed since the last call, in one dict. Raises MalformedFile, OSError where a table cannot be read."""
        if not self._host.loaded():
            return []
        # At first in any case, so that what it mounts later in a namespace that it began in is seen to its end.
        if self._looked and not self._held and not self._host.foreign():
            return []
        deserted = self._look()
        if not self._held:
            return []
        try:
            self._host.has(self._job, self._devices())
            for device, stats in self._read():
                self._take(device, stats)
        finally:
            for tables in deserted:
                self._let_go(tables)
        changed, self._changed = self._changed, {}
        return [changed] if changed else []

    def close(self) -> None:
        """Let its namespaces go."""
        for tables in list(self._held.values()):
            self._let_go(tables)
        self._host.leave(self._job)

    def _look(self) -> list[Tables]:
        """Hold the namespaces that its processes are in; those in which no process is any more."""
        inhabited = set()
        for pid in self._pids():
            self._looked = True
            found = namespace(pid)
            if found is None or found in inhabited or self._host.is_ours(found):
                continue
            if found not in self._held:
                try:
                    tables = Tables(pid)
                except (FileNotFoundError, ProcessLookupError):
                    continue  # it ended, or is no process of this job any more
                except OSError as e:
                    if e.errno != errno.EINVAL:
                        raise
                    continue  # a zombie, which has no mounts any more
                if tables.id != found:
                    tables.close()
                    continue  # it moved on meanwhile: the next look finds it
                self._held[found] = tables
            inhabited.add(found)
        return [tables for found, tables in self._held.items() if found not in inhabited]

    def _let_go(self, tables: Tables) -> None:
        del self._held[tables.id]
        self._host.has(self._job, self._devices())
        tables.release(self._host.mounted())

    def _devices(self) -> frozenset[str]:
        return frozenset(mount.device for tables in self._held.values() for mount in _nfs(tables))

    def _read(self) -> Iterator[tuple[str, MountStats]]:
        """Each superblock once, with where it is mounted first."""
        seen = set()
        for tables in self._held.values():
            # The tables are two files with the same mounts in the same order; a mount may come between their readings.
            for _ in range(3):
                mounts = _nfs(tables)
                if not mounts:
                    break
                stats = parse_mountstats(tables.statistics(), tables.path)
                if [mount.point for mount in mounts] == [each.point for each in stats]:
                    for mount, each in zip(mounts, stats, strict=True):
                        if mount.device not in seen:
                            seen.add(mount.device)
                            yield mount.device, each
                    break

    def _take(self, device: str, stats: MountStats) -> None:
        born = time.monotonic() - stats.age
        known = self._known.get(device)
        if known is None or not known.is_still(born, stats.counts):
            known = self._known[device] = Superblock(stats.point, born, self._start(device, born, stats))
        known.born = born
        before, known.last = known.last, stats.counts
        if self._was_shared(device, known) or (known.counted and before == stats.counts):
            return
        totals = self._totals.setdefault(known.label, [0] * len(METRICS))
        known.counted = True
        self._host.counted(device, known)
        for index, metric in enumerate(METRICS):
            totals[index] += stats.counts[index] - before[index]
            self._changed[metric, known.label] = totals[index]

    def _start(self, device: str, born: float, stats: MountStats) -> Counts:
        """From where on a superblock that this reader has not seen before is counted."""
        claimed = self._claimable.pop(stats.point, None)
        counted = self._host.last_counted(device)
        if counted is not None and counted.is_still(born, stats.counts):
            return counted.last  # by another job, or by this one's last reader
        if stats.age > self._age():
            return stats.counts  # it is older than the job: what was done on it so far was done by others
        if claimed is None:
            return (0,) * len(METRICS)
        return tuple(min(pair) for pair in zip(claimed, stats.counts, strict=True))

    def _was_shared(self, device: str, known: Superblock) -> bool:
        """Whether others had it too at any time since it was read last, as far as we have seen."""
        before, known.hosted = known.hosted, device in self._host.mounted()
        if before or known.hosted:
            if known.counted:
                self._note(f"NFS mount {known.label} was mounted by the host too: it is counted up to then")
                known.counted = False
            return True
        if others := self._host.sharers(device, self._job):
            self._note(
                f"NFS mount {known.label} is shared with job {others[0]}: what is done on it then is not counted"
            )
            return True
        return False


def _nfs(tables: Tables) -> list[Mount]:
    return [mount for mount in tables.mounts() if mount.kind in _KINDS]
