"""`python -m bench.lifecycle`: set-up and tear-down of one job, among 0, 100 and 1000 others, against a shell script.

What is timed is all that acctd does around a job's command: Agent.create, begin and finish, the ledger's commits, the
last reading and the record included, which the script (lifecycle.sh) has nothing of. A round is one job each of the
script, the lean script and both back ends, one after the other, so that noise meets them all. The script's jobs stand
among those of the iptables back end: both use the legacy tables.
"""

import argparse
import contextlib
import itertools
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from acctd import readers
from acctd.agent import Agent
from acctd.cgroup import limits as limit_files
from acctd.cgroup.driver import JobCgroups
from acctd.kernel import conntrack
from acctd.ledger import Ledger
from acctd.model import JobSpec
from acctd.network import pipe
from bench.report import machine, median, spread, table
from bench.world import LIMITS, World, settle

SCRIPT = Path(__file__).with_suffix(".sh")
STYLES = ("plain", "lean")


class Script:
    """The peer, on the iptables back end's node. Its cgroups lie below a base that is there before it is timed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._serial = itertools.count(1)
        layout = world.agent.layout
        # A job's cgroups that stay empty, to give the script's a parent with controllers and a cpuset.
        self._base = JobCgroups(layout, world.base, "script")
        self._base.create(LIMITS)

    def close(self) -> None:
        if not self._base.remove():
            raise RuntimeError(f"left behind: cgroups below {self.world.base}/script")

    def whole_life(self, style: str) -> None:
        number = next(self._serial)
        environ = self._environ(number)
        for verb in ("create", "delete"):
            subprocess.run(["sh", SCRIPT, verb, style], env=environ, check=True)

    def _environ(self, number: int) -> dict[str, str]:
        job = f"{self.world.base}-{number}"
        mine = JobCgroups(self._base.layout, f"{self._base.base}/script", job)
        internal = [network for cls in self.world.agent.config.network.classes for network in cls.networks]
        return {
            "PATH": os.environ["PATH"],
            "JOB": job,
            "IFNAME": f"sc{number:x}",
            "OUTER4": str(IPv4Address("10.182.0.0") + 2 * number),
            "INNER4": str(IPv4Address("10.182.0.1") + 2 * number),
            "OUTER6": str(IPv6Address("fd61:6363:7465::") + 2 * number),
            "INNER6": str(IPv6Address("fd61:6363:7465::1") + 2 * number),
            "INTERNAL4": " ".join(str(network) for network in internal if network.version == 4),
            "INTERNAL6": " ".join(str(network) for network in internal if network.version == 6),
            "CGROUPS": " ".join(str(directory.path) for _, directory in mine.all()),
            "SETTINGS": " ".join(_settings(mine)),
        }


def _settings(cgroups: JobCgroups) -> list[str]:
    """The files and values that acctd writes for LIMITS, a v1 cpuset's inheritance included."""
    words = []
    memory = cgroups.layout.of("memory")
    settings = limit_files.v1_settings if memory and memory.version == 1 else limit_files.v2_settings
    for setting in settings(LIMITS):
        if where := cgroups.directory(setting.controller):
            words += [f"{where.path}/{setting.file}", setting.value]
    cpuset = cgroups.layout.of("cpuset")
    if cpuset and cpuset.version == 1 and (where := cgroups.directory("cpuset")):
        for file in ("cpuset.cpus", "cpuset.mems"):
            words += [f"{where.path}/{file}", (where.parent.read(file) or b"").decode().strip()]
    return words


def timed(work: Callable[[], object]) -> float:
    """Wall time in ms."""
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1000


def measure(worlds: list[World], script: Script, rounds: int) -> dict[str, list[float]]:
    """ms a job, by name, over so many rounds."""
    times: dict[str, list[float]] = {name: [] for name in (*STYLES, *(world.backend for world in worlds))}
    for number in range(-1, rounds):  # one round to warm up
        for style in STYLES:
            with script.world.entered():
                took = timed(lambda style=style: script.whole_life(style))  # type: ignore[misc]
            if number >= 0:
                times[style].append(took)
        for world in worlds:
            spec = world.spec()
            with world.entered():
                took = timed(lambda world=world, spec=spec: world.whole_life(spec))  # type: ignore[misc]
            settle()  # what the kernel finishes later is in the sustained rate, not in somebody else's round
            if number >= 0:
                times[world.backend].append(took)
    return times


def sustained(worlds: list[World], script: Script, jobs: int) -> dict[str, float]:
    """Jobs a second, back to back, until the kernel has finished the last one's link too."""
    rates: dict[str, float] = {}
    for style in STYLES:

        def script_run(style: str = style) -> None:
            for _ in range(jobs):
                script.whole_life(style)

        with script.world.entered():
            rates[style] = jobs * 1000 / timed(script_run)
    for world in worlds:
        specs = [world.spec() for _ in range(jobs)]

        def run(world: World = world, specs: list[JobSpec] = specs) -> None:
            for spec in specs:
                world.whole_life(spec)
            settle()

        with world.entered():
            rates[world.backend] = jobs * 1000 / timed(run)
    return rates


