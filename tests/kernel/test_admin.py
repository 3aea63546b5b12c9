"""The commands for admins, against a living agent and real processes: in pipes, on terminals, as root and as a user."""

import contextlib
import fcntl
import grp
import json
import os
import pty
import pwd
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from acctd.cli.main import main
from lab.traffic import PORT, Server
from tests.kernel.conftest import REPO, Node
from tests.kernel.served import Served

_PATIENCE = 30.0
SCREEN = "(?:(?!q quit).)*"
"""Anything that is on one screen: each ends with these words."""
NOBODY = pwd.getpwnam("nobody")

BUSY = "import sys; block = bytearray(b'x') * (64 << 20); print('ready', flush=True)\nwhile True: pass"
"""A job that uses one core and 64 MiB."""


@pytest.fixture
def served(node: Node) -> Iterator[Served]:
    made = Served(node, None)  # type: ignore[arg-type]  # start() sets it
    made.start()
    yield made
    if made.process.poll() is None:
        for job in made.ok("List")["jobs"]:
            made.ok("Finish", job=job["id"])
        assert made.stop() == 0


@pytest.fixture
def busy(served: Served) -> Iterator[subprocess.Popen[str]]:
    """A process that is busy inside of job 42.0."""
    served.ok("Create", job="42.0", network="host", tags={"Vo": "cms"}, limits={"pids": 50})
    script = f"input()\n{BUSY}"
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    served.ok("Attach", job="42.0", pid=child.pid)
    child.stdin.write("\n")
    child.stdin.flush()
    assert child.stdout.readline() == "ready\n"
    yield child
    child.kill()
    child.communicate()


class Terminal:
    """A command on a terminal of its own, 80 by 24 unless told."""

    def __init__(self, argv: list[str], environ: dict[str, str], columns: int = 80) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            # A login has no signal ignored; whoever runs the tests in the background may have.
            for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGHUP, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
            os.execvpe(argv[0], argv, environ)  # noqa: S606
        self.seen = ""
        self.code: int | None = None

    def until(self, pattern: str) -> str:
        """All that was written since the last call, once something in it matches; control sequences count."""
        return self._until(lambda: re.search(pattern, self.seen))

    def until_shown(self, pattern: str) -> str:
        """The same for what a person sees: without control sequences, and `.` is a newline too."""
        return bare(self._until(lambda: re.search(pattern, bare(self.seen), re.DOTALL)))

    def _until(self, found: Callable[[], object]) -> str:
        deadline = time.monotonic() + _PATIENCE
        while not found():
            assert select.select([self.fd], [], [], deadline - time.monotonic())[0], self.seen
            try:
                data = os.read(self.fd, 1 << 16)
            except OSError:
                data = b""  # EIO: nobody has the terminal open any more
            assert data, self.seen
            self.seen += data.decode()
        shown, self.seen = self.seen, ""
        return shown

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def wait(self) -> int:
        """How it exited; what it wrote last goes to `seen`."""
        deadline = time.monotonic() + _PATIENCE
        while self.code is None:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.fd], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    self.seen += os.read(self.fd, 1 << 16).decode()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def close(self) -> None:
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.fixture
def on_terminal(served: Served) -> Iterator[Callable[..., Terminal]]:
    """`on_terminal("ps")` starts acctd on a terminal."""
    started = []

    def start(*arguments: str, columns: int = 80, **environ: str) -> Terminal:
        plain = {key: value for key, value in served.node.environ.items() if key not in ("NO_COLOR", "COLUMNS")}
        terminal = Terminal(served.node.argv(*arguments), {**plain, "TERM": "xterm-256color", **environ}, columns)
        started.append(terminal)
        return terminal

    yield start
    for terminal in started:
        terminal.close()


ENTERED, LEFT = r"\x1b\[\?1049h", r"\x1b\[\?1049l"  # the alternate screen; xterm's control sequences
COLOUR = re.compile(r"\x1b\[(\d+;)*(3|9)\dm")


