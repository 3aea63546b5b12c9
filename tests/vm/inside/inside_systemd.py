"""acctd as a service of a real systemd: what happens to jobs when systemd does something to the agent, and the reverse.

The units are installed as an admin would and started once; the tests follow one job through all of it, in this order.
"""

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from acctd import hookcall
from tests.vm.guest import REPO, RESULTS
from tests.vm.inside.service import (
    BASE,
    CONFIG,
    DROP_INS,
    PLACE,
    SOCKET,
    journal,
    main_pid,
    run,
    said,
    served,
    shown,
    until,
)

WATCHDOG = DROP_INS / "watchdog.conf"
CONTROLLERS = {"cpu", "cpuset", "io", "memory", "pids"}
DATAGRAM = 100 + 28  # payload, UDP and IP header

SEND = "printf %0100d 0 >/dev/udp/203.0.113.2/9"
# A datagram for each line it reads.
SENDER = f"while read -r _; do {SEND}; echo sent; done"

_SCRAPE = """
import socket, sys
with socket.socket(socket.AF_UNIX) as made:
    made.connect(sys.argv[1])
    made.sendall(b"GET /metrics HTTP/1.0\\r\\n\\r\\n")
    while data := made.recv(65536):
        sys.stdout.write(data.decode())
"""


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Not the whole machine's as in the other guests: systemd changes it too."""
    yield


@contextmanager
def configured(more: str, code: int = 0) -> Iterator[None]:
    """More in the configuration for a while. `code` is what systemctl reload exits with."""
    good = CONFIG.read_text()
    CONFIG.write_text(f"{good}\n{more}")
    try:
        run("systemctl", "reload", "acctd.service", code=code)
        yield
    finally:
        CONFIG.write_text(good)
        run("systemctl", "reload", "acctd.service")


