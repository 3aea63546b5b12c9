"""One InfluxDB as a target of delivery: a batch of lines in one request, and what the server's answer means.

Versions 2 and 3 through influxdb-client's write API in its SYNCHRONOUS mode, version 1 through urllib3, both within the
bounds of httpbounds. Keeps no point, tries nothing twice and waits for nothing: delivery does. judge() decides between
trying again and quarantine.
"""

import base64
import gzip
import json
import logging
import re
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlencode

import urllib3
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    NameResolutionError,
    NewConnectionError,
    ReadTimeoutError,
    SSLError,
)

from acctd.errors import AcctdError, NotFoundError
from acctd.frames import STREAMS, Frame
from acctd.sinks import ExportConfig, InfluxSink
from acctd.wording import clean
from exporters.delivery import Item, RefusedError, TooLargeError, UnavailableError
from exporters.httpbounds import LateError, Pools
from exporters.lineprotocol import TO_RECORDS, Lines
from exporters.secretfile import locate, secret

_CONNECT_MOST = 5.0  # s; one that is there accepts at once, and the rest of the time-out is for its answer
_WORDS_MOST = 500  # characters of an answer that are shown
_COMPRESSION = 1  # the level; the highest takes six times the CPU for a fifth of the bytes less
_UNNAMED_MOST = 20  # points in a row, none of them named and none accepted between, that go into quarantine at once
_UNNAMED_WAIT = 86400.0  # s for which the next one waits; long enough for somebody to come

_OF_THE_POINTS = (400, 422)
_OF_POINTS = re.compile(r"pars|partial|point|line|field|tag|column|measurement|table|value|timestamp", re.IGNORECASE)
_NOT_OF_THE_POINTS = re.compile(
    # A parameter is wrong or missing; the request was garbled on its way; the database takes no new series or column;
    # its disk is full or broken (influxd 1.6 calls that a partial write, too, where the series are new).
    r"database is required|bucket not found|orgID|\bdb name|database or rp name|retention policy not found|precision"
    r"|unexpected EOF|unable to read data|gzip|authoriz|limit exceeded|would exceed"
    r"|no space left|disk quota|input/output error|read-only file system|too many open files",
    re.IGNORECASE,
)
_OF_A_LINE_IN_PLAIN_TEXT = re.compile(r"too long line|failed to parse line protocol")
_DROPPED = re.compile(r"dropped=(\d+)")
_DROPPED_AT_END = re.compile(r" dropped=\d+\Z")
_UNPARSED = "unable to parse '"
_TOLD_AND_CUT = re.compile(r'\s*\{.{0,200}?"(?:error|message)"\s*:\s*"((?:[^"\\]|\\.)*)', re.DOTALL)
_ENTRY_AND_CUT = re.compile(r'"error_message"\s*:\s*"((?:[^"\\]|\\.)*)"', re.DOTALL)


