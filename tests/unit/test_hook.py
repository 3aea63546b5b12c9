"""The hook without an agent: what it makes of a command line, of bad agents and of none, and how little it loads."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acctd import hook, hookcall, hookexec

REPO = Path(__file__).parents[2]
_FILES = (
    "__init__", "hook", "hookcall", "hookchirp", "hookmonitor", "hookwishes", "hookexec", "enter", "helper", "isolate",
)  # fmt: skip


@dataclass
class Installed:
    """The hook as it is installed, in a virtual environment that holds nothing else."""

    hook: Path
    packages: Path

    def add(self, file: Path) -> Path:
        """A copy of a file that whoever may run the hook may read."""
        return Path(shutil.copy(file, self.packages))


def install(directory: Path, python: str = sys.executable) -> Installed:
    """The script of bin/ beside an interpreter, and the package where that one looks for it."""
    asked = "import sys; print(sys.base_prefix, '%d.%d' % sys.version_info[:2], os.path.realpath(sys.executable))"
    done = subprocess.run([python, "-I", "-c", f"import os; {asked}"], capture_output=True, text=True, check=True)
    _, version, real = done.stdout.split()
    made = Installed(directory / "bin" / "acctd-hook", directory / "lib" / f"python{version}" / "site-packages")
    made.hook.parent.mkdir(parents=True)
    (made.packages / "acctd").mkdir(parents=True)
    (directory / "pyvenv.cfg").write_text(f"home = {Path(real).parent}\ninclude-system-site-packages = false\n")
    (made.hook.parent / "python").symlink_to(real)
    shutil.copy(REPO / "bin" / "acctd-hook", made.hook)
    for name in _FILES:
        shutil.copy(REPO / "acctd" / f"{name}.py", made.packages / "acctd")
    return made


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install(tmp_path_factory.mktemp("installed"))


Answering = Callable[[bytes], bytes | None]


class FakeAgent:
    """A socket that is answered by a function: bytes to send, or None to say nothing and keep the line open."""

    def __init__(self, path: Path, answer: Answering) -> None:
        self.path = str(path)
        self.heard: list[Any] = []
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(8)
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(connection)
            data = b""
            while not data.endswith(b"\0"):
                data += connection.recv(65536)
            self.heard.append(json.loads(data[:-1]))
            answer = self._answer(data)
            if answer is not None:
                try:
                    connection.sendall(answer)
                except BrokenPipeError:
                    pass  # the hook has had enough; that is what the test is about
                connection.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for each in (self._listener, *self._open):
            each.close()


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Callable[[Answering], FakeAgent]]:
    made: list[FakeAgent] = []

    def make(answer: Answering) -> FakeAgent:
        made.append(FakeAgent(tmp_path / "s", answer))
        return made[-1]

    yield make
    for each in made:
        each.close()


def reply(**parameters: Any) -> Answering:
    return lambda _: json.dumps({"parameters": parameters}).encode() + b"\0"


JOB = {
    "id": "7", "parent": None, "owner": "alice", "phase": "running", "wall_ns": 4_000_000_000, "pids": [11, 12],
    "totals": {
        "cpu_user": {"": 1_500_000_000}, "cpu_system": {"": 500_000_000}, "memory_peak": {"": 10 << 20},
        "memory_resident": {"": 3 << 20}, "memory_file": {"": 1025}, "memory_resident_peak": {"": 4 << 20},
        "block_read": {"8:0": 1024, "8:16": 2048}, "network": {"OutgoingExternal": 7, "IncomingExternal": 8},
    },
}  # fmt: skip


def test_usage_in_procds_words(fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    agent = fake(reply(job=JOB, classad="JobId = 7\n"))
    assert hook.run(["--socket", agent.path, "usage", "--job", "7"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Number of Processes: 2",
        "User CPU Time (s): 1.500000",
        "System CPU Time (s): 0.500000",
        "CPU Percentage (%): 50.000000",
        "Maximum Image Size (KB): 10240",
        "Total Image Size(KB): 3074",
        "Bytes read from block devices (KB): 3",
        "Resident Set Size (KB): 3072",
        "Maximum Resident Set Size (KB): 4096",
        "Network IncomingExternal Bytes: 8",
        "Network OutgoingExternal Bytes: 7",
    ]
    assert hook.run(["usage", "--job=7", "--classad", "--socket", agent.path]) == 0
    assert capsys.readouterr().out == "JobId = 7\n"
    assert hook.run(["usage", "--json", f"--socket={agent.path}", "--job", "7"]) == 0
    assert json.loads(capsys.readouterr().out) == JOB
    assert agent.heard == [{"method": "org.acctd.Node.Usage", "parameters": {"job": "7"}}] * 3


@pytest.mark.parametrize(
    ("line", "method", "parameters"),
    [
        ("create --job j", "Create", {"job": "j"}),
        ("create --job j --user bob --network none --tag A=1 --tag B=x=y --class Lan=10.0.0.0/8,fd00::/8 --memory 2G "
         "--memory-soft 1024K --swap 5 --cpus 1.5 --cpu-shares 100 --cpuset 0-1 --pids 9 --parent p --watcher 5 "
         "--interval 2.5",
         "Create",
         {"job": "j", "user": "bob", "network": "none", "tags": {"A": "1", "B": "x=y"}, "parent": "p", "watcher": 5,
          "classes": {"Lan": ["10.0.0.0/8", "fd00::/8"]}, "interval": 2.5,
          "limits": {"memory": 2 << 30, "memory_soft": 1 << 20, "swap": 5, "cpus": 1.5, "cpu_shares": 100,
                     "cpuset": "0-1", "pids": 9}}),
        ("register --job j --pid 7 --parent p --watcher 8 --interval 3 --tag A=1", "Register",
         {"job": "j", "pid": 7, "parent": "p", "watcher": 8, "interval": 3.0, "tags": {"A": "1"}}),
        ("track --job j --pid 7", "Attach", {"job": "j", "pid": 7}),
        ("track --job j --environment A=1", "Track", {"job": "j", "environment": "A=1"}),
        ("track --job j --login bob", "Track", {"job": "j", "login": "bob"}),
        ("track --job j --group 500", "Track", {"job": "j", "group": 500}),
        ("attach --job j 7", "Attach", {"job": "j", "pid": 7}),
        ("unregister --job j", "Unregister", {"job": "j"}),
        ("signal --job j 15", "Signal", {"job": "j", "signal": 15}),
        ("suspend --job j", "Suspend", {"job": "j"}),
        ("continue --job j", "Continue", {"job": "j"}),
        ("kill --job j", "Kill", {"job": "j"}),
        ("finish --job j", "Finish", {"job": "j"}),
        ("finish --job j --exit-code 3", "Finish", {"job": "j", "exit_code": 3}),
        ("finish --job j --exit-signal 9 --json", "Finish", {"job": "j", "exit_signal": 9}),
        ("list", "List", {}),
        ("dump", "List", {}),
        ("snapshot", "Snapshot", {}),
        ("quit", "Quit", {}),
    ],
)  # fmt: skip
def test_each_verb_is_one_call(
    fake: Any, capsys: pytest.CaptureFixture[str], line: str, method: str, parameters: dict[str, Any]
) -> None:
    agent = fake(reply(job="j", jobs=[JOB], pids=[3, 4], survivors=[], record={"id": "j"}, classad="A = 1\n"))
    assert hook.run([*line.split(), "--socket", agent.path]) == 0
    assert agent.heard == [{"method": f"org.acctd.Node.{method}", "parameters": parameters}]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "which verb?"),
        ("nonsense", "verb 'nonsense' is none"),
        ("--colour red usage", "option --colour is unknown before the verb"),
        ("--socket", "option --socket needs a value"),
        ("usage", "usage needs --job ID"),
        ("usage --job", "option --job needs a value, ID"),
        ("usage --job --json", "option --job needs a value, ID"),
        ("usage --job a --job b", "option --job is given twice"),
        ("usage --job a --json --classad", "not both"),
        ("usage --job a --json=yes", "option --json takes no value"),
        ("usage --job a b", "usage takes no word such as 'b'"),
        ("usage --job a --memory 5", "option --memory is unknown to usage"),
        ("create --job a --memory lots", "memory 'lots' is no number"),
        ("create --job a --memory -5", "memory '-5' is no number"),
        ("create --job a --memory G", "memory '' is no number"),
        ("create --job a --cpus nan", "cpus 'nan' is no number above 0"),
        ("create --job a --cpus inf", "cpus 'inf' is no number above 0"),
        ("create --job a --pids ²", "pids '²' is no number"),
        ("create --job a --pids 99999999999999999999", "is no number from 0 to"),
        ("create --job a --tag Vo", "--tag 'Vo' is not KEY=VALUE"),
        ("create --job a --tag =cms", "--tag '=cms' is not KEY=VALUE"),
        ("create --job a --watcher 0", "watcher '0' is no number from 1"),
        ("create --job a --interval 0", "interval '0' is no number above 0"),
        ("register --job a", "register needs --pid PID"),
        ("track --job a", "track needs one of"),
        ("track --job a --pid 1 --login bob", "track needs one of"),
        ("track --job a --environment NAME", "--environment 'NAME' is not KEY=VALUE"),
        ("track --job a --group root", "group 'root' is no number"),
        ("attach --job a", "say one PID; it has 0"),
        ("attach --job a 1 2", "say one PID; it has 2"),
        ("attach --job a me", "pid 'me' is no number"),
        ("signal --job a 65", "signal '65' is no number from 1 to 64"),
        ("signal --job a TERM", "signal 'TERM' is no number"),
        ("finish --job a --exit-code 256", "exit-code '256' is no number from 0 to 255"),
        ("finish --job a --exit-code 1 --exit-signal 2", "not by both"),
        ("exec --job a", "exec needs a command"),
        ("exec --job a --", "exec needs a command"),
        ("exec --job a --fail-open --fail-closed -- true", "not both"),
        ("list --job a", "option --job is unknown to list"),
    ],
)  # fmt: skip
def test_a_call_that_makes_no_sense_is_one_sentence(line: str, said: str) -> None:
    with pytest.raises(hookcall.HookError) as caught:
        hook.run(line.split())
    assert caught.value.code == 64
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help_names_every_verb_and_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert hook.run(["--help"]) == 0
    page = capsys.readouterr().out
    for verb, (_, _, _, options) in hook._VERBS.items():
        assert f"\n  {verb} " in page
        assert hook.run([verb, "--help"]) == 0
        own = capsys.readouterr().out
        assert own.startswith(f"usage: acctd-hook {verb}")
        assert [name for name in (*options, "socket") if f"\n  --{name} " not in own] == []
    assert {name for verb in hook._VERBS.values() for name in verb[3]} | {"socket"} == hook._OPTIONS.keys()
    assert max(map(len, page.splitlines())) <= 120


# Agents that are none, that hang, and that lie


@pytest.mark.parametrize(
    "answer",
    [b"hello\0", b"{\0", b'{"a"\0', b"[]\0", b"7\0", b'{"error": 7}\0', b'{"parameters": 7}\0', b"\xff\0", b"\0",
     b'{"error": "x", "parameters": 7}\0', b'{"error": "x"}\0'],
)  # fmt: skip
def test_what_is_no_agent_is_told_as_such(fake: Any, answer: bytes) -> None:
    agent = fake(lambda _: answer)
    with pytest.raises(hookcall.HookError, match="is no acctd agent") as caught:
        hook.run(["list", "--socket", agent.path])
    assert caught.value.code == 69


@pytest.mark.parametrize("answer", [None, b'{"parameters": {"jobs"', b""])
def test_an_agent_that_hangs_or_hangs_up(fake: Any, monkeypatch: pytest.MonkeyPatch, answer: bytes | None) -> None:
    monkeypatch.setattr(hookcall, "_PATIENCE", 0.05)
    agent = fake(lambda _: answer)
    said = "has not answered within 0.05 s" if answer is None else "hung up"
    with pytest.raises(hookcall.HookError, match=said) as caught:
        hook.run(["list", "--socket", agent.path])
    assert (caught.value.code, caught.value.unreachable) == (69, True)


def test_an_agent_that_dribbles_is_not_waited_for_without_end(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes soon enough, and the answer never ends: the time is that of the whole call."""
    monkeypatch.setattr(hookcall, "_PATIENCE", 0.2)
    path = Path(fake(reply()).path).with_name("dribble")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        done = threading.Event()

        def dribble() -> None:
            connection, _ = listener.accept()
            with connection:
                while not done.wait(0.01):
                    try:
                        connection.send(b" ")
                    except OSError:
                        return

        thread = threading.Thread(target=dribble)
        thread.start()
        with pytest.raises(hookcall.HookError, match="has not answered within"):
            hook.run(["list", "--socket", str(path)])
        done.set()
        thread.join()


