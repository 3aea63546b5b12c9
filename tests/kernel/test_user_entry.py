"""acctd-hook exec as an ordinary user, the job's owner: the pipe comes into a namespace of the user's own."""

import functools
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

import pytest

from acctd.errors import InUseError, KernelRefusedError, NotFoundError, NotPermittedError
from acctd.kernel import netns
from acctd.network import pipe
from acctd.network.backend import Pools
from acctd.network.pool import Lease, lease
from lab.topology import Topology
from lab.traffic import PORT, Server, expected_udp
from lab.wire import WireCounter
from tests.kernel.conftest import REPO, Node, make_node
from tests.kernel.served import Served
from tests.unit.test_hook import Installed, install

NOBODY = 65534
PYTHON = "/usr/bin/python3"  # one that any user may run
WAN4 = "203.0.113.2"


@dataclass
class Owned:
    """An agent with a job of an ordinary user's, and the hook as that user has it."""

    served: Served
    installed: Installed

    def create(self, job: str, network: str = "nat") -> dict[str, Any]:
        return self.served.ok("Create", job=job, user=str(NOBODY), network=network)

    def argv(self, *arguments: str, groups: str = "--clear-groups", uid: int = NOBODY) -> list[str]:
        person = ["setpriv", f"--reuid={uid}", f"--regid={uid}", groups]
        return [*person, str(self.installed.hook), "--socket", str(self.served.path), *arguments]

    def run(self, *arguments: str, groups: str = "--clear-groups", **options: Any) -> subprocess.CompletedProcess[str]:
        """The hook, called by the owner."""
        argv = self.argv(*arguments, groups=groups)
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, **options)

    def inside(self, job: str, *command: str, **options: Any) -> str:
        """What a command says that the owner runs in a job; it must succeed."""
        done = self.run("exec", "--job", job, "--", *command, **options)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout

    def begin(self, job: str, *command: str) -> subprocess.Popen[str]:
        """A command in the job that waits for its input to end; it is in the job once it has said a line."""
        argv = self.argv("exec", "--job", job, "--", *command)
        return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture(params=["nftables", "iptables"])
def each_backend(request: pytest.FixtureRequest, topology: Topology) -> Iterator[Node]:
    """As everywhere, but in a place that anyone can pass to: pytest keeps its own directories to their owner."""
    with tempfile.TemporaryDirectory(prefix="acctdtest-") as name:
        os.chmod(name, 0o755)  # noqa: S103  # that is the point
        yield from make_node(topology, Path(name), backend=request.param)


@pytest.fixture
def owned(served: Served) -> Owned:
    return Owned(served, install(served.node.directory / "app", PYTHON))


@pytest.fixture
def wan(owned: Owned) -> Iterator[None]:
    lab = owned.served.node.topology
    with lab.enter(lab.wan):
        server = Server()
    with server:
        yield


def namespaces(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith(("net:[", "user:["))]


LOOK = "readlink /proc/self/ns/net /proc/self/ns/user"


def test_the_command_runs_as_its_owner_with_the_pipe_and_without_a_capability(owned: Owned) -> None:
    address = owned.create("u")["address"]
    environment = {**os.environ, "STARTERS_OWN": "kept"}
    script = f"id -u; id -g; cat /proc/self/status /proc/self/cgroup; ip -o address; echo $STARTERS_OWN; {LOOK}"
    said = owned.inside("u", "sh", "-c", script, env=environment)
    lines = said.splitlines()
    assert lines[:2] == [str(NOBODY), str(NOBODY)]
    capabilities = {line.split()[0]: int(line.split()[1], 16) for line in lines if line.startswith("Cap")}
    assert capabilities == {"CapInh:": 0, "CapPrm:": 0, "CapEff:": 0, "CapBnd:": 0, "CapAmb:": 0}
    assert any(line.endswith("job_u") for line in lines)
    assert any(f" {address}/31 " in line for line in lines)
    assert "kept" in lines
    net, user = namespaces(said)
    assert user != os.readlink("/proc/self/ns/user")
    held = owned.served.node.directory / "run" / "netns" / "u"
    assert net == f"net:[{held.stat().st_ino}]"


