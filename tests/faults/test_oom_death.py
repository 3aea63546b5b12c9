"""Whoever keeps a job is stopped or killed while that waits in OOM: the job is let go at its deadline, and that is
recorded; or the next agent, if it comes before, deals with the job as its policy asks.

The keeper is stopped before the job takes its memory, so that it acts on nothing; what becomes of it comes after.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from acctd.cgroup.layout import discover
from acctd.ledger import FILE, Ledger
from tests.kernel.conftest import Node
from tests.kernel.served import Served

MIB = 1 << 20
SHORT, LONG = 1.5, 600.0  # s; deadlines that are to pass, and one that no test outlasts
PATIENCE = 60.0  # s until a wait is a failure; nothing is concluded from how long it took

HOG = "import sys; sys.stdin.readline(); kept = bytearray(64 << 20)"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What is to be ended after a test, also after a failed one."""
    with ExitStack() as made:
        yield made


@pytest.fixture(autouse=True)
def no_guardian_stays(node: Node) -> Iterator[None]:
    """Once the jobs are gone, so are the guardians, whose keepers some tests have killed."""
    if (memory := discover().of("memory")) is None or memory.version != 1:
        pytest.skip("on v2 nothing waits in OOM")
    yield
    until(lambda: not guardians(node), "a guardian stays though its jobs are gone")


def guardians(node: Node) -> list[int]:
    """Those that leave their traces in this node's directory."""
    place = str(node.directory / "run" / "released")
    return [p.pid for p in psutil.process_iter(["cmdline"]) if place in (p.info["cmdline"] or [])]


@pytest.fixture
def agent(node: Node, stack: ExitStack) -> Served:
    """A node with a living agent, and a site's program that says where it is and never answers."""
    program = node.directory / "program"
    program.write_text(
        f"#!/bin/sh\necho $$ > {node.directory}/asked.new\nmv {node.directory}/asked.new {asked(node)}\n"
    )
    with program.open("a") as file:
        file.write("exec sleep 1000\n")
    program.chmod(0o755)
    with node.config.open("a") as file:
        file.write(f'[oom]\nprogram = "{program}"\n')
    made = Served(node, None)  # type: ignore[arg-type]  # start() sets it
    made.start()

    def end() -> None:
        made.process.kill()
        made.process.wait()

    stack.callback(end)
    return made


def asked(node: Node) -> Path:
    return node.directory / "asked"


def until(done: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def waits(node: Node, job: str) -> bool:
    memory = discover().of("memory")
    assert memory is not None
    control = memory.job(node.base, f"job_{job}").path / "memory.oom_control"
    return control.exists() and "under_oom 1" in control.read_text()


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, "it does not stop")


def hog(stack: ExitStack, agent: Served, action: str, deadline: float) -> subprocess.Popen[bytes]:
    """A job with this policy, and its only process, which takes too much as soon as it reads a line."""
    child = subprocess.Popen([sys.executable, "-c", HOG], stdin=subprocess.PIPE)
    stack.callback(child.wait)
    stack.callback(child.kill)
    oom = {"action": action, "deadline": deadline} | ({"ceiling": 20 * MIB} if action == "grow" else {})
    agent.ok("Create", job="victim", network="host", limits={"memory": 16 * MIB}, oom=oom)
    agent.ok("Attach", job="victim", pid=child.pid)
    return child


