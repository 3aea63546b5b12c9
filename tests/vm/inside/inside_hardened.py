"""What the agent does for jobs whose memory runs out, that are shut in or must be ended: all of it as acctd.service.

What the unit takes away from the agent, and what systemd thinks of the processes beside it, must not be in the way.
"""

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.vm.inside.service import (
    BASE,
    CONFIG,
    DROP_INS,
    install,
    journal,
    main_pid,
    run,
    said,
    served,
    shown,
    until,
)

MIB = 1 << 20
UNIT = Path("/sys/fs/cgroup/system.slice/acctd.service/cgroup.procs")
SCRATCH = Path("/var/lib/acctd/scratch")
PROGRAM, FACTS, ANSWER = Path("/run/decide"), Path("/run/facts"), Path("/run/answer")
# Says that it is asked, and does what it finds when the test lets it.
_PROGRAM = f"#!/bin/sh\ncat >{FACTS}.new\nmv {FACTS}.new {FACTS}\n. {ANSWER}\n"
_WAIT = "exec sleep 1000"
PERSON = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Not the whole machine's as in the other guests: systemd changes it too."""
    yield


@pytest.fixture(scope="module", autouse=True)
def agent() -> Iterator[None]:
    PROGRAM.write_text(_PROGRAM)
    PROGRAM.chmod(0o755)
    install()
    good = CONFIG.read_text()
    CONFIG.write_text(f"{good}\n[oom]\nprogram = '{PROGRAM}'\n")
    yield from served()
    CONFIG.write_text(good)


@contextmanager
def drop_in(lines: str) -> Iterator[None]:
    """Other lines in acctd.service for a while, for the next start."""
    path = DROP_INS / "test.conf"
    DROP_INS.mkdir(exist_ok=True)
    path.write_text(f"[Service]\n{lines}\n")
    run("systemctl", "daemon-reload")
    try:
        yield
    finally:
        path.unlink()
        run("systemctl", "daemon-reload")


def create(job: str, *options: str) -> None:
    run("acctd-hook", "create", "--job", job, "--network", "host", *options)