def test_what_it_sends_is_counted_to_the_byte(owned: Owned, wan: None) -> None:
    traffic = owned.installed.add(REPO / "lab" / "traffic.py")
    owned.create("u")
    owned.inside("u", PYTHON, str(traffic), "give", WAN4, str(PORT), "50000", "--udp")
    owned.inside("u", PYTHON, str(traffic), "take", "2001:db8:2::2", str(PORT), "30000", "--udp")
    gave, took = expected_udp(50_000, 4), expected_udp(30_000, 6)
    totals = owned.served.ok("Usage", job="u")["job"]["totals"]["network"]
    assert totals["OutgoingExternal"] == gave.data_bytes + took.control_bytes
    assert totals["IncomingExternal"] == gave.control_bytes + took.data_bytes
    record = owned.served.ok("Finish", job="u", exit_code=0)["record"]
    assert record["totals"]["network"] == totals


def test_whoever_comes_later_joins_the_first_ones_namespaces(owned: Owned) -> None:
    owned.create("u")
    with owned.begin("u", "sh", "-c", f"{LOOK}; read _") as first:
        assert first.stdout is not None
        net = [first.stdout.readline().strip() for _ in range(2)]
        assert namespaces(owned.inside("u", "sh", "-c", LOOK)) == net
        # Root too, though from its own user namespace.
        hook = [str(owned.installed.hook), "--socket", str(owned.served.path)]
        roots = subprocess.run(
            [*hook, "exec", "--job", "u", "--", "sh", "-c", LOOK], stdout=subprocess.PIPE, check=True
        )
        assert roots.stdout.decode().split() == [net[0], os.readlink("/proc/self/ns/user")]
        first.communicate()
    # Nobody is in there any more; the namespaces are held for the job.
    assert namespaces(owned.inside("u", "sh", "-c", LOOK)) == net


def test_several_at_once_end_up_in_one_place(owned: Owned) -> None:
    owned.create("u")
    starts = [owned.begin("u", "sh", "-c", f"{LOOK}; read _") for _ in range(5)]
    said = [process.communicate()[0] for process in starts]
    assert [process.returncode for process in starts] == [1] * 5  # of `read` at the end of its input
    assert len(set(said)) == 1
    assert len(namespaces(said[0])) == 2


def test_a_restarted_agent_knows_where_the_pipe_is(owned: Owned) -> None:
    owned.create("u")
    with owned.begin("u", "sh", "-c", f"{LOOK}; read _") as first:
        assert first.stdout is not None
        place = [first.stdout.readline().strip() for _ in range(2)]
        owned.served.process.kill()
        owned.served.process.wait()
        owned.served.start()
        assert namespaces(owned.inside("u", "sh", "-c", LOOK)) == place
        first.communicate()


def test_the_command_can_change_nothing_about_the_pipe(owned: Owned) -> None:
    owned.create("u")
    script = "ip link set eth0 down; ip address flush dev eth0; ip link delete eth0; ip -o link show eth0"
    done = owned.run("exec", "--job", "u", "--", "sh", "-c", script)
    assert done.stderr.count("Operation not permitted") == 3
    assert "UP" in done.stdout


def test_a_network_of_no_kind(owned: Owned) -> None:
    owned.create("none", network="none")
    said = owned.inside(
        "none", "sh", "-c", f"{LOOK}; ip -o address show dev lo; ip -o link; grep Cap /proc/self/status"
    )
    assert "127.0.0.1/8" in said
    assert "eth0" not in said
    assert namespaces(said)[1] != os.readlink("/proc/self/ns/user")
    owned.create("host", network="host")
    said = owned.inside("host", "sh", "-c", f"{LOOK}; cat /proc/self/cgroup")
    assert namespaces(said) == [os.readlink("/proc/self/ns/net"), os.readlink("/proc/self/ns/user")]
    assert "job_host" in said


def test_supplementary_groups_go_on_opening_files(owned: Owned) -> None:
    owned.create("u")
    shared = owned.served.node.directory / "shared"
    shared.write_text("for the group\n")
    shared.chmod(0o640)
    os.chown(shared, 0, 4242)
    script = f"cat {shared}; id -G"
    said = owned.inside("u", "sh", "-c", script, groups="--groups=4242").splitlines()
    # Not mapped, so it has no number in there; the kernel knows it all the same.
    assert said == ["for the group", "65534"]


