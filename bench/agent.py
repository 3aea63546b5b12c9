"""`python -m bench.agent`: what the agent costs with 1000 jobs standing, and how fast it answers meanwhile.

A real `acctd serve` with its own network, state and cgroup base; a sleeping process in each job's own pipe; a tick each
10 s over five minutes. Beside it, on the same jobs in the same minutes, collectd, Netdata and a psutil script
(bench/peers), and the C program of bench/poll.py that reads the very files the agent has open. CPU time is the kernel's
account of each process, with the children it has waited for, taken once all have found the jobs.

Then, without the peers, the latency of Usage: 20 calls a second on random jobs, over a kept connection and over fresh
ones in turns; first while the agent ticks by itself, then while ticks follow each other without a pause, so that every
call meets one.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import poll
from bench.peers.collectors import PEERS, MissingError, Peer, Sight
from bench.report import machine, table
from bench.served import Connection, Served, Weight, standing

GOALS = (("CPU, % of a core", 1.0), ("resident, MiB", 64.0), ("Usage p99 while ticking, ms", 10.0))
_RATE = 20.0  # Usage calls a second


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done."""

    jobs: int
    network: str
    backend: str
    interval: float  # s
    seconds: float  # of measuring
    settle: float  # s that the peers may take to find the jobs
    latency: float  # s of calls for each kind of ticking


@dataclass(frozen=True, slots=True)
class Costs:
    """One program over the measured time."""

    name: str
    percent: float  # of a core
    weight: Weight  # at the end
    start: float  # CPU s until measuring began
    found: float  # s until it had found all jobs
    sight: Sight

    def row(self) -> list[object]:
        return [
            self.name, f"{self.percent:.2f}", f"{self.weight.resident / 1024:.1f}", f"{self.weight.peak / 1024:.1f}",
            f"{self.start:.1f}", f"{self.found:.0f}", self.sight.jobs, self.sight.numbers, self.sight.network,
        ]  # fmt: skip


def measure(served: Served, plan: Plan) -> tuple[list[Costs], list[float], list[str]]:
    """Everybody's costs over the same time, the agent's ticks in s, and what could not be measured."""
    peers: list[Peer] = []
    missing = []
    with contextlib.ExitStack() as stack:
        for name, run in PEERS.items():
            try:
                peer = run(served, plan.interval)
            except MissingError as e:
                missing.append(f"{name}: {e}")
                continue
            stack.callback(_end, peer)
            peers.append(peer)
        floor = stack.enter_context(_floor(served))
        found = _settle(peers, plan)
        missing += [f"{peer.name}: had not found all jobs {plan.settle:g} s after its start" for peer in peers
                    if peer.name not in found]  # fmt: skip
        before = {peer.name: Weight.of(peer.process.pid) for peer in peers}
        agent = Weight.of(served.pid)
        began = time.monotonic()
        ticks, floors = _watch(served, floor, plan)
        took = time.monotonic() - began
        weights = {peer.name: Weight.of(peer.process.pid) for peer in peers}
        now = Weight.of(served.pid)
        costs = [Costs("acctd", (now.cpu - agent.cpu) / took * 100, now, agent.cpu, 0.0, _own_sight(served))]
        for peer in peers:
            spent = weights[peer.name].cpu - before[peer.name].cpu
            try:
                sight = peer.look()
            except (MissingError, OSError) as e:
                missing.append(f"{peer.name}: {e}")
                sight = Sight(0, 0, 0)
            start, late = before[peer.name].cpu, found.get(peer.name, plan.settle)
            costs.append(Costs(peer.name, spent / took * 100, weights[peer.name], start, late, sight))
        files = percentile(floors, 50) / 10 / plan.interval
        costs.append(Costs("C, the agent's files", files, Weight.of(floor.pid), 0.0, 0.0, Sight(plan.jobs, 0, 0)))
    return costs, ticks, missing


def _watch(served: Served, floor: "Floor", plan: Plan) -> tuple[list[float], list[float]]:
    """The agent's ticks, s, asked for once an interval; the C program's, CPU ms."""
    ticks: list[float] = []
    floors: list[float] = []
    with served.connect() as connection:
        seen = connection.call("Cost")["cost"]["ticks"]
        due = time.monotonic()
        end = due + plan.seconds
        while (due := due + plan.interval) <= end or not ticks:
            time.sleep(max(0.0, due - time.monotonic()))
            cost = connection.call("Cost")["cost"]
            if cost["ticks"] != seen:
                seen = cost["ticks"]
                ticks.append(cost["last_tick_seconds"])
            floors.append(floor.tick())
    return ticks, floors


def latency(served: Served, seconds: float, *, back_to_back: bool) -> tuple[list[float], ...]:
    """Usage over a kept connection and over fresh ones, and ticks meanwhile if they are ours; all in s."""
    kept: list[float] = []
    fresh: list[float] = []
    ticks: list[float] = []
    over = threading.Event()

    def tick() -> None:
        with served.connect() as connection:
            while not over.is_set():
                if took := connection.call("Snapshot")["seconds"]:  # 0: the agent's own was under way
                    ticks.append(took)

    ticker = threading.Thread(target=tick, name="ticker")
    if back_to_back:
        ticker.start()
    try:
        with served.connect() as connection:
            due = time.monotonic()
            end = due + seconds
            while due < end or not fresh:
                job = random.choice(served.jobs)  # noqa: S311  # no secret
                kept.append(_call(connection, job))
                began = time.perf_counter()
                with served.connect() as other:
                    _call(other, job)
                fresh.append(time.perf_counter() - began)
                due += 2 / _RATE
                time.sleep(max(0.0, due - time.monotonic()))
    finally:
        over.set()
        if back_to_back:
            ticker.join()
    return kept, fresh, ticks


