"""The server of /metrics over real sockets of this host: what it answers, to how many, and to whom not for long."""

import gzip
import os
import socket
import stat
import threading
import time
import urllib.error
import urllib.request

import pytest

from acctd.errors import InUseError, NotPermittedError, UsageError
from acctd.sinks import PrometheusSink
from exporters import scrape as module
from exporters.scrape import CLIENTS_MOST, OPENMETRICS, TEXT, Scrape, wants_gzip, wants_openmetrics

PATIENCE = 20.0  # s after which a test has failed


def plain(openmetrics):
    return b"metrics " + (b"open" if openmetrics else b"text") + b"\n"


@pytest.fixture
def served():
    """served(render, address): a running server; all are closed at the end."""
    running = []

    def serve(render=plain, address=("127.0.0.1", 0)):
        server = Scrape(PrometheusSink(address=address, grace=0), render)
        server.url = server.start()
        running.append(server)
        return server

    yield serve
    for server in running:
        server.close()


def fetch(url, **headers):
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    with urllib.request.urlopen(urllib.request.Request(url, headers=names), timeout=PATIENCE) as answer:  # noqa: S310
        return answer.status, answer.headers, answer.read()


def connect(server):
    host, port = server.url.removeprefix("http://").removesuffix("/metrics").rsplit(":", 1)
    return socket.create_connection((host.strip("[]"), int(port)), PATIENCE)


def rest_of(connection):
    """All that comes until the server closes."""
    data = b""
    while piece := connection.recv(65536):
        data += piece
    return data


def say(server, text):
    with connect(server) as connection:
        connection.sendall(text)
        return rest_of(connection)


def until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_text_for_whoever_asks_for_nothing(served):
    status, headers, body = fetch(served().url)
    assert (status, headers["Content-Type"], headers["Content-Encoding"]) == (200, TEXT, None)
    assert body == b"metrics text\n"
    assert int(headers["Content-Length"]) == len(body)


def test_openmetrics_and_gzip_for_whoever_asks(served):
    prometheus = (
        "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
        "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    )
    _, headers, body = fetch(served().url, Accept=prometheus, Accept_Encoding="gzip")
    assert (headers["Content-Type"], headers["Content-Encoding"]) == (OPENMETRICS, "gzip")
    assert gzip.decompress(body) == b"metrics open\n"


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text; version=1.0.0; charset=utf-8", True),
        ('Application/OpenMetrics-Text;version="1.0.0"', True),
        ("application/openmetrics-text;version=2.0.0", False),
        ("application/openmetrics-text;version=0.0.1", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=x", False),
        ("application/openmetrics-text;q=0.3,text/plain;q=0.5", False),
        ("application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.3", True),
    ],
)
def test_who_gets_openmetrics(accept, wanted):
    assert wants_openmetrics(accept) == wanted


@pytest.mark.parametrize(
    ("header", "wanted"),
    [("", False), ("gzip", True), ("deflate, GZIP;q=0.5", True), ("gzip;q=0", False), ("identity", False)],
)
def test_who_gets_gzip(header, wanted):
    assert wants_gzip(header) == wanted


def test_the_first_page_leads_to_the_other(served):
    server = served()
    status, headers, body = fetch(server.url.removesuffix("metrics"))
    assert status == 200
    assert headers["Content-Type"].startswith("text/html")
    assert b'href="/metrics"' in body


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET /metrics?a=b HTTP/1.0\r\n\r\n", 200),
        (b"GET /metrics HTTP/1.0\n\n", 200),
        (b"GET /metrics HTTP/1.1\nHost: x\nAccept: */*\n\n", 200),
        (b"GET /metrics HTTP/1.1\r\nHost: x\n\r\n", 200),
        (b"GET http://x/metrics HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET /metrics/ HTTP/1.1\r\n\r\n", 404),
        (b"GET /etc/passwd HTTP/1.1\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"DELETE / HTTP/1.1\r\n\r\n", 405),
        (b"hello\r\n\r\n", 400),
        (b"GET /metrics\r\n\r\n", 400),
        (b"GET /metrics HTTP/2\r\n\r\n", 400),
        (b"GET http://[/metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nno field\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\nno field\n\n", 400),
        (b"\r\n\r\n", 400),
        (b"\n\n", 400),
        (b"\0\xff\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 9000, 431),
    ],
)
def test_answers(served, request_, status):
    server = served()
    answer = say(server, request_)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\nConnection: close\r\n" in answer
    assert fetch(server.url)[0] == 200


