"""The job's resolver where the host's listens on loopback: a tiny DNS server on the node, asked from inside a job.

acctd runs with a resolv.conf of the test's own, bind-mounted in a mount namespace of its own.
"""

import json
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from acctd.network.resolver import host_servers, loopback_servers
from tests.kernel.conftest import Node

NAME = "files.campus.example"
ANSWER = {1: "198.51.100.77", 28: "2001:db8:1::77"}  # A, AAAA


def answer(query: bytes) -> bytes:
    """NAME's address, whatever the name asked for. RFC 1035: header, the question again, one record."""
    end = query.index(b"\0", 12) + 5
    kind = struct.unpack_from("!H", query, end - 4)[0]
    address = ip_address(ANSWER[kind]).packed
    record = struct.pack("!HHHIH", 0xC00C, kind, 1, 60, len(address)) + address
    return query[:2] + struct.pack("!HHHHH", 0x8180, 1, 1, 0, 0) + query[12:end] + record


@contextmanager
def dns(node: Node, address: str) -> Iterator[list[str]]:
    """A server on the node, UDP and TCP; gives the transports it was asked over."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    asked: list[str] = []

    def udp(sock: socket.socket) -> None:
        while True:
            query, client = sock.recvfrom(4096)
            if not query:
                return  # shut down
            asked.append("udp")
            sock.sendto(answer(query), client)

    def tcp(sock: socket.socket) -> None:
        while True:
            try:
                connection = sock.accept()[0]
            except OSError:
                return  # shut down
            with connection:
                while header := connection.recv(2, socket.MSG_WAITALL):
                    query = connection.recv(struct.unpack("!H", header)[0], socket.MSG_WAITALL)
                    asked.append("tcp")
                    # In two parts: a relay that takes one read for one answer would lose the second.
                    reply = answer(query)
                    connection.sendall(struct.pack("!H", len(reply)))
                    connection.sendall(reply)

    def hush(sock: socket.socket) -> None:
        with suppress(OSError):  # an unconnected socket says ENOTCONN, yet its reader wakes up
            sock.shutdown(socket.SHUT_RDWR)

    with ExitStack() as undo:
        for kind, work in ((socket.SOCK_DGRAM, udp), (socket.SOCK_STREAM, tcp)):
            with node.topology.enter(node.topology.node):
                sock = undo.enter_context(socket.socket(family, kind))
            if kind == socket.SOCK_STREAM:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, 53))
            if kind == socket.SOCK_STREAM:
                sock.listen()
            thread = threading.Thread(target=work, args=(sock,))
            thread.start()
            undo.callback(thread.join)
            undo.callback(hush, sock)
        yield asked


def argv(node: Node, resolv: str, *command: str) -> list[str]:
    """`acctd run` with this resolv.conf in the place of the host's."""
    path = node.directory / "resolv.conf"
    path.write_text(resolv)
    mount = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
    record = str(node.directory / "r.json")
    run = node.argv("run", "-q", "--id", "asks", "--json", record, "--", *command)
    return ["unshare", "--mount", "sh", "-c", mount, str(path), *run]


def run(node: Node, resolv: str, *command: str) -> subprocess.CompletedProcess[str]:
    return node.topology.run(
        node.topology.node, argv(node, resolv, *command), check=False, capture_output=True, text=True,
        timeout=60, env=node.environ,
    )  # fmt: skip


