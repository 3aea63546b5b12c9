"""The target against loopback servers that answer as the real ones do, and as proxies and broken networks do.

Bodies are what influxd 1.6.7 and VictoriaMetrics 1.79.5 answered, and what the sources of InfluxDB 2.7 and 3 write.
"""

import gzip
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

import pytest

from acctd.frames import Sample
from acctd.sinks import ExportConfig, InfluxSink
from exporters.delivery import RefusedError, TooLargeError, UnavailableError
from exporters.influxdb import InfluxTarget

POINTS = [b"m,t=a f=1i 1", b"m,t=b f=1i 1", b"m,t=c f=1i 1"]

# Of nobody: it was made for these tests, for 127.0.0.1.
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgCPow57a1hDdOuH1A
zAwBDIMDbp+mNj6M2nXTrV7RN0ahRANCAAQ3Hh0THytpzhhAmMN1mQidkUbeDpkp
2MWFF0nZ+o03531QQLq89xz4fCAxrfCcJupXPVqrZj7LVwv/UWy7L/r4
-----END PRIVATE KEY-----
"""
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBaTCCARCgAwIBAgIBATAKBggqhkjOPQQDAjATMREwDwYDVQQDDAhsb29wYmFj
azAgFw0yMDAxMDEwMDAwMDBaGA8yMTIwMDEwMTAwMDAwMFowEzERMA8GA1UEAwwI
bG9vcGJhY2swWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAQ3Hh0THytpzhhAmMN1
mQidkUbeDpkp2MWFF0nZ+o03531QQLq89xz4fCAxrfCcJupXPVqrZj7LVwv/UWy7
L/r4o1MwUTAPBgNVHRMBAf8EBTADAQH/MB0GA1UdDgQWBBQoc997F0DgTZ2gSCQF
50plrFBBDDAPBgNVHREECDAGhwR/AAABMA4GA1UdDwEB/wQEAwIChDAKBggqhkjO
PQQDAgNHADBEAiAF1x3jDcfUIEgYCydTC6Y1mDIXLnDIRzETz2oN1vqXGQIgQaKl
68Mc2XuuhYGXvCjdgQ6Gc5caeCeZn4r0y45y+1o=
-----END CERTIFICATE-----
"""

ANOTHER = """\
-----BEGIN CERTIFICATE-----
MIIBaTCCAQ6gAwIBAgIBAjAKBggqhkjOPQQDAjASMRAwDgYDVQQDDAdhbm90aGVy
MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjASMRAwDgYDVQQDDAdh
bm90aGVyMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEkwbGQ7WtDvntFNu6Avdy
YMKFPahtt+GDAE4uAPH+l9go2ryFMiO3omtaS5xeO0tL7t9N5K2kGZ7fiHlDtZj+
nKNTMFEwDwYDVR0TAQH/BAUwAwEB/zAdBgNVHQ4EFgQUKPE9e/XtiSsXoD3e0jcW
athsIZYwDwYDVR0RBAgwBocEfwAAATAOBgNVHQ8BAf8EBAMCAoQwCgYIKoZIzj0E
AwIDSQAwRgIhAOVYFNJjMjQxV0kqo3ZRnF4SRxrJyfFvKTTLmfcLsKM0AiEAvzGU
0evJdJelpOdjWy8V/2A8TBSyhX5G9a6v6lpttW4=
-----END CERTIFICATE-----
"""


class Request(NamedTuple):
    """What came."""

    path: str
    parameters: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes


class Reply(NamedTuple):
    """What goes back."""

    status: int = 204
    body: str | bytes = ""
    headers: dict[str, str] = {}  # noqa: RUF012  # never changed


