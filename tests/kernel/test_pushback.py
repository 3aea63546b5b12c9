"""v1: families of a living agent are pushed back to their soft limits when their pilot runs short, and only those over.

The push itself is test_soft_limits.py's.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from acctd.cgroup.layout import discover
from tests.kernel.served import Served

MIB = 1 << 20
PATIENCE = 30.0  # s until a wait is a failure

# Writes so much page cache into a file of its own, says so, and waits.
_CACHE = (
    "import os, sys\n"
    "file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)\n"
    "os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)\n"
    "for line in sys.stdin:\n"
    "    for _ in range(int(line)): os.write(file, bytes(1 << 20))\n"
    "    os.fsync(file)\n"
    "    print('done', flush=True)\n"
)

pytestmark = pytest.mark.skipif(
    (memory := discover().of("memory")) is None or memory.version != 1, reason="v2 pushes back by itself"
)


class Cacher:
    """A process of a family that fills page cache when told."""

    def __init__(self, served: Served, job: str, file: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CACHE, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        served.ok("Attach", job=job, pid=self.process.pid)

    def fill(self, mib: int) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{mib}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"


@contextmanager
def cacher(served: Served, job: str, file: Path) -> Iterator[Cacher]:
    made = Cacher(served, job, file)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.communicate()


def usage(served: Served, *names: str) -> int:
    path = "/".join(f"job_{name}" for name in names)
    return int(Path(f"/sys/fs/cgroup/memory/{served.node.base}/{path}/memory.usage_in_bytes").read_text())


def test_only_the_one_that_is_over_is_pushed_back(served: Served, tmp_path: Path) -> None:
    served.ok("Create", job="pilot", network="host", limits={"memory": 100 * MIB})
    for name in ("small", "large"):
        served.ok("Create", job=name, parent="pilot", limits={"memory_soft": 40 * MIB})
    with ExitStack() as stack:
        small = stack.enter_context(cacher(served, "small", tmp_path / "small"))
        large = stack.enter_context(cacher(served, "large", tmp_path / "large"))
        small.fill(24)
        before = usage(served, "pilot", "small")
        large.fill(64)
        deadline = time.monotonic() + PATIENCE
        told: list[str] = []
        while not told:
            assert time.monotonic() < deadline
            told = [each["text"] for each in served.ok("Events", job="large")["events"] if each["event"] == "memory"]
        assert "pushed back" in told[0] and str(40 * MIB) in told[0]
        assert usage(served, "pilot", "small") >= before - MIB
        assert usage(served, "pilot", "large") < 64 * MIB
        assert not [each for each in served.ok("Events", job="small")["events"] if each["event"] == "memory"]


def test_a_low_limit_that_a_dead_agent_left_is_put_right(served: Served, tmp_path: Path) -> None:
    served.ok("Create", job="pilot", network="host", limits={"memory": 100 * MIB})
    served.ok("Create", job="soft", parent="pilot", limits={"memory_soft": 40 * MIB})
    served.ok("Create", job="both", parent="pilot", limits={"memory_soft": 40 * MIB, "memory": 80 * MIB})
    with cacher(served, "soft", tmp_path / "a"), cacher(served, "both", tmp_path / "b"):
        served.stop(9)
        place = Path(f"/sys/fs/cgroup/memory/{served.node.base}/job_pilot")
        for name in ("soft", "both"):
            (place / f"job_{name}" / "memory.oom_control").write_text("1")
            (place / f"job_{name}" / "memory.limit_in_bytes").write_text(str(40 * MIB))
        served.start()
        assert int((place / "job_soft" / "memory.limit_in_bytes").read_text()) > 1 << 60
        assert int((place / "job_both" / "memory.limit_in_bytes").read_text()) == 80 * MIB
        for name in ("soft", "both"):
            assert "oom_kill_disable 0" in (place / f"job_{name}" / "memory.oom_control").read_text()
