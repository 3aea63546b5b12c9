"""Who may: what an ordinary user is refused over the socket and by acctd-hook, in what words; and what is left undone.

The users are real processes of other uids, and of jobs; a refusal is one sentence, and changes nothing.
"""

import hashlib
import itertools
import json
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from acctd.model import chain_name
from tests.kernel.conftest import Node
from tests.kernel.served import Served
from tests.unit.test_hook import Installed, install

NOBODY = 65534
STRANGER = 65533  # without an account
PYTHON = "/usr/bin/python3"  # one that any user may run

# Calls the agent as it is told, a line each: [method, parameters], and prints the reply. "sleep": makes a child.
PERSON = """
import json, os, socket, sys
print("[]", flush=True)
for line in sys.stdin:
    said = json.loads(line)
    if said == "sleep":
        child = os.fork()
        if child == 0:
            os.close(1)
            os.execvp("sleep", ["sleep", "1000"])
        print(json.dumps(child), flush=True)
        continue
    data = b""
    with socket.socket(socket.AF_UNIX) as agent:
        agent.settimeout(60)
        agent.connect(sys.argv[1])
        agent.sendall(json.dumps({"method": "org.acctd.Node." + said[0], "parameters": said[1]}).encode() + b"\\0")
        while not data.endswith(b"\\0"):
            data += agent.recv(65536) or b"\\0"
    print(data[:-1].decode(), flush=True)
"""