class Answer(NamedTuple):
    """What a server said; headers' names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: str


class InfluxTarget:
    """A delivery.Target. Nothing is read or opened before the first send()."""

    streams = STREAMS

    def __init__(self, sink: InfluxSink, export: ExportConfig, host: str, environ: Mapping[str, str]) -> None:
        self._sink, self._environ = sink, environ
        self.batch = sink.batch
        self.identity = sink.identity
        self._lines = Lines(sink, export, host)
        self._post: Callable[[str, bytes], Answer] | None = None
        self._release: Callable[[], None] = _nothing
        self._unnamed = 0  # points refused in words that name none, since the last that was accepted
        self._since = 0.0  # when they became too many, by the monotonic clock

    def encode(self, frame: Frame) -> list[Item]:
        return self._lines.encode(frame)

    def send(self, to: str, data: Sequence[bytes]) -> None:
        try:
            post = self._post or self._connect()
            answer = post(to, b"\n".join(data))
            if answer.status != 204 and (answer.status != 200 or answer.body.strip()):
                judge(answer, data, self._sink.url)
        except TooLargeError:
            raise
        except RefusedError as e:
            self._doubt(e, data)
            raise
        except UnavailableError:
            # The next attempt takes a new connection, and a token or a certificate that was changed meanwhile.
            self.close()
            raise
        except Exception as e:  # whatever a stranger's answer does to a parser: nothing is known against a point
            self.close()
            raise UnavailableError(f"{self._sink.url}: {_trouble(e, self._sink)}") from e
        self._unnamed = 0

    def state(self) -> dict[str, Any]:
        return {}

    def resume(self, state: Mapping[str, Any]) -> None:
        """There is nothing to find again."""

    def close(self) -> None:
        self._release()
        self._post, self._release = None, _nothing

    def _doubt(self, error: RefusedError, data: Sequence[bytes]) -> None:
        """Raises UnavailableError where so many points are refused in unknown words that it is hardly theirs.

        A server that is asked for one point and answers as it does for each is rather out of a right or a limit, in
        words that judge() does not know. Only for a time: were it the points after all, others would wait for ever.
        """
        if error.bad or len(data) > 1:
            return
        self._unnamed += 1
        if self._unnamed <= _UNNAMED_MOST:
            self._since = time.monotonic()
        elif time.monotonic() < self._since + _UNNAMED_WAIT:
            self.close()
            raise UnavailableError(
                f"{self._sink.url} takes no point and names none ({error}); see its log and its limits"
            ) from error

    def _connect(self) -> Callable[[str, bytes], Answer]:
        """Read the secrets and make a client. Raises AcctdError, OSError."""
        sink = self._sink
        context = self._tls() if sink.url.startswith("https:") else None
        self._post = self._connect_v1(context) if sink.version == 1 else self._connect_v2(context)
        return self._post

    def _connect_v1(self, context: ssl.SSLContext | None) -> Callable[[str, bytes], Answer]:
        sink = self._sink
        headers = {"Content-Type": "text/plain; charset=utf-8", "Content-Encoding": "gzip"}
        if sink.user is not None and sink.password_file is not None:
            password = secret(f"influxdb.{sink.name}.password_file", sink.password_file, self._environ)
            headers["Authorization"] = f"Basic {base64.b64encode(f'{sink.user}:{password}'.encode()).decode()}"
        elif (token := self._token()) is not None:
            headers["Authorization"] = f"Bearer {token}"
        pool = Pools(
            sink.timeout,
            retries=False,
            timeout=urllib3.Timeout(connect=self._connect_timeout, read=sink.timeout),
            ssl_context=context,
            headers=headers,
        )
        self._release = pool.clear

        def post(to: str, body: bytes) -> Answer:
            policy = sink.records_retention_policy if to == TO_RECORDS else sink.retention_policy
            query = {"db": sink.bucket, "precision": "ns"} | ({"rp": policy} if policy else {})
            answer = pool.request(
                "POST", f"{sink.url}/write?{urlencode(query)}", body=gzip.compress(body, _COMPRESSION), redirect=False
            )
            return Answer(answer.status, _lower(answer.headers), answer.data.decode(errors="replace"))

        return post

    def _connect_v2(self, context: ssl.SSLContext | None) -> Callable[[str, bytes], Answer]:
        # Half a second of CPU, and only for who uses it.
        from influxdb_client.client.influxdb_client import InfluxDBClient
        from influxdb_client.client.write_api import SYNCHRONOUS
        from influxdb_client.rest import ApiException

        sink = self._sink
        client = InfluxDBClient(
            url=sink.url,
            token=self._token() or "",
            org=sink.org or "",
            timeout=(round(self._connect_timeout * 1000), round(sink.timeout * 1000)),
            enable_gzip=True,
            ssl_context=context,
            retries=False,
        )
        # Its own pools would read an answer of any size, for any time; close() is theirs.
        pools = Pools(sink.timeout, retries=False, ssl_context=context)
        client.api_client.rest_client.pool_manager = pools  # type: ignore[assignment]
        writer = client.write_api(write_options=SYNCHRONOUS)
        self._release = client.close

        def post(to: str, body: bytes) -> Answer:
            bucket = sink.records_bucket if to == TO_RECORDS else sink.bucket
            handlers = logging.root.handlers[:]
            try:
                writer.write(bucket, record=body)  # in ns
            except ApiException as e:
                if not e.status:  # what the client makes of a TLS error
                    raise SSLError(e.reason) from e
                return Answer(e.status, _lower(e.headers or {}), e.body or "")
            finally:
                # Where nobody has set up logging, its logging.debug() does, and acctd's own words would be there twice.
                logging.root.handlers[:] = handlers
            answer = client.api_client.last_response
            return Answer(answer.status, _lower(answer.getheaders()), answer.data or "")

        return post

    @property
    def _connect_timeout(self) -> float:
        return min(self._sink.timeout, _CONNECT_MOST)

    def _token(self) -> str | None:
        name = self._sink.token_file
        return secret(f"influxdb.{self._sink.name}.token_file", name, self._environ) if name else None

    def _tls(self) -> ssl.SSLContext:
        """With verification, against the system's authorities or the given one. Raises AcctdError, OSError."""
        name = self._sink.ca_file
        if name is None:
            return ssl.create_default_context()
        key = f"influxdb.{self._sink.name}.ca_file"
        path = locate(key, name, self._environ)
        try:
            return ssl.create_default_context(cafile=path)
        except OSError as e:
            words = e.strerror if not isinstance(e, ssl.SSLError) else "it holds no certificate in PEM form"
            raise NotFoundError(f"{key} {path} cannot be used ({words}); give the authority's certificate") from e


