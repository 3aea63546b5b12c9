"""The HTTP server of /metrics: one thread, so at most one rendering at a time, shared by all who ask within a second.

Answers GET and HEAD of two pages, then closes the connection: RFC 9112 as far as a scraper needs it. A client that is
slow, says too much or nothing at all costs a place for some seconds, and places are few. Knows nothing of what it
serves, but that there are two formats of it.
"""

import errno
import gzip
import logging
import os
import re
import selectors
import socket
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from acctd.errors import AcctdError, InUseError, NotPermittedError, UsageError
from acctd.sinks import PrometheusSink

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

CLIENTS_MOST = 32
_HEAD_MOST = 8192  # bytes
_ASKING, _TAKING, _LEAVING = 5.0, 30.0, 1.0  # s for a request to arrive, an answer to be taken, and a client to go
_KEPT_MOST = 64 * 2**20  # bytes of answers that are not taken yet
_FRESH = 1.0  # s for which a rendering is given to whoever asks
_RETRY = 1.0  # s until a connection is accepted again where the process has no descriptor left, and after a defect
_SOCKET_MODE = 0o660  # its group may ask, too
_HEAD_END = re.compile(rb"\r?\n\r?\n")  # a lone LF ends a line, too: RFC 9112, 2.2
_PAGE = b'<!doctype html><title>acctd</title><p>acctd: <a href="/metrics">metrics</a></p>\n'
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
}

log = logging.getLogger("acctd")


@dataclass(slots=True)
class _Client:
    """One connection."""

    connection: socket.socket
    until: float  # s, monotonic: when it is closed whatever it does
    asked: bytearray = field(default_factory=bytearray)
    answer: list[memoryview] = field(default_factory=list)
    answered: bool = False


@dataclass(slots=True)
class _Rendering:
    """One format at one moment."""

    plain: bytes
    made: float  # s, monotonic: when it was ready
    packed: bytes | None = None  # once somebody has asked for that


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    path: str
    headers: dict[str, str]  # by lower-case name; what is there twice is joined with a comma


class _BadRequestError(Exception):
    """It is no HTTP/1 request."""


