"""`python -m bench.ingest`: what it costs to bring points into a database, and how many survive its faults.

First the same points into a real VictoriaMetrics, each way in a process and a database of its own: through the spool as
acctd does it, through influxdb-client's batching mode, and as raw POSTs of bodies that were ready before, which is as
little as it can take. Then, with --faults, the same samples towards an InfluxDB that goes through the faults of
lab/faultydb.py, is killed and restarted, and runs out of disk: by acctd, and by influxdb-client's batching mode.
"""

import argparse
import contextlib
import gzip
import http.client
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from acctd import spool
from acctd.frames import SAMPLES, encode
from acctd.sinks import ExportConfig, InfluxSink
from bench.report import machine, median, spread, table
from exporters import positions
from exporters.delivery import Delivery
from exporters.influxdb import InfluxTarget
from exporters.lineprotocol import Lines
from lab import series
from lab.faultydb import LOAD, FaultyDatabase
from lab.smalldisk import SmallDisk
from tests.db.conftest import Influx1, VictoriaMetrics

BATCH = 5000  # points a request, acctd's default and influxdb-client's advice
TICK = series.JOBS
PACE = 0.03  # s between two ticks, under faults
GIVE_UP = 240.0  # s for whoever delivers under faults
_OK = (200, 204)

CONFIG = """
state_dir = "{directory}/state"
runtime_dir = "{directory}/run"
[export]
spool_dir = "{directory}/spool"
positions_dir = "{directory}/positions"
[influxdb.site]
url = "{url}"
version = 1
database = "acctd"
batch = 1000
timeout = 2
"""


def sink(url: str) -> InfluxSink:
    return InfluxSink(
        name="bench", url=url, version=2, org="bench", bucket="acctd", records_bucket="acctd", batch=BATCH
    )


def good(count: int) -> Iterator[int]:
    """The first so many samples that no database has anything against."""
    return itertools.islice((n for n in itertools.count() if series.job(n).startswith("job-")), count)


def encoded(numbers: Iterator[int], url: str) -> Iterator[list[bytes]]:
    """Lines of InfluxDB's protocol, a tick at a time."""
    encoder = Lines(sink(url), ExportConfig(), "bench")
    while tick := [item.data for n in itertools.islice(numbers, TICK) for item in encoder.encode(series.sample(n))]:
        yield tick


# The ways, each in a process of its own, which gives seconds and CPU seconds; what is made ready for them, in others.


class Task(NamedTuple):
    """What a step is told."""

    url: str  # of the database
    samples: int
    directory: Path  # the steps of one way share it


def spooled(task: Task) -> dict[str, float]:
    """The agent's part: frames into the spool."""
    made = task.directory / "spool" / SAMPLES
    made.mkdir(parents=True)
    writer = spool.Writer(made)
    took = took_cpu = 0.0
    numbers = good(task.samples)
    while frames := [series.sample(number) for number in itertools.islice(numbers, TICK)]:
        began, cpu = time.perf_counter(), time.process_time()
        writer.append([encode(frame) for frame in frames])
        took, took_cpu = took + time.perf_counter() - began, took_cpu + time.process_time() - cpu
    raw = spool.size(made)
    writer.close()
    return {"seconds": took, "cpu": took_cpu, "raw": raw}


def by_spool(task: Task) -> dict[str, float]:
    """The exporter's part: from the spool into the database."""
    import influxdb_client.client.influxdb_client  # noqa: F401  # as whoever uses it has done by then

    (task.directory / "positions").mkdir()
    target = InfluxTarget(sink(task.url), ExportConfig(), "bench", {})
    delivery = Delivery("bench", target, task.directory / "spool", task.directory / "positions")
    began, cpu = time.perf_counter(), time.process_time()
    delivery.run(until_empty=True)
    return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}


def packed(task: Task) -> dict[str, float]:
    """The agent's part where points have to wait: the spool is compressed."""
    made = task.directory / "spool" / SAMPLES
    began, cpu = time.perf_counter(), time.process_time()
    for segment in spool.segments(made):
        spool.pack(segment)
    return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu, "packed": spool.size(made)}


def lines(task: Task) -> dict[str, float]:
    """What the others send, in a file: a line a tick, points parted by tabs."""
    size = 0
    began, cpu = time.perf_counter(), time.process_time()
    with open(task.directory / "lines", "wb") as stream:
        for tick in encoded(good(task.samples), task.url):
            size += stream.write(b"\t".join(tick) + b"\n")
    return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu, "bytes": size}