class Database:
    """An HTTP server in a thread. Answers what `reply` says, and remembers what it was asked."""

    def __init__(self, tls: Path | None = None) -> None:
        self.reply: Reply | Callable[[Request], Reply] = Reply()
        self.requests: list[Request] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # an answer in one piece, or each costs what TCP waits for a second one

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                parts = urlsplit(self.path)
                headers = {name.lower(): value for name, value in self.headers.items()}
                if headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                request = Request(parts.path, parse_qs(parts.query, keep_blank_values=True), headers, body)
                outer.requests.append(request)
                status, answer, more = outer.reply(request) if callable(outer.reply) else outer.reply
                data = answer.encode() if isinstance(answer, str) else answer
                self.send_response(status)
                for name, value in more.items():
                    self.send_header(name, value)
                if status != 204:
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                """Not into the tests' output."""

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """A client that does not trust this one hangs up."""

        self.server = Quiet(("127.0.0.1", 0), Handler)
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{self.server.server_address[1]}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


@pytest.fixture
def database() -> Iterator[Database]:
    server = Database()
    yield server
    server.close()


@pytest.fixture
def secure(tmp_path: Path) -> Iterator[Database]:
    pem = tmp_path / "server.pem"
    pem.write_text(KEY + CERTIFICATE)
    server = Database(pem)
    yield server
    server.close()


def target(url: str, version: int = 1, environ: dict[str, str] | None = None, **other) -> InfluxTarget:
    values = {"bucket": "b", "records_bucket": "b", "timeout": 5.0}
    values |= {2: {"org": "o"}}.get(version, {})
    sink = InfluxSink(name="x", url=url, version=version, **{**values, **other})  # type: ignore[arg-type]
    return InfluxTarget(sink, ExportConfig(), "node1", environ or {})


@pytest.fixture(params=[1, 2, 3], ids=["v1", "v2", "v3"])
def version(request) -> int:
    return request.param


def refused(of: InfluxTarget, points: list[bytes] = POINTS) -> RefusedError:
    with pytest.raises(RefusedError) as caught:
        of.send("samples", points)
    return caught.value


def unavailable(of: InfluxTarget, points: list[bytes] = POINTS) -> UnavailableError:
    with pytest.raises(UnavailableError) as caught:
        of.send("samples", points)
    assert "\n" not in str(caught.value)
    return caught.value


class TestRequests:
    def test_version_1(self, database: Database) -> None:
        one = target(
            database.url,
            1,
            bucket="db",
            retention_policy="weeks",
            records_bucket="db",
            records_retention_policy="all time",
        )
        one.send("samples", POINTS)
        one.send("records", POINTS[:1])
        one.close()
        first, second = database.requests
        assert (first.path, first.parameters) == ("/write", {"db": ["db"], "rp": ["weeks"], "precision": ["ns"]})
        assert second.parameters["rp"] == ["all time"]
        assert first.body == b"\n".join(POINTS)
        assert first.headers["content-encoding"] == "gzip"
        assert "authorization" not in first.headers

    def test_version_1_without_a_policy(self, database: Database) -> None:
        target(database.url, 1).send("records", POINTS)
        assert "rp" not in database.requests[0].parameters

    @pytest.mark.parametrize("number", [2, 3])
    def test_version_2_and_3(self, database: Database, number: int) -> None:
        one = target(database.url, number, bucket="weeks", records_bucket="years")
        one.send("samples", POINTS)
        one.send("records", POINTS[:1])
        one.close()
        first, second = database.requests
        org = "o" if number == 2 else ""
        assert first.path == "/api/v2/write"
        assert first.parameters == {"org": [org], "bucket": ["weeks"], "precision": ["ns"]}
        assert second.parameters["bucket"] == ["years"]
        assert first.body == b"\n".join(POINTS)
        assert first.headers["content-encoding"] == "gzip"

    def test_a_path_before_the_api(self, database: Database, version: int) -> None:
        target(f"{database.url}/a/b", version).send("samples", POINTS)
        assert database.requests[0].path == ("/a/b/write" if version == 1 else "/a/b/api/v2/write")

    def test_one_connection_for_all_requests(self, database: Database, version: int) -> None:
        ports = set()
        accept = database.server.get_request

        def counted() -> tuple[socket.socket, tuple]:
            found = accept()
            ports.add(found[1])
            return found

        database.server.get_request = counted  # type: ignore[method-assign]
        one = target(database.url, version)
        for _ in range(5):
            one.send("samples", POINTS)
        one.close()
        assert len(ports) == 1 and len(database.requests) == 5

    def test_points_beyond_ascii_and_the_encoder(self, database: Database, version: int) -> None:
        one = target(database.url, version)
        items = one.encode(Sample(1, "1", "Änne", 1, 1.0, "nat", {"cpu_user": {"": 5}}))
        one.send(items[0].to, [item.data for item in items])
        assert "owner=Änne" in database.requests[0].body.decode()

    def test_the_identity_has_no_secret_and_says_where(self, tmp_path: Path) -> None:
        (tmp_path / "token").write_text("secret")
        one = target("http://h", 2, bucket="weeks", records_bucket="years", token_file=str(tmp_path / "token"))
        assert one.identity == "influxdb2 http://h o weeks years"
        assert one.identity != target("http://h", 3, bucket="weeks", records_bucket="years").identity


