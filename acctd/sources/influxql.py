"""InfluxQL asked of a database, row by row: what version 1 answers at /query, and later ones that kept it.

An answer is read as a stream, in pieces of a bounded size. Nothing is written, nothing is tried twice. What rows mean
is not known here. https://docs.influxdata.com/influxdb/v1/guides/query_data/
"""

import base64
import json
import ssl
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import msgspec
import urllib3
from urllib3.exceptions import HTTPError

from acctd.errors import NotFoundError, UnavailableError, UsageError
from acctd.sinks import InfluxSink
from acctd.sinks import influx as checked
from acctd.tables import InfluxTable
from acctd.wording import clean
from exporters.secretfile import locate, secret

Row = Mapping[str, Any]
"""Columns, and the tags of GROUP BY, by their names; None where there is nothing."""

_CHUNK = 2000  # rows in one piece of an answer
_PIECE_MOST = 64 * 2**20  # bytes of a piece
_TIMEOUT = 120.0  # s for a piece; adding up a year takes its time
_SCHEMES = {"influxdb": "http", "influxdb+https": "https"}
_KEYS = {"db": "database", "rp": "records_retention_policy"}
_TAKES = "write it like influxdb://HOST:8086?db=NAME&rp=POLICY"


class Database:
    """One that is asked. Use as a context manager. Raises UsageError, which never shows the URL."""

    def __init__(self, url: str, environ: Mapping[str, str]) -> None:
        self._sink = _sink(url)
        self.name = f"{self._sink.url} {self._sink.bucket}"
        self._pool = urllib3.PoolManager(
            retries=False,
            timeout=urllib3.Timeout(connect=min(self._sink.timeout, 10.0), read=self._sink.timeout),
            headers=_headers(self._sink, environ),
            ssl_context=_tls(self._sink, environ) if self._sink.url.startswith("https:") else None,
        )

    def __enter__(self) -> "Database":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.clear()

    def ask(self, query: str) -> Iterator[Row]:
        """The rows of one query, times in ns. Raises UnavailableError where there is no such answer."""
        sink = self._sink
        wanted = {"db": sink.bucket, "epoch": "ns", "chunked": "true", "chunk_size": str(_CHUNK), "q": query}
        if sink.records_retention_policy:
            wanted["rp"] = sink.records_retention_policy
        try:
            answer = self._pool.request(
                "POST", f"{sink.url}/query", body=urlencode(wanted), preload_content=False, redirect=False,
                headers={**self._pool.headers, "Content-Type": "application/x-www-form-urlencoded"},
            )  # fmt: skip
            try:
                if answer.status != 200:
                    raise self._refused(f"{answer.status}: {_words(answer.read(2000))}")
                for piece in _pieces(answer):
                    yield from self._rows(piece)
            finally:
                answer.close()
        except (HTTPError, OSError) as e:
            raise UnavailableError(f"{sink.url} cannot be asked ({_plain(e)}); see that it runs, and the url") from e

    def fields(self, measurement: str) -> Iterator[str]:
        """The fields that a measurement has; none where there is no such."""
        for row in self.ask(f"SHOW FIELD KEYS FROM {identifier(measurement)}"):
            if "fieldKey" not in row:
                raise self._refused(f"asked for fields, it tells {_words(repr(dict(row)).encode())}")
            yield row["fieldKey"]

    def _rows(self, piece: bytes) -> Iterator[Row]:
        try:
            document = json.loads(piece)
            results = document["results"]
            for result in results:
                if "error" in result:
                    raise self._refused(_words(str(result["error"]).encode()))
                for series in result.get("series", ()):
                    columns, tags = series["columns"], series.get("tags", {})
                    for values in series.get("values", ()):
                        yield {**tags, **dict(zip(columns, values, strict=True))}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise self._refused(f"{_words(piece[:2000])}") from e

    def _refused(self, words: str) -> UnavailableError:
        return UnavailableError(
            f"{self._sink.url} gives no answer in InfluxQL ({words}); it takes InfluxDB 1, or a later one that has its "
            "/query; others can be billed by --from records DIR"
        )


def quoted(text: str) -> str:
    """A string in a query."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def identifier(text: str) -> str:
    """A field's or tag's name in a query."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _pieces(answer: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    """One document of JSON a line. Not msgspec: a stranger's numbers may be of any kind."""
    rest = bytearray()
    for data in answer.stream(2**16, decode_content=True):
        rest += data
        while (end := rest.find(b"\n")) >= 0:
            if line := bytes(rest[:end]).strip():
                yield line
            del rest[: end + 1]
        if len(rest) > _PIECE_MOST:
            raise UnavailableError(f"a piece of the database's answer has more than {_PIECE_MOST} bytes")
    if line := bytes(rest).strip():
        yield line


def _sink(text: str) -> InfluxSink:
    try:
        parts = urlsplit(text)
        scheme = _SCHEMES[parts.scheme]
    except (ValueError, KeyError):
        raise UsageError(f"--from has a URL that is none of a database; {_TAKES}") from None
    given: dict[str, Any] = {"url": parts._replace(scheme=scheme, query="").geturl(), "version": 1}
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        if key in ("url", "version"):
            raise UsageError(f"--from has a {key} in its query; {_TAKES}")
        given[_KEYS.get(key, key)] = value
    given.setdefault("timeout", _TIMEOUT)
    try:
        return checked("from", msgspec.convert(given, InfluxTable, strict=False))
    except msgspec.ValidationError as e:
        raise UsageError(f"--from is not usable ({e}); {_TAKES}") from None
    except UsageError as e:
        raise UsageError(str(e).replace("influxdb.from.", "--from: ")) from None


def _headers(sink: InfluxSink, environ: Mapping[str, str]) -> dict[str, str]:
    if sink.user is not None and sink.password_file is not None:
        word = secret("--from: password_file", sink.password_file, environ)
        return {"Authorization": f"Basic {base64.b64encode(f'{sink.user}:{word}'.encode()).decode()}"}
    if sink.token_file is not None:
        return {"Authorization": f"Bearer {secret('--from: token_file', sink.token_file, environ)}"}
    return {}


def _tls(sink: InfluxSink, environ: Mapping[str, str]) -> ssl.SSLContext:
    path = locate("--from: ca_file", sink.ca_file, environ) if sink.ca_file is not None else None
    try:
        return ssl.create_default_context(cafile=path)
    except OSError as e:
        raise NotFoundError(f"--from: ca_file {path} cannot be used ({e}); give the authority's certificate") from e


def _words(body: bytes) -> str:
    """A server's own, in one line."""
    return clean(" ".join(body.decode(errors="replace").split())[:300]) or "nothing more"


def _plain(error: Exception) -> str:
    """urllib3 begins with a pool's repr."""
    return clean(" ".join(str(error).rpartition(">: ")[2].split())[:300])