def _call(connection: Connection, job: str) -> float:
    began = time.perf_counter()
    connection.call("Usage", job=job)
    return time.perf_counter() - began


class Floor:
    """The C program of bench.poll, on the files that the agent keeps open; a context manager."""

    def __init__(self, built: Path, paths: list[str]) -> None:
        counters = built / "counters"
        counters.write_text("".join(f"{poll.listed(path)}\n" for path in paths))
        self._peer = poll.Peer(built / "poll", counters)
        self.pid = self._peer._process.pid
        self.tick()

    def __enter__(self) -> "Floor":
        return self

    def __exit__(self, *_: object) -> None:
        self._peer.close()

    def tick(self) -> float:
        """CPU time of reading all of them once, ms."""
        return self._peer.tick()


@contextlib.contextmanager
def _floor(served: Served) -> Iterator[Floor]:
    with poll.programs() as built:
        opened = [os.readlink(entry) for entry in Path(f"/proc/{served.pid}/fd").iterdir() if entry.is_symlink()]
        files = sorted(path for path in opened if f"/{served.base}/job_" in path)
        with Floor(built, files) as floor:
            yield floor


def _settle(peers: list[Peer], plan: Plan) -> dict[str, float]:
    """Wait until each peer has found all jobs and read them, or may take no longer. s until found, by name."""
    began = time.monotonic()
    found: dict[str, float] = {}
    while len(found) < len(peers) and time.monotonic() - began < plan.settle:
        time.sleep(1.0)
        for peer in peers:
            with contextlib.suppress(MissingError, OSError):
                if peer.name not in found and peer.found() >= plan.jobs:
                    found[peer.name] = time.monotonic() - began
    time.sleep(3 * plan.interval)
    return found


def _own_sight(served: Served) -> Sight:
    """What the agent itself shows."""
    jobs = served.call("List")["jobs"]
    totals = [(metric, label) for job in jobs for metric, labels in job["totals"].items() for label in labels]
    return Sight(len(jobs), len(totals), sum(metric.startswith("network") for metric, _ in totals))


def _end(peer: Peer) -> None:
    peer.process.send_signal(signal.SIGTERM)
    try:
        peer.process.wait(30)
    except subprocess.TimeoutExpired:
        peer.process.kill()
        peer.process.wait()


def percentile(values: Sequence[float], share: int) -> float:
    """The value that `share` of a hundred do not exceed."""
    return sorted(values)[max(0, -(-len(values) * share // 100) - 1)]


def _times(name: str, values: Sequence[float]) -> list[object]:
    """A row of times given in s, shown in ms."""
    shown = [f"{percentile(values, share) * 1000:.2f}" for share in (50, 99, 100)] if values else ["0", "0", "0"]
    return [name, len(values), *shown]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.agent", description="the agent's cost with many jobs")
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--network", choices=("nat", "host", "none"), default="nat")
    parser.add_argument("--backend", choices=("auto", "nftables", "iptables"), default="auto")
    parser.add_argument("--seconds", type=float, default=300.0, help="of measuring, after all have settled")
    parser.add_argument("--interval", type=float, default=10.0, help="between ticks, and of the peers, s")
    parser.add_argument("--quick", action="store_true", help="small figures: does it run at all?")
    options = parser.parse_args()
    plan = Plan(
        options.jobs, options.network, options.backend, options.interval, options.seconds, settle=600.0, latency=60.0
    )
    if options.quick:
        plan = Plan(5, options.network, options.backend, 1.0, 3.0, settle=30.0, latency=1.0)
    with standing(plan.jobs, network=plan.network, backend=plan.backend, interval=plan.interval) as served:
        costs, ticks, missing = measure(served, plan)
        usual = latency(served, plan.latency, back_to_back=False)
        dense = latency(served, plan.latency, back_to_back=True)
        if troubles := served.log().count(" trouble: "):
            missing.append(f"acctd: logged trouble {troubles} times")
        _print(plan, costs, ticks, usual, dense)
        for sentence in missing:
            print(f"\nNot as it should be: {sentence}.")


def _print(
    plan: Plan, costs: list[Costs], ticks: list[float], usual: tuple[list[float], ...], dense: tuple[list[float], ...]
) -> None:
    print(f"{plan.jobs} jobs with a sleeping process each, network {plan.network}, read each {plan.interval:g} s, "
          f"over {plan.seconds:g} s. {machine()}\n")  # fmt: skip
    head = ["program", "CPU, %", "RSS, MiB", "peak, MiB", "start, CPU s", "found, s", "jobs", "numbers", "of network"]
    print(table(head, [each.row() for each in costs]))
    print()
    rows = [_times("ticks each interval", ticks), _times("ticks back to back", dense[2])]
    rows += [_times("Usage, kept connection", usual[0]), _times("Usage, fresh connection", usual[1])]
    rows += [_times("Usage, kept, ticks back to back", dense[0])]
    rows += [_times("Usage, fresh, ticks back to back", dense[1])]
    print(table(["ms", "number", "p50", "p99", "highest"], rows))
    print()
    worst = max(percentile(values, 99) for values in (*usual[:2], *dense[:2])) * 1000
    seen = (costs[0].percent, costs[0].weight.resident / 1024, worst)
    print(table(["goal", "at most", "seen"], [[n, g, f"{v:.2f}"] for (n, g), v in zip(GOALS, seen, strict=True)]))


if __name__ == "__main__":
    main()