class TestSecrets:
    def test_a_token(self, database: Database, version: int, tmp_path: Path) -> None:
        (tmp_path / "token").write_text("abc\n")
        target(database.url, version, token_file=str(tmp_path / "token")).send("samples", POINTS)
        assert database.requests[0].headers["authorization"] == ("Bearer abc" if version == 1 else "Token abc")

    def test_user_and_password_of_a_credential(self, database: Database, tmp_path: Path) -> None:
        (tmp_path / "word").write_text("open sesame")
        environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
        target(database.url, 1, environ, user="ada", password_file="word").send("samples", POINTS)  # noqa: S106
        assert database.requests[0].headers["authorization"] == "Basic YWRhOm9wZW4gc2VzYW1l"

    def test_a_rotated_token_is_taken(self, database: Database, version: int, tmp_path: Path) -> None:
        path = tmp_path / "token"
        path.write_text("old")
        one = target(database.url, version, token_file=str(path))
        one.send("samples", POINTS)
        database.reply = lambda request: (
            Reply() if request.headers["authorization"].endswith(" new") else Reply(401, UNAUTHORIZED[version])
        )
        error = unavailable(one)
        assert "401" in str(error) and "token" in str(error) and "old" not in str(error)
        path.write_text("new")
        one.send("samples", POINTS)

    def test_a_missing_token(self, database: Database, version: int, tmp_path: Path) -> None:
        one = target(database.url, version, token_file=str(tmp_path / "token"))
        assert "token_file" in str(unavailable(one)) and not database.requests
        (tmp_path / "token").write_text("abc")
        one.send("samples", POINTS)

    def test_no_redirect_is_followed(self, database: Database, version: int, tmp_path: Path) -> None:
        (tmp_path / "token").write_text("abc")
        elsewhere = Database()
        try:
            database.reply = Reply(307, "", {"Location": f"{elsewhere.url}/write"})
            error = unavailable(target(database.url, version, token_file=str(tmp_path / "token")))
            assert "redirect" in str(error)
            assert len(database.requests) == 1 and not elsewhere.requests
        finally:
            elsewhere.close()


UNAUTHORIZED = {
    1: '{"error":"authorization failed"}',
    2: '{"code":"unauthorized","message":"unauthorized access"}',
    3: "",
}
RETENTION = "partial write: points beyond retention policy dropped="
CONFLICT = (
    'partial write: field type conflict: input field "f" on measurement "m" is type float, already exists as type '
    "integer dropped="
)


def v2(message: str, code: str = "invalid") -> str:
    return json.dumps({"code": code, "message": message})


def v1(message: str) -> str:
    return json.dumps({"error": message}) + "\n"