def test_where_others_wait_to_be_accepted_it_waits_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)  # one more than the 0 that may wait
        monkeypatch.setattr(hookcall, "_PATIENCE", 0.05)
        with pytest.raises(hookcall.HookError, match="has not answered within"):
            hook.run(["list", "--socket", path])
        monkeypatch.setattr(hookcall, "_PATIENCE", 30.0)
        results: list[int] = []
        waiting = threading.Thread(target=lambda: results.append(hook.run(["snapshot", "--socket", path])))
        waiting.start()
        listener.accept()[0].close()
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(65536).endswith(b"\0")
            connection.sendall(b'{"parameters": {}}\0')
        waiting.join()
    assert results == [0]


def test_no_agent(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in ("nothing", "file", "x" * 200):
        with pytest.raises(hookcall.HookError, match=r"no agent answers at .*; start acctd serve") as caught:
            hook.run(["list", "--socket", str(tmp_path / path)])
        assert (caught.value.code, caught.value.unreachable) == (69, True)


def test_what_the_agent_says_is_passed_on_with_its_code(fake: Any) -> None:
    names = {"UsageError": 64, "NotFound": 66, "InUse": 73, "Exhausted": 75, "NotPermitted": 77, "Other": 70}
    for name, code in names.items():
        agent = fake(lambda _, name=name: json.dumps(
            {"error": f"org.acctd.Node.{name}", "parameters": {"message": f"said {name}"}}
        ).encode() + b"\0")  # fmt: skip
        with pytest.raises(hookcall.HookError, match=f"said {name}") as caught:
            hook.run(["list", "--socket", agent.path])
        assert (caught.value.code, caught.value.unreachable) == (code, False)
        Path(agent.path).unlink()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(), below, max_size=4),
)