class Scrape:
    """Serves one address from start() to close(). `render` gives the text, as OpenMetrics if it is called with True."""

    def __init__(self, sink: PrometheusSink, render: Callable[[bool], bytes]) -> None:
        self._address, self._render = sink.address, render
        self._thread = threading.Thread(target=self._run, name="scrape")
        self._clients: dict[socket.socket, _Client] = {}
        self._rendered: dict[bool, _Rendering] = {}
        self._closing = threading.Event()
        self._accepting = False
        self._accept_after = 0.0  # s, monotonic

    def start(self) -> str:
        """Listen; the address in words. Raises UsageError, InUseError or NotPermittedError where that cannot be."""
        self._listener = listen(self._address)
        self._listener.setblocking(False)
        self._bell, self._ringer = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._thread.start()
        if isinstance(self._address, str):
            return f"unix:{self._address}"
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}/metrics" if ":" in host else f"http://{host}:{port}/metrics"

    def close(self) -> None:
        """Serve no longer; a connection that is open is cut."""
        if not self._thread.is_alive():
            return
        self._closing.set()
        self._ringer.send(b".")
        self._thread.join()
        if isinstance(self._address, str):
            _remove_own(self._listener, self._address)
        for each in (self._listener, self._bell, self._ringer):
            each.close()
        self._selector.close()

    def _run(self) -> None:
        told = ""
        while not self._closing.is_set():
            try:
                self._turn()
            except Exception as e:  # a defect of ours: whatever state it was in, the next one is asked in a new one
                if told != repr(e):
                    log.exception("serving /metrics failed; connections are cut, and it goes on")
                    told = repr(e)
                self._drop_all()
                self._closing.wait(_RETRY)
        self._drop_all()

    def _turn(self) -> None:
        """Wait for something to do, and do it."""
        self._accept_or_not()
        for key, _ in self._selector.select(self._wait()):
            if key.fileobj is self._listener:
                self._accept()
            elif isinstance(client := key.data, _Client) and client.connection in self._clients:
                self._serve(client)  # else it was cut off to make room for one before it
        now = time.monotonic()
        self._rendered = {form: each for form, each in self._rendered.items() if now < each.made + _FRESH}
        for client in [each for each in self._clients.values() if each.until <= now]:
            self._drop(client)

    def _wait(self) -> float | None:
        times = [client.until for client in self._clients.values()]
        times += [each.made + _FRESH for each in self._rendered.values()]  # it need not lie about
        if not self._accepting:
            times.append(max(self._accept_after, time.monotonic() + _RETRY))
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _accept_or_not(self) -> None:
        wanted = len(self._clients) < CLIENTS_MOST and time.monotonic() >= self._accept_after
        if wanted and not self._accepting:
            self._selector.register(self._listener, selectors.EVENT_READ)
        elif not wanted and self._accepting:
            self._selector.unregister(self._listener)
        self._accepting = wanted

    def _accept(self) -> None:
        """All that wait, so that their requests are there at one moment."""
        while len(self._clients) < CLIENTS_MOST:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as e:
                if e.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    self._accept_after = time.monotonic() + _RETRY
                return  # or it went before we came
            connection.setblocking(False)
            client = _Client(connection, time.monotonic() + _ASKING)
            self._clients[connection] = client
            self._selector.register(connection, selectors.EVENT_READ, client)

    def _drop_all(self) -> None:
        for client in list(self._clients.values()):
            self._drop(client)

    def _drop(self, client: _Client) -> None:
        del self._clients[client.connection]
        with suppress(KeyError):  # the kernel may have refused to watch it
            self._selector.unregister(client.connection)
        client.connection.close()

    def _serve(self, client: _Client) -> None:
        """Go on with one that can be read from or, while it is answered, written to."""
        try:
            if client.answer:
                self._write(client)
            elif client.answered:
                if not client.connection.recv(65536):
                    self._drop(client)
            else:
                self._read(client)
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)  # it went
        except Exception:
            log.exception("a scrape failed")  # a defect of ours; the others are served on
            self._drop(client)

    def _read(self, client: _Client) -> None:
        data = client.connection.recv(_HEAD_MOST)
        if not data:
            self._drop(client)
            return
        client.asked += data
        if end := _HEAD_END.search(client.asked):
            client.answer = self._answer(bytes(client.asked[: end.start()]))
        elif len(client.asked) > _HEAD_MOST:
            client.answer = _response(431, TEXT, b"the request is too long\n")
        else:
            return
        client.until = time.monotonic() + _TAKING
        self._selector.modify(client.connection, selectors.EVENT_WRITE, client)
        self._write(client)

    def _write(self, client: _Client) -> None:
        while client.answer:
            sent = client.connection.send(client.answer[0])
            client.answer[0] = client.answer[0][sent:]
            if not client.answer[0]:
                del client.answer[0]
        # To close at once would take back what it has not read yet, if it has sent more than was read.
        client.answered = True
        client.until = time.monotonic() + _LEAVING
        client.connection.shutdown(socket.SHUT_WR)
        self._selector.modify(client.connection, selectors.EVENT_READ, client)

    def _answer(self, head: bytes) -> list[memoryview]:
        try:
            request = _parse(head)
        except _BadRequestError as e:
            return _response(400, TEXT, f"{e}\n".encode())
        only_head = request.method == "HEAD"
        if request.path not in ("/", "/metrics"):
            return _response(404, TEXT, b"there is /metrics and nothing else\n", only_head=only_head)
        if request.method not in ("GET", "HEAD"):
            return _response(405, TEXT, b"this can be read and no more\n", "Allow: GET, HEAD\r\n")
        if request.path == "/":
            return _response(200, "text/html; charset=utf-8", _PAGE, only_head=only_head)
        self._make_room()
        openmetrics = wants_openmetrics(request.headers.get("accept", ""))
        packed = wants_gzip(request.headers.get("accept-encoding", ""))
        try:
            body = self._body(openmetrics, packed)
        except Exception:
            log.exception("/metrics could not be rendered")  # a defect of ours; the next scrape is tried all the same
            return _response(500, TEXT, b"see the log of acctd export\n", only_head=only_head)
        more = "Vary: Accept, Accept-Encoding\r\n" + ("Content-Encoding: gzip\r\n" if packed else "")
        return _response(200, OPENMETRICS if openmetrics else TEXT, body, more, only_head=only_head)

    def _make_room(self) -> None:
        """Who is slow to take its answer has it kept in memory: the slowest go first."""
        for client in sorted(self._clients.values(), key=lambda each: each.until):
            kept = {
                id(view.obj): memoryview(view.obj).nbytes for each in self._clients.values() for view in each.answer
            }
            if sum(kept.values()) <= _KEPT_MOST:
                return
            if client.answer:
                self._drop(client)

    def _body(self, openmetrics: bool, packed: bool) -> bytes:
        """Rendered once for all who ask within a second: asking and not taking makes neither work nor copies."""
        found = self._rendered.get(openmetrics)
        if found is None or time.monotonic() >= found.made + _FRESH:
            plain = self._render(openmetrics)
            found = self._rendered[openmetrics] = _Rendering(plain, time.monotonic())
        if not packed:
            return found.plain
        if found.packed is None:
            found.packed = gzip.compress(found.plain, compresslevel=1, mtime=0)
        return found.packed