def by_client(task: Task) -> dict[str, float]:
    """influxdb-client as its documentation shows it for bulk, gzip on, fed with lines that were made before."""
    from influxdb_client.client.influxdb_client import InfluxDBClient
    from influxdb_client.client.write_api import WriteOptions

    began, cpu = time.perf_counter(), time.process_time()
    with (
        open(task.directory / "lines", "rb") as stream,
        InfluxDBClient(url=task.url, token="none", org="bench", enable_gzip=True) as client,  # noqa: S106
        client.write_api(write_options=WriteOptions(batch_size=BATCH, flush_interval=1000)) as api,
    ):
        for tick in stream:
            api.write("acctd", record=tick.rstrip().split(b"\t"))
    return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}


def by_post(task: Task) -> dict[str, float]:
    """Bodies that were joined and compressed before, over one connection."""
    bodies, held = [], list[bytes]()
    with open(task.directory / "lines", "rb") as stream:
        for tick in stream:
            held += tick.rstrip().split(b"\t")
            while len(held) >= BATCH:
                bodies.append(gzip.compress(b"\n".join(held[:BATCH]), 1))
                del held[:BATCH]
    if held:
        bodies.append(gzip.compress(b"\n".join(held), 1))
    began, cpu = time.perf_counter(), time.process_time()
    connection = http.client.HTTPConnection(urlsplit(task.url).netloc)
    for body in bodies:
        connection.request("POST", "/api/v2/write?bucket=acctd&precision=ns", body, {"Content-Encoding": "gzip"})
        answer = connection.getresponse()
        words = answer.read()
        if answer.status not in _OK:
            raise RuntimeError(f"{task.url} answers {answer.status}: {words.decode()}")
    connection.close()
    return {
        "seconds": time.perf_counter() - began,
        "cpu": time.process_time() - cpu,
        "wire": sum(map(len, bodies)),
    }


STEPS: dict[str, Callable[[Task], dict[str, float]]] = {
    step.__name__: step for step in (spooled, by_spool, packed, lines, by_client, by_post)
}
WAYS = (("spooled", "by_spool", "packed"), ("lines", "by_client"), ("lines", "by_post"))


def run(samples: int) -> dict[str, dict[str, float]]:
    """Every way once, against a new database each, which must hold every point afterwards; by step."""
    found: dict[str, dict[str, float]] = {}
    for way in WAYS:
        with tempfile.TemporaryDirectory() as made, VictoriaMetrics(Path(made) / "db") as server:
            options = ["--url", server.url, "--samples", str(samples), "--directory", made]
            for step in way:
                argv = [sys.executable, "-m", "bench.ingest", "--step", step, *options]
                done = subprocess.run(argv, stdout=subprocess.PIPE, check=True)
                found[step] = json.loads(done.stdout)
            if (held := in_victoria(server)) != samples:
                raise RuntimeError(f"{way}: {samples} samples were given, {held} are there")
    return found


def in_victoria(server: VictoriaMetrics) -> int:
    """Samples of one field that is in every sample."""
    return sum(len(found["values"]) for found in server.export('{__name__="acctd_cpu_user_ns"}'))


# Under faults


def in_influx(server: Influx1) -> int:
    """Good points that are there, of all measurements of a sample."""
    fields = {
        "acctd_memory": "file_bytes",
        "acctd_cpu": "user_ns",
        "acctd_blkio": "write_bytes",
        "acctd_pids": "tasks",
        "acctd_pressure": "cpu_stall_us",
        "acctd_network": "packets",
        "acctd_limit": "cpus",
    }
    found = 0
    for measurement, field in fields.items():
        rows = server.query(f'SELECT count("{field}") AS n FROM {measurement}')  # noqa: S608
        found += sum(row["n"] for row in rows)
    return found


def client_under_faults(url: str, count: int, directory: Path) -> None:
    """All samples, the bad ones too, at the pace of the others. One that was killed goes on with what is next."""
    from influxdb_client.client.influxdb_client import InfluxDBClient
    from influxdb_client.client.write_api import WriteOptions

    at = directory / "at"
    given = int(at.read_text()) if at.exists() else 0
    options = WriteOptions(batch_size=1000, flush_interval=1000)
    with (
        InfluxDBClient(url=url, token="none", org="bench", enable_gzip=True, timeout=2000) as client,  # noqa: S106
        client.write_api(write_options=options) as api,
    ):
        for tick in encoded(iter(range(given, count)), url):
            api.write("acctd", record=tick)
            given += TICK
            at.write_text(str(given))
            time.sleep(PACE)


