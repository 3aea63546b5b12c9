"""`python -m bench.hook`: wall time of one `acctd-hook usage`, as a starter pays it at each of its snapshots.

The installed command against what the same interpreter needs to do nothing, against a Python client written the usual
way (argparse, json, socket), and against `systemctl show`, which asks systemd about a unit as this asks the agent about
a job. All of them once a round, in turns, so that noise meets them all. The last row is the agent's own part: the call
alone, over a kept connection.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bench.peers.manager import Manager, ManagerError
from bench.report import machine, median, spread, table
from bench.served import standing

GOAL = 2.0  # times what `python3 -c pass` takes

_CLIENT = """\
import argparse, json, socket
parser = argparse.ArgumentParser()
parser.add_argument("--socket"); parser.add_argument("--job")
options = parser.parse_args()
with socket.socket(socket.AF_UNIX) as agent:
    agent.connect(options.socket)
    agent.sendall(json.dumps({"method": "org.acctd.Node.Usage", "parameters": {"job": options.job}}).encode() + b"\\0")
    data = b""
    while not data.endswith(b"\\0"):
        data += agent.recv(65536)
print(json.loads(data[:-1])["parameters"]["job"]["totals"])
"""


def timed(argv: list[str], environ: dict[str, str] | None = None) -> Callable[[], float]:
    """A run of the command: its wall time in ms. It must succeed."""

    def run() -> float:
        began = time.perf_counter()
        done = subprocess.run(argv, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
        took = time.perf_counter() - began
        if done.returncode:
            raise RuntimeError(f"{argv[0]} ended with {done.returncode}: {done.stderr.decode().strip()}")
        return took * 1000

    return run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.hook", description="wall time of the starter's hook")
    parser.add_argument("--runs", type=int, default=101)
    parser.add_argument("--jobs", type=int, default=10, help="standing")
    parser.add_argument("--quick", action="store_true", help="small figures: does it run at all?")
    options = parser.parse_args()
    if options.quick:
        options.runs, options.jobs = 5, 2
    installed = Path(sys.executable).parent / "acctd-hook"
    if not installed.exists():
        sys.exit(f"there is no {installed}: install acctd into this environment")
    missing = None
    with ExitStack() as stack:
        served = stack.enter_context(standing(options.jobs))
        job = ["--job", served.jobs[0]]
        todo = {
            "python3 -c pass": timed([sys.executable, "-c", "pass"]),
            "acctd-hook usage": timed([str(installed), "--socket", str(served.socket), "usage", *job]),
            "acctd-hook usage --json": timed([str(installed), "--socket", str(served.socket), "usage", *job, "--json"]),
            "a usual Python client": timed([sys.executable, "-c", _CLIENT, "--socket", str(served.socket), *job]),
        }
        try:
            manager = stack.enter_context(Manager())
        except ManagerError as e:
            missing = str(e)
        else:
            todo["systemctl show"] = timed(manager.argv, manager.environ)
        connection = stack.enter_context(served.connect())

        def ask() -> float:
            began = time.perf_counter()
            connection.call("Usage", job=served.jobs[0])
            return (time.perf_counter() - began) * 1000

        todo["the agent's part"] = ask
        times: dict[str, list[float]] = {name: [] for name in todo}
        for number in range(-1, options.runs):  # one round to warm the caches
            for name, run in todo.items():
                took = run()
                if number >= 0:
                    times[name].append(took)
    bare = median(times["python3 -c pass"])
    print(f"Wall time, ms: median (90th percentile) of {options.runs}; {options.jobs} jobs standing. {machine()}\n")
    rows = [[name, spread(taken), f"{median(taken) / bare:.2f}"] for name, taken in times.items()]
    print(table(["command", "ms", "ratio to pass"], rows))
    seen = median(times["acctd-hook usage"]) / bare
    print(f"\nGoal: at most {GOAL} times python3 -c pass; seen {seen:.2f}.")
    if missing is not None:
        print(f"\nNot measured: systemctl show: {missing}.")


if __name__ == "__main__":
    main()