# Asks the first nameserver of resolv.conf for NAME, over UDP and over TCP, twice on one connection.
ASK = f"""
import re, socket, struct
server = re.search(r"nameserver (\\S+)", open("/etc/resolv.conf").read())[1]
family = socket.AF_INET6 if ":" in server else socket.AF_INET
name = b"".join(bytes([len(part)]) + part for part in {NAME.encode()!r}.split(b"."))
def query(number, kind):
    return struct.pack("!HHHHHH", number, 0x100, 1, 0, 0, 0) + name + b"\\0" + struct.pack("!HH", kind, 1)
def show(number, kind, reply):
    assert struct.unpack_from("!H", reply)[0] == number
    size = {{1: 4, 28: 16}}[kind]
    return socket.inet_ntop({{1: socket.AF_INET, 28: socket.AF_INET6}}[kind], reply[-size:])
"""
ASK_ALL = (
    ASK
    + """
with socket.socket(family, socket.SOCK_DGRAM) as sock:
    sock.settimeout(10)
    sock.connect((server, 53))
    for number, kind in ((7, 1), (8, 28)):
        sock.send(query(number, kind))
        print("udp", show(number, kind, sock.recv(4096)))
with socket.create_connection((server, 53), 10) as sock:
    for number, kind in ((9, 1), (10, 28)):
        sock.sendall(struct.pack("!H", len(query(number, kind))) + query(number, kind))
        length = struct.unpack("!H", sock.recv(2, socket.MSG_WAITALL))[0]
        print("tcp", show(number, kind, sock.recv(length, socket.MSG_WAITALL)))
"""
)