def test_lone_line_feeds_end_lines_and_are_no_part_of_them(served):
    answer = say(served(), b"GET /metrics HTTP/1.1\nAccept-Encoding: gzip\nAccept: application/openmetrics-text\n\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert OPENMETRICS.encode() in head
    assert gzip.decompress(body) == b"metrics open\n"


def test_only_the_head(served):
    head, end, body = say(served(), b"HEAD /metrics HTTP/1.1\r\n\r\n").partition(b"\r\n\r\n")
    assert b"Content-Length: 13" in head
    assert (end, body) == (b"\r\n\r\n", b"")


def test_a_request_in_pieces(served):
    with connect(served()) as connection:
        for piece in (b"GET /met", b"rics HTTP/1.1\r", b"\nAccept: application/openmetrics-text\r\n\r", b"\n"):
            connection.sendall(piece)
        assert rest_of(connection).endswith(b"metrics open\n")


def test_a_rendering_that_fails_is_an_answer_and_the_next_one_is_tried(served, caplog):
    outcomes = [ZeroDivisionError(), b"fine\n"]

    def render(openmetrics):
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    server = served(render)
    with pytest.raises(urllib.error.HTTPError, match="500"):
        fetch(server.url)
    assert fetch(server.url)[2] == b"fine\n"
    assert "could not be rendered" in caplog.text


def test_simultaneous_scrapes_share_one_rendering(served, monkeypatch):
    monkeypatch.setattr(module, "_FRESH", PATIENCE)
    begun, go = threading.Event(), threading.Event()
    rendered = []

    def render(openmetrics):
        begun.set()
        assert go.wait(PATIENCE)
        rendered.append(openmetrics)
        return b"%d\n" % len(rendered)

    server = served(render)
    ask = b"GET /metrics HTTP/1.1\r\n\r\n"
    with connect(server) as first:
        first.sendall(ask)
        assert begun.wait(PATIENCE)
        others = [connect(server) for _ in range(10)]
        for other in others:
            other.sendall(ask)
        go.set()
        assert rest_of(first).endswith(b"\n1\n")
        assert {rest_of(other)[-2:] for other in others} == {b"1\n"}
    assert rendered == [False]
    for other in others:
        other.close()


def test_who_asks_soon_after_gets_the_same_in_each_form_and_later_a_new_one(served, monkeypatch):
    monkeypatch.setattr(module, "_FRESH", PATIENCE)
    rendered = []

    def render(openmetrics):
        rendered.append(openmetrics)
        return b"%d\n" % len(rendered)

    server = served(render)
    assert [fetch(server.url)[2] for _ in range(3)] == [b"1\n"] * 3
    assert gzip.decompress(fetch(server.url, Accept_Encoding="gzip")[2]) == b"1\n"
    assert fetch(server.url, Accept="application/openmetrics-text")[2] == b"2\n"
    assert fetch(server.url)[2] == b"1\n"
    monkeypatch.setattr(module, "_FRESH", 0.0)
    assert fetch(server.url)[2] == b"3\n"
    until(lambda: not server._rendered)
    monkeypatch.setattr(module, "_FRESH", 0.5)
    assert fetch(server.url)[2] == b"4\n"
    until(lambda: not server._rendered)  # and nothing is kept of it, though nobody asks any more


def test_all_places_taken_by_who_reads_nothing_hold_one_answer(served, monkeypatch):
    monkeypatch.setattr(module, "_FRESH", PATIENCE)
    server = served(lambda _: bytes(16_000_000))  # more than a socket's buffers hold
    slow = [connect(server) for _ in range(CLIENTS_MOST)]
    for connection in slow:
        connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
    views = [client.answer[-1] for client in list(server._clients.values())]
    assert (len(views), len({id(view.obj) for view in views})) == (CLIENTS_MOST, 1)
    for connection in slow:
        assert len(rest_of(connection)) > 16_000_000
        connection.close()


def test_a_defect_is_told_of_and_ends_nothing(served, monkeypatch, caplog):
    monkeypatch.setattr(module, "_RETRY", 0.01)
    server = served()
    defects = [ZeroDivisionError("a defect")] * 3

    def accept():
        if defects:
            raise defects.pop()
        Scrape._accept(server)

    monkeypatch.setattr(server, "_accept", accept)
    assert fetch(server.url)[2] == b"metrics text\n"
    assert defects == []
    assert caplog.text.count("a defect") == 1
    assert "serving /metrics failed" in caplog.text


def test_a_connection_that_the_kernel_does_not_watch_costs_no_other(served, monkeypatch, caplog):
    monkeypatch.setattr(module, "_RETRY", 0.01)
    server = served()
    refused, register = [OSError(28, "No space left on device")], server._selector.register

    def picky(what, events, data=None):
        if isinstance(data, module._Client) and refused:
            raise refused.pop()
        return register(what, events, data)

    monkeypatch.setattr(server._selector, "register", picky)
    with connect(server) as first:
        first.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        try:
            assert rest_of(first) == b""
        except ConnectionResetError:
            pass
    assert fetch(server.url)[2] == b"metrics text\n"
    assert "No space left" in caplog.text


def test_who_is_cut_off_to_make_room_while_it_reads_costs_no_other(served, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "_FRESH", 0.0)
    begun, go = threading.Event(), threading.Event()

    def render(openmetrics):
        if openmetrics:
            begun.set()
            assert go.wait(PATIENCE)
        return bytes(16_000_000)  # more than a socket's buffers hold

    path = str(tmp_path / "metrics.sock")
    served(render, path)
    with connect_unix(path) as slow, connect_unix(path) as blocking, connect_unix(path) as third:
        slow.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert slow.recv(15) == b"HTTP/1.1 200 OK"
        # While one is rendered a third one asks, and the slow one reads: they are ready at the same moment after it.
        blocking.sendall(b"HEAD /metrics HTTP/1.1\r\nAccept: application/openmetrics-text\r\n\r\n")
        assert begun.wait(PATIENCE)
        monkeypatch.setattr(module, "_KEPT_MOST", 0)
        third.sendall(b"HEAD /metrics HTTP/1.1\r\n\r\n")
        assert slow.recv(8_000_000, socket.MSG_DONTWAIT)
        go.set()
        assert rest_of(third).startswith(b"HTTP/1.1 200 OK")
        assert len(rest_of(slow)) < 8_000_000
    assert len(ask_unix(path)) > 16_000_000
    assert caplog.text == ""


def test_who_asks_nothing_is_cut_off_and_holds_nobody_up(served, monkeypatch):
    server = served()
    with connect(server) as slow:
        slow.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert fetch(server.url)[0] == 200
    monkeypatch.setattr(module, "_ASKING", 0.2)
    with connect(server) as slow:
        slow.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert rest_of(slow) == b""


def test_who_does_not_take_its_answer_is_cut_off(served, monkeypatch):
    monkeypatch.setattr(module, "_TAKING", 0.2)
    big = b"x" * 64_000_000  # more than a socket's buffers hold
    server = served(lambda openmetrics: big if openmetrics else b"small\n")
    with connect(server) as slow:
        slow.sendall(b"GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text\r\n\r\n")
        assert fetch(server.url)[2] == b"small\n"
        until(lambda: not server._clients)
        try:
            got = len(rest_of(slow))
        except ConnectionResetError:
            got = 0
        assert got < len(big)
    monkeypatch.undo()
    assert fetch(server.url, Accept="application/openmetrics-text")[2] == big


def test_answers_that_are_not_taken_are_bounded_and_the_slowest_go_first(served, monkeypatch):
    monkeypatch.setattr(module, "_FRESH", 0.0)
    monkeypatch.setattr(module, "_KEPT_MOST", 40_000_000)
    server = served(lambda _: bytes(16_000_000))  # more than a socket's buffers hold, and a new one each time
    slow = []
    for _ in range(6):
        slow.append(connect(server))
        slow[-1].sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert slow[-1].recv(15) == b"HTTP/1.1 200 OK"
    assert len(fetch(server.url)[2]) == 16_000_000
    got = []
    for connection in slow:
        try:
            got.append(len(rest_of(connection)) > 16_000_000)
        except ConnectionResetError:
            got.append(False)
        connection.close()
    assert got == sorted(got)
    assert got[0] is False
    assert got[-1] is True


def test_who_hangs_up_in_the_middle_costs_nothing(served):
    server = served(lambda _: b"x" * 16_000_000)
    for _ in range(5):
        with connect(server) as connection:
            connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert len(fetch(server.url)[2]) == 16_000_000


def test_connections_are_bounded_and_who_waits_is_served(served, monkeypatch):
    monkeypatch.setattr(module, "_ASKING", 0.5)
    server = served()
    idle = [connect(server) for _ in range(CLIENTS_MOST + 10)]
    assert fetch(server.url)[0] == 200
    assert len(server._clients) <= CLIENTS_MOST
    for connection in idle:
        assert rest_of(connection) == b""
        connection.close()


def test_ipv6(served):
    assert fetch(served(address=("::1", 0)).url)[0] == 200


def test_a_port_that_is_taken(served):
    port = int(served().url.removesuffix("/metrics").rsplit(":", 1)[1])
    with pytest.raises(InUseError, match=rf"prometheus\.listen 127\.0\.0\.1:{port} cannot be served .*; name another"):
        served(address=("127.0.0.1", port))


def test_an_address_that_is_none(served):
    with pytest.raises(UsageError, match=r"prometheus\.listen 192\.0\.2\.1:9735 cannot be served"):
        served(address=("192.0.2.1", 9735))
    with pytest.raises(UsageError, match=r"prometheus\.listen x+:9735 cannot be served"):
        served(address=("x" * 64, 9735))


def connect_unix(path):
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(PATIENCE)
    connection.connect(path)
    return connection


def ask_unix(path):
    with connect_unix(path) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        return rest_of(connection)


def test_a_unix_socket(served, tmp_path):
    path = str(tmp_path / "metrics.sock")
    server = served(address=path)
    assert server.url == f"unix:{path}"
    assert ask_unix(path).endswith(b"metrics text\n")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
    server.close()
    assert os.listdir(tmp_path) == []


def test_the_socket_of_a_dead_one_is_replaced(served, tmp_path):
    path = str(tmp_path / "metrics.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
        dead.listen()
    served(address=path)
    assert ask_unix(path).endswith(b"metrics text\n")


def test_the_socket_of_a_living_one_is_not(served, tmp_path):
    path = str(tmp_path / "metrics.sock")
    first = served(address=path)
    with pytest.raises(InUseError, match="cannot be served"):
        served(address=path)
    assert ask_unix(path).endswith(b"metrics text\n")
    os.rename(path, f"{path}.old")
    served(address=path)
    first.close()
    assert ask_unix(path).endswith(b"metrics text\n"), "the first one leaves the second one's socket alone"


def test_a_foreign_file_is_not_replaced(served, tmp_path):
    path = tmp_path / "metrics.sock"
    path.write_text("precious")
    with pytest.raises(InUseError, match="is a file and no socket; move it away"):
        served(address=str(path))
    assert path.read_text() == "precious"
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(InUseError):
        served(address=str(tmp_path / "link"))
    assert path.read_text() == "precious"


def test_a_socket_where_none_can_be(served, tmp_path):
    with pytest.raises(UsageError, match=r"cannot be served \(No such file or directory\)"):
        served(address=str(tmp_path / "nowhere" / "metrics.sock"))
    if os.getuid():
        with pytest.raises(NotPermittedError):
            served(address="/metrics.sock")


def test_closing_cuts_what_is_open(served):
    server = served()
    with connect(server) as connection:
        connection.sendall(b"GET ")
        fetch(server.url)
        server.close()
        try:
            assert rest_of(connection) == b""
        except ConnectionResetError:
            pass
    server.close()
