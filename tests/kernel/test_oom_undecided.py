"""While the site's program is asked about a job, somebody else ends it, gives it another limit, or moves it."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.kernel.served import Served

MIB = 1 << 20
PATIENCE = 60.0  # s until a wait is a failure

_HOG = (
    "import sys\n"
    "print('here', flush=True)\n"
    "sys.stdin.readline()\n"
    "kept = bytearray(40 << 20)\n"
    "print('full', flush=True)\n"
    "sys.stdin.readline()\n"
)


class Asked:
    """A family inside a pilot that has run out of memory, and about which a program thinks for long."""

    def __init__(self, served: Served, program: Path) -> None:
        self.served, self.program = served, program
        served.ok("Create", job="pilot", network="host", limits={"memory": 200 * MIB})
        served.ok("Create", job="f", parent="pilot", limits={"memory": 24 * MIB, "swap": 0})
        self.hog = subprocess.Popen(
            [sys.executable, "-c", _HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.hog.stdin is not None and self.hog.stdout is not None
        assert self.hog.stdout.readline() == "here\n"
        served.ok("Attach", job="f", pid=self.hog.pid)
        self.hog.stdin.write("\n")
        self.hog.stdin.flush()
        self.until(program.with_name("asked").exists)

    def until(self, true: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def says(self, word: str) -> None:
        assert self.hog.stdout is not None
        assert self.hog.stdout.readline() == f"{word}\n"

    def events(self) -> list[str]:
        return [
            each["text"] for each in self.served.ok("Events", job="f")["events"] if each["event"] == "out-of-memory"
        ]

    def finish(self) -> dict[str, Any]:
        record: dict[str, Any] = self.served.ok("Finish", job="f", exit_signal=9)["record"]
        return record


@pytest.fixture
def asked(served: Served, tmp_path: Path) -> Iterator[Asked]:
    assert served.stop() == 0
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\nexec sleep 1000\n")
    program.chmod(0o755)
    with served.node.config.open("a") as config:
        config.write(f'[oom]\naction = "exec"\nprogram = "{program}"\ndeadline = 600\n')
    served.start()
    made = Asked(served, program)
    try:
        yield made
    finally:
        made.hog.kill()
        made.hog.communicate()


def test_its_starter_finishes_it(asked: Asked) -> None:
    record = asked.finish()
    (shortage,) = record["shortages"]
    assert (shortage["level"], shortage["action"]) == ("job", "undecided")
    assert shortage["processes"][0]["pid"] == asked.hog.pid
    assert "before it was decided what to do" in shortage["text"]
    assert asked.events() == [shortage["text"]]
    pilot = asked.served.ok("Usage", job="pilot")["job"]["shortages"]
    assert [(each["level"], each["whose"]) for each in pilot] == [("family", "f")]


def test_an_admin_kills_it(asked: Asked) -> None:
    asked.served.ok("Kill", job="f")
    asked.served.ok("Snapshot")
    assert len(asked.events()) == 1
    (shortage,) = asked.finish()["shortages"]
    assert shortage["action"] == "undecided"


def test_it_has_another_limit(asked: Asked) -> None:
    asked.served.ok("SetLimits", job="f", limits={"memory": 100 * MIB})
    asked.says("full")
    (shortage,) = asked.finish()["shortages"]
    assert (shortage["action"], shortage["limit"]) == ("undecided", 24 * MIB)


def test_its_processes_go_on_in_the_pilot(asked: Asked) -> None:
    """They had waited in a cgroup that is gone now."""
    record = asked.served.ok("Unregister", job="f")["record"]
    asked.says("full")
    assert [each["action"] for each in record["shortages"]] == ["undecided"]
    assert asked.served.ok("Usage", job="pilot")["job"]["pids"] == [asked.hog.pid]


def test_agent_and_guardian_are_killed_and_the_next_agent_lets_it_go(asked: Asked) -> None:
    """A frozen process asks for no memory: nobody but the next agent would ever think of it."""
    agent = psutil.Process(asked.served.process.pid)
    family = [agent, *agent.children(recursive=True)]
    for process in family:
        process.kill()
    psutil.wait_procs(family, PATIENCE)
    asked.served.process.wait(PATIENCE)
    asked.program.write_text('#!/bin/sh\necho \'{"action": "grow", "memory": 104857600}\'\n')
    asked.served.start()
    asked.says("full")


def test_who_is_suspended_meanwhile_stays_so(asked: Asked) -> None:
    asked.served.ok("Suspend", job="f")
    asked.served.ok("SetLimits", job="f", limits={"memory": 100 * MIB})
    state = Path(f"/sys/fs/cgroup/freezer/{asked.served.node.base}/job_pilot/job_f/freezer.state")
    if state.exists():
        assert state.read_text() != "THAWED\n"
    asked.served.ok("Continue", job="f")
    asked.says("full")
