"""`python -m bench.sinks`: whether a tick of the agent is later because a sink is slow, or dead.

A real `acctd serve` with 500 jobs standing and, beside it, a real `acctd export`. Ticks follow each other without a
pause, so that the spool gets far more than in life. The sink is in turns none, a server that takes everything at once,
one that accepts connections and never answers, and one whose connections are never even accepted. The rounds are
repeated in turns, so that what else the machine does falls on all alike.
"""

import argparse
import contextlib
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bench.report import machine, table
from bench.served import REPO, Served, standing

_LISTEN = "127.0.0.1"


class _Taking(http.server.BaseHTTPRequestHandler):
    """Takes all points and forgets them."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextlib.contextmanager
def taking() -> Iterator[int]:
    """A server that answers 204; its port."""
    server = http.server.ThreadingHTTPServer((_LISTEN, 0), _Taking)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def silent() -> Iterator[int]:
    """One that accepts, reads nothing and never answers; its port."""
    held: list[socket.socket] = []
    with socket.create_server((_LISTEN, 0)) as listening:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(listening.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in held:
                connection.close()


@contextlib.contextmanager
def deaf() -> Iterator[int]:
    """One whose queue is full, so that the kernel drops each SYN; its port."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind((_LISTEN, 0))
        listening.listen(0)
        port = listening.getsockname()[1]
        for _ in range(4):
            filling = stack.enter_context(socket.socket())
            filling.setblocking(False)
            filling.connect_ex((_LISTEN, port))
        yield port


SINKS = {
    "no sink": None,
    "takes everything": taking,
    "accepts and never answers": silent,
    "drops each connection": deaf,
}


def rounds(served: Served, ticks: int, turns: int) -> dict[str, tuple[list[float], list[float]]]:
    """By sink: seconds of each tick, and bytes in the spool at the end of each turn."""
    found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in SINKS}
    for turn in range(turns):
        for name, make in SINKS.items():
            took, spooled = found[name]
            with contextlib.ExitStack() as stack:
                if make is not None:
                    with served.topology.enter(served.topology.node):
                        port = stack.enter_context(make())
                    stack.enter_context(_exporting(served, f"{turn}-{list(SINKS).index(name)}", port))
                else:
                    served.configure("")
                with served.connect() as connection:
                    for _ in range(5):
                        connection.call("Snapshot")
                    took += [connection.call("Snapshot")["seconds"] for _ in range(ticks)]
                spooled.append(sum(path.stat().st_size for path in _spools(served).glob("*/*/*")))
            served.configure("")
            subprocess.run(["rm", "-rf", _spools(served)], check=True)
    return found


def _spools(served: Served) -> Path:
    return served.directory / "spools"


@contextlib.contextmanager
def _exporting(served: Served, name: str, port: int) -> Iterator[None]:
    """With such a sink configured, and an exporter that feeds it."""
    served.configure(
        f'[export]\nspool_dir = "{_spools(served)}/{name}"\npositions_dir = "{served.directory}/positions-{name}"\n'
        f'[influxdb.s]\nurl = "http://{_LISTEN}:{port}"\nversion = 1\ndatabase = "d"\n'
    )
    environ = {**os.environ, "ACCTD_CONFIG": str(served.config), "PYTHONPATH": str(REPO)}
    with open(served.directory / "export.log", "ab") as log:
        exporter = served.popen([sys.executable, "-m", "acctd", "export"], env=environ, stderr=log)
    try:
        positions = served.directory / f"positions-{name}" / "s.json"
        deadline = time.monotonic() + 30
        while not positions.exists():
            if exporter.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"acctd export does not start: {(served.directory / 'export.log').read_text()}")
            time.sleep(0.02)
        yield
    finally:
        exporter.send_signal(signal.SIGKILL)
        exporter.wait()


def percentile(values: list[float], part: float) -> float:
    """The value that so many of a hundred do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part / 100))]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.sinks", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--ticks", type=int, default=50, help="in each turn")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--quick", action="store_true", help="small figures: does it run at all?")
    options = parser.parse_args()
    if options.quick:
        options.jobs, options.ticks, options.turns = 3, 3, 1
    with standing(options.jobs, interval=600.0) as served:
        found = rounds(served, options.ticks, options.turns)
    print(f"Ticks back to back with {options.jobs} jobs, ms. {machine()}\n")
    least = percentile(found["no sink"][0], 99)
    rows = []
    for name, (took, spooled) in found.items():
        p50, p99 = percentile(took, 50), percentile(took, 99)
        rows.append(
            [name, len(took), *(f"{value * 1e3:.1f}" for value in (p50, p99, max(took))), f"{p99 / least:.2f}",
             f"{max(spooled) / 2**20:.1f}"]
        )  # fmt: skip
    print(
        table(
            ["sink", "ticks", "p50", "p99", "highest", "p99 against none", "left in the spool, MiB"],
            rows,
        )
    )


if __name__ == "__main__":
    main()