def under_faults(way: str, count: int, kills: bool) -> dict[str, Any]:
    """What is there in the end. The faults come by the request, the kills and the full disk by the clock."""
    with (
        tempfile.TemporaryDirectory() as made,
        SmallDisk(Path(made) / "disk", "256m") as disk,
        Influx1(disk.path / "influx") as server,
        FaultyDatabase(("127.0.0.1", server.port), series.NAMED.encode(), LOAD) as proxy,
        contextlib.ExitStack() as stack,
    ):
        directory = Path(made)
        config = directory / "acctd.toml"
        config.write_text(CONFIG.format(directory=directory, url=proxy.url))
        log = stack.enter_context(open(directory / "log", "wb"))
        me = [sys.executable, "-m", "bench.ingest", "--step", "faults", "--url", proxy.url]
        programs = {
            "client": [[*me, "--samples", str(count), "--directory", made]],
            "acctd": [
                [sys.executable, "-m", "lab.series", str(config), str(count), str(PACE)],
                [str(Path(sys.executable).parent / "acctd"), "export", "--config", str(config)],
            ],
        }[way]
        began = time.monotonic()

        def start() -> list[subprocess.Popen[bytes]]:
            begun = []
            for argv in programs:
                process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *argv], stdout=log, stderr=log)
                stack.callback(process.wait)
                stack.callback(process.kill)
                begun.append(process)
            return begun

        def killed() -> list[subprocess.Popen[bytes]]:
            if not kills:
                return running
            for process in running:
                process.kill()
                process.wait()
            return start()

        running = start()
        time.sleep(4)
        server.kill()
        running = killed()
        time.sleep(2)
        server.start()
        time.sleep(4)
        running = killed()
        disk.fill()
        time.sleep(2)
        server.kill()
        disk.free()
        server.start()
        deadline = time.monotonic() + GIVE_UP
        while not (running[0].poll() is not None if way == "client" else delivered(directory, count)):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{way} has not come to an end within {GIVE_UP:.0f} s")
            time.sleep(0.1)
        return {"points": in_influx(server), "seconds": time.monotonic() - began, "left": proxy.left}


def delivered(directory: Path, count: int) -> bool:
    state = positions.load(directory / "positions", "site")
    return state is not None and state.positions[SAMPLES].number == count


# What is printed


def print_speed(samples: int, runs: int) -> None:
    points = samples * series.POINTS
    found = [run(samples) for _ in range(runs)]

    def each(step: str, key: str) -> list[float]:
        return [once[step][key] for once in found]

    def row(name: str, step: str) -> Sequence[object]:
        return [
            name,
            spread([points / 1000 / seconds for seconds in each(step, "seconds")]),
            f"{median(each(step, 'seconds')) / median(each('by_post', 'seconds')):.2f}",
            f"{median(each(step, 'cpu')) * 1e6 / points:.1f}",
            f"{median(each(step, 'rss')):.0f}",
        ]

    print(
        f"{points} points into VictoriaMetrics, {BATCH} a request, gzip: thousand points a second, median (90th "
        f"percentile) of {runs}; time against the raw POST's; CPU us a point; peak RSS in MiB. {machine()}\n"
    )
    rows = [
        row("raw POST of bodies that are ready", "by_post"),
        row("influxdb-client batching, of lines that are ready", "by_client"),
        row("acctd, exporter: spool to database", "by_spool"),
        row("acctd, agent: frames to spool", "spooled"),
        row("acctd, agent: the spool compressed", "packed"),
    ]
    print(table(["way", "k points/s", "time ratio", "CPU us/point", "RSS"], rows))
    last = found[-1]
    print(
        f"\nBytes a point: line protocol {last['lines']['bytes'] / points:.0f}, on the wire "
        f"{last['by_post']['wire'] / points:.1f}; in the spool {last['spooled']['raw'] / points:.0f} as written, "
        f"{last['packed']['packed'] / points:.1f} compressed."
    )


def print_faults(count: int) -> None:
    wanted = series.sums(count).samples * series.POINTS
    print(
        f"\n{wanted} good points and {count * series.POINTS - wanted} bad ones, every fault of lab/faultydb.py, "
        "influxd 1.6 killed and restarted, its disk filled:\n"
    )
    rows = []
    for name, way, kills in (
        ("acctd, agent and exporter killed twice", "acctd", True),
        ("influxdb-client batching, never killed", "client", False),
        ("influxdb-client batching, killed twice", "client", True),
    ):
        found = under_faults(way, count, kills)
        lost = wanted - found["points"]
        rows.append([name, found["points"], lost, f"{100 * lost / wanted:.1f}", f"{found['seconds']:.0f}"])
    print(table(["way", "good points there", "lost", "lost, %", "seconds"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ingest", description="points into a database")
    parser.add_argument("--samples", type=int, default=25_000, help=f"of {series.POINTS} points each")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--faults", action="store_true", help="also under faults; needs root")
    parser.add_argument("--quick", action="store_true", help="small figures: does it run at all?")
    parser.add_argument("--step", choices=[*STEPS, "faults"], help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step == "faults":
        client_under_faults(options.url, options.samples, options.directory)
        return
    if options.step is not None:
        found = STEPS[options.step](Task(options.url, options.samples, options.directory))
        found["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(found))
        return
    if options.quick:
        options.samples, options.runs = 2000, 1
    print_speed(options.samples, options.runs)
    if options.faults:
        print_faults(options.samples)


if __name__ == "__main__":
    main()
