"""`acctd run` as its user meets it: streams, status, signals, terminal, user, limits, output, living side by side."""

import json
import os
import pty
import pwd
import select
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from acctd.cgroup.layout import discover
from acctd.kernel import procs
from tests.kernel.conftest import Node


def test_streams_arguments_and_status_pass_through(node: Node) -> None:
    done = node.acctd("run", "-q", "--", "sh", "-c", 'cat; echo "$1" >&2; exit 7', "sh", "an argument", input="in\nput")
    assert (done.returncode, done.stdout, done.stderr) == (7, "in\nput", "an argument\n")


def test_death_by_signal_is_128_and_the_signal(node: Node) -> None:
    done = node.acctd("run", "--id", "dies", "--", "sh", "-c", "kill -TERM $$")
    assert done.returncode == 128 + signal.SIGTERM
    assert "killed by SIGTERM" in done.stderr
    assert json.loads(node.acctd("show", "dies", "--json").stdout)["exit_signal"] == signal.SIGTERM


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU, signal.SIGRTMIN]
)
def test_signals_reach_the_command(node: Node, number: signal.Signals) -> None:
    script = f"trap 'echo caught; exit 5' {number.name[3:]}; echo ready; while :; do sleep 0.05; done"
    # Whoever runs the tests in the background ignores SIGINT, and a shell cannot trap what it was born to ignore.
    argv = ["env", "--default-signal", *node.argv("run", "-q", "--", "sh", "-c", script)]
    child = node.topology.popen(node.topology.node, argv, stdout=subprocess.PIPE, text=True, env=node.environ)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    assert child.communicate(timeout=20)[0] == "caught\n"
    assert child.returncode == 5


def test_the_command_starts_with_the_callers_signal_mask_and_dispositions(node: Node) -> None:
    status = node.acctd("run", "-q", "--", "cat", "/proc/self/status").stdout
    masks = dict(line.split(":\t") for line in status.splitlines() if line.startswith("Sig"))
    plain = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
    expected = dict(line.split(":\t") for line in plain.splitlines() if line.startswith("Sig"))
    assert masks["SigBlk"] == expected["SigBlk"]
    assert masks["SigIgn"] == expected["SigIgn"]


def test_a_terminal_is_the_commands_own_and_control_c_ends_it_once(node: Node) -> None:
    pid, fd = pty.fork()
    if pid == 0:
        argv = ["nsenter", f"--net={node.topology.node.path}", "--"]
        script = "trap 'echo once; exit 3' INT; test -t 0 && test -t 1 && echo terminal; while :; do sleep 0.05; done"
        argv += ["env", "--default-signal", *node.argv("run", "--", "sh", "-c", script)]
        os.execvpe(argv[0], argv, node.environ)  # noqa: S606
    seen = _read_until(fd, b"terminal")
    os.write(fd, b"\x03")
    seen += _read_until(fd, b"exit 3")
    assert seen.count(b"once") == 1
    # The live line and the summary share the terminal with the job; the status is what the shell sees.
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    os.close(fd)


def test_another_user(node: Node) -> None:
    nobody = pwd.getpwnam("nobody")
    done = node.acctd(
        "run", "--id", "42.0", "--user", "nobody", "-q", "--", "sh", "-c", "id -u; id -g; id -G; echo $HOME"
    )
    assert done.stdout.split() == [str(nobody.pw_uid), str(nobody.pw_gid), str(nobody.pw_gid), nobody.pw_dir]
    record = json.loads(node.acctd("show", "42.0", "--json").stdout)
    assert (record["owner"], record["uid"]) == ("nobody", nobody.pw_uid)


def test_another_user_has_no_privilege_left(node: Node) -> None:
    status = node.acctd("run", "-q", "--user", "nobody", "--", "cat", "/proc/self/status").stdout
    caps = {line.split(":")[0]: int(line.split()[1], 16) for line in status.splitlines() if line.startswith("Cap")}
    assert caps["CapEff"] == caps["CapPrm"] == caps["CapInh"] == caps["CapAmb"] == 0


def test_a_five_millisecond_job_has_a_complete_record(node: Node) -> None:
    record = node.job("--tag", "Project=x", "--", "sleep", "0.005")
    assert record["exit_code"] == 0
    assert record["state"] == "done"
    assert record["wall_ns"] > 5e6
    totals = record["totals"]
    for name in ("cpu_user", "cpu_system", "memory_peak", "memory_resident_peak", "pids_peak", "network"):
        assert name in totals
    assert totals["memory_peak"][""] > 0
    assert set(totals["network"]) == {
        f"{way}{cls}" for way in ("Outgoing", "Incoming") for cls in ("Internal", "External")
    }
    assert record["tags"] == {"Project": "x"}