@pytest.mark.parametrize("server", ["127.0.0.53", "::1"])
def test_a_resolver_on_the_hosts_loopback_answers_inside_and_is_not_billed(node: Node, server: str) -> None:
    with dns(node, server) as asked:
        done = run(node, f"nameserver {server}\n", sys.executable, "-S", "-c", ASK_ALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{way} {address}" for way in ("udp", "tcp") for address in ANSWER.values()]
    assert asked == ["udp", "udp", "tcp", "tcp"]
    assert network(node) == {0}


def test_libc_resolves_a_name_inside_a_job(node: Node) -> None:
    """The way every program asks: getaddrinfo, A and AAAA on one socket."""
    with dns(node, "127.0.0.53"):
        done = run(node, "nameserver 127.0.0.53\noptions edns0 trust-ad\n", "getent", "ahosts", NAME)
    assert (done.returncode, done.stderr) == (0, "")
    assert {line.split()[0] for line in done.stdout.splitlines()} == set(ANSWER.values())


def test_two_jobs_have_the_same_resolver_at_the_same_time(node: Node) -> None:
    """Each on its own loopback: the address is free in every one of them."""
    resolv = "nameserver 127.0.0.53\n"
    outer = ["sh", "-c", 'mount --bind "$0" /etc/resolv.conf && exec "$@"', str(node.directory / "resolv.conf")]
    with dns(node, "127.0.0.53"):
        first = argv(node, resolv, "sh", "-c", f"echo up; read _; getent ahosts {NAME}")
        child = node.topology.popen(
            node.topology.node, first, env=node.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        second = ["unshare", "--mount", *outer, *node.argv("run", "-q", "--", "getent", "ahosts", NAME)]
        done = node.topology.run(
            node.topology.node, second, check=False, capture_output=True, text=True, timeout=60, env=node.environ
        )
        output = child.communicate("go\n", timeout=60)[0]
    assert (child.returncode, done.returncode) == (0, 0), done.stderr
    assert {line.split()[0] for line in output.splitlines()} == set(ANSWER.values())
    assert {line.split()[0] for line in done.stdout.splitlines()} == set(ANSWER.values())


# A query that nobody answers, a connection that is closed; and once somebody is there, the next query is answered.
ASK_NOBODY = (
    ASK
    + """
with socket.socket(family, socket.SOCK_DGRAM) as sock:
    sock.settimeout(10)
    sock.connect((server, 53))
    sock.send(query(1, 1))
    with socket.create_connection((server, 53), 10) as other:
        print("closed" if other.recv(1) == b"" else "answered", flush=True)
    input()
    sock.send(query(2, 1))
    print(show(2, 1, sock.recv(4096)))
"""
)


@pytest.mark.parametrize("server", ["127.0.0.53", "::1"])
def test_a_resolver_that_is_not_there_is_silence_and_may_come_back(node: Node, server: str) -> None:
    command = argv(node, f"nameserver {server}\n", sys.executable, "-S", "-c", ASK_NOBODY)
    child = node.topology.popen(
        node.topology.node, command, env=node.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "closed\n"
    with dns(node, server):
        output = child.communicate("go\n", timeout=60)[0]
    assert (child.returncode, output) == (0, f"{ANSWER[1]}\n")


def test_a_query_under_way_does_not_hold_the_job_up(node: Node) -> None:
    """A resolver that takes a query and never answers, and one that accepts and never speaks; the job just ends."""
    script = ASK + (
        "u = socket.socket(family, socket.SOCK_DGRAM); u.connect((server, 53)); u.send(query(1, 1))\n"
        "t = socket.create_connection((server, 53), 10); t.sendall(b'x'); print('asked')\n"
    )
    with ExitStack() as mute:
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            with node.topology.enter(node.topology.node):
                sock = mute.enter_context(socket.socket(socket.AF_INET, kind))
            sock.bind(("127.0.0.53", 53))
            if kind == socket.SOCK_STREAM:
                sock.listen()
        done = run(node, "nameserver 127.0.0.53\n", sys.executable, "-S", "-c", script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "asked\n", "")


def test_a_resolver_elsewhere_is_reached_through_the_pipe_and_billed(node: Node) -> None:
    topology = node.topology
    with topology.enter(topology.campus):
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def once() -> None:
        query, client = server.recvfrom(4096)
        server.sendto(answer(query), client)

    script = ASK + (
        "u = socket.socket(family, socket.SOCK_DGRAM); u.settimeout(10); u.connect((server, 53)); u.send(query(1, 1))\n"
        "print(show(1, 1, u.recv(4096)))\n"
    )
    with server:
        server.settimeout(30)
        server.bind((topology.campus.v4, 53))
        thread = threading.Thread(target=once)
        thread.start()
        done = run(node, f"nameserver {topology.campus.v4}\n", sys.executable, "-S", "-c", script)
        thread.join()
    assert (done.returncode, done.stdout) == (0, f"{ANSWER[1]}\n"), done.stderr
    query = 12 + len(NAME) + 2 + 4
    assert network(node) == {0, 28 + query, 28 + query + 16}


def network(node: Node) -> set[int]:
    """All byte totals of the job that `run` ran."""

    totals: dict[str, Any] = json.loads((node.directory / "r.json").read_text())["totals"]
    return set(totals["network"].values())


@pytest.mark.parametrize(
    ("text", "servers"),
    [
        ("nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch example.org\n", ["127.0.0.53"]),
        ("nameserver 192.0.2.1\nnameserver 127.0.0.1\nnameserver ::1\n", ["127.0.0.1", "::1"]),
        ("nameserver 192.0.2.1\nnameserver 2001:db8::53\n", []),
        ("nameserver 127.0.0.1\nnameserver 127.0.0.1\n", ["127.0.0.1"]),
        ("nameserver\t127.0.0.2 # comment\n", ["127.0.0.2"]),
        ("nameserver fe80::1%eth0\n", []),
        ("# nameserver 127.0.0.9\n; nameserver 127.0.0.8\nnameserver 192.0.2.1\n", []),
        ("", ["127.0.0.1"]),
        ("search example.org\n", ["127.0.0.1"]),
    ],
)
def test_which_nameservers_are_relayed(text: str, servers: list[str]) -> None:
    assert [str(server) for server in loopback_servers(text)] == servers


def test_without_a_resolv_conf_libc_asks_localhost(tmp_path: Path) -> None:
    assert [str(server) for server in host_servers(tmp_path / "none")] == ["127.0.0.1"]
    path = tmp_path / "resolv.conf"
    path.write_bytes(b"# caf\xe9\nnameserver ::1\n")
    assert [str(server) for server in host_servers(path)] == ["::1"]
