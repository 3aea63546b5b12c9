"""v1: cgroups that a job makes inside its own, as runc and docker do, inherit that tasks wait. Nobody hears of them.

They must not wait for ever: not while the agent lives, and not once it is dead.
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from acctd.cgroup.layout import discover
from tests.kernel.served import Served

MIB = 1 << 20
PATIENCE = 60.0  # s until a wait is a failure

_HOG = (
    "import sys\nwith open(sys.argv[1] + '/cgroup.procs', 'w') as door: door.write('0')\nkept = bytearray(30 << 20)\n"
)

pytestmark = pytest.mark.skipif(
    (memory := discover().of("memory")) is None or memory.version != 1, reason="on v2 nobody waits"
)


@pytest.fixture
def place(served: Served) -> Path:
    """The memory cgroup of a job that may wait, on a node whose agent reads often."""
    assert served.stop() == 0
    with served.node.config.open("a") as config:
        config.write('[oom]\naction = "hold"\ndeadline = 1\n')
    served.node.config.write_text("poll_interval = 0.2\n" + served.node.config.read_text())
    served.start()
    served.ok("Create", job="box", network="host", limits={"memory": 100 * MIB})
    return Path(f"/sys/fs/cgroup/memory/{served.node.base}/job_box")


def ends(place: Path) -> None:
    """A process that runs into the limit of this cgroup is killed there."""
    (place / "memory.limit_in_bytes").write_text(str(10 * MIB))
    with subprocess.Popen([sys.executable, "-c", _HOG, str(place)]) as hog:
        try:
            assert hog.wait(PATIENCE) == -9
        finally:
            hog.kill()
    deadline = time.monotonic() + PATIENCE
    while place.exists():
        try:
            place.rmdir()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_one_after_the_other_is_let_go(served: Served, place: Path) -> None:
    for name in ("one", "two"):
        (place / name).mkdir()
        ends(place / name)
    assert "oom_kill_disable 1" in (place / "memory.oom_control").read_text(), "the job itself still waits for us"


def test_one_below_another_is_let_go(place: Path) -> None:
    (place / "outer" / "inner").mkdir(parents=True)
    ends(place / "outer" / "inner")


def test_a_family_with_a_policy_of_its_own_goes_on_waiting_for_it(served: Served, place: Path) -> None:
    served.ok("Create", job="family", parent="box", limits={"memory": 50 * MIB}, oom={"action": "hold"})
    (place / "one").mkdir()
    ends(place / "one")
    assert "oom_kill_disable 1" in (place / "job_family" / "memory.oom_control").read_text()


def test_with_a_dead_agent_the_guardian_lets_it_go(served: Served, place: Path) -> None:
    served.stop(9)
    (place / "one").mkdir()
    ends(place / "one")
    assert "oom_kill_disable 1" in (place / "memory.oom_control").read_text()
    served.start()