def test_what_the_command_leaves_running_is_ended_and_accounted(node: Node) -> None:
    record = node.job("--", "sh", "-c", "sleep 1000 & setsid sleep 1000 & exit 0")
    assert record["totals"]["pids_peak"][""] >= 2


def test_limits_are_in_force_and_recorded(node: Node) -> None:
    layout = discover()
    memory = layout.of("memory")
    assert memory is not None
    file = "memory.limit_in_bytes" if memory.version == 1 else "memory.max"
    path = f"{memory.top.path}/{node.base}/job_lim/{file}"
    done = node.acctd(
        "run", "-q", "--id", "lim", "--memory", "64M", "--memory-soft", "32M", "--cpus", "0.5", "--cpu-shares", "512",
        "--pids", "20", "--cpuset", "0", "--json", str(node.directory / "r"), "--", "cat", path, "/proc/self/status",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(64 << 20))
    assert "Cpus_allowed_list:\t0\n" in done.stdout
    limits = json.loads((node.directory / "r").read_text())["limits"]
    assert limits == {
        "memory": 64 << 20, "memory_soft": 32 << 20, "swap": None,
        "cpus": 0.5, "cpu_burst": None, "cpu_shares": 512, "cpuset": "0", "pids": 20, "memory_policy": "custom",
    }  # fmt: skip


def test_a_job_over_its_memory_limit_is_killed_and_says_so(node: Node) -> None:
    done = node.acctd(
        "run", "--id", "hog", "--memory", "20M", "--", "python3", "-c", "x = bytearray(100 << 20)", timeout=60
    )
    assert done.returncode == 128 + signal.SIGKILL
    assert "killed for want of memory" in done.stderr


def test_a_throttled_job_says_so(node: Node) -> None:
    record = node.job("--cpus", "0.2", "--", "python3", "-c", "import time\nwhile time.process_time() < 0.2: pass")
    assert record["totals"]["cpu_throttled"][""] > 0
    assert record["totals"]["cpu_throttled_periods"][""] > 0


def test_network_none_and_host(node: Node) -> None:
    alone = node.acctd("run", "-q", "--network", "none", "--", "ip", "-o", "link").stdout
    assert [line.split(":")[1].strip() for line in alone.splitlines()] == ["lo"]
    shared = node.acctd("run", "-q", "--network", "host", "--", "ip", "-o", "link").stdout
    assert "campus" in shared
    assert "wan" in shared


def test_files_are_written_whole_and_a_bad_path_costs_no_job(node: Node) -> None:
    refused = node.acctd("run", "--classad", f"{node.directory}/no/such", "--", "touch", f"{node.directory}/ran")
    assert refused.returncode == 66
    assert not (node.directory / "ran").exists()
    node.acctd("run", "-q", "--id", "x", "--classad", f"{node.directory}/ad", "--", "true")
    assert Path(f"{node.directory}/ad").read_text() == node.acctd("show", "x", "--classad").stdout


def test_ls_and_show(node: Node) -> None:
    assert node.acctd("run", "--id", "a[1]", "--", "true").returncode == 0
    assert "a[1]" in node.acctd("ls").stdout
    assert "done, exit 0" in node.acctd("show", "a[1]").stdout
    assert node.acctd("show", "nobody-had-this").returncode == 66


