"""The target against servers that mean no good, or are broken in ways that a database is not."""

import contextlib
import gzip
import json
import os
import socket
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from acctd.frames import Sample, encode
from acctd.sinks import ExportConfig
from acctd.spool import Writer
from exporters import delivery, influxdb
from exporters.delivery import Delivery, RefusedError, UnavailableError
from exporters.httpbounds import ANSWER_MOST
from exporters.influxdb import Answer, InfluxTarget, judge
from tests.unit.test_influxdb import (
    CERTIFICATE,
    CONFLICT,
    KEY,
    POINTS,
    RETENTION,
    Database,
    Reply,
    Request,
    Trouble,
    refused,
    target,
    unavailable,
    v1,
    v3,
)

TAKEN = b"HTTP/1.1 204 No Content\r\n\r\n"
UNKNOWN = v1("write failed for table: point lacks organization permission")
"""Looks like words about points, and is not."""


@pytest.fixture(params=[1, 2, 3], ids=["v1", "v2", "v3"])
def version(request) -> int:
    return request.param


@pytest.fixture
def database() -> Iterator[Database]:
    server = Database()
    yield server
    server.close()


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[socket.socket], None]], str]]:
    """A server that does something to each connection; what it is given back is where it listens."""
    with contextlib.ExitStack() as stack:

        def start(do: Callable[[socket.socket], None]) -> str:
            def bravely(connection: socket.socket) -> None:
                with contextlib.suppress(OSError):  # a client that went
                    do(connection)

            server = Trouble(bravely)
            stack.callback(server.close)
            return server.url

        yield start


def asked(connection: socket.socket) -> None:
    """Take one small request whole."""
    got = b""
    while b"\r\n\r\n" not in got:
        got += connection.recv(65536)
    head, _, body = got.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    while len(body) < length:
        body += connection.recv(65536)


def answers(*pieces: bytes) -> Callable[[socket.socket], None]:
    def do(connection: socket.socket) -> None:
        asked(connection)
        connection.sendall(b"".join(pieces))
        connection.shutdown(socket.SHUT_WR)

    return do


def for_ever(*pieces: bytes) -> Callable[[socket.socket], None]:
    """The last piece again and again, until the client has gone."""

    def do(connection: socket.socket) -> None:
        asked(connection)
        for piece in pieces[:-1]:
            connection.sendall(piece)
        connection.settimeout(0.02)
        while True:
            connection.sendall(pieces[-1])
            with contextlib.suppress(TimeoutError):
                if not connection.recv(1):
                    return

    return do


LINES = [b'acctd_event,t=a text="gzip \\"precision\\" %d",' % n + b"x" * 200 for n in range(3000)]


class TestAnswersWithoutEnd:
    @pytest.mark.parametrize(
        "head",
        [
            b"HTTP/1.1 400 No\r\nContent-Length: 1500000000\r\n\r\n",
            b"HTTP/1.1 400 No\r\n\r\n",
            b"HTTP/1.1 400 No\r\nTransfer-Encoding: chunked\r\n\r\n59682f00\r\n",
            b"HTTP/1.1 200 Fine\r\nContent-Length: 1500000000\r\n\r\n",
        ],
        ids=["by length", "by close", "chunked", "200"],
    )
    def test_only_the_beginning_is_read(self, serve, version: int, head: bytes) -> None:
        sent = []

        def floods(connection: socket.socket) -> None:
            asked(connection)
            connection.sendall(head)
            while True:
                connection.sendall(b"x" * 2**16)
                sent.append(2**16)
                if sum(sent) > 2**28:
                    return

        error = unavailable(target(serve(floods), version))
        assert "xxx" in str(error)
        assert sum(sent) < 2**26  # what the kernel's buffers take, beside what was read

    def test_the_same_connection_is_not_used_again(self, database: Database, version: int) -> None:
        one = target(database.url, version)
        database.reply = Reply(400, v1(f"partial write: field type conflict: {'x' * 2**19}"))
        refused(one)
        database.reply = Reply()
        one.send("samples", POINTS)
        assert len(database.requests) == 2

    @pytest.mark.parametrize("megabytes", [50, 80], ids=["below the bound as it comes", "above it"])
    def test_a_bomb_does_not_unfold(self, database: Database, version: int, megabytes: int) -> None:
        bomb = gzip.compress(b"x" * (megabytes * 10**6), 1)
        assert (len(bomb) < ANSWER_MOST) == (megabytes == 50)
        database.reply = Reply(500, bomb, {"Content-Encoding": "gzip"})
        one = target(database.url, version)
        database.reply = Reply(500, bomb, {"Content-Encoding": "gzip"})
        unavailable(one)  # all that is loaded once is
        tracemalloc.start()
        try:
            assert "xxx" in str(unavailable(one))
            assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
        finally:
            tracemalloc.stop()

    def test_a_packed_answer_is_understood(self, database: Database, version: int) -> None:
        body = gzip.compress(v1("unable to parse 'm,t=b f=1i 1': missing tag value").encode())
        database.reply = Reply(400, body, {"Content-Encoding": "gzip"})
        assert set(refused(target(database.url, version)).bad or {}) == {1}

    def test_what_is_not_packed_and_says_so(self, database: Database, version: int) -> None:
        database.reply = Reply(400, "nothing of the kind", {"Content-Encoding": "gzip"})
        assert "400" in str(unavailable(target(database.url, version)))