def go(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    child.stdin.write(b"go\n")
    child.stdin.close()


def finished(agent: Served) -> list[dict[str, Any]]:
    """The shortages in the record, once the agent has given it up to the starter."""
    record = agent.ok("Finish", job="victim", exit_signal=9)["record"]
    assert agent.stop() == 0
    found: list[dict[str, Any]] = record["shortages"]
    return found


@pytest.mark.parametrize("action", ["kill", "hold", "grow", "exec"])
def test_an_agent_that_dies_and_has_no_successor_in_time(agent: Served, stack: ExitStack, action: str) -> None:
    child = hog(stack, agent, action, SHORT)
    stop(agent.process.pid)
    go(child)
    until(lambda: waits(agent.node, "victim"), "it does not run out of memory")
    assert agent.stop(signal.SIGKILL) == -signal.SIGKILL
    assert child.wait(PATIENCE) == -signal.SIGKILL
    until(lambda: bool(list((agent.node.directory / "run" / "released").glob("victim.*"))), "it left no trace")
    agent.start()
    (shortage,) = finished(agent)
    assert shortage["action"] == "released" and shortage["kills"] == 1
    assert shortage["level"] == "job" and shortage["limit"] == 16 * MIB
    assert not list((agent.node.directory / "run" / "released").iterdir())


@pytest.mark.parametrize("action", ["kill", "hold"])
def test_an_agent_that_dies_and_has_a_successor_in_time(agent: Served, stack: ExitStack, action: str) -> None:
    child = hog(stack, agent, action, LONG)
    stop(agent.process.pid)
    go(child)
    until(lambda: waits(agent.node, "victim"), "it does not run out of memory")
    assert agent.stop(signal.SIGKILL) == -signal.SIGKILL
    agent.start()
    assert child.wait(PATIENCE) == -signal.SIGKILL
    (shortage,) = finished(agent)
    assert shortage["action"] == {"kill": "killed", "hold": "held"}[action]


@pytest.mark.parametrize("action", ["kill", "hold", "grow", "exec"])
def test_an_agent_that_stands_still(agent: Served, stack: ExitStack, action: str) -> None:
    """When it goes on it finds the job dead, and tells what has happened."""
    child = hog(stack, agent, action, SHORT)
    stop(agent.process.pid)
    go(child)
    assert child.wait(PATIENCE) == -signal.SIGKILL
    agent.process.send_signal(signal.SIGCONT)
    (shortage,) = finished(agent)
    assert shortage["action"] == "released" and shortage["kills"] == 1


@pytest.mark.parametrize("successor", [False, True], ids=["alone", "succeeded"])
def test_an_agent_that_dies_while_a_program_decides(agent: Served, stack: ExitStack, successor: bool) -> None:
    """The job is frozen then, too; the program dies unheard."""
    child = hog(stack, agent, "exec", LONG if successor else SHORT)
    node = agent.node
    # Not before it is asked: what it is killed over is the question.
    go(child)
    until(asked(node).exists, "the program is not asked")
    assert agent.stop(signal.SIGKILL) == -signal.SIGKILL
    stack.callback(end_program, int(asked(node).read_text()))
    if successor:
        asked(node).unlink()
        agent.start()
        until(asked(node).exists, "the program is not asked again")
        stack.callback(end_program, pid := int(asked(node).read_text()))
        os.kill(pid, signal.SIGKILL)  # no answer: hold
        assert child.wait(PATIENCE) == -signal.SIGKILL
        assert [each["action"] for each in finished(agent)] == ["held"]
        return
    assert child.wait(PATIENCE) == -signal.SIGKILL
    agent.start()
    assert [each["action"] for each in finished(agent)] == ["released"]


def end_program(pid: int) -> None:
    try:
        if psutil.Process(pid).cmdline() == ["sleep", "1000"]:
            os.kill(pid, signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return  # it ended with the one who had asked


def start_run(node: Node, stack: ExitStack, deadline: float) -> tuple[subprocess.Popen[str], int]:
    """`acctd run --oom hold` of a hog that waits for a line; and the hog's pid."""
    says = node.directory / "pid"
    code = f"import os; open({str(says)!r} + '.new', 'w').write(str(os.getpid()))\n"
    code += f"os.rename({str(says)!r} + '.new', {str(says)!r})\n{HOG}"
    argv = ["run", "-q", "--id", "victim", "--memory", str(16 * MIB), "--oom", "hold", "--oom-deadline", str(deadline)]
    argv += ["--network", "host", "--json", str(node.directory / "record.json"), "--", sys.executable, "-c", code]
    keeper = node.topology.popen(
        node.topology.node, node.argv(*argv), env=node.environ, stdin=subprocess.PIPE, text=True
    )
    stack.callback(keeper.wait)
    stack.callback(keeper.kill)
    until(says.exists, "the job does not begin")
    return keeper, int(says.read_text())


@pytest.mark.parametrize("fate", ["killed", "stopped"])
def test_a_supervisor_that_does_not_act(node: Node, stack: ExitStack, fate: str) -> None:
    keeper, _ = start_run(node, stack, SHORT)
    assert keeper.stdin is not None
    stop(keeper.pid)
    keeper.stdin.write("go\n")
    keeper.stdin.flush()
    until(lambda: waits(node, "victim"), "it does not run out of memory")
    if fate == "killed":
        keeper.kill()
        keeper.wait()
    until(lambda: not waits(node, "victim"), "it waits for ever")
    # It is let go first, and then that is written down.
    until(lambda: bool(list((node.directory / "run" / "released").glob("victim.*"))), "it left no trace")
    if fate == "killed":
        # Whoever comes next puts it on record.
        node.job("--id", "next", "--network", "host", "--", "true")
        with Ledger(node.directory / "state" / FILE) as ledger:
            shortages = [each.action for each in ledger.record("victim").shortages]
    else:
        keeper.send_signal(signal.SIGCONT)
        assert keeper.wait(PATIENCE) == 128 + signal.SIGKILL
        shortages = [each["action"] for each in json.loads((node.directory / "record.json").read_text())["shortages"]]
    assert shortages == ["released"]


def test_an_agent_takes_over_from_a_supervisor_in_time(node: Node, stack: ExitStack) -> None:
    keeper, pid = start_run(node, stack, LONG)
    assert keeper.stdin is not None
    stop(keeper.pid)
    keeper.stdin.write("go\n")
    keeper.stdin.flush()
    until(lambda: waits(node, "victim"), "it does not run out of memory")
    keeper.kill()
    keeper.wait()
    agent = Served(node, None)  # type: ignore[arg-type]  # start() sets it
    agent.start()
    stack.callback(agent.process.wait)
    stack.callback(agent.process.kill)
    until(lambda: not psutil.pid_exists(pid), "the agent leaves it waiting")
    assert [each["action"] for each in finished(agent)] == ["held"]
