"""`python -m bench.scrape`: what it takes to scrape a node with two thousand living jobs.

A real `acctd export` follows a spool with a sample of each job, and is scraped over the loopback in all its forms, by
turns. Beside it, in CPU time alone: the same jobs through an ordinary collector of prometheus_client's, which is what
an exporter usually is; the same lines joined by hand in Python, from ready labels and values; and by a C program.
"""

import argparse
import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector

from acctd.frames import AgentSample, Sample, decode, encode
from acctd.metrics import CATALOGUE, Metric, split_rule
from acctd.spool import Writer
from bench.report import machine, median, p90, table
from exporters.board import Board
from exporters.prometheus import Exposition
from exporters.scrape import OPENMETRICS

HERE = Path(__file__).parent
_FRESH = 1.1  # s after which a scrape is a rendering of its own
_LABELS = {
    (): ("",),
    ("device",): ("259:0", "259:1"),
    ("mount",): ("/data",),
    ("class", "direction"): ("OutgoingInternal", "IncomingInternal", "OutgoingExternal", "IncomingExternal"),
}
_FORMS = {
    "text": {},
    "text, gzip": {"Accept-Encoding": "gzip"},
    "OpenMetrics": {"Accept": "application/openmetrics-text;version=1.0.0"},
    "OpenMetrics, gzip": {"Accept": "application/openmetrics-text;version=1.0.0", "Accept-Encoding": "gzip"},
}


def samples(jobs: int) -> list[Sample]:
    """Every declared metric, on two devices, one NFS mount and two classes of networks; values of many digits."""
    began = time.time_ns()
    return [
        Sample(
            time=began + number,
            job=f"{120000 + number // 10}.{number % 10}",
            owner=f"user{number % 50}",
            uid=20000 + number % 50,
            started=began / 1e9,
            network="nat",
            totals={
                metric.name: {
                    label: 10**11 + 7919 * number + 104729 * at + n for n, label in enumerate(_LABELS[metric.labels])
                }
                for at, metric in enumerate(CATALOGUE)
            },
            tags={"account": f"group{number % 20}", "scheduler": "htcondor"},
            limits={"memory": 4 * 2**30, "cpus": 1.0, "pids": 4096},
        )
        for number in range(jobs)
    ]


class Usual(Collector):
    """As an exporter is usually written: a family a metric, add_metric() a value."""

    def __init__(self, jobs: list[Sample]) -> None:
        self._jobs = jobs

    def collect(self) -> Iterator[Family]:
        for metric in CATALOGUE:
            kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = kind(metric.prometheus, metric.help, labels=("jobid", *metric.labels))
            for job in self._jobs:
                for label, value in job.totals[metric.name].items():
                    family.add_metric((job.job, *outer(metric, label)), value / metric.per_base_unit)
            yield family


def outer(metric: Metric, label: str) -> tuple[str, ...]:
    """The values of the metric's labels."""
    return split_rule(label) if len(metric.labels) > 1 else (label,) if metric.labels else ()


def ready(jobs: list[Sample]) -> list[tuple[str, int, int]]:
    """Of each series the name with its labels, the integer, and by what it is divided."""
    found = []
    for metric in CATALOGUE:
        for job in jobs:
            for label, value in job.totals[metric.name].items():
                pairs = zip(("jobid", *metric.labels), (job.job, *outer(metric, label)), strict=True)
                labels = ",".join(f'{name}="{text}"' for name, text in pairs)
                found.append((f"{metric.prometheus}{{{labels}}}", value, metric.per_base_unit))
    return found


def by_hand(lines: list[tuple[str, int, int]]) -> bytes:
    return "".join([f"{series} {value if per == 1 else value / per}\n" for series, value, per in lines]).encode()


class Export:
    """A real `acctd export` over a spool of its own. Use as a context manager."""

    def __init__(self, directory: Path, jobs: list[Sample]) -> None:
        self._directory, self._jobs = directory, jobs
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]

    def __enter__(self) -> "Export":
        spool = self._directory / "spool"
        for stream in ("samples", "events", "records"):
            (spool / stream).mkdir(parents=True)
        # Ticks of an hour: no job is thought dead as long as this takes.
        agent = AgentSample(time.time_ns(), 3600.0, "bench", {"jobs": float(len(self._jobs))})
        Writer(spool / "samples").append([encode(agent), *map(encode, self._jobs)])
        config = self._directory / "acctd.toml"
        config.write_text(
            f'[export]\nspool_dir = "{spool}"\npositions_dir = "{self._directory}/positions"\n'
            f'[prometheus]\nlisten = "127.0.0.1:{self.port}"\n'
        )
        argv = [sys.executable, "-m", "acctd", "export", "--config", str(config)]
        self.process = subprocess.Popen(argv, stderr=subprocess.PIPE)
        wanted = b'acctd_job_info{jobid="%s"' % self._jobs[-1].job.encode()
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                if wanted in self.scrape({})[2]:
                    return self
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError("acctd export does not show the jobs")
            time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()

    def scrape(self, headers: dict[str, str]) -> tuple[float, float, bytes]:
        """Wall time and the exporter's CPU time, in s, and what came."""
        before, began = self._cpu(), time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/metrics", headers=headers)
        answer = connection.getresponse()
        body = answer.read()
        took = time.perf_counter() - began
        connection.close()
        if answer.status != 200 or ("Accept" in headers and answer.headers["Content-Type"] != OPENMETRICS):
            raise RuntimeError(f"acctd export answers {answer.status}, {answer.headers['Content-Type']}")
        return took, self._cpu() - before, body

    def memory(self, name: str) -> float:
        """MiB: VmRSS, or VmHWM, the highest so far. proc_pid_status(5)"""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(f"{name}:"))

    def _cpu(self) -> float:
        """Of all threads, from the scheduler's own ns. Documentation/scheduler/sched-stats.rst"""
        total = 0
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):
                total += int((task / "schedstat").read_text().split()[0])
        return total / 1e9