class TestListsThatWereCut:
    """A database tells of each bad line, and there may be thousands."""

    def test_quoted_lines(self, database: Database, version: int) -> None:
        database.reply = Reply(400, v1("\n".join(f"unable to parse '{x.decode()}': missing fields" for x in LINES)))
        bad = refused(target(database.url, version), LINES).bad
        assert bad is not None and 100 < len(bad) < 3000 and set(bad) == set(range(len(bad)))
        assert set(bad.values()) == {"missing fields"}

    def test_numbered_lines_are_found_by_halving(self, database: Database, version: int) -> None:
        def reply(request: Request) -> Reply:
            lines = request.body.split(b"\n")
            entries = [
                {"original_line": line.decode(), "line_number": n, "error_message": "No fields were provided"}
                for n, line in enumerate(lines, 1)
            ]
            return Reply(400, json.dumps({"error": "partial write of line protocol occurred", "data": entries}))

        database.reply = reply
        one = target(database.url, version)
        assert refused(one, LINES).bad is None
        assert set(refused(one, LINES[:100]).bad or {}) == set(range(100))

    def test_one_line_longer_than_what_is_read(self, database: Database, version: int) -> None:
        line = "m,t=a " + "x" * 2**19
        database.reply = Reply(400, v1(f"unable to parse '{line}': missing fields"))
        one = target(database.url, version)
        assert refused(one, [line.encode(), b"m f=1i 1"]).bad is None
        database.reply = Reply(400, json.dumps({"error": "parsing failed", "data": [{"original_line": line}]}))
        assert refused(one, [line.encode(), b"m f=1i 1"]).bad is None

    def test_words_behind_a_very_long_line(self, database: Database, version: int) -> None:
        line = "m,t=" + "x" * 2**17 + " f=1i 1"
        database.reply = Reply(400, v1(f"unable to parse '{line}': max key length exceeded"))
        assert refused(target(database.url, version), [line.encode()]).bad == {0: "max key length exceeded"}

    def test_a_limit_in_a_long_list_is_no_fault_of_points(self, database: Database, version: int) -> None:
        database.reply = Reply(400, v3(*range(1, 5000), words="Update would exceed number of columns per table"))
        assert "400" in str(unavailable(target(database.url, version), LINES))


