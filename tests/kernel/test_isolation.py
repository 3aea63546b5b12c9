"""Isolation at launch: each option alone and all together, by acctd run, by the hook as root, and by the job's owner.

And what a job may try against each. Jobs are an ordinary user's; for root's own none of it is a wall.
"""

import json
import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.kernel.conftest import REPO, Node, make_node, scrub
from tests.kernel.served import Served
from tests.kernel.test_run import _read_until
from tests.unit.test_hook import Installed, install

NOBODY = 65534
PYTHON = "/usr/bin/python3"  # one that any user may run
ALL: dict[str, Any] = {"pid_namespace": True, "scratch": ["/tmp"], "chroot": "small", "no_new_privs": True}
EACH: list[dict[str, Any]] = [
    {"pid_namespace": True}, {"scratch": ["/tmp"]}, {"chroot": "small"}, {"no_new_privs": True}, ALL,
]  # fmt: skip
NAMES = ["pid", "scratch", "chroot", "privs", "all"]


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A place that anyone can pass to, on a file system where set-user-id counts."""
    with tempfile.TemporaryDirectory(prefix="acctdtest-", dir="/var/tmp") as name:
        path = Path(name)
        path.chmod(0o755)
        (path / "id").write_bytes(Path("/usr/bin/id").read_bytes())
        (path / "id").chmod(0o4755)
        yield path


@pytest.fixture(scope="module")
def small(home: Path) -> Path:
    """A root directory with the host's programs in it, and places for a job's own."""
    root = home / "small"
    for name in ("usr", "dev", "proc", "tmp", "data", "etc", "run"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        if os.path.islink(f"/{name}"):
            (root / name).symlink_to(os.readlink(f"/{name}"))
        elif os.path.isdir(f"/{name}"):
            (root / name).mkdir()
    (root / "planted").symlink_to("/etc")
    (root / "etc" / "motd").touch()
    return root


@dataclass
class Site:
    """A node whose configuration has chroots, and everything of it where a user can reach it."""

    node: Node
    home: Path
    small: Path
    plain: str = ""  # its configuration without any isolation
    started: list["subprocess.Popen[str]"] = field(default_factory=list)

    @property
    def scratch(self) -> Path:
        return self.node.directory / "scratch"

    def write_config(self, **isolation: str) -> None:
        binds = [f"/{name}:/{name}:ro" for name in ("usr", "bin", "sbin", "lib", "lib64")]
        binds = [bind for bind in binds if (self.small / bind.split(":")[0][1:]).is_dir()]
        binds = [bind for bind in binds if not (self.small / bind.split(":")[0][1:]).is_symlink()]
        binds += [f"{self.home}:/data:ro", "/etc/hostname:/etc/motd"]
        self.plain = self.plain or self.node.config.read_text()
        text = self.plain + "[isolation]\n"
        text += "".join(f"{key} = {value}\n" for key, value in isolation.items())
        text += f'scratch_dir = "{self.scratch}"\n'
        for name, more in (("small", []), ("planted", ["/usr:/planted"]), ("absent", ["/usr:/nothing/there"])):
            text += f"[isolation.chroots.{name}]\nroot = {json.dumps(str(self.small))}\n"
            text += f"bind = {json.dumps([*binds, *more])}\n"
        self.node.config.write_text(text)

    def mounted(self) -> list[str]:
        """What the host has mounted of ours, but for the names of networks."""
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line for line in lines if str(self.home) in line and "/run/netns/" not in line]

    def left(self) -> list[str]:
        """What lies in the place of all scratch, by job."""
        trash = self.scratch / ".trash"
        found = os.listdir(self.scratch) if self.scratch.exists() else []
        return sorted(found + [f".trash/{name}" for name in (os.listdir(trash) if trash.exists() else [])])


class Way(Protocol):
    """One of the ways to start a command in a job."""

    name: str
    site: Site

    def start(self, isolation: dict[str, Any], *command: str, **options: Any) -> "subprocess.Popen[str]":
        """Start it in a job of nobody's."""

    def over(self) -> None:
        """End what was begun, and wait until nothing is left of it."""


