"""A node of its own for every test: namespaces, state directory, cgroup base; and what must be gone afterwards."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from acctd.cgroup.driver import JobCgroups
from acctd.cgroup.layout import discover
from acctd.kernel import netns
from acctd.kernel.cgroupfs import CgroupDir
from acctd.ledger import FILE, Ledger
from lab.topology import Topology

if TYPE_CHECKING:
    from tests.kernel.served import Served

REPO = Path(__file__).parents[2]
_serial = itertools.count()


BASE = "acctdtest-"


@pytest.fixture(scope="session")
def topology() -> Iterator[Topology]:
    for hierarchy in discover().hierarchies:
        for cgroup in hierarchy.top.children():
            owner = cgroup.path.name.removeprefix(BASE).partition("-")[0]
            if cgroup.path.name.startswith(BASE) and not Path("/proc", owner).exists():
                scrub(cgroup.path.name)  # of a test run that was killed
    with Topology() as made:
        yield made


def scrub(base: str) -> None:
    """End and remove whatever is left below a base of ours: after a failed test, the next one starts clean."""
    for hierarchy in discover().hierarchies:
        top = CgroupDir(hierarchy.top.mount, (base,))
        for name in {cgroup.path.name for cgroup in top.children()}:
            job = JobCgroups(discover(), base, name)
            job.kill()
            job.remove()
        top.remove()


@dataclass
class Node:
    """acctd as an admin has it: a configuration file and a command, inside the lab's node namespace."""

    topology: Topology
    directory: Path
    base: str
    config: Path

    def argv(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "acctd", *arguments]

    @property
    def environ(self) -> dict[str, str]:
        return {**os.environ, "ACCTD_CONFIG": str(self.config), "PYTHONPATH": str(REPO)}

    def acctd(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run acctd on the node; its exit status is the test's to judge."""
        options.setdefault("capture_output", True)
        options.setdefault("timeout", 120)
        options.setdefault("env", self.environ)
        return self.topology.run(self.topology.node, self.argv(*arguments), check=False, text=True, **options)

    def job(self, *arguments: str, **options: Any) -> dict[str, Any]:
        """Run a job that must succeed; gives its record."""
        path = self.directory / f"record-{next(_serial)}.json"
        done = self.acctd("run", "-q", "--json", str(path), *arguments, **options)
        assert done.returncode == 0, done.stderr
        record: dict[str, Any] = json.loads(path.read_text())
        return record

    def python(self, code: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run Python with acctd importable, on the node."""
        argv = [sys.executable, "-c", code, *arguments]
        options.setdefault("timeout", 300)
        return self.topology.run(
            self.topology.node, argv, check=False, text=True, capture_output=True, env=self.environ, **options
        )

    def left(self) -> dict[str, Any]:
        """All that a job could leave behind, in a form that can be compared."""
        cgroups = [str(p) for h in discover().hierarchies if (p := h.top.path / self.base).exists()]
        links = self.topology.run(self.topology.node, ["ip", "-o", "link"], text=True, capture_output=True).stdout
        runtime = self.directory / "run" / "netns"
        with Ledger(self.directory / "state" / FILE) as ledger:
            leases = [job.slot for job in ledger.open_jobs()]
        return {
            "cgroups": cgroups,
            "links": sorted(line.split(":")[1].split("@")[0].strip() for line in links.splitlines()),
            "namespaces": sorted(os.listdir(runtime)) if runtime.exists() else [],
            "rules": self._rules(),
            "leases": leases,
            "connections": self._connections(),
            "routes": self._routes(),
            # But for what a thread is about to remove.
            "scratch": sorted(path.name for path in (self.directory / "scratch").glob("[!.]*")),
        }

    def _rules(self) -> list[str]:
        text = ""
        for save in (["nft", "list", "ruleset"], ["iptables-legacy-save"], ["ip6tables-legacy-save"]):
            text += self.topology.run(self.topology.node, save, text=True, capture_output=True).stdout
        return [line for line in text.splitlines() if "acctd" in line.lower() or "JOB_" in line or "10.181" in line]

    def _routes(self) -> list[str]:
        shown = []
        for family in ("-4", "-6"):
            argv = ["ip", family, "route", "show", "type", "blackhole"]
            shown += self.topology.run(self.topology.node, argv, text=True, capture_output=True).stdout.splitlines()
        return shown

    def _connections(self) -> list[str]:
        with self.topology.enter(self.topology.node):
            path = Path("/proc/thread-self/net/nf_conntrack")
            return [line for line in path.read_text().splitlines() if "10.181." in line] if path.exists() else []


NOTHING = {"cgroups": [], "namespaces": [], "rules": [], "leases": [], "connections": [], "routes": [], "scratch": []}


@pytest.fixture
def node(topology: Topology, tmp_path: Path) -> Iterator[Node]:
    """A node; a test that leaves something behind fails here, whatever else it tested."""
    yield from make_node(topology, tmp_path)


@pytest.fixture(params=["nftables", "iptables"])
def each_backend(request: pytest.FixtureRequest, topology: Topology, tmp_path: Path) -> Iterator[Node]:
    """A node with either netfilter back end."""
    yield from make_node(topology, tmp_path, backend=request.param)


def make_node(topology: Topology, directory: Path, backend: str = "auto") -> Iterator[Node]:
    base = f"{BASE}{os.getpid()}-{next(_serial)}"
    config = directory / "acctd.toml"
    config.write_text(
        f'state_dir = "{directory}/state"\nruntime_dir = "{directory}/run"\nsocket = "{directory}/run/s"\n'
        f'[cgroup]\nbase = "{base}"\n[network]\nbackend = "{backend}"\n'
    )
    node = Node(topology, directory, base, config)
    before = node.left()
    try:
        yield node
        after = node.left()
        assert after == before | NOTHING
    finally:
        scrub(base)
        for path in (directory / "run" / "netns").glob("*"):
            netns.remove(path)


@pytest.fixture
def served(each_backend: Node) -> Iterator["Served"]:
    """A node with a living agent and either netfilter back end; jobs left open are finished at the end."""
    from tests.kernel.served import Served  # it needs the Node of this file

    made = Served(each_backend, None)  # type: ignore[arg-type]  # start() sets it
    made.start()
    yield made
    if made.process.poll() is None:
        for job in made.ok("List")["jobs"]:
            made.call("Finish", job=job["id"])
        assert made.stop() == 0


@pytest.fixture
def sleeper() -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Makes processes that do nothing; all gone at the end."""
    with ExitStack() as stack:

        def start() -> subprocess.Popen[bytes]:
            child = subprocess.Popen(["sleep", "1000"])
            stack.callback(child.wait)
            stack.callback(child.kill)
            return child

        yield start