@dataclass
class Job:
    """A job with a pipe and a memory limit: what it has sent, and how to make it send more."""

    name: str
    process: "subprocess.Popen[str]"
    datagrams: int = 0

    @classmethod
    def start(cls, name: str) -> "Job":
        run("acctd-hook", "create", "--job", name, "--user", "nobody", "--memory", "64M", "--network", "nat")
        command = ["acctd-hook", "exec", "--job", name, "--", "bash", "-c", SENDER]
        return cls(name, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))

    def send(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "sent\n"
        self.datagrams += 1

    def check(self) -> None:
        """It lives, is in its cgroup, and not a byte is missing or there twice."""
        assert self.process.poll() is None
        usage = hookcall.call(SOCKET, "Usage", job=self.name)["job"]
        assert usage["pids"] == [self.process.pid]
        assert usage["totals"]["network"]["OutgoingExternal"] == self.datagrams * DATAGRAM
        assert set((BASE / "cgroup.subtree_control").read_text().split()) >= CONTROLLERS
        assert (BASE / f"job_{self.name}/memory.max").read_text() == "67108864\n"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def installed() -> Iterator[None]:
    yield from served()


@pytest.fixture(scope="module")
def job(installed: None) -> Iterator[Job]:
    """The one that is there through all tests."""
    made = Job.start("kept")
    yield made
    made.end()


def test_the_units_are_well_formed(installed: None) -> None:
    units = ("acctd.service", "acctd-export.service", "acctd-jobs.service", "acctd.socket")
    found = run("systemd-analyze", "verify", "--man=no", *units)
    assert "acctd" not in found
    assert "acctd:" in Path("/etc/group").read_text()
    assert [oct(Path(path).stat().st_mode) for path in ("/run/acctd", "/var/lib/acctd")] == ["0o40755", "0o40711"]
    # What is left open is explained in the unit, line by line; nothing gets added by accident.
    run("systemd-analyze", "security", "--threshold=51", "acctd.service")
    run("systemd-analyze", "security", "--threshold=20", "acctd-export.service")


def test_the_agent_is_active_once_it_serves(installed: None) -> None:
    assert shown("acctd.service", "ActiveState", "Type", "NRestarts") == ["active", "notify", "0"]
    hookcall.call(SOCKET, "List")
    pid = main_pid()
    assert Path(f"/proc/{pid}/cgroup").read_text() == "0::/system.slice/acctd.service\n"
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert next(line for line in limits.splitlines() if line.startswith("Max open files")).split()[3] == "524288"
    assert os.stat(SOCKET).st_mode & 0o777 == 0o666
    assert said("serving on /run/acctd/acctd.sock")


def test_the_jobs_place_is_delegated(installed: None) -> None:
    """systemd has given every controller down to here, and no limit of its own comes with it."""
    assert set((PLACE / "cgroup.controllers").read_text().split()) >= CONTROLLERS
    assert (PLACE / "pids.max").read_text() == "max\n"
    assert (PLACE / "cgroup.procs").read_text() == ""
    keeper = shown("acctd-jobs.service", "MainPID")[0]
    assert (PLACE / "keeper/cgroup.procs").read_text() == f"{keeper}\n"


def test_a_job_under_the_hardened_agent(job: Job) -> None:
    job.send()
    job.check()
    cgroup = Path(f"/proc/{job.process.pid}/cgroup").read_text()
    assert cgroup.startswith("0::/acctd.slice/acctd-jobs.service/jobs/job_kept")
    assert os.stat(f"/proc/{job.process.pid}").st_uid == pwd.getpwnam("nobody").pw_uid


@pytest.mark.parametrize("verb", ["restart", "reload"])
def test_a_job_outlives(job: Job, verb: str) -> None:
    before, entries = main_pid(), len(journal())
    run("systemctl", verb, "acctd.service")
    assert (main_pid() == before) is (verb == "reload")
    assert said({"restart": "job kept adopted", "reload": "configuration read again"}[verb], entries)
    job.send()
    job.check()


def test_a_job_outlives_the_agents_death(job: Job) -> None:
    # For the agent that comes next, and the test that does.
    WATCHDOG.parent.mkdir(exist_ok=True)
    WATCHDOG.write_text("[Service]\nWatchdogSec=15\n")
    run("systemctl", "daemon-reload")
    before = main_pid()
    os.kill(before, signal.SIGKILL)
    job.send()
    until(lambda: main_pid() not in (0, before), "systemd does not start the agent again")
    # The socket is systemd's: this waits until the new agent answers.
    job.check()
    assert shown("acctd.service", "NRestarts") == ["1"]


def test_an_agent_that_hangs_is_ended_and_replaced(job: Job) -> None:
    before, entries = main_pid(), len(journal())
    WATCHDOG.unlink()
    run("systemctl", "daemon-reload")
    os.kill(before, signal.SIGSTOP)
    job.send()
    until(lambda: main_pid() not in (0, before), "the watchdog does not bite")
    job.check()
    assert said("Watchdog timeout", entries)
    # Where it stood is in the journal: faulthandler's doing.
    assert said("Fatal Python error: Aborted", entries)


def test_a_stopped_agent_is_started_by_its_socket(job: Job) -> None:
    run("systemctl", "stop", "acctd.service")
    assert shown("acctd.service", "ActiveState") == ["inactive"]
    job.send()
    assert "kept" in run("acctd-hook", "list")
    assert shown("acctd.service", "ActiveState") == ["active"]
    job.check()


def test_without_its_socket_a_stopped_agent_stays_stopped(job: Job) -> None:
    run("systemctl", "stop", "acctd.socket", "acctd.service")
    assert not Path(SOCKET).exists()
    assert "no agent answers" in run("acctd-hook", "list", code=69)
    job.send()
    run("systemctl", "start", "acctd.service")
    assert shown("acctd.socket", "ActiveState") == ["active"]
    job.check()


def test_systemds_own_work_on_cgroups_spares_the_jobs(job: Job) -> None:
    """Without Delegate= the first daemon-reload takes the controllers from all of them."""
    neighbour = Path("/run/systemd/system/neighbour.service")
    neighbour.write_text("[Service]\nType=oneshot\nSlice=acctd.slice\nExecStart=true\n")
    run("systemctl", "daemon-reload")
    run("systemctl", "set-property", "--runtime", "acctd.slice", "CPUWeight=50")
    run("systemctl", "start", "neighbour.service")
    assert (PLACE.parent / "cpu.weight").read_text() == "50\n"
    run("systemctl", "daemon-reexec")
    job.send()
    job.check()


def test_the_jobs_place_is_not_stopped_by_a_slip(job: Job) -> None:
    assert "Operation refused" in run("systemctl", "stop", "acctd-jobs.service", code=4)
    job.check()


def test_a_job_out_of_memory_costs_no_other(job: Job) -> None:
    run("acctd-hook", "create", "--job", "greedy", "--network", "host", "--memory", "16777216", "--swap", "0")
    greedy = ["acctd-hook", "exec", "--job", "greedy", "--", "dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1"]
    assert subprocess.run(greedy, check=False, stderr=subprocess.DEVNULL).returncode == -signal.SIGKILL
    run("acctd-hook", "finish", "--job", "greedy", "--exit-signal", "9")
    assert shown("acctd-jobs.service", "ActiveState") == ["active"]
    job.check()


def test_a_wrong_configuration_is_refused_and_an_error_in_the_journal(job: Job) -> None:
    entries = len(journal())
    with configured("[network]\nmode = 'carrier pigeon'\n", code=1):
        job.check()
        run("systemctl", "stop", "acctd.socket", "acctd.service")
        run("systemctl", "start", "acctd.service", code=1)
        # No restart mends this.
        assert shown("acctd.service", "ActiveState", "ExecMainStatus", "Result") == ["failed", "78", "exit-code"]
        CONFIG.write_text(CONFIG.read_text().partition("\n[network]")[0])
        run("systemctl", "start", "acctd.service")
    errors = [entry for entry in said("carrier pigeon", entries) if entry["PRIORITY"] == "3"]
    assert len(errors) == 2, "one from the reload, one from the start"
    job.check()


def test_an_ordinary_user_under_the_hardened_agent(job: Job) -> None:
    """What takes rights over other users' processes: their pipe, their environment, their end."""
    run("chmod", "755", "/root")  # this Python may live there
    run("usermod", "-aG", "acctd", "nobody")
    person = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--init-groups"]
    with configured("[access]\ncreate = ['@acctd']\n"):
        run(*person, "acctd-hook", "create", "--job", "own")
        run(*person, "acctd-hook", "exec", "--job", "own", "--", "bash", "-c", SEND)
        marked = subprocess.Popen([*person, "env", "ACCTD_MARK=1", "sleep", "1000"])
        try:
            until(lambda: b"ACCTD_MARK=1" in Path(f"/proc/{marked.pid}/environ").read_bytes(), "no sleep")
            assert run("acctd-hook", "track", "--job", "own", "--environment", "ACCTD_MARK=1") == f"{marked.pid}\n"
            ad = run(*person, "acctd-hook", "finish", "--job", "own", "--exit-code", "0")
            assert marked.wait() == -signal.SIGKILL
        finally:
            marked.kill()
            marked.wait()
    assert f"NetworkOutgoingExternal = {DATAGRAM}\n" in ad
    job.check()


def test_the_exporter_is_a_user_without_rights(job: Job) -> None:
    """As the units are, but for where the program is: this tree may be where the unit, or its user, sees nothing."""
    tree = Path("/opt/acctd-tree")
    packages = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    for name in ("acctd", "collectors", "exporters"):
        shutil.copytree(REPO / name, tree / name)
    for name in ("click", "msgspec", "prometheus_client"):
        shutil.copytree(packages / name, tree / name)
    program = "/usr/bin/python3 -c 'from acctd.cli.main import main; main()' export"
    drop_in = Path("/run/systemd/system/acctd-export.service.d/tree.conf")
    drop_in.parent.mkdir(parents=True)
    drop_in.write_text(f"[Service]\nExecStart=\nExecStart={program}\nEnvironment=PYTHONPATH={tree}\n")
    run("systemctl", "daemon-reload")
    out, metrics = Path("/var/lib/acctd-export/out.jsonl"), "/run/acctd-export/metrics.sock"
    with configured(f'[json.out]\npath = "{out}"\n[prometheus]\nlisten = "unix:{metrics}"\n'):
        run("systemctl", "start", "acctd-export.service")
        try:
            status = Path(f"/proc/{shown('acctd-export.service', 'MainPID')[0]}/status").read_text()
            assert f"\nUid:\t{pwd.getpwnam('acctd-export').pw_uid}\t" in status
            assert "\nCapEff:\t0000000000000000\n" in status
            assert "\nCapBnd:\t0000000000000000\n" in status
            run("acctd-hook", "create", "--job", "sent", "--network", "none")
            run("acctd-hook", "exec", "--job", "sent", "--", "true")
            run("acctd-hook", "finish", "--job", "sent", "--exit-code", "0")
            run("acctd-hook", "snapshot")
            until(lambda: out.exists() and '"id":"sent"' in out.read_text(), "the record is not delivered")
            text = run("/usr/bin/python3", "-c", _SCRAPE, metrics)
            assert "acctd_job_info{" in text
            assert 'jobid="kept"' in text
            run("systemctl", "reload", "acctd-export.service")
            assert shown("acctd-export.service", "ActiveState") == ["active"]
        finally:
            run("systemctl", "stop", "acctd-export.service")
    assert out.read_text().count('"id":"sent"') == 1
    job.check()


def test_legacy_iptables_under_the_hardened_agent(job: Job) -> None:
    """Its modules are not the agent's to load: without CAP_SYS_MODULE it says which one is missing."""
    with configured("[network]\nbackend = 'iptables'\n"):
        assert "; run modprobe ip" in run("acctd-hook", "create", "--job", "legacy", code=69)
        run("modprobe", "-a", "iptable_filter", "iptable_nat", "ip6table_filter", "ip6table_nat")
        run("acctd-hook", "create", "--job", "legacy")
        run("acctd-hook", "exec", "--job", "legacy", "--", "bash", "-c", SEND)
        ad = run("acctd-hook", "finish", "--job", "legacy", "--exit-code", "0")
    assert f"NetworkOutgoingExternal = {DATAGRAM}\n" in ad
    job.check()


def test_the_journal_has_lines_with_priorities(job: Job) -> None:
    entries = [entry for entry in journal() if entry["_COMM"] != "systemd"]
    assert [entry for entry in entries if "<" in entry["MESSAGE"][:1]] == []
    assert {entry["PRIORITY"] for entry in said("job kept created")} == {"6"}
    assert {entry["PRIORITY"] for entry in entries} >= {"3", "6"}


def test_a_finished_job_leaves_its_place_and_nothing_else(job: Job) -> None:
    job.send()
    record = json.loads(run("acctd-hook", "finish", "--job", "kept", "--exit-code", "0", "--json"))
    assert record["totals"]["network"]["OutgoingExternal"] == job.datagrams * DATAGRAM
    assert record["notes"] == []
    assert sorted(path.name for path in BASE.glob("job_*")) == []
    assert os.listdir("/run/acctd/netns") == []
    assert [name for name in os.listdir("/sys/class/net") if name.startswith("ac")] == []
    assert PLACE.exists()


def test_the_loss_of_the_places_keeper_spares_the_jobs(job: Job) -> None:
    """With the next agent systemd starts it again, in vain: a cgroup with jobs below takes no process.

    The job stays open at the end, for inside_rebooted.py.
    """
    last = Job.start("last")
    try:
        last.send()
        os.kill(int(shown("acctd-jobs.service", "MainPID")[0]), signal.SIGKILL)
        until(lambda: shown("acctd-jobs.service", "ActiveState") == ["failed"], "the keeper's end is not seen")
        last.send()
        last.check()
        run("systemctl", "restart", "acctd.service")
        assert shown("acctd-jobs.service", "ActiveState") == ["failed"]
        last.send()
        last.check()
        # What a power cut leaves: nobody ends the agent, nobody ends the job.
        run("acctd-hook", "snapshot")
        os.kill(main_pid(), signal.SIGSTOP)
        shutil.copytree("/var/lib/acctd", f"{RESULTS}/state")
    finally:
        os.kill(main_pid(), signal.SIGCONT)
        last.end()