def v3(
    *lines: int, words: str = "No fields were provided", error: str = "partial write of line protocol occurred"
) -> str:
    entries = [{"error_message": words, "line_number": line, "original_line": "m,t=a"} for line in lines]
    return json.dumps({"error": error, "data": entries})


class TestRefusals:
    @pytest.mark.parametrize(
        ("status", "body", "bad"),
        [
            pytest.param(400, v1(CONFLICT + "1"), None, id="v1 some"),
            pytest.param(400, v1(CONFLICT + "3"), {0, 1, 2}, id="v1 all"),
            pytest.param(400, v1(RETENTION + "2"), None, id="v1 some too old"),
            pytest.param(400, v1(RETENTION + "3"), {0, 1, 2}, id="v1 all too old"),
            pytest.param(400, v1("unable to parse 'm,t=b f=1i 1': missing tag value"), {1}, id="v1 one line"),
            pytest.param(
                400,
                v1(
                    "partial write: unable to parse 'm,t=a f=1i 1': missing tag value\n"
                    "unable to parse 'm,t=c f=1i 1': missing fields dropped=0"
                ),
                {0, 2},
                id="v1 two lines",
            ),
            pytest.param(400, v1("unable to parse 'something else': missing fields"), None, id="v1 no line of ours"),
            pytest.param(400, v1("unable to parse 'gzip=1': precision"), None, id="v1 words inside a line"),
            pytest.param(
                400, v1('partial write: invalid field name: input field "time" dropped=1'), None, id="v1 name"
            ),
            pytest.param(
                422, v2(f"failure writing points to database: {CONFLICT}1", "unprocessable entity"), None, id="v2"
            ),
            pytest.param(422, v2(f"failure writing points to database: {RETENTION}3"), {0, 1, 2}, id="v2 all"),
            pytest.param(400, v2("unable to parse 'm,t=c f=1i 1': bad timestamp"), {2}, id="v2 one line"),
            pytest.param(400, v3(2), {1}, id="v3 partial"),
            pytest.param(400, v3(1, 3), {0, 2}, id="v3 two"),
            pytest.param(400, v3(9), None, id="v3 a line that is none"),
            pytest.param(
                400,
                '{"error":"line protocol parsing error","data":{"error_message":"No fields were provided",'
                '"line_number":1,"original_line":"cpu,host=a val= 123"}}',
                {0},
                id="v3 whole",
            ),
            pytest.param(
                400,
                'remoteAddr: "127.0.0.1:39288"; requestURI: /api/v2/write?precision=ns; '
                "cannot read influx line protocol data: too long line: more than 262144 bytes\n",
                None,
                id="VictoriaMetrics",
            ),
        ],
    )
    def test_of_points(self, database: Database, version: int, status: int, body: str, bad: set[int] | None) -> None:
        database.reply = Reply(status, body)
        error = refused(target(database.url, version))
        assert (None if error.bad is None else set(error.bad)) == bad
        assert str(status) in str(error)
        assert all(len(words) > 5 and "unable to parse '" not in words for words in (error.bad or {}).values())

    @pytest.mark.parametrize("body", ["", v1("Request Entity Too Large"), "<html>nginx</html>"])
    def test_of_too_much(self, database: Database, version: int, body: str) -> None:
        database.reply = Reply(413, body)
        with pytest.raises(TooLargeError, match="413"):
            target(database.url, version).send("samples", POINTS)

    def test_the_next_batch_goes_over_the_same_client(self, database: Database, version: int) -> None:
        one = target(database.url, version)
        database.reply = Reply(400, v1(CONFLICT + "1"))
        refused(one)
        database.reply = Reply()
        one.send("samples", POINTS)
        assert len(database.requests) == 2