def spent(work: Callable[[], bytes], rounds: int) -> tuple[list[float], int]:
    """CPU s of this process of each time, and how many bytes it makes."""
    taken, made = [], 0
    for _ in range(rounds):
        before = time.process_time()
        made = len(work())
        taken.append(time.process_time() - before)
    return taken, made


def c_floor(lines: list[tuple[str, int, int]], rounds: int) -> tuple[list[float], int]:
    """The same of bench/scrape.c."""
    with tempfile.TemporaryDirectory(prefix="acctdbench-") as name:
        data = Path(name) / "lines"
        data.write_text("".join(f"{series}\t{value} {per}\n" for series, value, per in lines))
        subprocess.run(["gcc", "-O2", "-o", f"{name}/scrape", HERE / "scrape.c"], check=True)
        done = subprocess.run([f"{name}/scrape", data, str(rounds)], check=True, capture_output=True, text=True)
    *taken, made = map(int, done.stdout.split())
    return [ns / 1e9 for ns in taken], made


def ms(values: list[float]) -> str:
    return f"{median(values) * 1000:.0f} ({p90(values) * 1000:.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scrape", description="a scrape of a node with many jobs")
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="small figures: does it run at all?")
    options = parser.parse_args()
    if options.quick:
        options.jobs, options.runs = 20, 2
    os.environ.pop("ACCTD_CONFIG", None)
    jobs = samples(options.jobs)
    taken: dict[str, list[tuple[float, float]]] = {form: [] for form in _FORMS}
    size: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="acctdbench-") as name, Export(Path(name), jobs) as export:
        series = sum(not line.startswith(b"#") for line in export.scrape({})[2].splitlines())
        for _ in range(options.runs):
            for form, headers in _FORMS.items():
                time.sleep(_FRESH)
                wall, cpu, body = export.scrape(headers)
                taken[form].append((wall, cpu))
                size[form] = len(body)
        resident, highest = export.memory("VmRSS"), export.memory("VmHWM")
    board = Board(grace=0.0)
    board.take(AgentSample(time.time_ns(), 3600.0, "bench", {}))
    spool, following = [encode(job) for job in jobs], []
    for _ in range(5):
        before = time.process_time()
        for line in spool:
            board.take(decode(line))
        following.append((time.process_time() - before) * 1e6 / len(jobs))
    if len(board.seen().jobs) != options.jobs:
        raise RuntimeError("the board does not show all jobs")
    exposition, usual, lines = Exposition(board, "bench", (), {}), Usual(jobs), ready(jobs)
    few = max(2, options.runs // 4)
    floor = c_floor(lines, options.runs)
    cpu_only = {
        "acctd's text": spent(lambda: exposition.render(False), options.runs),
        "joined by hand": spent(lambda: by_hand(lines), options.runs),
        "C": floor,
        "prometheus_client, text": spent(lambda: generate_latest(usual), few),
        "prometheus_client, OpenMetrics": spent(
            lambda: generate_openmetrics(usual),  # type: ignore[no-untyped-call]
            few,
        ),
    }
    print(
        f"{options.jobs} jobs, {series} series; ms: median (90th percentile) of {options.runs}, "
        f"{few} for prometheus_client. {machine()}\n"
    )
    rows = [
        [form, ms([wall for wall, _ in times]), ms([cpu for _, cpu in times]), f"{size[form]:,}"]
        for form, times in taken.items()
    ]
    print(table(["a scrape over the loopback", "wall, ms", "the exporter's CPU, ms", "bytes"], rows))
    print(f"\nThe exporter's memory afterwards: {resident:.0f} MiB, at most {highest:.0f} MiB.")
    print(f"To take in a sample as it comes: {median(following):.0f} us of CPU time.\n")
    least = median(floor[0])
    rows = [[what, ms(each), f"{made:,}", f"{median(each) / least:.1f}"] for what, (each, made) in cpu_only.items()]
    print(table(["the text alone", "CPU, ms", "bytes", "ratio to C"], rows))


if __name__ == "__main__":
    main()