class TestTime:
    @pytest.mark.parametrize(
        "pieces",
        [
            (b"H", b"T"),
            (b"HTTP/1.1 204 No Content\r\nX: ", b"x"),
            (b"HTTP/1.1 500 Oh\r\nContent-Length: 1000000\r\n\r\n", b"x"),
            (b"HTTP/1.1 500 Oh\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
            (b"HTTP/1.1 500 Oh\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"x: y\r\n"),
            (b"HTTP/1.1 100 Continue\r\n\r\n",),
            (b"HTTP/1.1 103 Early Hints\r\n\r\n",),
        ],
        ids=["status", "headers", "body", "chunks", "trailers", "100 for ever", "103 for ever"],
    )
    def test_a_drip_holds_nobody(self, serve, version: int, pieces: Sequence[bytes]) -> None:
        error = unavailable(target(serve(for_ever(*pieces)), version, timeout=0.2))
        assert "a request was not through after 0.6 s" in str(error)

    def test_nor_does_one_within_tls(self, tmp_path: Path, version: int) -> None:
        """The same reader stands before a TLS socket."""
        (tmp_path / "server.pem").write_text(KEY + CERTIFICATE)
        (tmp_path / "ca.pem").write_text(CERTIFICATE)
        server = Database(tmp_path / "server.pem")
        handler = server.server.RequestHandlerClass
        held = for_ever(b"HTTP/1.1 500 Oh\r\n\r\n", b"x")

        class Drips(handler):  # type: ignore[misc, valid-type]
            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    held(self.connection)

        server.server.RequestHandlerClass = Drips
        try:
            error = unavailable(target(server.url, version, timeout=0.2, ca_file=str(tmp_path / "ca.pem")))
            assert "a request was not through after 0.6 s" in str(error)
        finally:
            server.close()

    def test_a_server_that_takes_little_at_a_time(self, serve, version: int) -> None:
        def sips(connection: socket.socket) -> None:
            connection.settimeout(0.02)
            while connection.recv(100):
                with contextlib.suppress(TimeoutError):
                    connection.recv(0) or connection.recv(1)

        points = [os.urandom(2**24)]  # does not shrink, and is more than buffers hold
        words = str(unavailable(target(serve(sips), version, timeout=0.2), points))
        assert "0.6 s" in words or "timeout = 0.2 s" in words

    def test_an_early_hint_is_not_the_answer(self, serve, version: int) -> None:
        hints = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
        target(serve(answers(hints, TAKEN)), version).send("samples", POINTS)


class TestWhatParsersDoNotSurvive:
    @pytest.mark.parametrize(
        "body",
        [
            "[" * 60_000,
            '{"a":' * 10_000,
            '{"error":"partial write of points","data":' + "[" * 60_000,
            '{"error":' + "9" * 5000 + "}",
            '{"error":"\\u12',
            '{"message":"\\ud800 gzip"}',
            "\x00" * 100,
        ],
        ids=["lists", "objects", "an end of lists", "a number", "an escape cut", "half a character", "zeros"],
    )
    def test_bodies(self, database: Database, version: int, body: str) -> None:
        database.reply = Reply(400, body)
        one = target(database.url, version)
        try:
            one.send("samples", POINTS)
        except (RefusedError, UnavailableError) as e:
            assert str(e).isprintable()
        else:
            pytest.fail("it was not taken")
        database.reply = Reply()
        one.send("samples", POINTS)

    @pytest.mark.parametrize("count", ["9" * 5000, "3" + "0" * 5000, "-3", "³"])
    def test_how_many_were_dropped(self, database: Database, version: int, count: str) -> None:
        database.reply = Reply(400, v1(CONFLICT + count))
        assert refused(target(database.url, version)).bad is None

    @pytest.mark.parametrize("number", ["true", "1e999", "-1", "9" * 4000, '"1"', "[]", "null", "NaN"])
    def test_numbers_of_lines(self, database: Database, version: int, number: str) -> None:
        database.reply = Reply(400, f'{{"error":"parsing failed","data":[{{"line_number":{number}}}]}}')
        assert refused(target(database.url, version)).bad is None

    @pytest.mark.parametrize(
        "answer",
        [
            b"HTTP/1.1 400 No\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nx",
            b"HTTP/1.1 400 No\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nx",
            b"HTTP/1.1 400 No\r\nContent-Length: 99999999999999999999999\r\n\r\nx",
            b"HTTP/1.1 400 No\r\nContent-Length: 1, 2\r\n\r\nx",
            b"HTTP/1.1 99999 No\r\n\r\n",
            b"HTTP/1.1 500 No\r\n" + b"x: y\r\n" * 1000 + b"\r\n",
            b"HTTP/1.1 500 No\r\nx: " + b"y" * 10**6 + b"\r\n\r\n",
            b"HTTP/1.1 503 No\r\nRetry-After: 99999999999999, 99 Jan 0 99:99:99 +9999\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
            b"\x1b[31mHTTP\r\n\r\n",
            b"\xff" * 1000,
        ],
    )
    def test_heads(self, serve, version: int, answer: bytes) -> None:
        assert str(unavailable(target(serve(answers(answer)), version))).isprintable()

    def test_anything_else(self, monkeypatch: pytest.MonkeyPatch, database: Database, version: int) -> None:
        def fails(*_: object) -> None:
            raise LookupError("\x1b[2J what nobody thought of")

        monkeypatch.setattr(influxdb, "judge", fails)
        database.reply = Reply(400, "x")
        words = str(unavailable(target(database.url, version)))
        assert "LookupError" in words and words.isprintable()

    @pytest.mark.parametrize(
        "words",
        ["unable to parse '" * 60_000, "unable to parse ''" * 60_000, "\nunable to parse '': dropped=1" * 60_000],
    )
    def test_quotes_in_quotes_take_linear_time(self, words: str) -> None:
        """A megabyte of it took the better part of an hour."""
        with pytest.raises((RefusedError, UnavailableError)):
            judge(Answer(400, {}, json.dumps({"error": words})), POINTS, "http://h")

    @pytest.mark.parametrize("text", ["<", "</", '{"error":"', '"error_message":"', '{"error":"x"' + '"error_message"'])
    def test_pages_and_what_was_cut_take_linear_time(self, text: str) -> None:
        with pytest.raises((RefusedError, UnavailableError)):
            judge(Answer(400, {}, '{"error":"partial' + text * 10**5), POINTS, "http://h")
        with pytest.raises(UnavailableError):
            judge(Answer(500, {}, text * 10**5), POINTS, "http://h")

    def test_a_line_that_quotes_what_a_server_says(self, database: Database, version: int) -> None:
        lines = [b'm,t=a f="unable to parse \'m,t=b f=1i 1" 1', b"m,t=b f=1i 1"]
        database.reply = Reply(400, v1(f"unable to parse '{lines[0].decode()}': bad timestamp dropped=0"))
        assert refused(target(database.url, version), lines).bad == {0: "bad timestamp"}


class TestWords:
    HOSTILE = "\x1b[31mred\x07\x9b1m\u202eback\x00"

    def said(self, of: InfluxTarget) -> list[str]:
        try:
            of.send("samples", POINTS)
        except RefusedError as e:
            return [str(e), *(e.bad or {}).values()]
        except UnavailableError as e:
            return [str(e)]
        return []

    @pytest.mark.parametrize(
        ("status", "body"),
        [
            (500, HOSTILE),
            (413, v1(HOSTILE)),
            (400, v1(f"unable to parse 'm,t=b f=1i 1': {HOSTILE}")),
            (400, v1(f"partial write: {HOSTILE} dropped=3")),
            (400, v3(1, words=HOSTILE)),
            (401, json.dumps({"message": HOSTILE})),
        ],
    )
    def test_no_terminal_hears_them(self, database: Database, version: int, status: int, body: str) -> None:
        database.reply = Reply(status, body)
        if status == 413:
            with pytest.raises(delivery.TooLargeError) as caught:
                target(database.url, version).send("samples", POINTS)
            said = [str(caught.value)]
        else:
            said = self.said(target(database.url, version))
        assert said and all(words.isprintable() for words in said) and any("red" in words for words in said)

    def test_nor_those_of_a_header(self, database: Database, version: int) -> None:
        database.reply = Reply(500, "", {"X-Influxdb-Error": "\x1b[31mred"})
        (words,) = self.said(target(database.url, version))
        assert words.isprintable() and "red" in words


class TestUnknownWords:
    def send_each(self, one: InfluxTarget, count: int) -> list[type[Exception]]:
        found = []
        for _ in range(count):
            try:
                one.send("samples", POINTS[:1])
            except (RefusedError, UnavailableError) as e:
                found.append(type(e))
        return found

    def test_the_sink_waits_where_every_point_is_refused(self, database: Database, version: int) -> None:
        one = target(database.url, version)
        database.reply = Reply(400, UNKNOWN)
        assert refused(one).bad is None  # a batch is halved
        assert self.send_each(one, 22) == [RefusedError] * 20 + [UnavailableError] * 2
        assert "point lacks organization permission" in str(unavailable(one, POINTS[:1]))
        database.reply = Reply()
        one.send("samples", POINTS[:1])
        database.reply = Reply(400, UNKNOWN)
        assert self.send_each(one, 1) == [RefusedError]

    def test_not_for_ever(self, database: Database, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(influxdb, "_UNNAMED_WAIT", 0.0)
        database.reply = Reply(400, UNKNOWN)
        assert self.send_each(target(database.url, version), 30) == [RefusedError] * 30

    def test_not_where_some_are_taken(self, database: Database, version: int) -> None:
        one = target(database.url, version)
        for _ in range(3):
            database.reply = Reply(400, UNKNOWN)
            assert self.send_each(one, 15) == [RefusedError] * 15
            database.reply = Reply()
            one.send("samples", POINTS)

    @pytest.mark.parametrize(
        "body",
        [
            v1(RETENTION + "1"),
            v1(CONFLICT + "1"),
            v1("unable to parse 'what it was': missing fields"),
            v3(7),
            "too long line: more than 262144 bytes",
        ],
    )
    def test_not_where_the_words_are_known(self, database: Database, version: int, body: str) -> None:
        """A spool that is older than the retention policy goes on, all of it."""
        database.reply = Reply(400, body)
        assert self.send_each(target(database.url, version), 30) == [RefusedError] * 30


class TestDelivery:
    def test_a_database_that_lost_a_right_costs_little(self, database: Database, tmp_path: Path, version: int) -> None:
        """And nothing of what waits, once it is given back."""

        def reply(_: Request) -> Reply:
            # Once the sink stands, somebody mends it.
            if way.numbers().trouble and "point lacks" in way.numbers().trouble:
                database.reply = Reply()
            return Reply(400, UNKNOWN)

        spool, positions = tmp_path / "spool", tmp_path / "positions"
        positions.mkdir()
        for stream in ("samples", "events", "records"):
            (spool / stream).mkdir(parents=True)
        writer = Writer(spool / "samples")
        writer.append([encode(Sample(n, str(n), "ada", 1, 1.0, "nat", {"cpu_user": {"": n}})) for n in range(1, 101)])
        writer.close()
        one = target(database.url, version)
        way = Delivery("x", one, spool, positions)
        database.reply = reply
        way.run(until_empty=True)
        assert way.numbers().counts.quarantined == 20
        assert way.numbers().counts.sent >= 80 and way.numbers().trouble is None

    def test_what_a_target_did_not_foresee_is_tried_again(
        self, database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(delivery, "_BACKOFF", 0.01)
        failures = [RecursionError("deep"), ValueError("digits"), RecursionError("deep")]
        troubles: list[str | None] = []

        class Fails(InfluxTarget):
            def send(self, to: str, data: Sequence[bytes]) -> None:
                troubles.append(way.numbers().trouble)
                if failures:
                    raise failures.pop(0)
                super().send(to, data)

        spool, positions = tmp_path / "spool", tmp_path / "positions"
        positions.mkdir()
        for stream in ("samples", "events", "records"):
            (spool / stream).mkdir(parents=True)
        writer = Writer(spool / "samples")
        writer.append([encode(Sample(1, "1", "ada", 1, 1.0, "nat", {"cpu_user": {"": 5}}))])
        writer.close()
        sink = target(database.url, 1)._sink
        way = Delivery("x", Fails(sink, ExportConfig(), "node1", {}), spool, positions)
        way.run(until_empty=True)
        assert len(database.requests) == 1 and way.numbers().counts.failures == 3
        assert troubles == [None, "RecursionError('deep')", "ValueError('digits')", "RecursionError('deep')"]
        assert way.numbers().trouble is None and way.numbers().counts.quarantined == 0
        assert sum("Traceback" in (record.exc_text or "") for record in caplog.records) == 1
