"""`python -m bench.live`: jobs live on one node: what a tick leaves, what a scrape costs, what a database is sent.

A real `acctd serve` with standing jobs, each with a pipe and a process of its own, and a real `acctd export` beside it,
with /metrics and one InfluxDB sink: a server that takes everything and counts. The figures of bench/scrape.py are from
made-up samples that have every metric; these are what real jobs have.
"""

import argparse
import contextlib
import gzip
import http.server
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from bench.report import machine, table
from bench.served import REPO, Served, Weight, standing

_LISTEN = "127.0.0.1"


class _Counting(http.server.BaseHTTPRequestHandler):
    """Takes all points, and remembers how many each request had."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[int, int, int]]  # points, bytes, bytes on the wire

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        text = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        self.seen.append((text.count(b"\n") + (not text.endswith(b"\n")), len(text), len(body)))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def counting() -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
    """A server that answers 204; its port, and what it was sent."""
    seen: list[tuple[int, int, int]] = []
    server = http.server.ThreadingHTTPServer((_LISTEN, 0), type("_Handler", (_Counting,), {"seen": seen}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1], seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def scrape(path: str, *, packed: bool) -> tuple[float, bytes]:
    """Seconds, and the body as it came."""
    began = time.perf_counter()
    with socket.socket(socket.AF_UNIX) as made:
        made.settimeout(60)
        made.connect(path)
        accept = "Accept-Encoding: gzip\r\n" if packed else ""
        made.sendall(f"GET /metrics HTTP/1.0\r\n{accept}\r\n".encode())
        pieces = []
        while received := made.recv(1 << 20):
            pieces.append(received)
    return time.perf_counter() - began, b"".join(pieces).partition(b"\r\n\r\n")[2]


def measure(served: Served, ticks: int, scrapes: int) -> None:
    """Print it."""
    directory, jobs = served.directory, len(served.jobs)
    with contextlib.ExitStack() as stack:
        with served.topology.enter(served.topology.node):
            port, seen = stack.enter_context(counting())
        served.configure(
            f'[export]\nspool_dir = "{directory}/spool"\npositions_dir = "{directory}/positions"\n'
            f'[influxdb.s]\nurl = "http://{_LISTEN}:{port}"\nversion = 1\ndatabase = "d"\n'
            f'[prometheus]\nlisten = "unix:{directory}/m"\n'
        )
        exporter = stack.enter_context(_exporter(served))
        deadline = time.monotonic() + 60
        while not (directory / "m").exists():
            if exporter.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"acctd export does not start: {(directory / 'export.log').read_text()}")
            time.sleep(0.02)
        with served.connect() as connection:
            took = []
            for _ in range(ticks):
                took.append(connection.call("Snapshot")["seconds"])
                time.sleep(1)
        while len(scrape(f"{directory}/m", packed=False)[1].split(b"acctd_job_info{")) <= jobs:
            time.sleep(0.2)
        plain: list[tuple[float, bytes]] = []
        packed: list[tuple[float, bytes]] = []
        for _ in range(scrapes):
            for form in (plain, packed):
                time.sleep(1.1)  # a rendering is shared for a second
                form.append(scrape(f"{directory}/m", packed=form is packed))
        series = sum(not line.startswith(b"#") for line in plain[-1][1].splitlines())
        resident, agent = Weight.of(exporter.pid).resident, Weight.of(served.pid).resident
    print(f"{jobs} jobs. {machine()}\n")
    rows: list[list[object]] = [
        [f"tick with its samples, ms (p50 of {len(took)})", f"{statistics.median(took) * 1e3:.0f}"],
        ["agent resident, MiB", f"{agent / 1024:.1f}"],
        ["scrape as text, ms", f"{statistics.median(took for took, _ in plain) * 1e3:.0f}"],
        ["its size, MB", f"{len(plain[-1][1]) / 1e6:.2f}"],
        ["series", series],
        ["scrape with gzip, ms", f"{statistics.median(took for took, _ in packed) * 1e3:.0f}"],
        ["its size, MB", f"{len(packed[-1][1]) / 1e6:.2f}"],
        ["acctd export resident, MiB", f"{resident / 1024:.1f}"],
        ["requests to the database a tick", f"{len(seen) / ticks:.1f}"],
        ["points a request, mean", f"{statistics.mean(points for points, *_ in seen):.0f}"],
        ["its size, kB", f"{statistics.mean(size for _, size, _ in seen) / 1e3:.0f}"],
        ["its size on the wire, kB", f"{statistics.mean(size for *_, size in seen) / 1e3:.0f}"],
    ]
    print(table(["what", "figure"], rows))


@contextlib.contextmanager
def _exporter(served: Served) -> "Iterator[subprocess.Popen[bytes]]":
    environ = {"ACCTD_CONFIG": str(served.config), "PYTHONPATH": str(REPO), "PATH": "/usr/bin:/bin"}
    with open(served.directory / "export.log", "ab") as log:
        exporter = served.popen([sys.executable, "-m", "acctd", "export"], env=environ, stderr=log)
    try:
        yield exporter
    finally:
        exporter.send_signal(signal.SIGKILL)
        exporter.wait()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.live", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2000, help="each keeps some 18 files open: see ulimit -Hn")
    parser.add_argument("--ticks", type=int, default=10)
    parser.add_argument("--scrapes", type=int, default=11)
    parser.add_argument("--quick", action="store_true", help="small figures: does it run at all?")
    options = parser.parse_args()
    if options.quick:
        options.jobs, options.ticks, options.scrapes = 3, 2, 1
    with standing(options.jobs, interval=600.0) as served:
        measure(served, options.ticks, options.scrapes)


if __name__ == "__main__":
    main()
