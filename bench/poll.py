"""`python -m bench.poll`: CPU time of one tick over 500 jobs, against a C program that reads the very same files.

A tick is Agent.poll of jobs that share the host's network: every counter file read, what changed parsed and metered.
The chains' part is bench.chains. The C program (poll.c) keeps the same files open, preads them and takes the same
numbers out of them; it keeps no totals. Both are compiled or imported, opened and warm before the first tick.

idle: one sleeping process a job, so nothing changes between ticks. busy: before every tick of either, each job's
process (busy.c) has touched or freed 1 MiB, used 0.1 ms of CPU and written a block past the page cache; each side thus
pays for the kernel's own summing up of what is new, and starts with caches full of other things. They take turns, so
noise meets both.
"""

import argparse
import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from acctd.job import Job
from bench.report import machine, median, spread, table
from bench.world import World, enough_descriptors
from collectors.reader import Reader

HERE = Path(__file__).parent

_STAT = {
    "memory.stat": "total_cache total_rss total_shmem total_swap anon file kernel shmem",
    "memory.oom_control": "oom_kill",
    "memory.events": "max oom_kill",
    "cpu.stat": "user_usec system_usec nr_periods nr_throttled throttled_usec throttled_time",
    "cpuacct.stat": "user system",
    "pids.events": "max",
}
_PRESSURE = {"cpu.pressure": "some", "io.pressure": "some full", "memory.pressure": "some full"}


def listed(path: str) -> str:
    """One file as poll.c wants it: kind, path, the names that acctd takes out of it."""
    name = os.path.basename(path)
    if name in _STAT:
        return f"s {path} {_STAT[name]}"
    if name in _PRESSURE:
        return f"p {path} {_PRESSURE[name]}"
    if name == "io.stat":
        return f"k {path} rbytes wbytes rios wios dbytes"
    if name.startswith("blkio."):
        return f"d {path} Read Write Discard"
    return f"n {path}"


def files(jobs: list[Job]) -> list[str]:
    """Every counter file of a cgroup that the agent keeps open for these jobs."""
    readers = [reader for job in jobs for reader in job.readers if isinstance(reader, Reader)]
    return [source.file.path for reader in readers for source in reader._sources]


class Peer:
    """The C program; a context manager."""

    def __init__(self, program: Path, counters: Path) -> None:
        self._process = subprocess.Popen([program, counters], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def tick(self) -> float:
        """CPU time of one, ms."""
        return int(_answer(self._process)) / 1e6

    def close(self) -> None:
        _end(self._process)


class Crowd:
    """A process in every job; a context manager's content."""

    def __init__(self, program: Path, directory: Path, jobs: list[Job]) -> None:
        self._process = subprocess.Popen([program, directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        paths = "".join("\n".join(f"{d.path}/cgroup.procs" for _, d in job.cgroups.all()) + "\n\n" for job in jobs)
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(f"{paths}.\n".encode())
        stdin.flush()
        if stdout.read(1) != b"r":
            raise RuntimeError("the jobs' processes could not be started; see above")

    def work(self) -> None:
        """Let every job use something of everything."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(b"g")
        stdin.flush()
        if stdout.read(1) != b"r":
            raise RuntimeError("a job's process failed; see above")

    def close(self) -> None:
        _end(self._process)


def _answer(process: "subprocess.Popen[bytes]") -> bytes:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"t")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("the C program gave up; see above")
    return line


def _end(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    process.stdout.close()
    process.wait()


@contextlib.contextmanager
def programs() -> Iterator[Path]:
    """A directory with poll and busy compiled in it."""
    with tempfile.TemporaryDirectory(prefix="acctdbench-") as name:
        directory = Path(name)
        for program in ("poll", "busy"):
            subprocess.run(["gcc", "-O2", "-o", directory / program, HERE / f"{program}.c"], check=True)
        yield directory


def measure(world: World, peer: Peer, crowd: Crowd, ticks: int, *, busy: bool) -> tuple[list[float], list[float]]:
    """CPU ms a tick: ours, the peer's."""
    ours, theirs = [], []
    for number in range(-2, ticks):
        if busy:
            crowd.work()
        before = time.process_time_ns()
        world.agent.poll(world.standing)
        took = (time.process_time_ns() - before) / 1e6
        if busy:
            crowd.work()
        other = peer.tick()
        if number >= 0:
            ours.append(took)
            theirs.append(other)
    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.poll", description="CPU time of one tick")
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--ticks", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="small figures: does it run at all?")
    options = parser.parse_args()
    if options.quick:
        options.jobs, options.ticks = 5, 3
    enough_descriptors()
    rows = []
    with contextlib.ExitStack() as stack:
        built = stack.enter_context(programs())
        world = stack.enter_context(World("auto"))
        world.stand(options.jobs, network="host")
        counters = built / "counters"
        paths = files(world.standing)
        counters.write_text("".join(f"{listed(path)}\n" for path in paths))
        crowd = Crowd(built / "busy", built, world.standing)
        stack.callback(crowd.close)
        peer = Peer(built / "poll", counters)
        stack.callback(peer.close)
        each = len(paths) // options.jobs
        print(f"CPU time of one tick over {options.jobs} jobs, {each} files each, ms: median (90th percentile) of "
              f"{options.ticks}. {machine()}\n")  # fmt: skip
        for name in ("idle", "busy"):
            ours, theirs = measure(world, peer, crowd, options.ticks, busy=name == "busy")
            ratio, a_job = median(ours) / median(theirs), median(ours) * 1000 / options.jobs
            rows.append([name, spread(ours), spread(theirs), f"{ratio:.2f}", f"{a_job:.0f}"])
    print(table(["jobs", "acctd", "C", "ratio", "acctd, us a job"], rows))


if __name__ == "__main__":
    main()
