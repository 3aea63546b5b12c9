"""acctd-hook as a starter calls it, against a living agent."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import classad2

from tests.kernel.conftest import REPO
from tests.kernel.served import Served


def hook(served: Served, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "acctd.hook", "--socket", str(served.path), *arguments]
    environ = {**os.environ, "PYTHONPATH": str(REPO)}
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, env=environ, **options)


def test_a_starters_whole_day(served: Served) -> None:
    made = hook(
        served, "create", "--job", "12.3", "--user", "nobody", "--tag", "Vo=cms", "--pids", "30", "--cpus", "0.5"
    )
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["job"] == "12.3"
    script = "id -u; ip -o link | wc -l; cat /proc/self/cgroup; echo $HOME; exit 5"
    ran = hook(served, "exec", "--job", "12.3", "--", "sh", "-c", script)
    assert ran.returncode == 5
    lines = ran.stdout.splitlines()
    assert (lines[0], lines[1], lines[-1]) == ("65534", "2", "/nonexistent")
    assert sum("job_12.3" in line for line in lines) >= 1
    usage = hook(served, "usage", "--job", "12.3").stdout
    assert "Number of Processes: 0\n" in usage
    assert "Network OutgoingExternal Bytes: 0\n" in usage
    assert "12.3 nobody running 0\n" in hook(served, "list").stdout
    done = hook(served, "finish", "--job", "12.3", "--exit-code", "5")
    ad = classad2.parseOne(done.stdout)
    assert (ad.eval("ExitCode"), ad.eval("Owner"), ad.eval("AcctdTagVo")) == (5, "nobody", "cms")
    assert hook(served, "finish", "--job", "12.3").stdout == done.stdout


def test_a_running_process_is_attached_stopped_and_killed(
    served: Served, sleeper: Callable[[], subprocess.Popen[bytes]]
) -> None:
    child = sleeper()
    assert hook(served, "create", "--job", "a").returncode == 0
    assert hook(served, "attach", "--job", "a", str(child.pid)).returncode == 0
    assert hook(served, "suspend", "--job", "a").returncode == 0
    assert hook(served, "continue", "--job", "a").returncode == 0
    assert hook(served, "signal", "--job", "a", "0").returncode == 64
    assert hook(served, "kill", "--job", "a").returncode == 0
    assert child.wait(20) == -9


def test_errors_are_one_sentence_with_a_code(served: Served) -> None:
    for arguments, code in (
        (("nonsense",), 64), (("usage",), 64), (("usage", "--job", "none"), 66), (("create", "--job", "../x"), 64),
        (("create", "--job", "x", "--colour", "red"), 64), (("create", "--job", "x", "--memory", "lots"), 64),
        (("exec", "--job", "none", "--", "true"), 66), (("exec", "--job", "none"), 64), (("attach", "--job", "x"), 64),
        (("finish", "--job", "none"), 66), (("signal", "--job"), 64), ((), 64),
    ):  # fmt: skip
        done = hook(served, *arguments)
        assert done.returncode == code, (arguments, done.stderr)
        assert "Traceback" not in done.stderr
        assert done.stderr.count("\n") == (1 if arguments else 0)


def test_without_an_agent_exec_refuses_or_goes_on_as_it_is_told(tmp_path: Path) -> None:
    alone = Served.__new__(Served)
    alone.node = type("Nowhere", (), {"directory": tmp_path})()
    closed = hook(alone, "exec", "--job", "x", "--", "echo", "ran")
    assert (closed.returncode, closed.stdout) == (69, "")
    assert "no agent answers" in closed.stderr
    opened = hook(alone, "exec", "--job", "x", "--fail-open", "--", "echo", "ran")
    assert (opened.returncode, opened.stdout) == (0, "ran\n")
    assert "unaccounted" in opened.stderr


def test_it_loads_little() -> None:
    code = "import sys; import acctd.hook; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    ).stdout.split()
    for heavy in ("asyncio", "argparse", "ctypes", "subprocess", "click", "msgspec", "pyroute2", "acctd.agent"):
        assert heavy not in loaded