class TestNotOfThePoints:
    @pytest.mark.parametrize(
        ("status", "body", "words"),
        [
            (400, v1("database is required"), "database is required"),
            (400, v1("unexpected EOF"), "unexpected EOF"),
            (
                400,
                v1('partial write: max-values-per-tag limit exceeded (100000/100000): measurement="m" dropped=3'),
                "limit",
            ),
            (400, v1("partial write: max-series-per-database limit exceeded: (1000000) dropped=1"), "limit"),
            (404, v1('database not found: "none"'), "database or bucket exists"),
            (500, v1("retention policy not found: nope"), "retention policy not found"),
            (400, v2("Please provide either orgID or org"), "orgID"),
            (400, v2("gzipped HTTP body contains an invalid header"), "gzipped"),
            (403, v2("insufficient permissions for write", "forbidden"), "insufficient permissions"),
            (404, v2('bucket "b" not found', "not found"), 'bucket "b" not found'),
            (422, v3(1, words="Update to schema would exceed number of columns per table limit of 500 columns"), "422"),
            (400, v1("db name did not start with a number or letter"), "db name"),
            (400, "error decoding gzip stream: x", "gzip"),
            (400, 'requestURI: /writ; unsupported path requested: "/writ"', "unsupported path"),
            (400, "<html><head><title>400 Bad Request</title></head></html>", "400 Bad Request"),
            (400, "<html>too long line</html>", "too long line"),
            (400, '{"message":"Bad Request"}', "Bad Request"),
            (400, "", "nothing more"),
            (400, "[1]", "[1]"),
            (401, "", "token or password"),
            (302, "", "redirect"),
            (200, "<html>please log in</html>", "please log in"),
            (408, "", "408"),
            (502, "<html><body>bad gateway</body></html>", "bad gateway"),
            (500, b"\xff\xfe", ""),
        ],
    )
    def test_waits(self, database: Database, version: int, status: int, body: str, words: str) -> None:
        database.reply = Reply(status, body)
        one = target(database.url, version)
        error = unavailable(one)
        assert words in str(error) and database.url in str(error) and "<" not in str(error)
        assert error.retry_after is None
        database.reply = Reply()
        one.send("samples", POINTS)

    def test_a_full_disk_of_the_database(self, database: Database, version: int) -> None:
        """influxd 1.6 of points in new series: dropped are all, and all are good."""
        words = "partial write: write /x/data/acctd/_series/07/0000: no space left on device dropped=1000"
        database.reply = Reply(400, v1(words))
        assert words in str(unavailable(target(database.url, version), [b"m,t=%d f=1i 1" % n for n in range(1000)]))

    @pytest.mark.parametrize("status", [429, 503])
    def test_retry_after(self, database: Database, version: int, status: int) -> None:
        one = target(database.url, version)
        for text, low, high in (
            ("7", 7, 7),
            (formatdate(time.time() + 100, usegmt=True), 90, 101),
            (formatdate(0, usegmt=True), 0, 0),
        ):
            database.reply = Reply(status, v2("slow down"), {"Retry-After": text})
            found = unavailable(one).retry_after
            assert found is not None and low <= found <= high
        for text in ("soon", "", "-1", "²"):
            database.reply = Reply(status, "", {"Retry-After": text.encode().decode("latin-1")})
            assert unavailable(one).retry_after is None

    def test_200_without_words_is_taken(self, database: Database, version: int) -> None:
        database.reply = Reply(200)
        target(database.url, version).send("samples", POINTS)

    def test_nobody_sets_up_logging(self, database: Database, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(logging.root, "handlers", [])
        database.reply = Reply(500, "no JSON")
        unavailable(target(database.url, version))
        assert logging.root.handlers == []

    def test_long_words_are_cut(self, database: Database, version: int) -> None:
        database.reply = Reply(500, "x" * 100_000)
        assert len(str(unavailable(target(database.url, version)))) < 1000


class Trouble:
    """A listener that does something to each connection."""

    def __init__(self, do: Callable[[socket.socket], None]) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self._do, self._held = do, []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection = self.listener.accept()[0]
            except OSError:
                return
            self._held.append(connection)
            self._do(connection)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self._thread.join()
        for connection in self._held:
            connection.close()


def reset(connection: socket.socket) -> None:
    connection.recv(10)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


def cut(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 500 Oh\r\nContent-Length: 100\r\n\r\nhalf")
    connection.shutdown(socket.SHUT_RDWR)


class TestNetwork:
    @pytest.mark.parametrize(
        ("do", "words"),
        [
            (lambda _: None, "did not answer within timeout = 0.3 s"),
            (reset, "the connection broke"),
            (cut, "the connection broke"),
            (lambda connection: connection.close(), "the connection broke"),
            (lambda connection: connection.sendall(b"SSH-2.0-x\r\n"), "the connection broke"),
        ],
        ids=["hangs", "resets", "cuts its answer", "closes", "is something else"],
    )
    def test_broken(self, version: int, do: Callable[[socket.socket], None], words: str) -> None:
        server = Trouble(do)
        try:
            error = unavailable(target(server.url, version, timeout=0.3))
            assert words in str(error) and "0x" not in str(error)
            assert "timeout" not in words or "read timeout=0.3" in str(error.__cause__)
        finally:
            server.close()

    def test_nobody_there_and_then_somebody(self, version: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        assert "cannot be reached" in str(unavailable(target(f"http://127.0.0.1:{port}", version)))

    def test_a_server_that_was_started_anew(self, database: Database, version: int) -> None:
        """The connection that was kept is dead; that costs one attempt at most."""
        one = target(database.url, version)
        database.reply = Reply(204, "", {"Connection": "close"})
        one.send("samples", POINTS)
        one.send("samples", POINTS)
        assert len(database.requests) == 2


class TestTls:
    def test_verified_by_ca_file(self, secure: Database, version: int, tmp_path: Path) -> None:
        (tmp_path / "ca.pem").write_text(CERTIFICATE)
        target(secure.url, version, ca_file=str(tmp_path / "ca.pem")).send("samples", POINTS)
        target(secure.url, version, {"CREDENTIALS_DIRECTORY": str(tmp_path)}, ca_file="ca.pem").send("samples", POINTS)
        assert len(secure.requests) == 2

    def test_an_unknown_authority(self, secure: Database, version: int) -> None:
        error = unavailable(target(secure.url, version))
        assert "TLS" in str(error) and "certificate verify failed" in str(error) and not secure.requests

    def test_another_name(self, secure: Database, version: int, tmp_path: Path) -> None:
        (tmp_path / "ca.pem").write_text(CERTIFICATE)
        url = secure.url.replace("127.0.0.1", "localhost")
        error = unavailable(target(url, version, ca_file=str(tmp_path / "ca.pem")))
        assert "TLS" in str(error) and not secure.requests

    def test_an_authority_that_was_exchanged(self, secure: Database, version: int, tmp_path: Path) -> None:
        (tmp_path / "ca.pem").write_text(ANOTHER)
        one = target(secure.url, version, ca_file=str(tmp_path / "ca.pem"))
        assert "certificate verify failed" in str(unavailable(one))
        (tmp_path / "ca.pem").write_text(CERTIFICATE)
        one.send("samples", POINTS)

    def test_plain_http_where_tls_is_wanted(self, database: Database, version: int) -> None:
        assert "TLS" in str(unavailable(target(database.url.replace("http:", "https:"), version)))

    @pytest.mark.parametrize("content", [None, "", "no certificate"])
    def test_a_bad_ca_file(self, secure: Database, version: int, tmp_path: Path, content: str | None) -> None:
        if content is not None:
            (tmp_path / "ca.pem").write_text(content)
        one = target(secure.url, version, ca_file=str(tmp_path / "ca.pem"))
        assert "influxdb.x.ca_file" in str(unavailable(one))
        (tmp_path / "ca.pem").write_text(CERTIFICATE)
        one.send("samples", POINTS)