@given(VALUES)
def test_json_is_jsons(value: Any) -> None:
    assert json.loads(hookcall.to_json(value)) == value
    assert hookcall.to_json(value, "") == json.dumps(value, indent=2)
    assert hookcall._scan(json.dumps(value), 0)[0] == value


# What is on record of a start that nobody accounts for


def test_fail_open_goes_into_the_system_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(str(tmp_path / "log"))
        monkeypatch.setattr(hookexec, "_LOG", str(tmp_path / "log"))
        hookexec._put_on_record(str(tmp_path / "s"), "7.0", ["sleep"], "no agent")
        line = log.recv(4096).decode()
    assert line == f"<28>acctd-hook[{os.getpid()}]: job 7.0 starts unaccounted, as --fail-open asks: no agent"
    assert capsys.readouterr().err.endswith("; on record in the system log\n")


def test_without_any_place_for_the_record_standard_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hookexec, "_LOG", str(tmp_path / "nothing"))
    hookexec._put_on_record(str(tmp_path / "s"), "7.0", ["sleep"], "no agent")
    assert capsys.readouterr().err.endswith("no agent; on record in no other place than here\n")


# Whose Python it runs in


@pytest.fixture
def trap(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A directory full of modules that say they were loaded, and an environment that points everything at it."""
    evil = tmp_path / "evil"
    user = evil / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    user.mkdir(parents=True)
    for name in ("sitecustomize", "usercustomize", "json", "struct", "acctd", "os", "re", "socket", "startup"):
        for place in (evil, user):
            (place / f"{name}.py").write_text(f"import sys; sys.stderr.write('TRAPPED {name}')")
    environ = {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(evil), "PYTHONSTARTUP": str(evil / "startup.py"),
        "PYTHONUSERBASE": str(evil), "HOME": str(evil), "PYTHONHOME": str(evil), "PYTHONVERBOSE": "1",
        "PYTHONINSPECT": "1", "PYTHONPLATLIBDIR": "evil",
    }  # fmt: skip
    return evil, environ


def test_the_callers_python_environment_does_not_reach_it(
    installed: Installed, trap: tuple[Path, dict[str, str]]
) -> None:
    evil, environ = trap
    linked = evil / "link"
    linked.symlink_to(installed.hook)
    for hook_file in (installed.hook, linked):
        done = subprocess.run([str(hook_file), "list", "--socket", "/nowhere/s"], cwd=evil, env=environ, **_CAPTURED)
        assert (done.returncode, done.stdout) == (69, "")
        assert done.stderr.startswith("acctd-hook: no agent answers at /nowhere/s")
        assert done.stderr.count("\n") == 1


_CAPTURED: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "timeout": 30, "stdin": -3}


def test_the_trap_is_one(installed: Installed, trap: tuple[Path, dict[str, str]]) -> None:
    """The same environment without the script's -I, so that the test above can fail."""
    evil, environ = trap
    del environ["PYTHONHOME"], environ["PYTHONPLATLIBDIR"]  # these two let no Python start at all
    python = installed.hook.with_name("python")
    done = subprocess.run([str(python), "-c", "import acctd.hook"], cwd=evil, env=environ, **_CAPTURED)
    assert "TRAPPED" in done.stderr


def test_it_takes_arguments_as_they_are(installed: Installed) -> None:
    done = subprocess.run([str(installed.hook), "usage", "--job", "a b", "*", "$(id)"], **_CAPTURED)
    assert done.stderr == "acctd-hook: usage takes no word such as '*'; see acctd-hook usage --help\n"


def test_a_reader_that_leaves_is_no_trouble(installed: Installed) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as closed:
        done = subprocess.run([str(installed.hook), "--help"], stdout=closed, stderr=-1, check=False, timeout=30)
    assert (done.returncode, done.stderr) == (141, b"")


def test_it_loads_little() -> None:
    code = "import sys; before = set(sys.modules); import acctd.hook; print(*(set(sys.modules) - before))"
    environ = {**os.environ, "PYTHONPATH": str(REPO)}
    argv = [sys.executable, "-c", code]
    loaded = subprocess.run(argv, capture_output=True, text=True, check=True, env=environ).stdout.split()
    assert {*loaded} == {"acctd", "acctd.hook", "acctd.hookcall", "_json", "_socket", "struct", "_struct"}