def listen(address: str | tuple[str, int]) -> socket.socket:
    """A listening socket. Raises UsageError, InUseError or NotPermittedError."""
    try:
        if isinstance(address, str):
            _clear(address)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            where: object = address
        else:
            family, kind, proto, _, where = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
            listener = socket.socket(family, kind, proto)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(where)  # type: ignore[arg-type]
            if isinstance(address, str):
                os.chmod(address, _SOCKET_MODE)
            listener.listen(CLIENTS_MOST)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as e:
        number = e.errno if isinstance(e, OSError) else None
        error: type[AcctdError] = UsageError
        if number == errno.EADDRINUSE:
            error = InUseError
        elif number in (errno.EACCES, errno.EPERM):
            error = NotPermittedError
        shown = address if isinstance(address, str) else f"{address[0]}:{address[1]}"
        why = e.strerror if isinstance(e, OSError) else "this is no name of a host"
        raise error(f"prometheus.listen {shown} cannot be served ({why}); name another address") from e
    return listener


def _clear(path: str) -> None:
    """Remove the socket of a server that is no more. Nothing else is ever removed."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise InUseError(f"prometheus.listen {path} is a file and no socket; move it away, or name another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except TimeoutError:
            pass  # one that is too busy to answer; bind() says the rest
        except FileNotFoundError:
            pass


def _remove_own(listener: socket.socket, path: str) -> None:
    """The socket's file, unless it is another's by now."""
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        listener.close()
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)


def wants_openmetrics(accept: str) -> bool:
    """Whether that is what the client takes, and takes as gladly as plain text. RFC 9110, 12.5.1."""
    openmetrics, text = 0.0, 0.0
    for media, parameters in _weighed(accept):
        if media == "application/openmetrics-text" and parameters.get("version", "1.0.0") == "1.0.0":
            openmetrics = max(openmetrics, _weight(parameters))
        elif media == "text/plain":
            text = max(text, _weight(parameters))
    return openmetrics > 0 and openmetrics >= text


def wants_gzip(accept_encoding: str) -> bool:
    """RFC 9110, 12.5.3."""
    return any(name == "gzip" and _weight(parameters) > 0 for name, parameters in _weighed(accept_encoding))


def _weighed(header: str) -> list[tuple[str, dict[str, str]]]:
    found = []
    for part in header.split(","):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        pairs = (parameter.partition("=") for parameter in parameters)
        found.append((name.lower(), {key.strip().lower(): value.strip().strip('"') for key, _, value in pairs}))
    return found


def _weight(parameters: dict[str, str]) -> float:
    try:
        return float(parameters.get("q", "1"))
    except ValueError:
        return 0.0


def _parse(head: bytes) -> _Request:
    """Raises _BadRequestError."""
    line, *rest = (each.removesuffix("\r") for each in head.decode("latin-1").split("\n"))
    words = line.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise _BadRequestError("this is no HTTP/1 request")
    try:
        path = urlsplit(words[1]).path
    except ValueError as e:
        raise _BadRequestError("this is no address of a page") from e
    headers: dict[str, str] = {}
    for each in rest:
        name, colon, value = each.partition(":")
        if not colon:
            raise _BadRequestError("a header field has no colon")
        name = name.lower()
        headers[name] = f"{headers[name]},{value}" if name in headers else value
    return _Request(words[0], path, headers)


def _response(status: int, kind: str, body: bytes, more: str = "", *, only_head: bool = False) -> list[memoryview]:
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        f"{more}Connection: close\r\n\r\n"
    )
    return [memoryview(head.encode())] + ([] if only_head or not body else [memoryview(body)])