def bare(text: str) -> str:
    """Without control sequences."""
    # A frame begins with the cursor at home, not with a newline.
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.replace("\x1b[H", "\n")).replace("\r", "")


def as_nobody(*arguments: str, **environ: str) -> tuple[int, str, str]:
    """acctd as an ordinary user, in a child of this process, which needs no file that the user may not read."""
    out, err = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setresgid(NOBODY.pw_gid, NOBODY.pw_gid, NOBODY.pw_gid)
        os.setresuid(NOBODY.pw_uid, NOBODY.pw_uid, NOBODY.pw_uid)
        os.dup2(out[1], 1)
        os.dup2(err[1], 2)
        os.environ.update(environ)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        code = 99
        try:
            main([*arguments])
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 0
        finally:
            os._exit(code)
    os.close(out[1])
    os.close(err[1])
    with open(out[0]) as told, open(err[0]) as complained:
        texts = told.read(), complained.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), *texts


def let_in(served: Served) -> None:
    """Let an ordinary user reach the socket, below pytest's own directory."""
    for path in (served.path.parent, *served.path.parent.parents):
        if path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(0o755)


def test_ps_lists_what_jobs_use_now(served: Served, busy: subprocess.Popen[str]) -> None:
    def listed() -> dict[str, str]:
        done = served.node.acctd("ps")
        assert (done.returncode, done.stderr) == (0, "")
        assert "\x1b" not in done.stdout
        title, line = done.stdout.splitlines()
        assert title.split() == ["JOB", "OWNER", "PHASE", "PROCS", "CPU", "MEMORY", "IN", "OUT", "WALL", "NETWORK"]
        # The job is in the host's network, which is not counted: IN and OUT are blank.
        return dict(
            zip(["JOB", "OWNER", "PHASE", "PROCS", "CPU", "MEMORY", "WALL", "NETWORK"], line.split(), strict=True)
        )

    first = listed()
    assert (first["JOB"], first["OWNER"], first["PHASE"], first["PROCS"], first["NETWORK"]) == (
        *("42.0", "root", "running", "1"),
        "host",
    )
    assert re.fullmatch(r"(6[4-9]|7\d|8\d)M", first["MEMORY"])
    deadline = time.monotonic() + _PATIENCE
    while listed()["CPU"] == first["CPU"]:
        assert time.monotonic() < deadline


def test_ps_counts_the_network(served: Served) -> None:
    lab = served.node.topology
    with lab.enter(lab.wan):
        server = Server()
    with server:
        served.ok("Create", job="net")
        traffic = [sys.executable, str(REPO / "lab" / "traffic.py"), "give", "203.0.113.2", str(PORT), "50000", "--udp"]
        netns = served.node.directory / "run" / "netns" / "net"
        subprocess.run(["nsenter", f"--net={netns}", *traffic], check=True, capture_output=True, timeout=60)
        line = served.node.acctd("ps").stdout.splitlines()[1].split()
    # 50,000 bytes in 42 datagrams with 28 bytes of headers each are 50.0 KiB; two windows' acknowledgements came back.
    assert (line[0], "50K" in line, "104" in line) == ("net", True, True)


def test_ps_as_json_is_what_the_agent_says(served: Served, busy: subprocess.Popen[str]) -> None:
    (job,) = json.loads(served.node.acctd("ps", "--json").stdout)
    assert (job["id"], job["pids"], job["totals"]["pids"]) == ("42.0", [busy.pid], {"": 1})


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_ps_fits_the_terminal(
    served: Served, busy: subprocess.Popen[str], on_terminal: Callable[..., Terminal], columns: int
) -> None:
    name = "12345[3].a-server.with.a-long.name.example.org"
    served.ok("Create", job=name, network="host")
    terminal = on_terminal("ps", columns=columns)
    assert terminal.wait() == 0
    lines = bare(terminal.seen).splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= columns
    assert ("CPU" in lines[0], "MEMORY" in lines[0], "OUT" in lines[0]) == (True, True, True)
    assert lines[2].startswith(name if columns == 200 else "12345[3].a-")
    assert ("NETWORK" in lines[0]) == (columns != 40)