class Person:
    """A process of some user's that calls the agent."""

    def __init__(self, served: Served, uid: int) -> None:
        argv = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid else []
        self._process = subprocess.Popen(
            [*argv, PYTHON, "-S", "-c", PERSON, str(served.path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/",
        )  # fmt: skip
        self._children: list[int] = []
        self._heard()  # it is who it is to be

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        reply = self._say([method, parameters])
        assert isinstance(reply, dict)
        return reply

    def ok(self, method: str, **parameters: Any) -> dict[str, Any]:
        reply = self.call(method, **parameters)
        assert "error" not in reply, reply
        found: dict[str, Any] = reply["parameters"]
        return found

    def refused(self, error: str, method: str, **parameters: Any) -> str:
        """A call that must be refused so; the one sentence that was given."""
        reply = self.call(method, **parameters)
        assert reply.get("error", "").endswith(f".{error}"), (method, parameters, reply)
        said = str(reply["parameters"]["message"])
        assert "\n" not in said
        assert len(said) > 20
        return said

    def child(self) -> int:
        """A sleeping child; gone with this one."""
        self._children.append(int(str(self._say("sleep"))))
        return self._children[-1]

    def end(self) -> None:
        for pid in self._children:
            subprocess.run(["kill", "-9", str(pid)], check=False, capture_output=True)
        self._process.kill()
        self._process.communicate()

    def begin(self, method: str, **parameters: Any) -> None:
        """A call whose answer is waited for by answer()."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([method, parameters]) + "\n")
        self._process.stdin.flush()

    def has_answered(self) -> bool:
        assert self._process.stdout is not None
        return bool(select.select([self._process.stdout], [], [], 0)[0])

    def answer(self) -> dict[str, Any]:
        found = self._heard()
        assert isinstance(found, dict)
        return found

    def _say(self, what: object) -> object:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._heard()

    def _heard(self) -> object:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@dataclass
class House:
    """A living agent, and people who want something of it."""

    served: Served
    installed: Installed
    stack: ExitStack

    def person(self, uid: int, inside: str | None = None) -> Person:
        made = Person(self.served, uid)
        self.stack.callback(made.end)
        if inside is not None:
            self.served.ok("Attach", job=inside, pid=made.pid)
        return made

    def configure(self, access: str) -> None:
        """Other rules about access, from now on."""
        path = self.served.node.config
        path.write_text(path.read_text().partition("[access]")[0] + f"[access]\n{access}\n")
        self.served.ok("Reload")

    def hook(self, uid: int, *arguments: str) -> subprocess.CompletedProcess[str]:
        person = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        argv = [*person, str(self.installed.hook), "--socket", str(self.served.path), *arguments]
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, cwd="/")


@pytest.fixture
def house(node: Node, tmp_path: Path) -> Iterator[House]:
    """Everything on the way to the socket and to the hook can be passed by anyone."""
    installed = install(tmp_path / "app", PYTHON)
    for directory in (tmp_path, *tmp_path.parents):
        if directory != Path("/tmp") and directory.is_relative_to("/tmp"):
            directory.chmod(0o755)
    served = Served(node, None)  # type: ignore[arg-type]  # start() sets it
    served.start()
    with ExitStack() as stack:
        yield House(served, installed, stack)
        for job in served.ok("List")["jobs"]:
            served.call("Finish", job=job["id"])
    assert served.stop() == 0


def state(served: Served) -> tuple[object, ...]:
    """All that a call could have changed of the jobs there are."""
    shown = [
        (job["id"], job["parent"], job["phase"], job["pids"], job["notes"]) for job in served.ok("List")["jobs"]
    ]  # fmt: skip
    return shown, [event["number"] for event in served.ok("Events")["events"]]


# Another's job


OF_JOB: list[tuple[str, dict[str, Any]]] = [
    ("Usage", {}), ("Entry", {}), ("MovePipe", {}), ("Attach", {}), ("Signal", {"signal": 9}), ("Suspend", {}),
    ("Continue", {}), ("Kill", {}), ("Finish", {}), ("Finish", {"exit_code": 0}), ("Unregister", {}),
    ("Track", {"environment": "A=B"}), ("Track", {"login": "nobody"}), ("Track", {"group": 65534}),
]  # fmt: skip


@pytest.mark.parametrize("owner", ["root", "games"])
def test_no_call_reaches_into_anothers_job(house: House, owner: str) -> None:
    served, person = house.served, house.person(NOBODY)
    house.configure('create = ["nobody"]')
    worker = house.person(0)
    served.ok("Create", job="theirs", user=owner)
    served.ok("Attach", job="theirs", pid=worker.pid)
    served.ok("Create", job="waiting", user=owner)
    before = state(served)
    for name in ("theirs", "waiting"):
        for method, parameters in OF_JOB:
            said = person.refused("NotPermitted", method, job=name, **parameters)
            assert repr(name) in said
            assert str(NOBODY) in said
        for method in ("Create", "Register"):
            assert repr(name) in person.refused("NotPermitted", method, job="mine", parent=name)
    for method in ("Snapshot", "Reload", "Quit"):
        assert "only root" in person.refused("NotPermitted", method)
    assert state(served) == before
    # Nor once it has ended.
    worker.end()
    served.ok("Finish", job="theirs", exit_code=0)
    assert "'theirs'" in person.refused("NotPermitted", "Finish", job="theirs")
    assert "'theirs'" in person.refused("NotPermitted", "Unregister", job="theirs")
    for method, parameters in OF_JOB:
        if method not in ("Finish", "Unregister"):
            person.refused("NotFound", method, job="theirs", **parameters)


VERBS = [
    "create --job mine --parent theirs", "register --job mine --parent theirs --pid {own}", "exec --job theirs -- true",
    "attach --job theirs {own}", "track --job theirs --pid {own}", "track --job theirs --environment A=B",
    "track --job theirs --login nobody", "track --job theirs --group 65534", "usage --job theirs",
    "usage --job theirs --json", "usage --job theirs --classad", "signal --job theirs 15", "suspend --job theirs",
    "continue --job theirs", "kill --job theirs", "finish --job theirs", "finish --job theirs --exit-code 0",
    "unregister --job theirs", "snapshot", "quit", "create --job mine --user root", "create --job mine --user games",
]  # fmt: skip


def test_no_verb_of_the_hook_reaches_into_anothers_job(house: House) -> None:
    served, person = house.served, house.person(NOBODY)
    house.configure('create = ["nobody"]')
    served.ok("Create", job="theirs")
    served.ok("Attach", job="theirs", pid=house.person(0).pid)
    before = state(served)
    for verb in VERBS:
        done = house.hook(NOBODY, *verb.format(own=person.pid).split())
        assert (done.returncode, done.stdout) == (77, ""), (verb, done)
        assert done.stderr.startswith("acctd-hook: ")
        assert done.stderr.count("\n") == 1
        assert str(NOBODY) in done.stderr
    assert state(served) == before
    assert house.hook(NOBODY, "list").stdout == "theirs root running 1 -\n"
    (shown,) = json.loads(house.hook(NOBODY, "dump").stdout)
    assert (shown["totals"], shown["tags"], shown["notes"]) == ({}, {}, [])


# Processes


def test_processes_that_are_not_the_callers(house: House) -> None:
    served, person = house.served, house.person(NOBODY)
    house.configure('create = ["nobody"]')
    agent, roots, others = served.process.pid, house.person(0), house.person(STRANGER)
    served.ok("Create", job="roots")
    served.ok("Create", job="lent", user="nobody")
    person.ok("Create", job="mine")
    person.ok("Create", job="second")
    inside = house.person(NOBODY, "second")
    # Its owner's, but where root has put it.
    captive = house.person(NOBODY, "roots")
    gone = subprocess.Popen(["true"])
    gone.wait()
    before = state(served)
    ways: list[tuple[str, dict[str, Any]]] = [
        ("Attach", {"job": "mine"}), ("Register", {"job": "new"}), ("Register", {"job": "new", "parent": "mine"}),
    ]  # fmt: skip
    for method, parameters in ways:
        for pid in (roots.pid, others.pid):
            assert f"pid {pid} is not yours" in person.refused("NotPermitted", method, pid=pid, **parameters)
        for pid in (inside.pid, captive.pid):
            assert "already" in person.refused("NotPermitted", method, pid=pid, **parameters)
        for pid in (0, 1, -1, -person.pid, agent):
            assert f"pid {pid} " in person.refused("UsageError", method, pid=pid, **parameters)
        for pid in (gone.pid, 2**31 - 1, 2**63 - 1):
            assert f"pid {pid} " in person.refused("NotFound", method, pid=pid, **parameters)
    assert state(served) == before
    # Root is kept from these, too.
    for method, parameters in (*ways, ("Attach", {"job": "roots"})):
        for pid in (0, 1, -1, agent):
            reply = served.call(method, pid=pid, **parameters)
            assert reply.get("error", "").endswith(".UsageError"), (method, pid, reply)
    # Nobody is harmed by being watched.
    person.ok("Register", job="watching", pid=person.child(), watcher=roots.pid)
    for watcher in (0, -1, gone.pid, 2**31 - 1):
        person.refused("NotFound", "Create", job="new", watcher=watcher)
        person.refused("NotFound", "Register", job="new", pid=person.child(), watcher=watcher)
    assert {job["id"] for job in served.ok("List")["jobs"]} == {"roots", "lent", "mine", "second", "watching"}


def test_processes_that_are_not_the_callers_by_the_hook(house: House) -> None:
    house.configure('create = ["nobody"]')
    agent, roots = house.served.process.pid, house.person(0)
    house.person(NOBODY).ok("Create", job="mine")
    before = state(house.served)
    for verb in ("attach --job mine {}", "track --job mine --pid {}", "register --job new --pid {}"):
        for pid, code in ((roots.pid, 77), (1, 64), (0, 64), (-1, 64), (agent, 64), (2**31 - 1, 66), ("self", 64)):
            done = house.hook(NOBODY, *verb.format(pid).split())
            assert (done.returncode, done.stdout) == (code, ""), (verb, pid, done)
            assert done.stderr.count("\n") == 1
    assert state(house.served) == before


def test_a_registration_takes_no_descendant_out_of_a_job(house: House) -> None:
    """A shell outside any job, with a child in one that has limits: where root may take it from, its owner may not."""
    served, shell = house.served, house.person(NOBODY)
    house.configure('create = ["nobody"]')
    served.ok("Create", job="limited", user="nobody", limits={"pids": 5})
    captive, free = shell.child(), shell.child()
    served.ok("Attach", job="limited", pid=captive)
    shell.ok("Register", job="new", pid=shell.pid)
    assert served.ok("Usage", job="limited")["job"]["pids"] == [captive]
    assert served.ok("Usage", job="new")["job"]["pids"] == sorted([shell.pid, free])


def test_a_registration_takes_no_descendant_of_another_user(house: House) -> None:
    """What runs as root below a user's shell, by sudo for one, is not the user's to stop."""
    served = house.served
    house.configure('create = ["nobody"]')
    # The child stays root, and the shell becomes an ordinary user.
    users = subprocess.Popen(
        ["sh", "-c", "sleep 1000 & exec setpriv --reuid=65534 --regid=65534 --clear-groups sleep 1000"],
    )
    house.stack.callback(users.wait)
    house.stack.callback(users.kill)
    deadline = time.monotonic() + 20
    while not (below := children(users.pid)) or comm(users.pid) != "sleep" or comm(below[0]) != "sleep":
        assert time.monotonic() < deadline
    house.stack.callback(subprocess.run, ["kill", "-9", str(below[0])], check=False, capture_output=True)
    house.person(NOBODY).ok("Register", job="mine", pid=users.pid)
    assert served.ok("Usage", job="mine")["job"]["pids"] == [users.pid]


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_tracking_never_takes_the_agent(house: House) -> None:
    """It carries a mark in its environment that only it and what a test starts beside it have."""
    served = house.served
    served.ok("Register", job="wide", pid=house.person(0).child())
    mark = f"ACCTD_CONFIG={served.node.config}"
    assert served.process.pid not in served.ok("Track", job="wide", environment=mark)["pids"]
    served.ok("Snapshot")
    assert "job_wide" not in Path(f"/proc/{served.process.pid}/cgroup").read_text()


# Names


NO_IDS = [
    "", ".", "..", "../x", "a/b", "/x", "x/", "x" * 129, "x" * 300, "a\0b", "a\nb", "a\rb", "a\tb", "a b", "é", "ж",
    "٣", "‮x", "x..", ".x", "-x", "_x", "$(x)", "`x`", "x;y", "x|y", "x*", "x\\y", "x'y", 'x"y', "x%s", "{x}",
]  # fmt: skip
ODD_IDS = ["job_x", "own", "sentinel-1", "cgroup.procs", "tasks", "x.", "a@b", "a_b", "A.1[2]", "0", "x" * 128]


def test_names_that_are_built_to_escape(house: House) -> None:
    served, person = house.served, house.person(NOBODY)
    house.configure('create = ["nobody"]')
    person.ok("Create", job="mine")
    before = served.node.left(), state(served)
    for name in NO_IDS:
        for method in ("Create", "Register"):
            for more in ({}, {"parent": "mine"}):
                said = person.refused("UsageError", method, job=name, **more)
                assert repr(name) in said or len(name) > 128
            person.refused("NotFound", method, job="new", parent=name)
        for method, parameters in OF_JOB:
            assert len(person.refused("NotFound", method, job=name, **parameters)) < 600
    assert (served.node.left(), state(served)) == before


def test_odd_names_stay_in_their_place(house: House) -> None:
    """They are ids like others: below the base, under a name of acctd's own, and gone again without a trace."""
    served, person = house.served, house.person(NOBODY)
    house.configure('create = ["nobody"]')
    for name in ODD_IDS:
        made = person.ok("Create", job=name)
        assert {Path(path).parts[-2:] for path in made["cgroups"]} == {(served.node.base, f"job_{name}")}
        assert Path(made["netns"]).parent == served.node.directory / "run" / "netns"
        inner = person.ok("Create", job="inner", parent=name)
        assert {Path(path).parts[-3:-1] for path in inner["cgroups"]} == {(served.node.base, f"job_{name}")}
        assert person.ok("Finish", job=name, exit_code=0)["record"]["id"] == name
        # Taken as it runs, in the host's network.
        child, grandchild = person.child(), person.child()
        person.ok("Register", job=name, pid=child)
        person.ok("Attach", job=name, pid=grandchild)
        person.ok("Register", job="inner", parent=name, pid=grandchild)
        assert person.ok("Usage", job=name)["job"]["pids"] == sorted([child, grandchild])
        assert person.ok("Usage", job="inner")["job"]["pids"] == [grandchild]
        assert person.ok("Kill", job=name) == {"survivors": []}
        assert person.ok("Finish", job=name, exit_code=0)["record"]["id"] == name


def test_ids_that_come_to_one_chain_name(house: House) -> None:
    """The second is refused before anything of the first is touched."""
    served, person = house.served, house.person(NOBODY)
    house.configure('create = ["nobody"]')
    first, second = twins()
    assert chain_name(first) == chain_name(second)
    person.ok("Create", job=first)
    before = state(served)
    assert repr(second) in person.refused("InUse", "Create", job=second)
    assert state(served) == before
    person.ok("Finish", job=first)
    person.ok("Create", job=second)


def twins() -> tuple[str, str]:
    """Two ids with equal beginnings and, 32 bits being few, equal hashes."""
    seen: dict[str, str] = {}
    for number in range(1_000_000):
        name = f"longenoughtobecut-{number}"
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        if digest in seen:
            return seen[digest], name
        seen[digest] = name
    raise AssertionError("no twins among a million")


ODD_TEXTS = ["a\0b", "a\nb", "../../etc/passwd", "x" * 100_000, "‮é", "-1", "٣", str(2**70)]


@pytest.mark.parametrize("value", ODD_TEXTS)
def test_odd_text_elsewhere(house: House, value: str) -> None:
    """No text makes the agent stumble: what is refused is refused by name."""
    served = house.served
    served.ok("Create", job="mine")
    calls: list[tuple[str, dict[str, Any]]] = [
        ("Create", {"job": "x", "user": value}), ("Create", {"job": "x", "network": value}),
        ("Create", {"job": "x", "tags": {value: "v"}}), ("Create", {"job": "x", "limits": {"cpuset": value}}),
        ("Create", {"job": "x", "limits": {value: 1}}), ("Create", {"job": "x", "classes": {value: ["10.0.0.0/8"]}}),
        ("Create", {"job": "x", "classes": {"Site": [value]}}), ("Track", {"job": "mine", "login": value}),
        ("Track", {"job": "mine", "environment": value}), ("Create", {"job": value, "parent": value}),
    ]  # fmt: skip
    for method, parameters in calls:
        said = served.call(method, **parameters)
        # The kernel is asked about a CPU list alone.
        known = ("UsageError", "NotFound", *(["KernelRefused"] if "cpuset" in str(parameters) else []))
        assert said.get("error", "").rpartition(".")[2] in known, (method, parameters, said)
    assert served.ok("Events", job=value) == {"events": []}
    assert [job["id"] for job in served.ok("List")["jobs"]] == ["mine"]
    assert served.ok("Cost")["cost"]["errors"] == 0


@pytest.mark.parametrize("value", [2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**70), 10**400])
def test_numbers_of_any_size(house: House, value: int) -> None:
    served = house.served
    served.ok("Create", job="mine")
    calls: list[tuple[str, dict[str, Any]]] = [
        ("Attach", {"job": "mine", "pid": value}), ("Register", {"job": "x", "pid": value}),
        ("Signal", {"job": "mine", "signal": value}), ("Finish", {"job": "mine", "exit_code": value}),
        ("Finish", {"job": "mine", "exit_signal": value}), ("Events", {"limit": value}),
        ("Create", {"job": "x", "watcher": value}), ("Create", {"job": "x", "interval": value}),
        ("Create", {"job": "x", "limits": {"pids": value}}), ("Create", {"job": "x", "limits": {"cpus": value}}),
        ("Create", {"job": "x", "limits": {"cpu_shares": value}}),
    ]  # fmt: skip
    for method, parameters in calls:
        said = served.call(method, **parameters)
        known = ("UsageError", "NotFound", "InvalidParameter")
        assert said.get("error", "").rpartition(".")[2] in known, (method, parameters, said)
    for method, parameters in (("Track", {"job": "mine", "group": value}), ("Events", {"since": value})):
        said = served.call(method, **parameters)
        assert not said.get("error", "").endswith(".Failed"), (method, said)
    assert [job["id"] for job in served.ok("List")["jobs"]] == ["mine"]
    assert served.ok("Cost")["cost"]["errors"] == 0


# From inside a job


@pytest.mark.parametrize("uid", [NOBODY, 0])
def test_who_is_inside_a_job_stays_inside(house: House, uid: int) -> None:
    """Also root, and also where job and target are the same user's."""
    served = house.served
    house.configure('create = ["nobody"]')
    for name in ("pilot", "beside"):
        served.ok("Create", job=name, user=str(uid), network="host")
    served.ok("Create", job="payload", user=str(uid), parent="pilot")
    other, free = house.person(uid, "beside"), house.person(uid)
    below = house.person(uid, "payload")
    person = house.person(uid, "pilot")
    before = state(served)
    for who, outside, inner in ((person, ["beside"], "pilot"), (below, ["beside", "pilot"], "payload")):
        for name in outside:
            for method, parameters in OF_JOB:
                if method != "Usage":  # to look is no act
                    assert repr(inner) in who.refused("NotPermitted", method, job=name, **parameters)
            for method in ("Create", "Register"):
                assert repr(inner) in who.refused("NotPermitted", method, job="new", parent=name)
        for method in ("Create", "Register"):
            assert repr(inner) in who.refused("NotPermitted", method, job="new")
        # Nor does it bring anybody in from outside.
        for pid in (other.pid, free.pid):
            who.refused("NotPermitted", "Attach", job=inner, pid=pid)
            who.refused("NotPermitted", "Register", job="new", parent=inner, pid=pid)
    assert state(served) == before
    # Inside, it may.
    child = person.child()
    person.ok("Create", job="own", parent="pilot")
    person.ok("Attach", job="own", pid=child)
    person.ok("Register", job="deep", parent="own", pid=child)
    assert served.ok("Usage", job="deep")["job"]["pids"] == [child]
    assert person.ok("Kill", job="own") == {"survivors": []}
    assert person.ok("Finish", job="own", exit_code=0)["record"]["parent"] == "pilot"
    assert {job["id"] for job in served.ok("List")["jobs"]} == {"pilot", "beside", "payload"}


def test_tracking_from_inside_takes_nobody_from_outside(house: House) -> None:
    served = house.served
    served.ok("Create", job="pilot", user="nobody")
    person, free = house.person(NOBODY, "pilot"), house.person(NOBODY)
    person.call("Track", job="pilot", login="nobody")
    served.ok("Snapshot")
    assert free.pid not in served.ok("Usage", job="pilot")["job"]["pids"]


# What the configuration says


def test_who_may_create(house: House) -> None:
    person, hook = house.person(NOBODY), house.hook
    house.configure("create = []")
    said = person.refused("NotPermitted", "Create", job="x")
    assert "access.create" in said
    assert "access.create" in person.refused("NotPermitted", "Register", job="x", pid=person.child())
    assert hook(NOBODY, "create", "--job", "x").returncode == 77
    # Inside a job of its own it may all the same.
    house.served.ok("Create", job="given", user="nobody")
    person.ok("Create", job="inner", parent="given")
    person.ok("Finish", job="inner")
    for line in ('create = ["games", "@games"]', 'create = ["@nobody"]', 'create = ["NOBODY"]'):
        house.configure(line)
        person.refused("NotPermitted", "Create", job="x")
    for line in ('create = ["nobody"]', 'create = ["@nogroup"]'):
        house.configure(line)
        person.ok("Create", job="x")
        # For itself alone.
        for user in ("root", "0", "games"):
            assert "only root" in person.refused("NotPermitted", "Create", job="y", user=user)
        person.ok("Create", job="y", user="nobody")
        assert {person.ok("Finish", job=name)["record"]["owner"] for name in "xy"} == {"nobody"}
    stranger = house.person(STRANGER)
    stranger.refused("NotPermitted", "Create", job="z")
    house.configure(f'create = ["{STRANGER}"]')
    stranger.ok("Create", job="z")
    assert stranger.ok("Finish", job="z")["record"]["uid"] == STRANGER


def test_how_many_jobs_a_user_may_have(house: House) -> None:
    """Families count, too; another's and root's do not."""
    person, stranger = house.person(NOBODY), house.person(STRANGER)
    house.configure(f'create = ["nobody", "{STRANGER}"]\njobs_per_user = 2')
    house.served.ok("Create", job="roots")
    stranger.ok("Create", job="strangers")
    person.ok("Create", job="a")
    person.ok("Create", job="b", parent="a")
    for parent in (None, "a"):
        assert "jobs_per_user is 2" in person.refused("NotPermitted", "Create", job="c", parent=parent)
        child = person.child()
        assert "jobs_per_user is 2" in person.refused("NotPermitted", "Register", job="c", parent=parent, pid=child)
    house.served.ok("Create", job="d", user="nobody")  # root may
    for name in ("b", "d"):
        person.ok("Finish", job=name)
    person.ok("Create", job="c")


@pytest.mark.parametrize("others", ["ps", "nothing"])
def test_what_is_shown_of_others(house: House, others: str) -> None:
    served, person = house.served, house.person(NOBODY)
    house.configure(f'create = ["nobody"]\nothers = "{others}"')
    served.ok("Create", job="theirs", tags={"Secret": "1"}, limits={"pids": 77})
    worker = house.person(0, "theirs")
    person.ok("Create", job="mine", tags={"Own": "1"}, limits={"pids": 7})
    served.ok("Snapshot")
    shown = {job["id"]: job for job in person.ok("List")["jobs"]}
    assert set(shown) == ({"mine", "theirs"} if others == "ps" else {"mine"})
    assert (shown["mine"]["tags"], shown["mine"]["limits"]["pids"]) == ({"Own": "1"}, 7)
    assert shown["mine"]["totals"] != {}
    if others == "ps":
        found = shown["theirs"]
        assert (found["totals"], found["tags"], found["notes"]) == ({}, {}, [])
        assert found["limits"].get("pids") is None
        assert (found["owner"], found["pids"]) == ("root", [worker.pid])
    person.refused("NotPermitted", "Usage", job="theirs")
    assert {event["job"] for event in person.ok("Events")["events"]} == {"mine"}
    assert person.ok("Events", job="theirs") == {"events": []}
    assert {event["job"] for event in served.ok("Events")["events"]} >= {"mine", "theirs"}
    assert person.ok("Cost")["cost"]["jobs"] == 2


def test_who_takes_an_id_after_another_does_not_see_what_that_one_did(house: House) -> None:
    served, person = house.served, house.person(NOBODY)
    house.configure('create = ["nobody"]')
    served.ok("Create", job="again")
    served.ok("Attach", job="again", pid=house.person(0).pid)
    served.ok("Finish", job="again", exit_code=0)
    assert person.ok("Events", job="again") == {"events": []}
    person.ok("Create", job="again")
    assert [event["event"] for event in person.ok("Events", job="again")["events"]] == ["created"]
    person.ok("Finish", job="again")
    assert [event["event"] for event in person.ok("Events", job="again")["events"]] == ["created", "finished"]


def test_watching_shows_ones_own_alone(house: House) -> None:
    served, person = house.served, house.person(NOBODY)
    house.configure('create = ["nobody"]')
    watcher = house.person(NOBODY)
    watcher.begin("Watch")
    deadline = time.monotonic() + 20
    for number in itertools.count():
        served.ok("Create", job=f"theirs-{number}")
        served.ok("Finish", job=f"theirs-{number}")
        person.ok("Create", job=f"mine-{number}")
        if watcher.has_answered():
            break
        assert time.monotonic() < deadline
        person.ok("Finish", job=f"mine-{number}")
    event = watcher.answer()["parameters"]["event"]
    assert event["job"].startswith("mine-")
    assert event["event"] in ("created", "finished")


def test_a_familys_network_is_not_the_hosts(house: House) -> None:
    """Nobody, root included, gets out of the parent's counting by it."""
    served, person = house.served, house.person(NOBODY)
    served.ok("Create", job="mine", user="nobody")
    for said in (
        person.refused("UsageError", "Create", job="x", parent="mine", network="host"),
        str(served.call("Create", job="x", parent="mine", network="host")["parameters"]["message"]),
    ):
        assert '"host"' in said
    done = house.hook(NOBODY, "create", "--job", "x", "--parent", "mine", "--network", "host")
    assert (done.returncode, done.stdout) == (64, "")
    # Without a parent there is none to share.
    assert served.call("Create", job="x", network="parent")["error"].endswith(".UsageError")
    assert [job["id"] for job in served.ok("List")["jobs"]] == ["mine"]


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("Attach", {"pid": 1}),
        ("Register", {"pid": 1}),
        ("Create", {"watcher": 1, "network": "host"}),
    ],
)
def test_a_pid_of_another_namespace(served: Served, method: str, parameters: dict[str, Any]) -> None:
    """In there 1 is the caller's own; out here it is the host's first process, which root could attach."""
    served.ok("Create", job="there", network="host")
    job = "there" if method == "Attach" else "new"
    inside = subprocess.run(
        ["unshare", "--pid", "--fork", PYTHON, "-S", "-c", PERSON, str(served.path)],
        input=json.dumps([method, {"job": job, **parameters}]) + "\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    reply = json.loads(inside.stdout.splitlines()[-1])
    assert reply["error"] == "org.acctd.Node.UsageError"
    assert "pid 1: you are in a PID namespace of your own" in reply["parameters"]["message"]
    assert [each["id"] for each in served.ok("List")["jobs"]] == ["there"]
    assert served.ok("Usage", job="there")["job"]["pids"] == []
