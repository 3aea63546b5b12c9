"""`python -m bench.chains`: reading every chain of 500 and 1000 jobs, IPv4 and IPv6, against programs that list them.

Ours is the back end's read(): bytes and packets by rule, both IP versions summed, as Python numbers. The peers only
write their text; nobody parses it here, which whoever used them would have to do as well. Chains without jobs: what is
read is the same. first: a new reader, as after a restart. changed: a job came since the last read. same: none did; only
counters may have moved.
"""

import argparse
import resource
import subprocess
import time
from collections.abc import Callable
from functools import partial

from acctd.network.backend import PREFIX, ChainPlan, Chains, Pools
from acctd.network.probe import open_backend
from bench.report import machine, spread, table
from bench.world import World

PEERS = {
    "nftables": [
        ("nft -j list table inet acctd", [["nft", "-j", "list", "table", "inet", "acctd"]]),
        ("nft -j list ruleset", [["nft", "-j", "list", "ruleset"]]),
    ],
    "iptables": [("ip(6)tables-legacy-save -c", [["iptables-legacy-save", "-c"], ["ip6tables-legacy-save", "-c"]])],
}


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU time in ms; CPU is user and system time of this process and of the children it has waited for."""
    before, start = _cpu(), time.perf_counter()
    work()
    wall = time.perf_counter() - start
    return wall * 1000, (_cpu() - before) * 1000


def _cpu() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run(commands: list[list[str]]) -> None:
    for command in commands:
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


class Bench:
    """One back end's chains on a node of their own."""

    def __init__(self, world: World) -> None:
        self._world = world
        config = world.agent.config.network
        self._classes, self._ipv6 = config.classes, config.pool6 is not None
        self._pools = Pools(config.pool4, config.pool6)
        self._chains: Chains = open_backend(world.backend, self._pools)
        self._jobs = 0

    def close(self) -> None:
        self._chains.close()

    def fill(self, jobs: int) -> None:
        while self._jobs < jobs:
            self._jobs += 1
            self._chains.add(self._plan(self._jobs))

    def measure(self, rounds: int) -> dict[str, list[tuple[float, float]]]:
        """(wall, CPU) by what is read and how, in rounds of all."""
        times: dict[str, list[tuple[float, float]]] = {}

        def log(name: str, work: Callable[[], object]) -> None:
            times.setdefault(name, []).append(measured(work))

        extra = self._plan(self._jobs + 1)
        for _ in range(rounds):
            fresh = open_backend(self._world.backend, self._pools)
            log("acctd, first", fresh.read)
            fresh.close()
            self._chains.add(extra)
            log("acctd, changed", self._chains.read)
            self._chains.remove(extra)
            self._chains.read()
            log("acctd, same", self._chains.read)
            if len(self._chains.read()) != self._jobs:
                raise RuntimeError(f"{len(self._chains.read())} chains read where {self._jobs} are")
            for name, commands in PEERS[self._world.backend]:
                log(name, partial(run, commands))
        return times

    def _plan(self, number: int) -> ChainPlan:
        # As the agent names them: reversed, so that a tree of chains on name prefixes fills evenly.
        return ChainPlan(f"JOB_{number}", PREFIX + f"{number:04x}"[::-1], self._classes, self._ipv6)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.chains", description="Reading all chains")
    parser.add_argument("--jobs", type=int, nargs="+", default=[500, 1000])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="small figures: does it run at all?")
    options = parser.parse_args()
    if options.quick:
        options.jobs, options.rounds = [2, 4], 2
    print(f"Reading all chains, ms: median (90th percentile) of {options.rounds}. {machine()}\n")
    rows = []
    for backend in PEERS:
        with World(backend) as world, world.entered():
            bench = Bench(world)
            try:
                for jobs in sorted(options.jobs):
                    bench.fill(jobs)
                    for name, pairs in bench.measure(options.rounds).items():
                        wall, cpu = ([pair[part] for pair in pairs] for part in (0, 1))
                        rows.append([f"{backend}: {name}", jobs, spread(wall), spread(cpu)])
            finally:
                bench.close()
    print(table(["what", "jobs", "wall", "CPU"], rows))


if __name__ == "__main__":
    main()