def test_no_color(served: Served, busy: subprocess.Popen[str], on_terminal: Callable[..., Terminal]) -> None:
    for environ, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        terminal = on_terminal("top", "-n", "2", "--interval", "0.2", **environ)
        assert terminal.wait() == 0
        assert "42.0" in terminal.seen
        assert bool(COLOUR.search(terminal.seen)) == coloured


@pytest.mark.parametrize(
    "arguments",
    [["ps"], ["top"], ["events"], ["events", "-f"], ["kill", "x"], ["suspend", "x"], ["continue", "x"], ["reload"]],
    ids=" ".join,
)
def test_without_an_agent_one_line_says_so(node: Node, arguments: list[str]) -> None:
    done = node.acctd(*arguments, timeout=60)
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr == (
        f"acctd: no agent answers at {node.directory}/run/s (No such file or directory); start acctd serve\n"
    )


def test_top_in_a_pipe_prints_tables_with_rates(served: Served, busy: subprocess.Popen[str]) -> None:
    done = served.node.acctd("top", "-n", "2", "--interval", "1")
    assert (done.returncode, done.stderr) == (0, "")
    tables = done.stdout.split("\n\n")
    assert len(tables) == 2
    for text in tables:
        assert "\x1b" not in text
        title, line = text.splitlines()
        assert title.split() == ["JOB", "OWNER", "PROCS", "CPU%", "MEMORY", "IN/s", "OUT/s", "IO/s", "WALL"]
        found = re.match(r"42\.0 +root +1 +(\d+)  \[\|* *\] +\d+M  \[\|* *\] ", line)
        assert found, line
        # One busy process: at most one core, and a share of it however much else goes on here.
        assert 1 <= int(found[1]) <= 110
    assert served.node.acctd("top").stdout.count("JOB") == 1


