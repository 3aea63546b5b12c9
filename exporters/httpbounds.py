"""HTTP to a server that need not mean well: an answer is short, and a request ends.

A urllib3.PoolManager for one thread, which influxdb-client takes in place of its own. urllib3 by itself bounds each
wait only, and reads an answer whole. What an answer means is not known here.
"""

import io
import time
import zlib
from functools import partial
from http import client
from socket import socket
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError

ANSWER_MOST = 2**18  # bytes of an answer, as it comes and unpacked; of a longer one this is the beginning
"""InfluxDB 1 and 2 say only after a line what is wrong with it, and the longest strings of acctd are 64 KiB."""

WAITS = 3  # a request with its answer may take so many times what one wait may

_PIECE = 2**14  # bytes handed to a socket at once: a TLS socket's patience is per record, of that size at most
_TOLD_ANEW = ("content-length", "content-encoding", "transfer-encoding")


class LateError(TimeoutError):
    """A request was not through when its time was over, although something went on all the while."""


class Pools(urllib3.PoolManager):
    """For one thread. `wait`: s for the server to take or give any byte; a request gets WAITS times that in all.

    Looking up a name and each try of one of its addresses have bounds of their own: the resolver's, and `timeout`.
    Follows no redirect.
    """

    def __init__(self, wait: float, **keywords: Any) -> None:
        super().__init__(**keywords)
        self._deadline = _Deadline(wait)

    def urlopen(  # type: ignore[override]
        self, method: str, url: str, redirect: bool = False, **keywords: Any
    ) -> urllib3.BaseHTTPResponse:
        """The answer with its body read, ANSWER_MOST bytes of text. Raises HTTPError, OSError, LateError among them."""
        self._deadline.begin()
        try:
            answer = super().urlopen(method, url, redirect=False, **{**keywords, "preload_content": False})
            try:
                body = _beginning(answer)
            finally:
                answer.close()  # of a connection whose answer was read whole it has let go
        except (HTTPError, OSError) as e:
            if self._deadline.left <= 0:
                raise LateError(f"a request was not through after {self._deadline.total:g} s") from e
            raise
        headers = urllib3.HTTPHeaderDict(
            (name, value) for name, value in answer.headers.items() if name.lower() not in _TOLD_ANEW
        )
        return urllib3.HTTPResponse(io.BytesIO(body), headers, answer.status, reason=answer.reason)

    def _new_pool(
        self, scheme: str, host: str, port: int, request_context: dict[str, Any] | None = None
    ) -> urllib3.HTTPConnectionPool:
        pool = super()._new_pool(scheme, host, port, request_context)
        pool.ConnectionCls = _TlsConnection if scheme == "https" else _Connection
        pool.conn_kw["deadline"] = self._deadline
        return pool


def _beginning(answer: urllib3.BaseHTTPResponse) -> bytes:
    """Text in UTF-8, whatever came."""
    raw = b""
    while len(raw) <= ANSWER_MOST and (piece := answer.read(ANSWER_MOST + 1 - len(raw), decode_content=False)):
        raw += piece
    body = raw[:ANSWER_MOST]
    if answer.headers.get("content-encoding", "").strip().lower() in ("gzip", "x-gzip", "deflate"):
        try:
            body = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(body, ANSWER_MOST)
        except zlib.error:
            body = b""  # its status says enough
    return body.decode(errors="replace").encode()


class _Deadline:
    """Of the request that is under way."""

    def __init__(self, wait: float) -> None:
        self.wait, self.total = wait, WAITS * wait
        self._until = 0.0

    def begin(self) -> None:
        self._until = time.monotonic() + self.total

    @property
    def left(self) -> float:
        """s."""
        return self._until - time.monotonic()

    def prepare(self, of: socket) -> None:
        """Before each wait. Raises TimeoutError."""
        left = self.left
        if left <= 0:
            raise TimeoutError("timed out")
        of.settimeout(min(left, self.wait))


class _Connection(HTTPConnection):
    def __init__(self, *arguments: Any, deadline: _Deadline, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._deadline = deadline
        self.response_class = partial(_Answer, deadline)  # type: ignore[assignment]

    def send(self, data: Any) -> None:
        if self.sock is None:
            self.connect()
        view = memoryview(data)
        for start in range(0, len(view), _PIECE):
            self._deadline.prepare(self.sock)
            super().send(view[start : start + _PIECE])


class _TlsConnection(_Connection, HTTPSConnection):
    pass


class _Answer(client.HTTPResponse):
    def __init__(self, deadline: _Deadline, sock: socket, *arguments: Any, **keywords: Any) -> None:
        super().__init__(sock, *arguments, **keywords)
        self.fp = io.BufferedReader(_Reader(deadline, sock, self.fp.detach()))

    def _read_status(self) -> tuple[str, int, str]:
        """Only of 100 does http.client know that the answer proper comes after it (RFC 9110, 15.2)."""
        version, status, reason = super()._read_status()  # type: ignore[misc]
        interim = 100 <= status < 200 and status != client.SWITCHING_PROTOCOLS
        return version, client.CONTINUE if interim else status, reason


class _Reader(io.RawIOBase):
    """What a socket gives, each read with what is left of the time."""

    def __init__(self, deadline: _Deadline, sock: socket, raw: io.RawIOBase) -> None:
        self._deadline, self._sock, self._raw = deadline, sock, raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._deadline.prepare(self._sock)
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()
