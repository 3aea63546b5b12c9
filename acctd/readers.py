"""Which collectors read a job, by what its host has: opened here, read by the agent.

Floor 4. Opens and closes; meters nothing.
"""

from collections.abc import Iterator

from acctd.job import Job, boottime, cgroup_name
from acctd.kernel import procs
from acctd.metrics import CPU_SYSTEM, CPU_USER, NFS
from collectors.blkio import BlkioReader, OwnBlkioReader
from collectors.cpu import CpuReader
from collectors.memory import MemoryReader
from collectors.nfs import NfsHost, NfsReader
from collectors.pids import PidsReader
from collectors.pressure import PressureReader


def open_for(job: Job, nfs: NfsHost) -> None:
    """Open what the job is read from."""
    directory = job.cgroups.directory
    if memory := directory("memory"):
        job.readers.append(MemoryReader(memory))
    # Where v2 is mounted too, its cpu.stat has the kernel's own exact split of user and system time; v1 samples it.
    unified = job.cgroups.unified
    cpuacct = unified if unified and unified.has("cpu.stat") else directory("cpuacct")
    if cpu := directory("cpu") or cpuacct:
        last = job.meter.last((CPU_USER, CPU_SYSTEM))
        job.readers.append(CpuReader(cpu=cpu, cpuacct=cpuacct or cpu, last=last))
    if blkio := directory("blkio"):
        bfq = "bfq" in procs.schedulers()
        own = job.row.terms.families and not blkio.has("io.stat")
        job.readers.append(OwnBlkioReader(blkio, cgroup_name(""), bfq=bfq) if own else BlkioReader(blkio, bfq=bfq))
    if pids := directory("pids"):
        job.readers.append(PidsReader(pids))
    if unified:
        job.readers.append(PressureReader(unified))
    job.readers.append(
        NfsReader(
            nfs,
            job=job.spec.id,
            parent=job.spec.parent,
            pids=lambda: _own_processes(job),
            age=lambda: (boottime() - job.row.boot_ns) / 1e9,
            note=job.note,
            last=job.meter.last(NFS),
        )
    )


def _own_processes(job: Job) -> Iterator[int]:
    """Its pids less those of families inside it, as one hierarchy tells them."""
    hierarchy = job.cgroups.layout.of("pids") or job.cgroups.layout.hierarchies[0]
    waiting = [hierarchy.job(job.cgroups.base, job.cgroups.name)]
    while waiting:
        cgroup = waiting.pop()
        yield from cgroup.procs()
        waiting += [child for child in cgroup.children() if not child.parts[-1].startswith(cgroup_name(""))]