def test_a_starter_that_ignores_sigchld_gets_its_account(node: Node) -> None:
    argv = ["env", "--ignore-signal=CHLD", *node.argv("run", "--", "sh", "-c", "exit 3")]
    done = node.topology.run(
        node.topology.node, argv, check=False, env=node.environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 3
    assert "done, exit 3" in done.stderr


@pytest.mark.parametrize(
    "flush",
    [["nft", "flush", "ruleset"], ["sh", "-c", "for i in iptables ip6tables; do $i-legacy -F; $i-legacy -X; done"]],
)
def test_a_ruleset_flushed_from_outside_is_noted_and_cleaned_up(each_backend: Node, flush: list[str]) -> None:
    node = each_backend
    argv = node.argv("run", "-q", "--id", "flushed", "--", "sh", "-c", "echo up; read _")
    child = node.topology.popen(
        node.topology.node, argv, env=node.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    node.topology.run(node.topology.node, flush, check=False, capture_output=True)
    child.communicate("go\n", timeout=60)
    assert child.returncode == 0
    record = json.loads(node.acctd("show", "flushed", "--json").stdout)
    hit = ("nft" in flush) == ("nftables" in node.config.read_text())
    assert any("by another program" in note for note in record["notes"]) == hit, record["notes"]


def test_the_next_run_finishes_what_a_killed_acctd_left(each_backend: Node) -> None:
    node = each_backend
    argv = node.argv("run", "-q", "--id", "orphan", "--", "sh", "-c", "echo up; exec sleep 1000")
    child = node.topology.popen(node.topology.node, argv, env=node.environ, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    child.kill()
    child.wait()
    # The job lives on without its keeper and is let be ...
    assert node.acctd("run", "--id", "next", "--", "true").returncode == 0
    assert "orphan" in node.acctd("ls").stdout
    # ... and when it has ended, it gets its record.
    for hierarchy in discover().hierarchies:
        for pid in hierarchy.job(node.base, "job_orphan").procs():
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while (done := node.acctd("run", "--", "true")).returncode == 0 and "finished job orphan" not in done.stderr:
        assert time.monotonic() < deadline
    assert done.returncode == 0, done.stderr
    assert json.loads(node.acctd("show", "orphan", "--json").stdout)["state"] == "lost"


def test_an_orphan_is_cleared_away_whatever_the_configuration_says_by_then(node: Node) -> None:
    argv = node.argv("run", "-q", "--id", "orphan", "--", "sh", "-c", "echo up; exec sleep 1000")
    child = node.topology.popen(node.topology.node, argv, env=node.environ, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    child.kill()
    child.wait()
    text = node.config.read_text()
    node.config.write_text(text.replace("[cgroup]\n", '[cgroup]\ncontrollers = ["memory", "freezer"]\n'))
    for hierarchy in discover().hierarchies:
        for pid in hierarchy.job(node.base, "job_orphan").procs():
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while "finished job orphan" not in (done := node.acctd("run", "--network", "none", "--", "true")).stderr:
        assert done.returncode == 0, done.stderr
        assert time.monotonic() < deadline
    # Its CPU time is counted, though the configuration names no such controller any more; the node sees to the rest.
    # How it is split is sampled by some kernels.
    totals = json.loads(node.acctd("show", "orphan", "--json").stdout)["totals"]
    assert totals["cpu_user"][""] + totals["cpu_system"][""] > 0


def _read_until(fd: int, what: bytes, timeout: float = 20.0) -> bytes:
    seen = b""
    deadline = time.monotonic() + timeout
    while what not in seen:
        assert time.monotonic() < deadline, seen
        if select.select([fd], [], [], 0.1)[0]:
            try:
                seen += os.read(fd, 65536)
            except OSError:
                break
    return seen


@pytest.mark.parametrize(
    "ending", ["2>&-", "2>/dev/full", ">&-", "</dev/null >/dev/full", "2>&1 >/dev/null | head -c 0"]
)
def test_streams_that_cannot_be_written_change_no_exit_status(node: Node, ending: str) -> None:
    command = shlex.join(node.argv("run", "--id", "s", "--", "sh", "-c", "sleep 0.05; exit 7"))
    script = f"{command} {ending}" if "|" not in ending else f"set -o pipefail; {command} {ending}"
    done = node.topology.run(
        node.topology.node, ["bash", "-c", script], check=False, env=node.environ, capture_output=True, timeout=60
    )
    assert done.returncode == 7, done.stderr
    assert b"Traceback" not in done.stderr
    assert json.loads(node.acctd("show", "s", "--json").stdout)["exit_code"] == 7


def test_output_that_cannot_be_written_is_one_sentence(node: Node) -> None:
    for words, ending, code in (("ls", ">/dev/full", 70), ("ls", ">&-", 70), ("run -q --json - -- true", ">&-", 70)):
        done = node.topology.run(
            node.topology.node, ["bash", "-c", f"{shlex.join(node.argv())} {words} {ending}"],
            check=False, env=node.environ, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr


def test_a_pool_of_the_hosts_own_network_is_refused(node: Node) -> None:
    text = node.config.read_text()
    for key, pool in (("pool4", "203.0.113.0/24"), ("pool6", "2001:db8:2::/112")):
        node.config.write_text(text + f'{key} = "{pool}"\n')
        done = node.acctd("run", "--", "true")
        assert done.returncode == 73
        assert "overlaps" in done.stderr
        assert node.acctd("doctor").returncode == 69
    node.config.write_text(text)


def test_a_signal_that_comes_too_late_is_not_the_jobs_end(node: Node) -> None:
    """Sent from the moment the job ends until acctd does: it exits as the job did."""
    mark = node.directory / "pid"
    argv = node.argv("run", "--", "sh", "-c", f"echo $$ > {mark}; exit 7")
    child = node.topology.popen(node.topology.node, argv, env=node.environ, stderr=subprocess.PIPE, text=True)
    while not mark.exists() or not mark.read_text().strip():
        assert child.poll() is None
    while procs.owner(pid := int(mark.read_text())) is not None and procs.is_alive(procs.identity(pid)):
        assert child.poll() is None
    while child.poll() is None:
        child.send_signal(signal.SIGTERM)
        time.sleep(0.001)
    assert child.returncode == 7
    assert child.stderr is not None
    assert "done, exit 7" in child.stderr.read()
