"""What the tests inside a guest share: an agent in this process (a fresh Python costs seconds there), and a reporter.

The whole machine is the test's: `left` compares all of it. Collected by name from the outside, never by `pytest tests`.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from acctd.cgroup.layout import CONTROLLERS, discover
from tests.bodies.machine import Machine as Machine
from tests.bodies.machine import machine as made_machine

BASE = "acctdvm/jobs"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One JSON line a phase: what is known survives a guest that dies in the middle."""
    if path := os.environ.get("ACCTD_VM_REPORT"):
        line: dict[str, object] = {
            "name": report.nodeid.rpartition("::")[2],
            "when": report.when,
            "outcome": report.outcome,
        }
        line |= {"seconds": round(report.duration, 1), "text": report.longreprtext}
        with open(path, "a") as out:
            out.write(json.dumps(line) + "\n")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Cgroups of every hierarchy, links, namespaces and rules are as before."""
    before = _left()
    yield
    assert _left() == before


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    with made_machine(tmp_path, BASE) as made:
        yield made


def _left() -> dict[str, object]:
    tops = [hierarchy.top for hierarchy in discover(CONTROLLERS).hierarchies]
    netns = Path("/run/netns")
    return {
        "cgroups": sorted(str(cgroup.path) for top in tops for cgroup in top.subtree()),
        "links": sorted(os.listdir("/sys/class/net")),
        "namespaces": sorted(os.listdir(netns)) if netns.exists() else [],
        "processes": _sleepers(),
    }


def _sleepers() -> list[str]:
    """Processes of tests: all of them run sleep, dd or a shell that waits, by these names."""
    if shutil.which("pgrep") is None:
        raise RuntimeError("pgrep is missing; install procps")
    return subprocess.run(["pgrep", "-x", "sleep|dd"], capture_output=True, text=True, check=False).stdout.split()