@contextlib.contextmanager
def stopwatches(world: World) -> Iterator[dict[str, list[float]]]:
    """Wraps each step of a job's life in a clock; gives step -> ms, in the order of a life."""
    chains = type(world.agent._backend(world.backend, world.agent.pools))
    steps: list[tuple[str, object, tuple[str, ...]]] = [
        ("ledger", Ledger, ("open_job", "begin", "sign_off", "forget")),
        ("cgroups", JobCgroups, ("create", "kill", "remove")),
        ("chain", chains, ("add", "read", "remove")),
        ("pipe", pipe, ("make", "remove")),
        ("agent", Agent, ("_count_block_io", "take")),
        ("readers", readers, ("open_for",)),
        ("conntrack", conntrack, ("forget",)),
    ]
    times: dict[str, list[float]] = {}
    with contextlib.ExitStack() as undo:
        for part, owner, names in steps:
            for name in names:
                raw = vars(owner)[name]
                undo.callback(setattr, owner, name, raw)
                log = times.setdefault(f"{part}: {name.strip('_').replace('_', ' ')}", [])
                setattr(owner, name, _clocked(raw, log))
        yield times


def _clocked(raw: object, log: list[float]) -> object:
    work: Callable[..., object] = raw.__func__ if isinstance(raw, staticmethod) else raw  # type: ignore[assignment]

    def run(*args: object, **options: object) -> object:
        start = time.perf_counter()
        try:
            return work(*args, **options)
        finally:
            log.append((time.perf_counter() - start) * 1000)

    return staticmethod(run) if isinstance(raw, staticmethod) else run


def show_steps(worlds: list[World], rounds: int) -> None:
    columns: list[dict[str, list[float]]] = []
    for world in worlds:
        with world.entered(), stopwatches(world) as times:
            whole = []
            for _ in range(rounds):
                spec = world.spec()
                whole.append(timed(lambda world=world, spec=spec: world.whole_life(spec)))  # type: ignore[misc]
                settle()
            columns.append({**times, "whole": whole})
    names = list(columns[0])
    rows = [[name, *(f"{median(column[name]):.2f}" for column in columns)] for name in names]
    print(table(["step, ms (median)", *(world.backend for world in worlds)], rows), end="\n\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.lifecycle", description="A job's set-up and tear-down")
    parser.add_argument("--standing", type=int, nargs="+", default=[0, 100, 1000], help="jobs standing meanwhile")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--burst", type=int, default=100, help="jobs back to back for the sustained rate")
    parser.add_argument("--steps", action="store_true", help="also show where the time goes")
    parser.add_argument("--quick", action="store_true", help="small figures: does it run at all?")
    options = parser.parse_args()
    if options.quick:
        options.standing, options.rounds, options.burst, options.steps = [0, 2], 2, 2, True
    print(f"Set-up and tear-down of one job, ms: median (90th percentile) of {options.rounds}. {machine()}\n")
    rows, rates, medians = [], [], []
    with World("nftables") as nft, World("iptables") as ipt:
        worlds = [nft, ipt]
        script = Script(ipt)
        try:
            for number in sorted(options.standing):
                for world in worlds:
                    world.stand(number, read=False)
                times = measure(worlds, script, options.rounds)
                middle = {name: median(values) for name, values in times.items()}
                medians.append(middle)
                rows.append([
                    number, *(spread(times[name]) for name in times),
                    *(f"{middle[world.backend] / middle['plain']:.2f}" for world in worlds),
                    *(f"{middle[world.backend] / middle['lean']:.2f}" for world in worlds),
                ])  # fmt: skip
                rate = sustained(worlds, script, options.burst)
                rates.append([number, *(f"{value:.1f}" for value in rate.values())])
                if options.steps:
                    print(f"{number} standing:\n")
                    show_steps(worlds, max(options.rounds // 2, 2))
        finally:
            with ipt.entered():
                script.close()
    print(table(["standing", "script", "lean script", "nftables", "iptables",
                 "nft/script", "ipt/script", "nft/lean", "ipt/lean"], rows))  # fmt: skip
    first, last = medians[0], medians[-1]
    growth = ", ".join(f"{name} {last[name] / first[name]:.2f}" for name in first)
    print(f"\nGrowth from {rows[0][0]} to {rows[-1][0]} standing: {growth}\n")
    print(f"Jobs a second, {options.burst} back to back, until the kernel has finished the last link:\n")
    print(table(["standing", "script", "lean script", "nftables", "iptables"], rates))


if __name__ == "__main__":
    main()