def judge(answer: Answer, data: Sequence[bytes], url: str) -> NoReturn:
    """What an answer that is no success means. Raises RefusedError, TooLargeError or UnavailableError.

    About the points are 400 and 422 of a server that speaks as InfluxDB does, in JSON, with words about points and not
    about the request. An HTML page is a proxy's: it has not asked the database, so it can have nothing against a point,
    and a sink that waits is better than a spool that goes into quarantine. The same goes for a gateway's "Bad Request",
    and for plain text, unless it says that a line is at fault, as VictoriaMetrics does of one that is too long. A
    database that has as many series or columns as it may will take the point once its limit is raised. Of an answer
    that was too long to be read whole the beginning counts.
    """
    status, words = answer.status, _words(answer)
    if status == 413:
        raise TooLargeError(f"{url} answers {status}: {words}")
    if status in _OF_THE_POINTS:
        document = _document(answer.body)
        told = _message(document)
        if told is not None and not _of_the_request(told, document):
            raise RefusedError(f"{status} {words}", _bad(document, told, data))
        if told is None and _OF_A_LINE_IN_PLAIN_TEXT.search(answer.body) and not answer.body.lstrip().startswith("<"):
            raise RefusedError(f"{status} {words}", _alone(data, words))
    raise UnavailableError(f"{url} answers {status}: {words}{_advice(status)}", _retry_after(answer.headers))


def _bad(document: Any, told: str, data: Sequence[bytes]) -> dict[int, str] | None:
    """Which points, where the server tells; None where it does not."""
    if entries := _entries(document):
        if all(type(number) is int and 1 <= number <= len(data) for number, _ in entries):
            return {number - 1: clean(words) for number, words in entries}
        return _alone(data, told)
    if unparsed := _unparsed(told):  # 1 and 2, which quote the line
        numbers = {line.decode(errors="replace"): number for number, line in enumerate(data)}
        found = {numbers[line]: clean(words) for line, words in unparsed if line in numbers}
        return found or _alone(data, told)
    dropped = _DROPPED.search(told)
    if dropped and dropped[1] == str(len(data)):
        return dict.fromkeys(range(len(data)), clean(told))
    return None


def _alone(data: Sequence[bytes], words: str) -> dict[int, str] | None:
    """For words that are about some line: of one that was sent alone they are about that."""
    return {0: clean(words)} if len(data) == 1 else None


def _unparsed(told: str) -> list[tuple[str, str]]:
    """Lines that are quoted, and the words about each, in linear time: a line may hold what stands around lines."""
    first, *others = told.split(f"\n{_UNPARSED}")
    parts = [part for part in (first.partition(_UNPARSED)[2], *others) if part]
    found = []
    for part in parts:
        line, colon, words = part.partition("': ")
        if colon:
            found.append((line, _DROPPED_AT_END.sub("", words)))
    return found