def test_a_host_that_lets_users_make_no_namespace(owned: Owned) -> None:
    """The limit is set in a user namespace below the host's, so that nobody else is touched."""
    owned.create("u")
    hook = owned.argv("exec", "--job", "u", "--", "echo", "ran")
    # The first shell has lost its capabilities, its uid not being mapped when it was executed; the second has them.
    limit = 'echo 0 >/proc/sys/user/max_user_namespaces && exec "$@"'
    script = f"read _; exec sh -c '{limit}' sh \"$@\""
    with subprocess.Popen(
        ["unshare", "--user", "sh", "-c", script, "sh", *hook],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        own = os.readlink("/proc/self/ns/user")
        while os.readlink(f"/proc/{process.pid}/ns/user") == own:
            assert process.poll() is None
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{process.pid}/{name}").write_text("0 0 4294967295")
        out, err = process.communicate("\n", timeout=60)
    assert (process.returncode, out) == (77, "")
    assert err.count("\n") == 1
    assert "cannot make namespaces: No space left on device; let job owners run acctd-hook by sudo" in err


def test_another_users_job_is_not_entered(owned: Owned) -> None:
    owned.create("u")
    argv = owned.argv("exec", "--job", "u", "--", "echo", "ran", uid=NOBODY - 1)
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (77, "")
    assert "is not yours" in done.stderr
    # And the job's owner still can.
    assert namespaces(owned.inside("u", "sh", "-c", LOOK))


def test_without_an_agent(owned: Owned) -> None:
    argv = owned.argv("exec", "--fail-open", "--job", "u", "--socket", "/nowhere/s", "--", "sh", "-c", LOOK)
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0
    assert done.stdout.split() == [os.readlink("/proc/self/ns/net"), os.readlink("/proc/self/ns/user")]
    assert done.stderr.count("\n") == 1
    assert "job u starts unaccounted" in done.stderr


# An owner who goes the same way as the hook, but keeps the capabilities over its own namespace. It sends a datagram by
# some trick, and then makes a connection over the pipe: once that stands, the datagram has had its chance.
_HOSTILE = r"""
import ctypes, json, os, socket, subprocess, sys
sys.path.insert(0, sys.argv[1])
path, peer, port, trick = sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]
from acctd import enter, hookcall
enter._new_namespaces(0x50000000)
hookcall.call(path, "MovePipe", job="u")
hookcall.call(path, "Attach", job="u")
libc = ctypes.CDLL(None, use_errno=True)
header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capget(header, data) == 0
data[2], data[5] = data[1], data[4]  # inheritable: as permitted, and then ambient, so that ip(8) has them too
assert libc.capset(header, data) == 0
for capability in range(int(open("/proc/sys/kernel/cap_last_cap").read()) + 1):
    assert libc.prctl(47, 2, capability, 0, 0) == 0
ip = lambda *words: subprocess.run(["ip", *words], check=True)
shown = json.loads(subprocess.run(["ip", "-j", "-4", "address", "show", "dev", "eth0"], check=True, stdout=-1).stdout)
inner = shown[0]["addr_info"][0]["local"]
outer = ".".join([*inner.split(".")[:3], str(int(inner.split(".")[3]) ^ 1)])
def send(source):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.setsockopt(socket.IPPROTO_IP, 19, 1)  # IP_TRANSPARENT
        s.bind((source, 0))
        s.sendto(b"x" * 1000, (peer, 9))
if trick == "foreign source":
    send("10.181.0.241")
elif trick == "another address":
    ip("address", "flush", "dev", "eth0")
    ip("address", "add", "198.18.0.7/31", "dev", "eth0")
    ip("route", "add", outer, "dev", "eth0"); ip("route", "add", "default", "via", outer, "dev", "eth0")
    send("198.18.0.7")
    ip("address", "add", inner + "/31", "dev", "eth0")
    ip("route", "replace", "default", "via", outer, "dev", "eth0", "src", inner)
elif trick == "another link address":
    ip("link", "set", "eth0", "down"); ip("link", "set", "eth0", "address", "02:00:00:00:00:07")
    ip("link", "set", "eth0", "up"); ip("route", "add", "default", "via", outer, "dev", "eth0")
    send(inner)
elif trick == "another namespace":
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.read(reader, 1)
        ip("link", "set", "eth0", "netns", str(os.getppid()))
        os._exit(0)
    assert libc.unshare(0x40000000) == 0
    os.write(writer, b"x")
    assert os.wait()[1] == 0
    ip("link", "set", "lo", "up"); ip("link", "set", "eth0", "up"); ip("address", "add", inner + "/31", "dev", "eth0")
    ip("route", "add", "default", "via", outer, "dev", "eth0")
    send(inner)
with socket.create_connection((peer, port), timeout=20) as s:
    s.shutdown(socket.SHUT_WR)
    s.recv(1)
"""


@pytest.mark.parametrize(
    ("trick", "passes"),
    [
        ("foreign source", False), ("another address", False), ("another link address", True),
        ("another namespace", True),
    ],
)  # fmt: skip
def test_an_owner_who_keeps_the_capabilities_sends_nothing_uncounted(
    owned: Owned, wan: None, trick: str, passes: bool
) -> None:
    owned.create("u")
    lab = owned.served.node.topology
    argv = owned.argv()[: -len(["--socket", "PATH"]) - 1]
    with WireCounter(functools.partial(lab.enter, lab.wan), lab.wan.dev) as counter:
        hostile = [
            PYTHON,
            "-c",
            _HOSTILE,
            str(owned.installed.packages),
            str(owned.served.path),
            WAN4,
            str(PORT),
            trick,
        ]
        done = subprocess.run([*argv, *hostile], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        # First, because it waits for what is still on its way.
        record = owned.served.ok("Finish", job="u", exit_code=0)["record"]
        wire = counter.stop()
    sent = record["totals"]["network"]["OutgoingExternal"]
    arrived = sum(count.bytes for count in wire.received.values())
    assert sent == arrived, wire
    assert (sent > 1000) == passes
    assert sent > 100  # the connection


# The agent's side by itself: what may be moved where, and that a move that fails leaves the pipe as it was

POOLS = Pools(IPv4Network("10.182.0.0/18"), IPv6Network("fd61:6363:7465::/112"))


@dataclass
class Laid:
    """A pipe on the node, and who wants it."""

    path: Path
    lease: Lease
    lab: Topology
    started: list[subprocess.Popen[bytes]]

    def holder(self, *namespaces: str, uid: int = NOBODY) -> int:
        """A process of that user, in new namespaces of its own; its pid."""
        person = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        argv = [*person, *(["unshare", *namespaces] if namespaces else []), "sleep", "1000"]
        process = self.lab.popen(self.lab.node, argv)
        self.started.append(process)
        deadline = time.monotonic() + 20
        while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":
            assert process.poll() is None
            assert time.monotonic() < deadline
        return process.pid

    def look(self) -> tuple[str, str, bool]:
        """Where the pipe's name leads, the addresses in there, and whether the outer end is up."""
        with self.lab.enter(self.lab.node):
            namespace = os.open(self.path, os.O_RDONLY)
            try:
                argv = ["nsenter", f"--net={self.path}", "ip", "-o", "address", "show", "dev", "eth0"]
                inside = subprocess.run(argv, capture_output=True, text=True, check=False).stdout
                outer = subprocess.run(
                    ["ip", "-o", "address", "show", "dev", self.lease.ifname, "up"], capture_output=True, text=True
                )
                words = [word for word in inside.split() if "/31" in word or "/127" in word]
                return (
                    f"net:[{os.fstat(namespace).st_ino}]",
                    " ".join(words),
                    str(self.lease.outer4) in outer.stdout,
                )
            finally:
                os.close(namespace)

    def move(self, pid: int, uid: int = NOBODY) -> str:
        """Move the pipe; the name of the namespace it is in then."""
        with self.lab.enter(self.lab.node):
            namespace = pipe.move(self.path, self.lease, pid=pid, uid=uid)
        try:
            return f"net:[{os.fstat(namespace).st_ino}]"
        finally:
            os.close(namespace)


@pytest.fixture
def laid(topology: Topology, tmp_path: Path) -> Iterator[Laid]:
    made = Laid(tmp_path / "netns" / "job", lease(POOLS, 77), topology, [])
    before = set(os.listdir("/proc/self/fd"))
    with topology.enter(topology.node):
        os.close(pipe.make(made.path, made.lease))
    try:
        yield made
    finally:
        with topology.enter(topology.node):
            pipe.remove(made.path, made.lease.ifname)
        for process in made.started:
            process.kill()
            process.wait()
    assert not made.path.exists()
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    for thread in threading.enumerate():
        if thread.name == "link removal":
            thread.join()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_pipe_is_moved_with_all_it_has(laid: Laid) -> None:
    old, addresses, up = laid.look()
    assert up
    pid = laid.holder("--user", "--net")
    there = os.readlink(f"/proc/{pid}/ns/net")
    assert laid.move(pid) == there != old
    assert laid.look() == (there, addresses, True)
    with pytest.raises(InUseError, match="has been moved"):
        laid.move(laid.holder("--user", "--net"))
    assert laid.look() == (there, addresses, True)


@pytest.mark.parametrize(
    ("namespaces", "owner", "said"),
    [
        ((), NOBODY, "must be a new one"),  # where the node itself is
        (("--user",), NOBODY, "must be a new one"),
        (("--net",), 0, "belongs to uid 0, not to 65534"),
        (("--user", "--net"), 0, "belongs to uid 0, not to 65534"),
        (("--user", "--net"), NOBODY - 1, "belongs to uid 65533, not to 65534"),
    ],
)
def test_a_namespace_that_is_not_the_callers_own_is_refused(
    laid: Laid, namespaces: tuple[str, ...], owner: int, said: str
) -> None:
    before = laid.look()
    with pytest.raises(NotPermittedError, match=said):
        laid.move(laid.holder(*namespaces, uid=owner))
    assert laid.look() == before


def test_a_process_of_the_callers_in_a_namespace_of_roots_is_refused(laid: Laid) -> None:
    """As a job of the same user that root has entered: the process is the caller's, its namespace is not."""
    before = laid.look()
    other = laid.path.with_name("other")
    with laid.lab.enter(laid.lab.node):
        os.close(pipe.make_empty(other))
    try:
        argv = ["nsenter", f"--net={other}", "setpriv", "--reuid=65534", "--clear-groups", "sleep", "1000"]
        process = laid.lab.popen(laid.lab.node, argv)
        laid.started.append(process)
        deadline = time.monotonic() + 20
        while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":
            assert time.monotonic() < deadline
        with pytest.raises(NotPermittedError, match="must be a new one"):
            laid.move(process.pid)
    finally:
        netns.remove(other)
    assert laid.look() == before


def test_the_namespace_of_another_job_of_the_same_user_is_refused(laid: Laid) -> None:
    pid = laid.holder("--user", "--net")
    laid.move(pid)
    second = Laid(laid.path.with_name("second"), lease(POOLS, 78), laid.lab, laid.started)
    with laid.lab.enter(laid.lab.node):
        os.close(pipe.make(second.path, second.lease))
    try:
        before = second.look()
        with pytest.raises(NotPermittedError, match="is that of job job"):
            second.move(pid)
        assert second.look() == before
    finally:
        with laid.lab.enter(laid.lab.node):
            pipe.remove(second.path, second.lease.ifname)


def test_a_process_that_is_gone(laid: Laid) -> None:
    before = laid.look()
    pid = laid.holder("--user", "--net")
    laid.started[-1].kill()
    laid.started[-1].wait()
    with pytest.raises(NotFoundError, match=f"process {pid} is gone"):
        laid.move(pid)
    assert laid.look() == before


@pytest.mark.parametrize(
    "obstacle", ["ip link add eth0 type veth peer name other", "echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6"]
)
def test_a_move_that_fails_half_way_puts_the_pipe_back(laid: Laid, obstacle: str) -> None:
    before = laid.look()
    pid = laid.holder("--user", "--net")
    # By the way of root, who may do in there all that the namespace's owner may.
    subprocess.run(["nsenter", f"--net=/proc/{pid}/ns/net", "sh", "-c", obstacle], check=True)
    with pytest.raises((KernelRefusedError, NotPermittedError)):
        laid.move(pid)
    assert laid.look() == before


def test_an_empty_namespace_is_moved_too(topology: Topology, tmp_path: Path) -> None:
    path = tmp_path / "netns" / "job"
    with topology.enter(topology.node):
        os.close(pipe.make_empty(path))
    person = ["setpriv", "--reuid=65534", "--clear-groups", "unshare", "--user", "--net", "sleep", "1000"]
    process = topology.popen(topology.node, person)
    try:
        deadline = time.monotonic() + 20
        while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\n":
            assert time.monotonic() < deadline
        with topology.enter(topology.node):
            namespace = pipe.move(path, None, pid=process.pid, uid=NOBODY)
        assert f"net:[{os.fstat(namespace).st_ino}]" == os.readlink(f"/proc/{process.pid}/ns/net")
        os.close(namespace)
        argv = ["nsenter", f"--net={path}", "ip", "-o", "address"]
        said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        assert "127.0.0.1/8" in said
    finally:
        netns.remove(path)
        process.kill()
        process.wait()