def start(job: str, script: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(["acctd-hook", "exec", "--job", job, "--", "sh", "-c", script], stderr=subprocess.DEVNULL)


def hog(job: str) -> "subprocess.Popen[bytes]":
    """64 MB where 24 may be had."""
    return start(job, "head -c 64m /dev/zero | tail >/dev/null")


def finish(job: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(run("acctd-hook", "finish", "--job", job, "--exit-signal", "9", "--json"))
    return record


def beside(agent: int) -> dict[int, str]:
    """The other processes of the unit, by pid: their names."""
    if not UNIT.exists():
        return {}
    found = {}
    for pid in set(map(int, UNIT.read_text().split())) - {agent}:
        try:
            found[pid] = Path(f"/proc/{pid}/comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
    return found


def test_a_job_over_its_limit_is_held() -> None:
    entries = len(journal())
    create("held", "--memory", "24M", "--swap", "0", "--oom", "hold")
    assert hog("held").wait() in (-signal.SIGKILL, 128 + signal.SIGKILL)
    (shortage,) = finish("held")["shortages"]
    assert (shortage["level"], shortage["action"], shortage["limit"]) == ("job", "held", 24 * MIB)
    told = [entry for entry in said("job held out-of-memory: ", entries) if shortage["text"] in entry["MESSAGE"]]
    assert [entry["PRIORITY"] for entry in told] == ["6"]


def test_the_guardian_outlives_the_agent_until_the_next_one_acts() -> None:
    """The program that was asked does not: the next agent asks again."""
    ANSWER.write_text(_WAIT)
    create("asked", "--memory", "24M", "--swap", "0", "--oom", "exec", "--oom-deadline", "20")
    process = hog("asked")
    until(FACTS.exists, "the program is not asked")
    assert json.loads(FACTS.read_text())["job"] == "asked"
    assert (BASE / "job_asked/cgroup.freeze").read_text() == "1\n"
    before, entries = main_pid(), len(journal())
    guardian, program = sorted(beside(before))
    ANSWER.write_text('echo \'{"action": "kill"}\'')
    run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "acctd.service")
    assert process.wait() in (-signal.SIGKILL, 128 + signal.SIGKILL)
    assert said(f"left-over process {guardian} (python", entries)
    assert not said(f"left-over process {program} ", entries)
    until(lambda: guardian not in beside(main_pid()), "the guardian of the dead agent stays")
    (shortage,) = finish("asked")["shortages"]
    assert shortage["action"] == "killed"


def test_a_stopped_job_is_let_go_when_its_agent_goes() -> None:
    """In peace, by itself; and where it was killed and no other one comes, by the guardian, which then ends."""
    ANSWER.write_text(_WAIT)
    FACTS.unlink()
    state = BASE / "job_waits/cgroup.freeze"
    with drop_in("Restart=no"):
        create("waits", "--memory", "24M", "--swap", "0", "--oom", "exec", "--oom-deadline", "3")
        process = hog("waits")
        until(FACTS.exists, "the program is not asked")
        assert len(beside(main_pid())) == 2
        run("systemctl", "stop", "acctd.socket", "acctd.service")
        assert (state.read_text(), beside(0)) == ("0\n", {})
        FACTS.unlink()
        run("systemctl", "start", "acctd.service")
        until(FACTS.exists, "the next agent does not ask again")
        run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "acctd.service")
        until(lambda: shown("acctd.service", "ActiveState") == ["failed"], "systemd does not see the agent's end")
        until(lambda: state.read_text() == "0\n", "nobody lets the job go")
        until(lambda: not beside(0), "the guardian stays although nothing is left to guard")
        run("systemctl", "start", "acctd.service")
    run("acctd-hook", "kill", "--job", "waits")
    assert process.wait() in (-signal.SIGKILL, 128 + signal.SIGKILL)
    finish("waits")


def test_a_program_that_runs_out_of_memory_is_not_the_agents_end() -> None:
    ANSWER.write_text("echo 1000 >/proc/self/oom_score_adj; exec tail /dev/zero")
    FACTS.unlink()
    before, entries = main_pid(), len(journal())
    run("systemctl", "set-property", "--runtime", "acctd.service", "MemoryMax=64M", "MemorySwapMax=0")
    try:
        create("greedy", "--memory", "24M", "--swap", "0", "--oom", "exec")
        assert hog("greedy").wait() in (-signal.SIGKILL, 128 + signal.SIGKILL)
        (shortage,) = finish("greedy")["shortages"]
    finally:
        run("systemctl", "set-property", "--runtime", "acctd.service", "MemoryMax=infinity", "MemorySwapMax=infinity")
    assert shortage["action"] == "held"
    assert said("has been killed by the OOM killer", entries)
    assert main_pid() == before


def test_the_limits_of_a_living_job_are_changed_and_its_bomb_ends() -> None:
    create("bomb", "--user", "nobody", "--memory", "24M", "--cpuset", "linear:1")
    assert json.loads(run("acctd-hook", "limit", "--job", "bomb", "--memory", "32M", "--pids", "20"))["pids"] == 20
    place = BASE / "job_bomb"
    shown = [(place / file).read_text().strip() for file in ("memory.max", "pids.max", "cpuset.cpus")]
    assert shown == [str(32 * MIB), "20", "0"]
    process = start("bomb", "b() { b | b & }; b; sleep 1000")
    until(lambda: (place / "pids.events").read_text() != "max 0\n", "the bomb does not go off")
    run("acctd-hook", "kill", "--job", "bomb")
    assert process.wait() == -signal.SIGKILL
    record = finish("bomb")
    assert record["cpus"] == "0"
    assert record["totals"]["pids_peak"][""] == 20
    assert not place.exists()


@pytest.mark.parametrize("person", [[], PERSON], ids=["root", "owner"])
def test_a_job_is_shut_in_and_its_scratch_goes_with_it(person: list[str]) -> None:
    run("chmod", "755", "/root")  # this Python may live there
    create("shut", "--user", "nobody", "--pid-namespace", "--no-new-privs", "--scratch", "/tmp")
    (own,) = SCRATCH.glob("shut.*/0")
    script = (
        "id -u; ps -e -o pid= | wc -l; grep NoNewPrivs /proc/self/status; ls -A /tmp | wc -l;"
        # What its owner has closed is open to nobody without a right for it.
        "mkdir -p /tmp/closed/deeper; touch /tmp/closed/deeper/file; chmod 0 /tmp/closed/deeper /tmp/closed"
    )
    said = run(*person, "acctd-hook", "exec", "--job", "shut", "--", "sh", "-c", script).split()
    assert said[0] == "65534"
    assert int(said[1]) <= 5
    assert said[2:] == ["NoNewPrivs:", "1", "0"]
    assert [path.name for path in own.iterdir()] == ["closed"]
    assert finish("shut")["notes"] == []
    trash = SCRATCH / ".trash"
    until(lambda: [*SCRATCH.iterdir()] == [trash] and not any(trash.iterdir()), "the scratch stays")