def _of_the_request(told: str, document: Any) -> bool:
    """Whether the words are about something else than points. A line that they quote may hold any word."""
    if _unparsed(told):
        return False
    if not _OF_POINTS.search(told):
        return True
    return any(_NOT_OF_THE_POINTS.search(words) for words in (told, *(words for _, words in _entries(document))))


def _entries(document: Any) -> list[tuple[Any, str]]:
    """Line numbers, from 1 on, and words: of InfluxDB 3, which gives a list of some, or one by itself."""
    entries = document.get("data")
    entries = entries if isinstance(entries, list) else [entries]
    return [(e.get("line_number"), str(e.get("error_message"))) for e in entries if isinstance(e, Mapping)]


def _document(body: str) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        pass
    if told := _TOLD_AND_CUT.match(body):
        entries = _ENTRY_AND_CUT.findall(body, told.end())
        return {"error": _unescaped(told[1]), "data": [{"error_message": _unescaped(words)} for words in entries]}
    return None


def _unescaped(text: str) -> str:
    """The inside of a JSON string, which may have been cut in an escape."""
    try:
        return str(json.loads(f'"{text}"', strict=False))
    except ValueError:
        return text


def _message(document: Any) -> str | None:
    """`error` is version 1's and 3's, `message` 2's; None for what neither says."""
    if not isinstance(document, Mapping):
        return None
    told = document.get("error") or document.get("message")
    return told if isinstance(told, str) else None


def _words(answer: Answer) -> str:
    """The server's own, in one line."""
    told = _message(_document(answer.body)) or answer.headers.get("x-influxdb-error")
    if told is None:
        told = re.sub(r"<[^<>]*>", " ", answer.body)
    told = " ".join(told.split())
    return clean(told if len(told) <= _WORDS_MOST else f"{told[:_WORDS_MOST]}...") or "nothing more"


def _advice(status: int) -> str:
    if status in (401, 403):
        return "; see that the token or password is right and may write there"
    if status == 404:
        return "; see that the database or bucket exists and that the url is right"
    if 200 <= status < 300:
        return "; a database answers a write with 204 and no words, so see that the url is right"
    if 300 <= status < 400:
        return "; a redirect is not followed, because the token would go along, so give the url that it leads to"
    if 400 <= status < 500 and status not in (408, 429):
        return "; see that the url leads to the database itself"
    return ""


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """s; RFC 9110, 10.2.3: seconds or a date."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _trouble(error: Exception, sink: InfluxSink) -> str:
    """One sentence for what kept a request from being answered."""
    if isinstance(error, AcctdError):
        return str(error)
    if isinstance(error, SSLError | ssl.SSLError):
        return f"TLS fails ({_plain(error)}); see its certificate, and ca_file"
    if isinstance(error, NameResolutionError):
        return "its name is not known; see the url, and the resolver"
    if isinstance(error, NewConnectionError):
        return f"it cannot be reached ({_plain(error)}); see that it runs, and the url"
    if isinstance(error, ConnectTimeoutError):
        return "nothing accepts a connection there; see that it runs and that no firewall is between"
    if isinstance(error, LateError):
        return f"{_plain(error)}; see that it and the network are not overloaded, or give more timeout"
    if isinstance(error, ReadTimeoutError | TimeoutError) or any(isinstance(e, TimeoutError) for e in error.args):
        return f"it did not answer within timeout = {sink.timeout:g} s"
    if isinstance(error, HTTPError | OSError):
        return f"the connection broke ({_plain(error)})"
    return (
        f"its answer cannot be made sense of ({type(error).__name__}: {_plain(error)}); see that the url leads to the "
        "database itself"
    )


def _plain(error: Exception) -> str:
    """urllib3 begins with a pool's repr."""
    return clean(" ".join(str(error).rpartition(">: ")[2].split())[:_WORDS_MOST])


def _lower(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def _nothing() -> None:
    """There is nothing to give back."""
