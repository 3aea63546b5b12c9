"""`acctd serve` over its socket: jobs made, read and finished; a restart that loses nothing; who may do what."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from acctd import varlink
from lab.traffic import PORT, Server
from tests.kernel.conftest import REPO
from tests.kernel.served import Served, talk


def test_a_job_from_create_to_finish(served: Served, sleeper: Callable[[], subprocess.Popen[bytes]]) -> None:
    child = sleeper()
    made = served.ok("Create", job="7.0", tags={"Vo": "cms"}, limits={"pids": 50})
    assert all(Path(path).is_dir() for path in made["cgroups"])
    served.ok("Attach", job="7.0", pid=child.pid)
    job = served.ok("Usage", job="7.0")["job"]
    assert (job["pids"], job["phase"], job["totals"]["pids"]) == ([child.pid], "running", {"": 1})
    served.ok("Suspend", job="7.0")
    served.ok("Continue", job="7.0")
    assert served.ok("Signal", job="7.0", signal=0 + signal.SIGCONT)["pids"] == [child.pid]
    assert served.ok("Kill", job="7.0") == {"survivors": []}
    first = served.ok("Finish", job="7.0", exit_signal=9)
    assert (first["record"]["exit_signal"], first["record"]["tags"]) == (9, {"Vo": "cms"})
    assert served.ok("Finish", job="7.0") == first


def test_a_killed_agent_loses_nothing(served: Served) -> None:
    """What the job sends while nobody watches is in its totals afterwards."""
    node, lab = served.node, served.node.topology
    with lab.enter(lab.wan):
        server = Server()
    with server:
        served.ok("Create", job="j")
        traffic = [sys.executable, str(REPO / "lab" / "traffic.py"), "give", "203.0.113.2", str(PORT)]
        script = "read _; " + "; ".join(
            " ".join([*traffic, str(size), "--udp"]) + " >&2; echo done; read _" for size in (50_000, 70_000)
        )
        netns = node.directory / "run" / "netns" / "j"
        child = subprocess.Popen(
            ["nsenter", f"--net={netns}", "sh", "-c", script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            served.ok("Attach", job="j", pid=child.pid)
            child.stdin.write(b"\n")
            child.stdin.flush()
            assert child.stdout.readline() == b"done\n"
            served.process.kill()
            served.process.wait()
            child.stdin.write(b"\n")
            child.stdin.flush()
            assert child.stdout.readline() == b"done\n"
            served.start()
            assert [job["id"] for job in served.ok("List")["jobs"]] == ["j"]
            record = served.ok("Finish", job="j", exit_code=0)["record"]
        finally:
            child.kill()
            child.wait()
    datagrams = -(-50_000 // 1200) + -(-70_000 // 1200)
    assert record["totals"]["network"]["OutgoingExternal"] == 120_000 + 28 * datagrams
    assert (record["state"], record["notes"]) == ("done", [])


def test_the_interface_says_what_the_server_does(served: Served) -> None:
    info = served.ok(f"{varlink.SERVICE}.GetInfo")
    assert varlink.INTERFACE in info["interfaces"]
    said = served.ok(f"{varlink.SERVICE}.GetInterfaceDescription", interface=varlink.INTERFACE)["description"]
    for method in re.findall(r"^method (\w+)\(", said, re.MULTILINE):
        if method not in ("Watch", "Quit"):
            assert "MethodNotFound" not in served.call(method).get("error", "")
    assert served.call("Nonsense")["error"] == f"{varlink.SERVICE}.MethodNotFound"
    assert served.call("org.example.Other.Thing")["error"] == f"{varlink.SERVICE}.InterfaceNotFound"


@pytest.mark.parametrize(
    ("method", "parameters", "error"),
    [
        ("Create", {"job": "../x"}, "UsageError"),
        ("Create", {"job": "x", "limits": {"memory": 1}}, "UsageError"),
        ("Create", {"job": "x", "limits": {"colour": 1}}, "UsageError"),
        ("Create", {"job": "x", "network": "wifi"}, "UsageError"),
        ("Create", {"job": "x", "user": "nobody-has-this-name"}, "NotFound"),
        ("Create", {"job": "x", "classes": {"A": ["not a net"]}}, "UsageError"),
        ("Usage", {"job": "x"}, "NotFound"),
        ("Finish", {"job": "x"}, "NotFound"),
        ("Create", {}, "InvalidParameter"),
        ("Create", {"job": 7}, "InvalidParameter"),
        ("Usage", {"job": "x", "colour": 1}, "InvalidParameter"),
    ],
)
def test_bad_calls_are_refused_by_name(served: Served, method: str, parameters: dict[str, Any], error: str) -> None:
    reply = served.call(method, **parameters)
    assert reply["error"].endswith(f".{error}")
    assert served.ok("List") == {"jobs": []}


def test_an_ordinary_user_sees_and_does_nothing_to_others(
    served: Served, sleeper: Callable[[], subprocess.Popen[bytes]]
) -> None:
    child = sleeper()
    served.ok("Create", job="roots")
    served.ok("Attach", job="roots", pid=child.pid)
    served.node.directory.chmod(0o755)
    for parent in served.node.directory.parents:
        if parent.is_relative_to("/tmp") and parent != Path("/tmp"):
            parent.chmod(0o755)
    pid = os.fork()
    if pid == 0:
        os.setresuid(65534, 65534, 65534)
        answers = [
            served.call(method, **parameters).get("error", "")
            for method, parameters in (
                ("Usage", {"job": "roots"}), ("Signal", {"job": "roots", "signal": 9}), ("Suspend", {"job": "roots"}),
                ("Continue", {"job": "roots"}), ("Kill", {"job": "roots"}), ("Finish", {"job": "roots"}),
                ("Attach", {"job": "roots"}), ("Create", {"job": "mine"}), ("Snapshot", {}), ("Reload", {}),
                ("Quit", {}),
            )
        ]  # fmt: skip
        seen = served.ok("List")["jobs"]
        shown = [(job["id"], job["totals"], job["tags"]) for job in seen] == [("roots", {}, {})]
        os._exit(0 if all(answer.endswith(".NotPermitted") for answer in answers) and shown else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert served.ok("Usage", job="roots")["job"]["pids"] == [child.pid]


def test_frames_that_are_none_end_their_connection_alone(served: Served) -> None:
    good = served.connect()
    for bad in (
        b"not json\0",
        b"[]\0",
        b"x" * (varlink.FRAME_LIMIT + 70_000),
        b'{"method": 1}\0',
        b"[" * 100_000 + b"\0",
    ):
        with served.connect() as connection:
            connection.sendall(bad)
            assert b"InvalidParameter" in connection.recv(1 << 16)
    half = served.connect()
    half.sendall(b'{"method": "org.acc')
    with good, half:
        assert "parameters" in talk(good, "List")


def test_watchers_hear_of_a_job(served: Served) -> None:
    with served.connect() as connection:
        connection.sendall(json.dumps({"method": f"{varlink.INTERFACE}.Watch", "more": True}).encode() + b"\0")
        served.ok("Cost")  # an answered call after ours: the agent has read it
        served.ok("Create", job="seen")
        served.ok("Finish", job="seen", exit_code=0)
        heard = b""
        while heard.count(b"\0") < 2:
            heard += connection.recv(1 << 16)
    told = [json.loads(frame)["parameters"]["event"]["event"] for frame in heard.split(b"\0")[:2]]
    assert told == ["created", "finished"]


def test_ticks_come_and_their_cost_is_told(served: Served, sleeper: Callable[[], subprocess.Popen[bytes]]) -> None:
    child = sleeper()
    served.ok("Create", job="t")
    served.ok("Attach", job="t", pid=child.pid)
    before = served.ok("Cost")["cost"]["ticks"]
    assert served.ok("Snapshot")["seconds"] > 0
    cost = served.ok("Cost")["cost"]
    assert (cost["ticks"], cost["errors"], cost["jobs"]) == (before + 1, 0, 1)


def test_a_reload_disturbs_no_job_and_a_wrong_file_changes_nothing(
    served: Served, sleeper: Callable[[], subprocess.Popen[bytes]]
) -> None:
    child = sleeper()
    served.ok("Create", job="r")
    served.ok("Attach", job="r", pid=child.pid)
    text = served.node.config.read_text()
    served.node.config.write_text("poll_intervall = 3\n" + text)
    assert "poll_intervall" in served.call("Reload")["parameters"]["message"]
    served.node.config.write_text("poll_interval = 0.2\n" + text)
    served.ok("Reload")
    deadline = time.monotonic() + 20
    while served.ok("Cost")["cost"]["ticks"] < 2:
        assert time.monotonic() < deadline
    assert served.ok("Usage", job="r")["job"]["pids"] == [child.pid]


def test_two_agents_on_one_socket(served: Served) -> None:
    done = served.node.acctd("serve", timeout=30)
    assert done.returncode == 73
    assert f"another agent holds {served.node.directory}/run" in done.stderr
    assert served.ok("List") == {"jobs": []}


def test_a_job_ends_with_its_last_process(served: Served, sleeper: Callable[[], subprocess.Popen[bytes]]) -> None:
    """Its wall time ends there, however late its starter comes; a process that comes after it lets it go on."""

    def wall() -> int:
        found: int = served.ok("Usage", job="e")["job"]["wall_ns"]
        return found

    def end(child: subprocess.Popen[bytes]) -> list[str]:
        child.kill()
        child.wait()
        served.ok("Snapshot")
        return [event["event"] for event in served.ok("Events", job="e")["events"]]

    first, second, third = sleeper(), sleeper(), sleeper()
    served.ok("Create", job="e")
    for child in (first, second):
        served.ok("Attach", job="e", pid=child.pid)
    assert end(first) == ["created", "began"]
    assert end(second) == ["created", "began", "ended"]
    ended = wall()
    assert wall() == ended
    served.ok("Attach", job="e", pid=third.pid)
    assert wall() > ended
    assert end(third) == ["created", "began", "ended", "ended"]
    ended = wall()
    assert served.ok("Finish", job="e", exit_code=3)["record"]["wall_ns"] == ended


def test_a_process_whose_first_thread_has_ended_lives(served: Served) -> None:
    """Its leader looks like a zombie while others of its threads run, and the agent is not to spin on it."""
    code = (
        "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(1000,)).start(); "
        "ctypes.CDLL(None).syscall({'x86_64': 60, 'aarch64': 93}[__import__('os').uname().machine], 0)"
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 20
        while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline
        served.ok("Register", job="z", pid=child.pid)
        before = served.ok("Cost")["cost"]
        served.ok("Snapshot")
        after = served.ok("Cost")["cost"]
        assert after["cpu_seconds"] - before["cpu_seconds"] < after["uptime_seconds"] - before["uptime_seconds"] + 1
        assert [event["event"] for event in served.ok("Events", job="z")["events"]] == ["created", "began"]
        assert served.ok("Kill", job="z") == {"survivors": []}
    finally:
        child.kill()
        child.wait()
    served.ok("Snapshot")
    assert [event["event"] for event in served.ok("Events", job="z")["events"]].count("ended") == 1


def test_a_connection_whose_maker_has_ended_acts_no_more(served: Served) -> None:
    """It may have been made to look as if it came from outside the job that its heir is in."""
    served.ok("Create", job="other")
    left, right = socket.socketpair()
    if (pid := os.fork()) == 0:
        made = served.connect()
        socket.send_fds(left, [b"x"], [made.fileno()])
        os._exit(0)
    _, (fd,), _, _ = socket.recv_fds(right, 1, 1)
    assert os.waitpid(pid, 0)[1] == 0
    with socket.socket(fileno=fd) as heir, left, right:
        heir.settimeout(20)
        for method in ("Kill", "Suspend", "Finish", "Attach"):
            assert talk(heir, method, job="other")["error"].endswith(".NotPermitted")
        assert talk(heir, "Create", job="new")["error"].endswith(".NotPermitted")
        assert talk(heir, "Usage", job="other")["parameters"]["job"]["id"] == "other"


def test_forwarding_that_is_switched_off_is_switched_on_again(served: Served) -> None:
    lab = served.node.topology
    served.ok("Create", job="f")
    off = "net.ipv4.ip_forward=0"
    lab.run(lab.node, ["sysctl", "-q", "-w", off], check=True)
    served.ok("Snapshot")
    assert lab.run(lab.node, ["sysctl", "-n", "net.ipv4.ip_forward"], text=True, capture_output=True).stdout == "1\n"
    told = [event for event in served.ok("Events")["events"] if event["event"] == "mended"]
    assert [event["job"] for event in told] == [None]


def test_what_started_without_an_agent_is_told_once(served: Served) -> None:
    """A file of acctd-hook exec --fail-open is an event at the next start, and gone then."""
    fact = served.path.parent / "unaccounted" / "x.1"
    assert served.stop() == 0
    fact.write_text('{"job": "x", "command": "true"}')
    for _ in range(2):
        served.start()
        told = [event["text"] for event in served.ok("Events")["events"] if event["event"] == "unaccounted"]
        assert told == ['started without an agent: {"job": "x", "command": "true"}']
        assert not fact.exists()
        assert served.stop() == 0
