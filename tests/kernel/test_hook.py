"""acctd-hook as a starter calls it, against a living agent: every verb, root's way in, and starts without an agent."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import classad2
import pytest

from tests.kernel.conftest import REPO
from tests.kernel.served import Served

Sleepers = Callable[[], "subprocess.Popen[bytes]"]


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    options.setdefault("env", {**os.environ, "PYTHONPATH": str(REPO)})
    argv = [sys.executable, "-m", "acctd.hook", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, **options)


def hook(served: Served, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return run("--socket", str(served.path), *arguments, **options)


def ok(served: Served, *arguments: str, **options: Any) -> str:
    done = hook(served, *arguments, **options)
    assert (done.returncode, done.stderr) == (0, ""), arguments
    return done.stdout


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_starters_whole_day(served: Served) -> None:
    made = json.loads(
        ok(served, "create", "--job", "12.3", "--user", "nobody", "--tag", "Vo=cms", "--pids", "30", "--cpus", "0.5")
    )
    assert made["job"] == "12.3"
    script = "id -u; ip -o link | wc -l; cat /proc/self/cgroup; echo $HOME; exit 5"
    ran = hook(served, "exec", "--job", "12.3", "--", "sh", "-c", script)
    assert ran.returncode == 5
    lines = ran.stdout.splitlines()
    assert (lines[0], lines[1], lines[-1]) == ("65534", "2", "/nonexistent")
    assert sum("job_12.3" in line for line in lines) >= 1
    usage = ok(served, "usage", "--job", "12.3")
    assert "Number of Processes: 0\n" in usage
    assert "User CPU Time (s): 0." in usage
    assert "Network OutgoingExternal Bytes: 0\n" in usage
    ad = classad2.parseOne(ok(served, "usage", "--job", "12.3", "--classad"))
    assert ad.eval("Owner") == "nobody"
    shown = json.loads(ok(served, "usage", "--job", "12.3", "--json"))
    assert shown == {**served.ok("Usage", job="12.3")["job"], "wall_ns": shown["wall_ns"], "totals": shown["totals"]}
    assert ok(served, "list") == "12.3 nobody running 0 -\n"
    assert [job["id"] for job in json.loads(ok(served, "dump"))] == ["12.3"]
    done = ok(served, "finish", "--job", "12.3", "--exit-code", "5")
    ad = classad2.parseOne(done)
    assert (ad.eval("ExitCode"), ad.eval("Owner"), ad.eval("AcctdTagVo")) == (5, "nobody", "cms")
    assert ok(served, "finish", "--job", "12.3") == done
    assert json.loads(ok(served, "finish", "--job", "12.3", "--json"))["id"] == "12.3"


def test_a_running_process_is_attached_stopped_and_killed(served: Served, sleeper: Sleepers) -> None:
    child = sleeper()
    ok(served, "create", "--job", "a")
    ok(served, "attach", "--job", "a", str(child.pid))
    ok(served, "suspend", "--job", "a")
    ok(served, "continue", "--job", "a")
    ok(served, "snapshot")
    ok(served, "signal", "--job", "a", str(int(signal.SIGCONT)))
    ok(served, "kill", "--job", "a")
    assert child.wait(20) == -9
    ad = classad2.parseOne(ok(served, "finish", "--job", "a", "--exit-signal", "9"))
    assert ad.eval("ExitSignal") == 9


def test_a_family_is_registered_inside_a_job_and_goes_on_in_it_when_unregistered(
    served: Served, sleeper: Sleepers
) -> None:
    pilot, payload, other = sleeper(), sleeper(), sleeper()
    ok(served, "register", "--job", "pilot", "--pid", str(pilot.pid), "--tag", "Kind=pilot")
    ok(served, "attach", "--job", "pilot", str(payload.pid))
    made = json.loads(
        ok(served, "register", "--job", "payload", "--parent", "pilot", "--pid", str(payload.pid),
           "--watcher", str(pilot.pid), "--interval", "0.5")
    )  # fmt: skip
    assert made["job"] == "payload"
    assert all("/job_pilot/" in path for path in made["cgroups"])
    ok(served, "track", "--job", "payload", "--pid", str(other.pid))
    rows = {row.split()[0]: row.split()[1:] for row in ok(served, "list").splitlines()}
    assert rows["payload"][1:] == ["running", "2", "pilot"]
    assert rows["pilot"][1:] == ["running", "3", "-"]
    record = classad2.parseOne(ok(served, "unregister", "--job", "payload"))
    assert record.eval("Owner") == "root"
    assert sorted(json.loads(ok(served, "usage", "--job", "pilot", "--json"))["pids"]) == sorted(
        process.pid for process in (pilot, payload, other)
    )
    ok(served, "kill", "--job", "pilot")
    assert [process.wait(20) for process in (pilot, payload, other)] == [-9] * 3


def test_processes_are_tracked_by_a_mark(served: Served) -> None:
    ok(served, "create", "--job", "t", "--network", "host")
    mark = f"ACCTD_TEST_MARK={os.getpid()}"
    name, _, value = mark.partition("=")
    with subprocess.Popen(["sleep", "1000"], env={**os.environ, name: value}) as child:
        try:
            assert ok(served, "track", "--job", "t", "--environment", mark) == f"{child.pid}\n"
        finally:
            child.kill()


def test_a_family_made_with_create_gets_what_it_asks_for(served: Served) -> None:
    ok(served, "create", "--job", "p", "--user", "nobody")
    made = json.loads(ok(served, "create", "--job", "c", "--parent", "p", "--user", "nobody", "--memory", "64M"))
    assert all("/job_p/" in path for path in made["cgroups"])
    assert json.loads(ok(served, "usage", "--job", "c", "--json"))["limits"]["memory"] == 64 << 20
    # A family has its parent's network: entered from outside, and by a process of the parent's.
    look = ["sh", "-c", "readlink /proc/self/ns/net; id -u"]
    assert ok(served, "exec", "--job", "c", "--", *look) == ok(served, "exec", "--job", "p", "--", *look)
    ok(served, "create", "--job", "rp")
    ok(served, "create", "--job", "rc", "--parent", "rp")
    nested = [sys.executable, "-m", "acctd.hook", "--socket", str(served.path), "exec", "--job", "rc", "--", *look]
    assert ok(served, "exec", "--job", "rp", "--", *nested) == ok(served, "exec", "--job", "rp", "--", *look)


def test_errors_are_one_sentence_with_a_code(served: Served) -> None:
    for arguments, code in (
        (("nonsense",), 64), (("usage",), 64), (("usage", "--job", "none"), 66), (("create", "--job", "../x"), 64),
        (("create", "--job", "x", "--colour", "red"), 64), (("create", "--job", "x", "--memory", "lots"), 64),
        (("create", "--job", "x", "--memory", "1"), 64), (("create", "--job", "x", "--user", "nobody-here"), 66),
        (("create", "--job", "x", "--network", "wifi"), 64), (("create", "--job", "x", "--parent", "none"), 66),
        (("exec", "--job", "none", "--", "true"), 66), (("exec", "--job", "none"), 64), (("attach", "--job", "x"), 64),
        (("register", "--job", "x", "--pid", "4194305"), 66), (("track", "--job", "none", "--login", "root"), 66),
        (("unregister", "--job", "none"), 66), (("kill", "--job", "none"), 66),
        (("finish", "--job", "none"), 66), (("signal", "--job"), 64), ((), 64),
    ):  # fmt: skip
        done = hook(served, *arguments)
        assert done.returncode == code, (arguments, done.stderr)
        assert done.stderr.startswith("acctd-hook: ")
        assert "Traceback" not in done.stderr
        assert done.stderr.count("\n") == 1
    assert ok(served, "list") == ""


def test_a_command_that_cannot_be_started(served: Served) -> None:
    ok(served, "create", "--job", "x", "--network", "host")
    for command, code in (("/no/such", 127), ("/etc/passwd", 126)):
        done = hook(served, "exec", "--job", "x", "--", command)
        assert (done.returncode, done.stderr.count("\n")) == (code, 1)
        assert f"command '{command}' cannot be started" in done.stderr


def test_root_by_sudo_enters_only_the_jobs_of_who_called_sudo(served: Served) -> None:
    """sudo sets SUDO_UID, and whoever may call the hook by it could name any job."""
    ok(served, "create", "--job", "x", "--user", "nobody")
    environ = {**os.environ, "PYTHONPATH": str(REPO)}
    for uid, code, out in (("65534", 0, "65534\n"), ("1", 77, ""), ("0", 0, "65534\n")):
        done = hook(served, "exec", "--job", "x", "--", "id", "-u", env={**environ, "SUDO_UID": uid})
        assert (done.returncode, done.stdout) == (code, out), done.stderr
    assert "unset SUDO_UID" in hook(served, "exec", "--job", "x", "--", "id", env={**environ, "SUDO_UID": "1"}).stderr


def test_quit_ends_the_agent_and_no_job(served: Served, sleeper: Sleepers) -> None:
    child = sleeper()
    ok(served, "create", "--job", "q")
    ok(served, "attach", "--job", "q", str(child.pid))
    ok(served, "quit")
    assert served.process.wait(30) == 0
    assert child.poll() is None
    assert hook(served, "list").returncode == 69
    served.start()
    assert ok(served, "list") == "q root running 1 -\n"


# Without an agent


@pytest.fixture
def nowhere(tmp_path: Path) -> str:
    return str(tmp_path / "s")


def test_without_an_agent_exec_starts_nothing(nowhere: str) -> None:
    for choice in ((), ("--fail-closed",)):
        done = run("exec", "--socket", nowhere, "--job", "x", *choice, "--", "echo", "ran")
        assert (done.returncode, done.stdout) == (69, "")
        assert "no agent answers" in done.stderr
        assert done.stderr.count("\n") == 1


def test_fail_open_starts_the_command_as_the_user_it_is_told_and_leaves_a_file(nowhere: str, tmp_path: Path) -> None:
    place = tmp_path / "unaccounted"
    place.mkdir(mode=0o700)
    arguments = ["exec", "--socket", nowhere, "--job", "x.1", "--fail-open", "--user", "nobody", "--"]
    done = run(*arguments, "sh", "-c", "id -u; id -G; echo $HOME $$")
    uid, groups, rest = done.stdout.splitlines()
    assert (done.returncode, uid, groups) == (0, "65534", "65534")
    home, pid = rest.split()
    assert home == "/nonexistent"
    assert "job x.1 starts unaccounted, as --fail-open asks: no agent answers at" in done.stderr
    assert done.stderr.count("\n") == 1
    (file,) = place.iterdir()
    assert file.name == f"x.1.{pid}"
    assert file.stat().st_mode & 0o777 == 0o600
    fact = json.loads(file.read_text())
    assert (fact["job"], fact["pid"], fact["command"]) == ("x.1", int(pid), "sh")
    assert fact["reason"].startswith("no agent answers at")


def test_fail_open_by_root_needs_to_know_whom_to_become(nowhere: str) -> None:
    arguments = ["exec", "--socket", nowhere, "--job", "x", "--fail-open"]
    for more, code, said in (
        ((), 64, "needs --user USER"), (("--user", "nobody-here"), 66, "does not exist"),
        (("--user", "nobody", "--job", "../x"), 64, "given twice"),
    ):  # fmt: skip
        done = run(*arguments, *more, "--", "echo", "ran")
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert said in done.stderr
    bad = run("exec", "--socket", nowhere, "--job", "../x", "--fail-open", "--user", "nobody", "--", "echo", "ran")
    assert (bad.returncode, bad.stdout) == (64, "")
    sudo = {**os.environ, "PYTHONPATH": str(REPO), "SUDO_UID": "65534"}
    assert run(*arguments, "--", "id", "-u", env=sudo).stdout == "65534\n"
    refused = run(*arguments, "--user", "root", "--", "id", "-u", env=sudo)
    assert (refused.returncode, refused.stdout) == (77, "")


@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_root_writes_into_no_directory_that_others_can_change(nowhere: str, tmp_path: Path, mode: int) -> None:
    """The socket's path may come from a job's environment."""
    place = tmp_path / "unaccounted"
    place.mkdir()
    place.chmod(mode)
    arguments = ["exec", "--socket", nowhere, "--job", "x", "--fail-open", "--user", "nobody", "--", "true"]
    assert run(*arguments).returncode == 0
    assert list(place.iterdir()) == []
    place.rmdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    place.symlink_to(elsewhere)
    assert run(*arguments).returncode == 0
    assert list(elsewhere.iterdir()) == []


@pytest.fixture
def false_agent() -> Iterator[str]:
    """Answers as an agent would, but belongs to an ordinary user: whom to become is root, and so on."""
    code = """