def test_top_ends_with_its_reader_and_on_interrupt(served: Served, busy: subprocess.Popen[str]) -> None:
    # A background shell has its children ignore SIGINT.
    argv = ["env", "--default-signal=INT", *served.node.argv("top", "-n", "100000", "--interval", "0.1")]
    with subprocess.Popen(argv, env=served.node.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as top:
        assert top.stdout is not None
        assert top.stderr is not None
        assert top.stdout.readline().startswith(b"JOB")
        top.stdout.close()
        assert (top.wait(_PATIENCE), top.stderr.read()) == (141, b"")
    with subprocess.Popen(argv, env=served.node.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as top:
        assert top.stdout is not None
        assert top.stderr is not None
        assert top.stdout.readline().startswith(b"JOB")
        top.send_signal(signal.SIGINT)
        top.stdout.read()
        assert top.wait(_PATIENCE) == 130
        assert b"Traceback" not in top.stderr.read()


def test_top_on_a_terminal_takes_keys_and_gives_it_back(
    served: Served, busy: subprocess.Popen[str], on_terminal: Callable[..., Terminal]
) -> None:
    served.ok("Create", job="a-idle", network="host")
    top = on_terminal("top", "--interval", "0.3")
    before = termios.tcgetattr(top.fd)
    top.until(ENTERED)
    # Sorted by CPU: the busy one is first as soon as there are rates.
    shown = top.until_shown(r"by cpu\s[^q]*42\.0 +root +1 +\d+  \[[^q]*a-idle[^q]*q quit")
    assert max(len(line) for line in shown.splitlines()) <= 80
    assert not termios.tcgetattr(top.fd)[3] & termios.ECHO
    top.type("j")
    top.until_shown(r"by id\s[^q]*42\.0[^q]*a-idle[^q]*q quit")
    top.type("r")
    top.until_shown(r"by id\s[^q]*a-idle[^q]*42\.0[^q]*q quit")
    for key, name in (("m", "memory"), ("n", "network"), ("i", "io"), ("c", "cpu")):
        top.type(key)
        top.until_shown(rf"by {name}\s.*q quit")
    top.type("q")
    assert top.wait() == 0
    assert re.search(LEFT, top.seen)
    assert termios.tcgetattr(top.fd) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_top_gives_the_terminal_back_on_a_signal(
    served: Served, on_terminal: Callable[..., Terminal], number: int, code: int
) -> None:
    top = on_terminal("top")
    before = termios.tcgetattr(top.fd)
    top.until(r"q quit")
    os.kill(top.pid, number)
    assert top.wait() == code
    assert re.search(LEFT, top.seen)
    assert "Traceback" not in top.seen
    assert termios.tcgetattr(top.fd) == before


def test_top_is_stopped_and_continued_and_follows_the_terminals_size(
    served: Served, busy: subprocess.Popen[str], on_terminal: Callable[..., Terminal]
) -> None:
    top = on_terminal("top", "--interval", "3600")
    before = termios.tcgetattr(top.fd)
    top.until(r"q quit")
    os.kill(top.pid, signal.SIGTSTP)
    _, status = os.waitpid(top.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    top.until(LEFT)
    assert termios.tcgetattr(top.fd) == before
    os.kill(top.pid, signal.SIGCONT)
    top.until(rf"{ENTERED}[^\x00]*42\.0[^\x00]*q quit")
    fcntl.ioctl(top.fd, termios.TIOCSWINSZ, struct.pack("4H", 10, 50, 0, 0))
    # Frames of the old width may still come: the last line of the new one is cut.
    top.until_shown(r"42\.0[^q]*j job  r reverse\s*$")
    top.type("\x03")
    assert top.wait() == 0


def test_top_waits_for_an_agent_that_is_started_anew(
    served: Served, busy: subprocess.Popen[str], on_terminal: Callable[..., Terminal]
) -> None:
    top = on_terminal("top", "--interval", "0.2", columns=200)
    top.until(r"42\.0")
    assert served.stop() == 0
    top.until_shown(rf"no agent answers{SCREEN}42\.0{SCREEN}q quit")
    served.start()
    top.until_shown(rf"q quit{SCREEN}by cpu\s+JOB{SCREEN}42\.0{SCREEN}q quit")
    top.type("q")
    assert top.wait() == 0


def test_a_dumb_terminal_gets_plain_tables(served: Served, on_terminal: Callable[..., Terminal]) -> None:
    top = on_terminal("top", "--interval", "0.1", TERM="dumb")
    assert top.wait() == 0
    assert top.seen.startswith("JOB")
    assert "\x1b" not in top.seen


def test_show_a_living_job_then_its_record(served: Served, busy: subprocess.Popen[str]) -> None:
    text = served.node.acctd("show", "42.0").stdout
    assert text.startswith("job 42.0 of root: running, 1 processes, network host\n")
    assert re.search(r"resident  6\d\.\d MiB now", text)
    assert json.loads(served.node.acctd("show", "42.0", "--json").stdout)["pids"] == [busy.pid]
    assert "\nRemoteUserCpu = " in "\n" + served.node.acctd("show", "42.0", "--classad").stdout
    served.ok("Finish", job="42.0", exit_code=3)
    assert served.node.acctd("show", "42.0").stdout.startswith("job 42.0 of root: done, exit 3\n")
    assert json.loads(served.node.acctd("show", "42.0", "--json").stdout)["exit_code"] == 3
    nobody = served.node.acctd("show", "nobody-had-this")
    assert (nobody.returncode, nobody.stderr.count("\n")) == (66, 1)


def test_kill_does_what_it_can_and_says_what_it_cannot(served: Served, busy: subprocess.Popen[str]) -> None:
    done = served.node.acctd("kill", "no-such", "42.0", "../x")
    assert done.returncode == 66
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["acctd", "acctd"]
    assert "no-such" in done.stderr.splitlines()[0]
    assert busy.wait(_PATIENCE) == -signal.SIGKILL
    # The job is its starter's to finish.
    assert served.ok("Usage", job="42.0")["job"]["pids"] == []


def frozen(cgroups: list[str]) -> bool:
    """By the kernel's own word: freezer.state on v1, cgroup.events on v2."""
    for path in map(Path, cgroups):
        if (path / "freezer.state").exists():
            return (path / "freezer.state").read_text() == "FROZEN\n"
    return any("frozen 1" in (Path(path) / "cgroup.events").read_text() for path in cgroups)


def test_suspend_and_continue(served: Served) -> None:
    cgroups = served.ok("Create", job="s", network="host")["cgroups"]
    with subprocess.Popen(["sleep", "1000"]) as child:
        served.ok("Attach", job="s", pid=child.pid)
        for verb, wanted in (("suspend", True), ("continue", False)):
            assert served.node.acctd(verb, "s").returncode == 0
            deadline = time.monotonic() + _PATIENCE
            while frozen(cgroups) != wanted:
                assert time.monotonic() < deadline
        child.kill()


def test_reload(served: Served) -> None:
    text = served.node.config.read_text()
    served.node.config.write_text("poll_intervall = 3\n" + text)
    # Where the agent is comes from the same file: an admin with a mistake in it names the socket.
    done = served.node.acctd("reload", "--socket", str(served.path))
    assert done.returncode != 0
    assert "poll_intervall" in done.stderr
    assert done.stderr.count("\n") == 1
    served.node.config.write_text("poll_interval = 0.2\n" + text)
    assert served.node.acctd("reload").returncode == 0
    deadline = time.monotonic() + _PATIENCE
    while served.ok("Cost")["cost"]["ticks"] < 2:
        assert time.monotonic() < deadline


def test_an_ordinary_user_sees_what_may_be_seen(served: Served, busy: subprocess.Popen[str]) -> None:
    let_in(served)
    served.ok("Create", job="mine", user="nobody", network="host")
    environ = {"ACCTD_SOCKET": str(served.path)}
    code, out, err = as_nobody("ps", **environ)
    assert (code, err) == (0, "")
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["mine", "nobody"]]
    allowed = {job["id"]: job for job in json.loads(as_nobody("ps", "--all", "--json", **environ)[1])}
    assert allowed["mine"]["totals"]
    assert (allowed["42.0"]["totals"], allowed["42.0"]["pids"]) == ({}, [busy.pid])
    other = next(line for line in as_nobody("ps", "--all", **environ)[1].splitlines() if line.startswith("42.0"))
    assert re.fullmatch(r"42\.0 +root +running +1 +[\d.]+s +host", other), "no numbers but processes and wall time"
    assert "42.0" not in as_nobody("top", "--interval", "0.1", **environ)[1]
    assert as_nobody("show", "mine", **environ)[1].startswith("job mine of nobody: ")
    for arguments in (["show", "42.0"], ["kill", "42.0"], ["suspend", "42.0"], ["continue", "42.0"], ["reload"]):
        code, out, err = as_nobody(*arguments, **environ)
        assert (code, out, err.count("\n")) == (77, "", 1), arguments
    assert busy.poll() is None
    # Without an agent there is only the ledger, which is root's; what is wrong is that there is no agent.
    assert as_nobody("show", "x", ACCTD_SOCKET=f"{served.path}-none")[0] == 69


def test_who_may_read_sees_all_and_acts_on_nothing(served: Served, busy: subprocess.Popen[str]) -> None:
    let_in(served)
    environ = {"ACCTD_SOCKET": str(served.path)}
    with open(served.node.config, "a") as config:
        config.write(f'[access]\nread = ["@{grp.getgrgid(NOBODY.pw_gid).gr_name}"]\n')
    served.ok("Reload")
    served.ok("Snapshot")
    allowed = {job["id"]: job for job in json.loads(as_nobody("ps", "--all", "--json", **environ)[1])}
    assert allowed["42.0"]["totals"]["pids"] == {"": len(allowed["42.0"]["pids"])}
    assert as_nobody("show", "42.0", **environ)[1].startswith("job 42.0 of root: ")
    assert "42.0" in as_nobody("events", **environ)[1]
    for arguments in (["kill", "42.0"], ["suspend", "42.0"], ["limit", "42.0", "--pids", "9"], ["reload"]):
        code, out, err = as_nobody(*arguments, **environ)
        assert (code, out, err.count("\n")) == (77, "", 1), arguments


def test_events_are_listed_and_followed(served: Served) -> None:
    """From the ledger and from then on, across a restart of the agent: each once, in order."""
    for name in ("before-1", "before-2"):
        served.ok("Create", job=name, network="host")
        served.ok("Finish", job=name, exit_code=0)
    listed = [json.loads(line) for line in served.node.acctd("events", "--json").stdout.splitlines()]
    numbers = [event["number"] for event in listed]
    assert numbers == sorted(set(numbers))
    assert [event["event"] for event in listed if event["job"] == "before-1"] == ["created", "finished"]
    newest = served.node.acctd("events", "-n", "1", "--job", "before-1").stdout
    assert re.fullmatch(r" *\d+  \d{4}-\d\d-\d\d \d\d:\d\d:\d\d  before-1 +finished +\S.*\n", newest)
    since = [json.loads(line) for line in served.node.acctd("events", "--json", "--since", "1").stdout.splitlines()]
    assert since == [event for event in listed if event["number"] > 1]

    argv = ["env", "--default-signal=INT", *served.node.argv("events", "-f", "--json", "--since", "0")]
    with subprocess.Popen(argv, env=served.node.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as follower:
        assert follower.stdout is not None
        followed = [json.loads(follower.stdout.readline()) for _ in listed]
        assert followed == listed
        served.ok("Create", job="after", network="host")
        while (event := json.loads(follower.stdout.readline()))["job"] != "after":
            followed.append(event)
        followed.append(event)
        assert served.stop() == 0
        served.start()
        served.ok("Create", job="again", network="host")
        while (event := json.loads(follower.stdout.readline()))["job"] != "again":
            followed.append(event)
        followed.append(event)
        follower.send_signal(signal.SIGINT)
        assert follower.wait(_PATIENCE) == 130
    numbers = [event["number"] for event in followed]
    assert numbers == sorted(set(numbers))
    all_of_it = [json.loads(line) for line in served.node.acctd("events", "--json", "-n", "1000").stdout.splitlines()]
    assert followed == all_of_it[: len(followed)]


def test_an_ordinary_user_hears_of_own_jobs_alone(served: Served) -> None:
    let_in(served)
    served.ok("Create", job="roots", network="host")
    served.ok("Create", job="mine", user="nobody", network="host")
    code, out, err = as_nobody("events", "--json", ACCTD_SOCKET=str(served.path))
    assert (code, err) == (0, "")
    assert {json.loads(line)["job"] for line in out.splitlines()} == {"mine"}


# Completion, as the shells do it: they start `acctd` by its name.


@pytest.fixture
def with_acctd(served: Served) -> dict[str, str]:
    """An environment in which `acctd` can be called, and jobs that it can name."""
    for name in ("42.0", "42.1", "7.0"):
        served.ok("Create", job=name, network="host")
    command = served.node.directory / "bin" / "acctd"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\nexec " + " ".join(served.node.argv()) + ' "$@"\n')
    command.chmod(0o755)
    return {**served.node.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", "TERM": "dumb", "PS1": "$ "}


def shell(name: str, *arguments: str) -> list[str]:
    """A shell's command line; it is there wherever tools/system-packages could install it."""
    if subprocess.run(["sh", "-c", f"command -v {name}"], capture_output=True).returncode != 0:
        if subprocess.run(["sh", "-c", "command -v apt-get"], capture_output=True).returncode == 0:
            pytest.fail(f"{name} is missing; run tools/system-packages")
        pytest.skip(f"{name} is not installed, and cannot be by apt-get")
    return [name, *arguments]


def test_completion_in_bash(with_acctd: dict[str, str]) -> None:
    bash = Terminal(shell("bash", "--norc", "--noprofile", "-i"), with_acctd)
    try:
        bash.type(f". {REPO}/completions/acctd.bash; bind 'set bell-style none'; echo rea''dy\r")
        bash.until_shown(r"ready\n")
        bash.type("acctd susp\t")
        bash.until_shown(r"acctd suspend $")
        bash.type("7\t")
        bash.until_shown(r"7\.0 $")
        bash.type("42\t")
        bash.until_shown(r"42\.$")
        bash.type("\t\t")
        bash.until_shown(r"42\.0 +42\.1")
    finally:
        bash.close()


def test_completion_in_zsh(with_acctd: dict[str, str]) -> None:
    zsh = Terminal(shell("zsh", "-f", "-i"), {**with_acctd, "TERM": "xterm"})
    try:
        zsh.type(f"fpath=({REPO}/completions $fpath); autoload -U compinit; compinit -u -D; echo rea''dy\r")
        zsh.until_shown(r"ready\n")
        zsh.type("acctd susp\t")
        zsh.until_shown(r"suspend")
        zsh.type("7\t")
        zsh.until_shown(r"7\.0")
        zsh.type("42\t")
        zsh.until_shown(r"42\.")
        zsh.type("\t")
        zsh.until_shown(r"^(?=.*42\.0 )(?=.*42\.1 ).*made, of root")
    finally:
        zsh.close()


def test_completion_in_fish(with_acctd: dict[str, str], tmp_path: Path) -> None:
    def offered(line: str) -> list[str]:
        script = f"source {REPO}/completions/acctd.fish; complete -C '{line}'"
        environ = {**with_acctd, "HOME": str(tmp_path)}
        done = subprocess.run(
            shell("fish", "--no-config", "-c", script), env=environ, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, "")
        return sorted(entry.split("\t")[0] for entry in done.stdout.splitlines())

    assert offered("acctd susp") == ["suspend"]
    assert offered("acctd suspend 42") == ["42.0", "42.1"]
    assert offered("acctd top --sort ") == ["cpu", "id", "io", "memory", "network"]


def test_completion_without_an_agent_is_silent(node: Node) -> None:
    environ = {**node.environ, "_ACCTD_COMPLETE": "bash_complete", "COMP_WORDS": "acctd kill ", "COMP_CWORD": "2"}
    done = node.acctd(env=environ)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


# docs/admin.md


def examples() -> list[str]:
    page = (REPO / "docs" / "admin.md").read_text()
    blocks: list[str] = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_the_examples_for_admins(with_acctd: dict[str, str]) -> None:
    assert len(examples()) >= 15
    for line in examples():
        done = subprocess.run(["sh", "-c", line], env=with_acctd, capture_output=True, text=True, timeout=60)
        wanted = re.search(r"# exits (\d+)$", line)
        assert done.returncode == int(wanted[1] if wanted else 0), f"{line}\n{done.stdout}{done.stderr}"
        assert done.stderr == "", line


def test_every_command_for_admins_has_an_example() -> None:
    shown = {line.split("acctd ")[1].split()[0] for line in examples()}
    assert shown == {"ps", "top", "show", "events", "kill", "limit", "suspend", "continue", "reload"}