def run(way: Way, isolation: dict[str, Any], script: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A shell script in a job; what it said, and how it ended."""
    options = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE} | options
    process = way.start(isolation, "sh", "-c", script, **options)
    out, err = process.communicate(timeout=60)
    code = process.returncode
    if code > 128:
        code = 128 - code  # acctd run says so what a process that is waited for shows
    return subprocess.CompletedProcess([], code, out, err)


@dataclass
class ByRun:
    """acctd run."""

    site: Site
    name: str = "run"

    def start(self, isolation: dict[str, Any], *command: str, **options: Any) -> "subprocess.Popen[str]":
        words = ["run", "-q", "--user", str(NOBODY), "--network", options.pop("network", "host")]
        for key, value in isolation.items():
            option = f"--{key.replace('_', '-')}"
            words += [option] if value is True else [part for each in _listed(value) for part in (option, each)]
        node = self.site.node
        options = {"stdout": subprocess.PIPE, "text": True, "env": node.environ, "cwd": "/"} | options
        argv = ["env", "--default-signal", *node.argv(*words, "--", *command)]
        process: subprocess.Popen[str] = node.topology.popen(node.topology.node, argv, **options)
        self.site.started.append(process)
        return process

    def over(self) -> None:
        for process in self.site.started:
            process.kill()
            process.communicate()


@dataclass
class ByHook:
    """acctd-hook exec, as root or as the job's owner."""

    site: Site
    served: Served
    installed: Installed
    name: str
    jobs: int = 0

    def create(self, isolation: dict[str, Any], network: str = "nat") -> str:
        self.jobs += 1
        wanted = {"job": f"j{self.jobs}", "user": str(NOBODY), "network": network, "isolation": isolation}
        job: str = self.served.ok("Create", **wanted)["job"]
        return job

    def start(self, isolation: dict[str, Any], *command: str, **options: Any) -> "subprocess.Popen[str]":
        return self.enter(self.create(isolation, options.pop("network", "nat")), *command, **options)

    def enter(self, job: str, *command: str, **options: Any) -> "subprocess.Popen[str]":
        person = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if self.name == "owner" else []
        hook = [str(self.installed.hook), "--socket", str(self.served.path), "exec", "--job", job, "--", *command]
        options = {"stdout": subprocess.PIPE, "text": True, "cwd": "/"} | options
        argv = ["env", "--default-signal", *person, *hook]
        process: subprocess.Popen[str] = subprocess.Popen(argv, **options)  # type: ignore[call-overload]
        self.site.started.append(process)
        return process

    def over(self) -> None:
        for process in self.site.started:
            process.kill()
            process.communicate()
        for job in self.served.ok("List")["jobs"]:
            self.served.ok("Finish", job=job["id"])
        until(lambda: self.site.left() in ([], [".trash"]), "scratch is gone")


def _listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def marked(mark: str) -> list[int]:
    """Processes on the host that have a mark among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.fixture
def site(topology: Any, home: Path, small: Path) -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="node-", dir=home) as name:
        os.chmod(name, 0o755)  # noqa: S103  # that is the point
        # What a job could leave behind beside mounts and scratch is compared by the node.
        with contextmanager(make_node)(topology, Path(name)) as node:
            made = Site(node, home, small)
            made.write_config()
            before = made.mounted()
            try:
                yield made
                assert made.mounted() == before
                assert made.left() in ([], [".trash"])
            finally:
                scrub(node.base)


def by_hook(site: Site, name: str) -> Iterator[ByHook]:
    installed = install(site.node.directory / "app", PYTHON)
    served = Served(site.node, None)  # type: ignore[arg-type]  # start() sets it
    served.start()
    made = ByHook(site, served, installed, name)
    try:
        yield made
        made.over()
        assert served.stop() == 0
    finally:
        if served.process.poll() is None:
            served.process.kill()
        served.process.communicate()


@pytest.fixture(params=["run", "root", "owner"])
def way(request: pytest.FixtureRequest, site: Site) -> Iterator[Way]:
    if request.param == "run":
        made = ByRun(site)
        yield made
        made.over()
    else:
        yield from by_hook(site, request.param)


@pytest.fixture(params=["root", "owner"])
def hook(request: pytest.FixtureRequest, site: Site) -> Iterator[ByHook]:
    yield from by_hook(site, request.param)


# Each does what it is for


LOOK = """
ps -e -o pid=,comm= | sed 's/^/ps /'
echo uid $(id -u) $(id -g)
grep NoNewPrivs /proc/self/status; grep '^Cap' /proc/self/status
ls -A /tmp | sed 's/^/tmp /'; touch /tmp/mine && echo made
ls / | grep -qx data && echo another root
"""


@pytest.mark.parametrize("isolation", EACH, ids=NAMES)
def test_each_alone_and_all_together(way: Way, isolation: dict[str, Any]) -> None:
    with tempfile.NamedTemporaryFile(prefix="acctdtest-", dir="/tmp") as outside:
        if isolation == {"chroot": "small"}:
            way.site.small.joinpath("tmp").chmod(0o1777)
        done = run(way, isolation, LOOK)
        assert done.returncode == (0 if "chroot" in isolation else 1), done.stderr
        assert done.stderr == ""
        lines = done.stdout.splitlines()
        shown = [line.split()[1:] for line in lines if line.startswith("ps ")]
        # Our own first process, the command and what it has just started; or all that the host has.
        pids = {int(pid) for pid, _ in shown}
        assert (pids <= {*range(1, 6)} and ["1", "acctd-init"] in shown) == bool(
            isolation.keys() & {"pid_namespace", "chroot"}
        )
        assert (os.getpid() in pids) == (not isolation.keys() & {"pid_namespace", "chroot"})
        assert f"uid {NOBODY} {NOBODY}" in lines
        # A directory that only the job asks for takes set-user-id programs away: they may trust what lies there.
        wanted = "no_new_privs" in isolation or "scratch" in isolation
        assert f"NoNewPrivs:\t{int(wanted)}" in lines
        capabilities = [line.split()[1] for line in lines if line.startswith(("CapEff", "CapPrm", "CapInh", "CapAmb"))]
        assert capabilities == ["0000000000000000"] * 4
        there = [line for line in lines if line.startswith("tmp ")]
        name = os.path.basename(outside.name)
        assert (f"tmp {name}" in there) == (not {"scratch", "chroot"} & isolation.keys())
        assert "made" in lines
        if "scratch" in isolation:
            assert not there
        assert ("another root" in lines) == ("chroot" in isolation)
        if "scratch" not in isolation:
            for place in ("/tmp", way.site.small / "tmp"):
                Path(place, "mine").unlink(missing_ok=True)


@pytest.mark.parametrize("isolation", [{"pid_namespace": True}, ALL], ids=["pid", "all"])
def test_the_starter_sees_how_the_command_ended(way: Way, isolation: dict[str, Any]) -> None:
    assert run(way, isolation, "exit 7").returncode == 7
    assert run(way, isolation, "kill -TERM $$").returncode == -signal.SIGTERM
    assert run(way, isolation, "kill -KILL $$").returncode == -signal.SIGKILL
    assert run(way, isolation, "kill -SEGV $$").returncode == -signal.SIGSEGV
    assert run(way, isolation, "exec /no/such").returncode == 127


def test_a_command_that_is_not_there(way: Way) -> None:
    process = way.start(ALL, "/no/such/command", stderr=subprocess.PIPE)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 127
    assert "/no/such/command" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "USR1", "USR2", "QUIT"])
def test_signals_reach_the_command(way: Way, name: str) -> None:
    script = f"trap 'echo caught; exit 5' {name}; echo ready; while :; do sleep 0.05; done"
    process = way.start({"pid_namespace": True}, "sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(getattr(signal, f"SIG{name}"))
    assert process.communicate(timeout=30)[0] == "caught\n"
    assert process.returncode == 5


def test_a_stop_is_seen_and_ended_by_the_starter(hook: ByHook) -> None:
    script = "echo ready; read word; echo $word"
    # A group of its own, because the kernel stops none that has no parent outside, as a test in the background is.
    process = hook.start({"pid_namespace": True}, "sh", "-c", script, stdin=subprocess.PIPE, process_group=0)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTSTP)
    flags = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
    until(lambda: os.waitid(os.P_PID, process.pid, flags) is not None, "it is seen to have stopped")
    job = hook.served.ok("List")["jobs"][0]["id"]
    (inside,) = hook.served.ok("Signal", job=job, signal=int(signal.SIGURG))["pids"]
    assert Path(f"/proc/{inside}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    process.send_signal(signal.SIGCONT)
    assert process.communicate("on\n", timeout=30)[0] == "on\n"
    assert process.returncode == 0


@pytest.mark.parametrize("by", ["the hook", "itself"])
def test_a_stop_that_the_starter_knows_nothing_of_does_not_hang_it(hook: ByHook, by: str) -> None:
    """Nobody would continue the process that it waits for."""
    script = "(sleep 0.3; kill -CONT 2)& kill -STOP $$; exit 5" if by == "itself" else "echo ready; read word; exit 5"
    process = hook.start({"pid_namespace": True}, "sh", "-c", script, stdin=subprocess.PIPE, process_group=0)
    assert process.stdout is not None
    if by == "the hook":
        assert process.stdout.readline() == "ready\n"
        job = hook.served.ok("List")["jobs"][0]["id"]
        (inside,) = hook.served.ok("Signal", job=job, signal=int(signal.SIGSTOP))["pids"]
        stat = Path(f"/proc/{inside}/stat")
        until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "it has stopped")
        hook.served.ok("Signal", job=job, signal=int(signal.SIGCONT))
    process.communicate("on\n", timeout=30)
    assert process.returncode == 5


def test_a_terminal_is_the_commands_own_and_control_c_reaches_it_once(site: Site) -> None:
    pid, fd = pty.fork()
    if pid == 0:
        script = "trap 'echo once; exit 3' INT; test -t 0 && tty && echo terminal; while :; do sleep 0.05; done"
        argv = ["env", "--default-signal", *site.node.argv("run", "-q", "--network", "host", "--pid-namespace", "--")]
        os.execvpe(argv[0], [*argv, "sh", "-c", script], site.node.environ)  # noqa: S606
    seen = _read_until(fd, b"terminal")
    os.write(fd, b"\x03")
    status = os.waitpid(pid, 0)[1]
    seen += _read_until(fd, b"once")
    assert seen.count(b"once") == 1
    assert b"/dev/pts/" in seen
    assert os.waitstatus_to_exitcode(status) == 3
    os.close(fd)


def test_signals_are_as_the_starter_left_them(way: Way) -> None:
    script = "grep -E 'Sig(Blk|Ign)' /proc/self/status"
    assert run(way, {"pid_namespace": True}, script).stdout == run(way, {}, script).stdout


def test_its_end_is_the_end_of_all_in_the_namespace(way: Way) -> None:
    """Also of those that left its session; and none stays behind as a zombie meanwhile."""
    mark = f"{os.getpid()}.{time.monotonic_ns()}"
    script = f"setsid sh -c 'sleep 1000; :' {mark} >/dev/null 2>&1 & (exec true &); ps -e -o stat=; exit 4"
    done = run(way, {"pid_namespace": True}, script)
    assert done.returncode == 4
    assert marked(mark) == []
    # An orphan that has ended is taken by the first process of the namespace.
    script = (
        "(sh -c 'exit 0' &); for i in 1 2 3 4 5 6 7 8 9; do ps -e -o stat= | grep -q Z || exit 0; sleep 1; done; exit 1"
    )
    assert run(way, {"pid_namespace": True}, script).returncode == 0


def test_nothing_is_left_when_the_outer_process_is_killed(hook: ByHook) -> None:
    mark = f"{os.getpid()}.{time.monotonic_ns()}"
    script = f"setsid sh -c 'sleep 1000; :' {mark} & echo up; wait"
    process = hook.start(ALL, "sh", "-c", script)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    until(lambda: marked(mark), "it runs")
    process.kill()
    until(lambda: not marked(mark), "all that was in the namespace has ended")


def test_what_waits_is_not_billed(hook: ByHook) -> None:
    """Neither what the starter waits for nor the namespace's first process is in the job."""
    process = hook.start(ALL, "sh", "-c", "echo up; read _", stdin=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    job = hook.served.ok("List")["jobs"][0]["id"]
    pids = hook.served.ok("Signal", job=job, signal=int(signal.SIGURG))["pids"]
    assert len(pids) == 1
    assert process.pid not in pids
    process.communicate("\n", timeout=30)


# Scratch


def test_the_environment_of_scratch(way: Way) -> None:
    """Started below a directory that it covers, the job is not left in what it covers."""
    with tempfile.TemporaryDirectory(prefix="acctdtest-", dir="/tmp") as name:
        os.chmod(name, 0o755)  # noqa: S103
        Path(name, "secret").touch()
        script = "ls -A . ..; pwd -P; stat -c '%a %u' /tmp /var/tmp"
        done = run(way, {"scratch": ["/tmp", "/var/tmp"]}, f"cd .; {script}", cwd=name)
        assert "secret" not in done.stdout
        assert os.path.basename(name) not in done.stdout
        assert done.stdout.splitlines()[-3:] == ["/", f"700 {NOBODY}", f"700 {NOBODY}"]


HOSTILE = r"""
import os, sys
os.chdir("/tmp")
os.symlink(sys.argv[1], "link")
os.symlink("/", "root")
os.mkfifo("fifo")
os.mkdir("closed"); open("closed/file", "w").close(); os.chmod("closed", 0)
os.mkdir("wide")
for number in range(2500):
    open(f"wide/{number}", "w").close()
for level in range(3000):
    os.mkdir("deep"); open("file", "w").close(); os.symlink(sys.argv[1], "victim"); os.chdir("deep")
"""


def test_whatever_lies_in_scratch_is_removed_and_nothing_else(way: Way) -> None:
    victim = way.site.home / "victim"
    victim.mkdir(exist_ok=True)
    (victim / "precious").touch()
    process = way.start({"scratch": ["/tmp"]}, PYTHON, "-c", HOSTILE, str(victim), stderr=subprocess.PIPE)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0
    way.over()
    assert way.site.left() in ([], [".trash"])
    assert (victim / "precious").exists()


def test_scratch_of_a_killed_acctd_is_removed_by_the_next(site: Site) -> None:
    way = ByRun(site)
    process = way.start({"scratch": ["/tmp"]}, "sh", "-c", "touch /tmp/x; echo up; exec sleep 1000")
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    assert site.left() != []
    process.kill()
    process.wait()
    scrub(site.node.base)  # its processes end
    assert site.node.acctd("run", "-q", "--network", "host", "--", "true").returncode == 0
    assert site.left() == [".trash"]


def test_scratch_of_a_killed_agent_is_removed_by_the_next(hook: ByHook) -> None:
    mark = f"{os.getpid()}.{time.monotonic_ns()}"
    process = hook.start(ALL, "sh", "-c", "touch /tmp/x; echo up; read _", mark, stdin=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    (own,) = (name for name in hook.site.left() if not name.startswith("."))
    hook.served.process.kill()
    hook.served.process.communicate()
    # One that was half gone when the agent died.
    trash = hook.site.scratch / ".trash"
    trash.mkdir(exist_ok=True)
    (trash / "older.01234567" / "0" / "directory").mkdir(parents=True)
    process.communicate("\n", timeout=30)
    assert own in hook.site.left()
    hook.served.start()
    until(lambda: hook.site.left() == [".trash"], "what was left is gone")


def test_a_place_of_scratch_that_a_user_can_change_is_refused(site: Site) -> None:
    site.scratch.mkdir()
    os.chown(site.scratch, NOBODY, NOBODY)
    done = run(ByRun(site), {"scratch": ["/tmp"]}, "echo ran")
    assert (done.returncode, done.stdout) == (77, "")
    assert f"{site.scratch} can be changed by others than root" in done.stderr
    site.scratch.rmdir()


@pytest.mark.parametrize("name", ["/planted", "/no/such"])
def test_scratch_goes_by_no_symbolic_link(way: Way, name: str) -> None:
    done = run(way, {"chroot": "small", "scratch": [name]}, "echo ran")
    assert (done.returncode, done.stdout) == (77 if way.name == "owner" else 71, "")
    assert done.stderr.count("\n") == 1
    assert ("is a symbolic link" if name == "/planted" else "No such file") in done.stderr


def test_a_directory_of_the_configurations_own_leaves_set_user_id_programs(site: Site) -> None:
    site.write_config(scratch='["/tmp"]')
    script = "grep NoNewPrivs /proc/self/status; stat -c %u /tmp"
    assert run(ByRun(site), {}, script).stdout == f"NoNewPrivs:\t0\n{NOBODY}\n"
    assert run(ByRun(site), {"scratch": ["/var/tmp"]}, script).stdout == f"NoNewPrivs:\t1\n{NOBODY}\n"


# Another root


def test_a_root_of_its_own(way: Way) -> None:
    script = "ls / | tr '\\n' ' '; ls /dev | tr '\\n' ' '; cat /etc/motd; pwd; echo x >/dev/null && echo null"
    done = run(way, {"chroot": "small"}, f"{script}; echo x >/usr/x || echo read-only; ls /dev/fd/", cwd="/var")
    lines = done.stdout.splitlines()
    assert {"data", "dev", "etc", "planted", "proc", "run", "tmp", "usr"} <= set(lines[0].split())
    assert "home" not in lines[0].split()
    devices = {"fd", "full", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty", "urandom"}
    assert devices | {"zero"} == set(lines[0].split()[-14:-1])
    assert lines[0].endswith(f" {Path('/etc/hostname').read_text().strip()}")
    assert lines[1:4] == ["/", "null", "read-only"]


@pytest.mark.parametrize(
    ("name", "said"), [("planted", "'planted' of /planted is a symbolic link"), ("absent", "No such file or directory")]
)
def test_a_bind_goes_by_no_symbolic_link_that_is_planted_in_the_root(way: Way, name: str, said: str) -> None:
    done = run(way, {"chroot": name}, "echo ran")
    assert (done.returncode, done.stdout) == (77 if way.name == "owner" else 71, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_there_is_no_way_up(way: Way) -> None:
    victim = way.site.home / "outside"
    victim.touch()
    script = f"cd ../../../../..; ls -d ./var/tmp {victim}; ls /proc/1/root/ /proc/1/cwd/ 2>&1 | head -2; echo over"
    done = run(way, {"chroot": "small", "pid_namespace": True}, script, cwd=str(way.site.home))
    assert str(way.site.home) not in done.stdout
    assert "./var/tmp" not in done.stdout
    assert done.stdout.splitlines()[-1] == "over"


def test_an_open_directory_of_the_starters_is_no_way_out(hook: ByHook) -> None:
    fd = os.open("/", os.O_RDONLY)
    try:
        process = hook.start(
            {"chroot": "small"}, "sh", "-c", f"ls /proc/self/fd/{fd}/ || echo shut", pass_fds=[fd],
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert process.communicate(timeout=30)[0] == "shut\n"
    finally:
        os.close(fd)


# What a job may try


@pytest.mark.parametrize("isolation", [{"pid_namespace": True}, ALL], ids=["pid", "all"])
def test_mounts_stay_as_they_are(way: Way, isolation: dict[str, Any]) -> None:
    script = """
before=$(cat /proc/self/mounts)
umount /proc; umount -l /proc; umount -l /tmp; umount -l /usr; mount -o remount,rw /usr; mount -t tmpfs none /tmp
mount --bind /usr /tmp; mount --move /proc /tmp; mount -t proc proc /tmp
unshare --user --map-root-user --mount sh -c '
    for where in /proc /usr /tmp; do umount $where && echo away; umount -l $where && echo away; done
    mount -o remount,bind,rw /usr && echo away; ls /proc | grep -c "^[0-9]"'
[ "$before" = "$(cat /proc/self/mounts)" ] && echo same
ps -e -o pid= | wc -l
"""
    done = run(way, isolation, script)
    lines = done.stdout.split()
    assert "away" not in lines, done
    assert "same" in lines
    assert int(lines[-1]) <= 5


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """A process of the job's own user, outside of it."""
    argv = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "sleep", "1000"]
    with subprocess.Popen(argv) as process:
        until(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n", "it sleeps")
        yield process
        process.kill()


ATTACH = r"""
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def attempt(pid):
    if libc.ptrace(16, pid, 0, 0) == 0:
        os.waitpid(pid, 0)
        libc.ptrace(17, pid, 0, 0)
        return "attached"
    return errno.errorcode[ctypes.get_errno()]
def there(what):
    try:
        return what()
    except OSError as e:
        return errno.errorcode[e.errno]
pid = int(sys.argv[1])
print(attempt(pid), there(lambda: os.kill(pid, 0)), there(lambda: open(f"/proc/{pid}/environ").read(1)))
print(attempt(1), there(lambda: open("/proc/1/mem", "rb+")), there(lambda: os.readlink("/proc/1/root")))
"""


def test_no_process_outside_is_read_or_traced(way: Way, victim: "subprocess.Popen[bytes]") -> None:
    def attempts(isolation: dict[str, Any]) -> list[str]:
        process = way.start(isolation, PYTHON, "-c", ATTACH, str(victim.pid))
        return process.communicate(timeout=30)[0].splitlines()

    assert attempts({"pid_namespace": True}) == ["ESRCH ESRCH ENOENT", "EPERM EACCES EACCES"]
    assert attempts(ALL) == ["ESRCH ESRCH ENOENT", "EPERM EACCES EACCES"]
    # Without it the same user's process can be; not by one in a user namespace, which may be signalled only.
    yama = Path("/proc/sys/kernel/yama/ptrace_scope")
    if not yama.exists() or yama.read_text().strip() == "0":
        assert attempts({})[0].split()[0] == ("EPERM" if way.name == "owner" else "attached")
        assert attempts({})[0].split()[1] == "None"


def test_another_chroots_proc_shows_nothing_of_the_host(site: Site) -> None:
    """As one that an admin keeps mounted for other uses."""
    there = site.home / "elsewhere"
    there.mkdir()
    script = (
        f"mount --make-rprivate / && mount -t proc proc {there} && exec {sys.executable} -m acctd run -q "
        f"--network host --pid-namespace --user {NOBODY} -- ls {there}"
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, env=site.node.environ, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert {name for name in done.stdout.split() if name.isdigit()} <= {"1", "2", "3"}


def test_mounts_go_in_and_not_out(site: Site) -> None:
    """On a host that shares its mounts, as systemd has it."""
    late = site.node.directory / "late"
    late.mkdir()
    (site.small / "late").mkdir(exist_ok=True)
    share = ["sh", "-c", "mount --make-rshared / && echo up; exec sleep 1000"]
    holder = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", *share], stdout=subprocess.PIPE, text=True
    )

    def mounts() -> list[str]:
        lines = Path(f"/proc/{holder.pid}/mountinfo").read_text().splitlines()
        return [line for line in lines if "/run/netns" not in line]  # other tests make and remove those

    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "up\n"
        there = ["nsenter", f"--mount=/proc/{holder.pid}/ns/mnt"]
        before = mounts()
        script = f"echo up; read _; ls {late} /late; read _"
        for isolation, shown in ((["--scratch", "/tmp"], f"{late}:"), (["--chroot", "small"], "/late:")):
            argv = [*there, *site.node.argv("run", "-q", "--network", "host", "--pid-namespace", *isolation), "--"]
            with subprocess.Popen(
                [*argv, "sh", "-c", script], env=site.node.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True,
            ) as process:  # fmt: skip
                assert process.stdout is not None
                assert process.stdin is not None
                assert process.stdout.readline() == "up\n"
                assert mounts() == before
                where = str(late) if shown == f"{late}:" else str(site.small / "late")
                subprocess.run([*there, "mount", "-t", "tmpfs", "late", where], check=True)
                subprocess.run([*there, "touch", f"{where}/it-is-here"], check=True)
                process.stdin.write("\n")
                process.stdin.flush()
                lines = [process.stdout.readline().strip() for _ in range(2)]
                assert "it-is-here" in lines, lines
                # And the host can take it away again while the job runs.
                subprocess.run([*there, "umount", where], check=True)
                process.communicate("\n", timeout=30)
            assert mounts() == before
    finally:
        holder.kill()
        holder.communicate()


def test_set_user_id_gives_nothing(way: Way) -> None:
    script = f"{way.site.home}/id -u"
    in_chroot = "/data/id -u"
    # One in a user namespace gets nothing from it anyway.
    assert run(way, {}, script).stdout.strip() == (str(NOBODY) if way.name == "owner" else "0")
    assert run(way, {"no_new_privs": True}, script).stdout.strip() == str(NOBODY)
    assert run(way, ALL, in_chroot).stdout.strip() == str(NOBODY)


# Entering


def test_each_exec_has_namespaces_of_its_own_and_the_jobs_scratch(hook: ByHook) -> None:
    job = hook.create(ALL)
    first = hook.enter(job, "sh", "-c", "touch /tmp/first; echo up; read _", stdin=subprocess.PIPE)
    assert first.stdout is not None
    assert first.stdout.readline() == "up\n"
    second = hook.enter(job, "sh", "-c", "ls /tmp; ps -e -o pid= | wc -l; ps -e -o comm=")
    lines = second.communicate(timeout=30)[0].split()
    assert lines[0] == "first"
    assert int(lines[1]) <= 4
    first.communicate("\n", timeout=30)
    assert first.returncode == 0


@pytest.mark.parametrize("isolation", EACH, ids=NAMES)
def test_the_owner_in_the_hosts_network(site: Site, isolation: dict[str, Any]) -> None:
    """Where there is no user namespace of the pipe's to join, it makes one, if one is needed."""
    for way in by_hook(site, "owner"):
        user = os.readlink("/proc/self/ns/user")
        script = "readlink /proc/self/ns/user; grep -c '^Cap.*:.0*$' /proc/self/status; cat /proc/self/cgroup"
        done = run(way, isolation, script, network="host")
        lines = done.stdout.splitlines()
        assert (lines[0] == user) == (isolation == {"no_new_privs": True}), done.stderr
        assert int(lines[1]) >= 4
        assert any(line.endswith("job_j1") for line in lines), lines


@pytest.mark.parametrize("network", ["host", "none"])
def test_where_users_make_no_namespaces_nothing_is_started(site: Site, network: str) -> None:
    for way in by_hook(site, "owner"):
        job = way.create({"pid_namespace": True}, network)
        # The limit is set in a user namespace below the host's, so that nobody else is touched.
        limit = 'read _; exec sh -c \'echo 0 >/proc/sys/user/max_user_namespaces && exec "$@"\' sh "$@"'
        person = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        hook = [str(way.installed.hook), "--socket", str(way.served.path), "exec", "--job", job, "--", "echo", "ran"]
        with subprocess.Popen(
            ["unshare", "--user", "sh", "-c", limit, "sh", *person, *hook],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            own = os.readlink("/proc/self/ns/user")
            while os.readlink(f"/proc/{process.pid}/ns/user") == own:
                assert process.poll() is None
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{process.pid}/{name}").write_text("0 0 4294967295")
            out, err = process.communicate("\n", timeout=60)
        assert (process.returncode, out, err.count("\n")) == (77, "", 1), err
        assert "namespace" in err


def test_what_nobody_can_be_asked_about_is_said(hook: ByHook) -> None:
    argv = ["exec", "--fail-open", "--job", "j9", "--socket", "/nowhere/s"]
    argv += ["--user", "nobody"] if hook.name == "root" else []
    person = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if hook.name == "owner" else []
    done = subprocess.run(
        [*person, str(hook.installed.hook), *argv, "--", "echo", "ran"], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "ran\n"
    assert "should it be isolated, it is not" in done.stderr


def test_an_agent_that_dies_in_between_leaves_the_isolation(site: Site) -> None:
    """What it has said counts, also for a start that it does not account for."""
    for way in by_hook(site, "root"):
        job = way.create(ALL)
        script = f"""
import os, sys
from acctd import hookcall, hookexec
look = ["sh", "-c", "ls -d /data; ps -e -o pid= | wc -l"]
real = hookcall.call
def call(path, method, **parameters):
    answer = real(path, method, **parameters)
    if method == "Entry":
        os.kill({way.served.process.pid}, 9)
    return answer
hookcall.call = call
sys.exit(hookexec.run({str(way.served.path)!r}, {job!r}, look, user="root", fail_open=True))
"""
        environ = {**os.environ, "PYTHONPATH": str(REPO)}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environ, cwd="/"
        )
        assert done.stdout.split()[0] == "/data", done.stderr
        assert int(done.stdout.split()[1]) <= 4
        assert f"job {job} starts unaccounted" in done.stderr
        assert str(way.served.path) in done.stderr
        way.served.process.wait()
        way.served.start()