import json, socket, sys
listener = socket.socket(socket.AF_UNIX); listener.bind(sys.argv[1]); listener.listen(1); print("ready", flush=True)
while True:
    connection, _ = listener.accept()
    connection.recv(65536)
    entry = {"netns": None, "uid": 0, "gid": 0, "groups": [0], "environment": {"LD_PRELOAD": "/evil"}}
    try:
        connection.sendall(json.dumps({"parameters": entry}).encode() + bytes(1))
    except OSError as e:
        print("root hung up first, as it may:", e, file=sys.stderr)
    connection.close()
"""
    with tempfile.TemporaryDirectory(prefix="acctdtest-") as home:
        os.chown(home, 65534, 65534)
        argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-c", code]
        with subprocess.Popen([*argv, f"{home}/s"], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield f"{home}/s"
            process.kill()


def test_root_listens_to_no_agent_but_roots(false_agent: str) -> None:
    environ = {**os.environ, "PYTHONPATH": str(REPO), "ACCTD_SOCKET": false_agent}
    for choice in ((), ("--fail-open", "--user", "nobody")):
        done = run("exec", "--job", "x", *choice, "--", "id", env=environ)
        assert (done.returncode, done.stdout) == (77, "")
        assert "belongs to uid 65534; root listens to root's alone" in done.stderr


def test_an_agent_that_dies_in_between_leaves_the_choice_open(served: Served) -> None:
    """It has said whom to become, and then is gone: what is started is still started as the owner."""
    ok(served, "create", "--job", "x", "--user", "nobody")
    script = f"""
import os, sys
from acctd import hookcall, hookexec
real = hookcall.call
def call(path, method, **parameters):
    if method == "Attach":
        os.kill({served.process.pid}, 9)
    return real(path, method, **parameters)
hookcall.call = call
sys.exit(hookexec.run({str(served.path)!r}, "x", ["sh", "-c", "id -u; readlink /proc/self/ns/net"], user="root",
                      fail_open=True))
"""
    environ = {**os.environ, "PYTHONPATH": str(REPO)}
    argv = [sys.executable, "-c", script]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, env=environ)
    uid, net = done.stdout.split()
    assert (done.returncode, uid) == (0, "65534"), done.stderr
    assert net == f"net:[{(served.node.directory / 'run' / 'netns' / 'x').stat().st_ino}]"
    assert "job x starts unaccounted" in done.stderr
    served.process.wait()
    served.start()
