"""`python -m bench.bombs`: 100 fork bombs in a row, with a limit on processes and without, each ended by the agent.

A job of its own for each: a C program that does nothing but fork, and so does each child. After half a second `Kill` is
called, as `acctd kill` does; timed is from the call to its answer, which says that nobody is left, and that is held
against the kernel's own lists. Then the job is finished. At the end no cgroup, process, rule or lease may be left; what
is not so ends the benchmark with an error. A memory limit of 64 MiB bounds what no limit on processes does, and few CPU
shares keep the host usable: never raise either on a machine that others use.
"""

import argparse
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from acctd.cgroup.driver import JobCgroups
from acctd.cgroup.layout import discover
from bench.report import machine, median, table
from bench.served import Connection, Served
from bench.storm import leftovers

PIDS = 200
LIMITS = {"memory": 64 << 20, "cpu_shares": 128}
_FUSE = 0.5  # s that a bomb has
_SOURCE = Path(__file__).with_name("bomb.c")


@dataclass(frozen=True, slots=True)
class Blast:
    """One bomb that is over."""

    processes: int  # as it was ended
    kill: float  # s from the call to the answer
    finish: float  # s


def explode(served: Served, connection: Connection, name: str, bomb: Path, limits: dict[str, int]) -> Blast:
    """Let one bomb grow, and end it. Raises RuntimeError where it did not grow or somebody is left."""
    connection.call("Create", job=name, network="none", limits=limits)
    job = JobCgroups(discover(), served.base, f"job_{name}")
    first = subprocess.Popen(["sh", "-c", 'read -r _ && exec "$0"', str(bomb)], stdin=subprocess.PIPE)
    try:
        connection.call("Attach", job=name, pid=first.pid)
        assert first.stdin is not None
        with first.stdin as fuse:
            fuse.write(b"\n")
        time.sleep(_FUSE)
        grown = len(job.procs())
        began = time.perf_counter()
        survivors = connection.call("Kill", job=name)["survivors"]
        killed = time.perf_counter()
        if survivors or (left := job.procs()):
            raise RuntimeError(f"{name}: processes {survivors or left} are left")
        if grown < 2:
            raise RuntimeError(f"{name} did not grow: is a limit of the user's or the host's in the way?")
        connection.call("Finish", job=name, exit_signal=9)
        return Blast(grown, killed - began, time.perf_counter() - killed)
    finally:
        first.kill()  # it is in no job if Attach failed
        first.wait()


def measure(served: Served, bomb: Path, prefix: str, limits: dict[str, int], number: int) -> list[Blast]:
    """So many bombs, one after the other."""
    with served.connect() as connection:
        return [explode(served, connection, f"{prefix}{n}", bomb, limits) for n in range(number)]


def row(name: str, blasts: Sequence[Blast]) -> list[object]:
    kills = sorted(blast.kill * 1000 for blast in blasts)
    p99 = kills[-(-len(kills) * 99 // 100) - 1]
    processes = [blast.processes for blast in blasts]
    return [
        *(name, len(blasts), f"{median(processes):.0f}", max(processes)),
        *(f"{median(kills):.1f}", f"{p99:.1f}", f"{kills[-1]:.1f}"),
        f"{median([blast.finish * 1000 for blast in blasts]):.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.bombs", description="fork bombs, and how long they take to end"
    )
    parser.add_argument("--bombs", type=int, default=100, help="of each kind")
    parser.add_argument("--quick", action="store_true", help="three of each: does it run at all?")
    options = parser.parse_args()
    if options.quick:
        options.bombs = 3
    with tempfile.TemporaryDirectory(prefix="acctdbench-") as directory, Served() as served:
        bomb = Path(directory) / "bomb"
        subprocess.run(["gcc", "-O2", "-o", bomb, _SOURCE], check=True)
        rows = [
            row(f"pids limit {PIDS}", measure(served, bomb, "limited", LIMITS | {"pids": PIDS}, options.bombs)),
            row("no pids limit", measure(served, bomb, "free", LIMITS, options.bombs)),
        ]
        if left := leftovers(served):
            raise RuntimeError(f"left behind: {'; '.join(left)}")
    print(f"From the call to nobody left, ms; each bomb had {_FUSE} s and {LIMITS['memory'] >> 20} MiB. {machine()}\n")
    print(table(["fork bombs", "number", "processes", "most", "p50", "p99", "highest", "then finish"], rows))
    print("\nEach is ended, and nothing is left.")


if __name__ == "__main__":
    main()
