"""A loopback proxy before a real database that goes through a script of faults, a step a write request, then behaves.

It refuses points that hold the marker throughout, as InfluxDB 1 refuses what it cannot parse: in turns with or without
their names, and with or without storing the others. Everything else reaches the database as it came and is answered
with its own words. Keeps no point; what it did is in `done`.

As a sink's address only: it knows /write and /api/v2/write, which it makes the former of where the database has only
that.
"""

import contextlib
import gzip
import itertools
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlencode, urlsplit

_HANG_MOST = 60.0  # s for a client to lose patience
_DRIP = 0.02  # s between two bytes of a slow answer
_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: closing is a reset


class FaultyDatabase:
    """Use as a context manager; `url` is where it listens."""

    def __init__(self, upstream: tuple[str, int], marker: bytes, script: Sequence[str] = ()) -> None:
        """A step is a name in STEPS. `marker`: a point that holds it is bad."""
        unknown = set(script) - STEPS.keys()
        if unknown:
            raise ValueError(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(sorted(STEPS))}")
        self.upstream, self.marker = upstream, marker
        self.done: Counter[str] = Counter()
        """Steps by name, `pass` among them; also `refused`, points that were, and `away`, requests to no database."""
        self._script = list(script)
        self._lock = threading.Lock()
        self.refusals = itertools.cycle([(True, True), (False, False), (True, False)])
        """Names the bad; stores the others."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.faulty = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def left(self) -> int:
        """Steps of the script that were not gone yet."""
        return len(self._script)

    def step(self) -> str:
        """What is done with this request."""
        with self._lock:
            name = self._script.pop(0) if self._script else "pass"
            self.done[name] += 1
            return name

    def add(self, script: Sequence[str]) -> None:
        """More steps, after those that are left."""
        with self._lock:
            self._script += script

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    timeout = _HANG_MOST
    server: ThreadingHTTPServer
    body = b""

    @property
    def faulty(self) -> FaultyDatabase:
        found: FaultyDatabase = self.server.faulty  # type: ignore[attr-defined]
        return found

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", "0"))
        step = self.faulty.step()
        with contextlib.suppress(OSError):  # a client that went
            if step == "reset_in_request":
                self.rfile.read(length // 2)
                self.reset()
                return
            self.body = self.rfile.read(length)
            if len(self.body) == length:
                STEPS[step](self)
            else:
                self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    # What steps are made of

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def reset(self) -> None:
        """The client sees a connection that is reset by its peer."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
        # http.server would shut it down in an orderly way first.
        self.rfile.close()
        self.connection.close()

    def lines(self) -> list[bytes]:
        packed = self.headers.get("Content-Encoding") == "gzip"
        return (gzip.decompress(self.body) if packed else self.body).splitlines()

    def store(self, lines: Sequence[bytes]) -> tuple[int, bytes]:
        """What the database answers. Raises OSError or HTTPException where there is none."""
        path = self.path
        parts = urlsplit(path)
        if parts.path == "/api/v2/write":
            path = "/write?" + urlencode({"db": parse_qs(parts.query)["bucket"][0], "precision": "ns"})
        database = HTTPConnection(*self.faulty.upstream, timeout=_HANG_MOST)
        try:
            database.request("POST", path, b"\n".join(lines))
            found = database.getresponse()
            return found.status, found.read()
        finally:
            database.close()

    def pass_on(self) -> None:
        """Refuse the bad ones; the others are the database's."""
        told = self.judged()
        if told is None:
            self.faulty.done["away"] += 1
            self.reset()
        else:
            self.answer(*told, Content_Type="application/json")

    def judged(self) -> tuple[int, bytes] | None:
        """Status and words: of the database, or about what is bad; None where the database is not there."""
        lines = self.lines()
        bad = [line for line in lines if self.faulty.marker in line]
        names, stores = next(self.faulty.refusals) if bad else (False, True)
        try:
            status, words = (204, b"")
            if stores and (good := [line for line in lines if self.faulty.marker not in line]):
                status, words = self.store(good)
        except (OSError, HTTPException):
            return None
        if not bad or status != 204:
            return status, words
        self.faulty.done["refused"] += len(bad)
        text = "\n".join(f"unable to parse '{line.decode()}': it is marked" for line in bad)
        if not names:
            text = "unable to parse points"
        return 400, json.dumps({"error": f"partial write: {text} dropped=0" if stores else text}).encode()


def _hang(request: _Handler) -> None:
    """No answer, until the client goes."""
    request.connection.settimeout(_HANG_MOST)
    while request.connection.recv(1):
        pass
    request.close_connection = True


def _cut(request: _Handler) -> None:
    """The database has stored; of its answer there is the beginning."""
    if request.judged() is not None:
        request.wfile.write(b"HTTP/1.1 20")
    request.reset()


def _lose(request: _Handler) -> None:
    """The database has stored, and nobody hears of it."""
    request.judged()
    request.reset()


def _short(request: _Handler) -> None:
    """An answer that breaks off in the middle of its body."""
    request.judged()
    request.send_response(400)
    request.send_header("Content-Length", "500")
    request.end_headers()
    request.wfile.write(b'{"error":"unable to')
    request.reset()


def _drip(request: _Handler) -> None:
    """The answer comes byte by byte."""
    told = request.judged()
    if told is None:
        request.reset()
        return
    status, body = told
    size = "" if status == 204 else f"Content-Length: {len(body)}\r\n"
    for byte in f"HTTP/1.1 {status} it drips\r\n{size}\r\n".encode():
        request.wfile.write(bytes([byte]))
        request.wfile.flush()
        time.sleep(_DRIP)
    request.wfile.write(body)


def _says(status: int, body: bytes, **headers: str) -> Callable[[_Handler], None]:
    return lambda request: request.answer(status, body, **headers)


STEPS: dict[str, Callable[[_Handler], None]] = {
    "pass": _Handler.pass_on,
    "busy": _says(503, b'{"error":"timeout"}', Content_Type="application/json"),
    "broken": _says(500, b'{"error":"engine is closed"}', Content_Type="application/json"),
    "later": _says(429, b'{"error":"too many writes"}', Content_Type="application/json", Retry_After="1"),
    "too_large": _says(413, b'{"error":"Request Entity Too Large"}', Content_Type="application/json"),
    "page": _says(400, b"<html><body>Please log in</body></html>", Content_Type="text/html"),
    "forbidden": _says(401, b'{"error":"authorization failed"}', Content_Type="application/json"),
    "hang": _hang,
    "reset_in_request": _lose,  # it is reset before there is a request
    "reset_after_store": _lose,
    "cut_answer": _cut,
    "short_answer": _short,
    "drip": _drip,
}
"""A step's name and what it does with a request. One that is not `pass`, `drip` or `too_large` is to be sent again."""

_ONE_BY_ONE = ("busy", "later", "page", "broken", "forbidden", "too_large", "hang", "reset_in_request")
_STORED = ("reset_after_store", "cut_answer", "short_answer", "drip")
LOAD = (
    *(step for name in (*_ONE_BY_ONE, *_STORED) for step in (name, "pass")),
    *("busy", "busy", "reset_after_store", "pass"),
)
"""Every fault there is, each after a request that went well, and at last three in a row."""
