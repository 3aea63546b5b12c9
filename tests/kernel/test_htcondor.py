"""HTCondor's ways to a job's numbers, from a real agent: ClassAds, the cron's monitor, and Chirp.

All is read by HTCondor's own parser, with attribute counts compared: it ends its reading silently at what it cannot
read. The starter is lab/starter.py; HTCondor's own Chirp client is held against it, too.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import classad2
import pytest
from htcondor2 import htchirp  # type: ignore[import-untyped]

from acctd.ledger import FILE
from acctd.metrics import CATALOGUE
from acctd.rows import Proxy
from exporters import chirp
from lab.starter import Starter
from lab.topology import Topology
from tests.kernel.conftest import BASE, REPO, Node, make_node
from tests.kernel.served import Served
from tests.kernel.test_classad_oracle import expected
from tests.kernel.test_hook import hook, ok
from tests.unit.test_hook import install
from tests.unit.test_hookmonitor import ads

DEADLINE = 30.0
SEND = "echo hello > /dev/udp/203.0.113.2/9"


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def read(text: str) -> dict[str, Any]:
    ad = classad2.parseOne(text, classad2.Parser.Old)
    assert len(ad) == text.count("\n")
    return {name: ad.eval(name) for name in ad}


@pytest.fixture(params=["nftables", "iptables"])
def each_backend(request: pytest.FixtureRequest, topology: Topology) -> Iterator[Node]:
    """Where other users reach it: pytest's own directory is closed to them again by each pytest that begins."""
    with tempfile.TemporaryDirectory(prefix=BASE) as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield from make_node(topology, directory, backend=request.param)


@pytest.fixture
def starter(topology: Topology) -> Iterator[Starter]:
    """On the agent's loopback, where a job with a network of its own cannot reach it."""
    with topology.enter(topology.node):
        made = Starter()
    with made:
        yield made


# ClassAds


def test_usage_and_record_are_read_by_htcondors_parser(served: Served) -> None:
    """A running job has what HTCondor's users know, but no end; the record then says the same, and how it ended."""
    ok(served, "create", "--job", "7.0", "--tag", "SlotName=slot1_1@h", "--memory", "1G", "--cpus", "2", "--pids", "50")
    ok(served, "exec", "--job", "7.0", "--", "bash", "-c", f"seq 99999 | wc; {SEND}")
    usage = read(ok(served, "usage", "--job", "7.0", "--classad"))
    shown = json.loads(ok(served, "usage", "--job", "7.0", "--json"))
    for name in (
        *("RemoteUserCpu", "RemoteSysCpu", "CpusUsage", "ResidentSetSize", "ImageSize", "MemoryUsage", "NumPids"),
        *("NetworkOutgoingExternal", "NetworkIncomingExternal", "NetworkInputMb", "NetworkOutputMb"),
        *("JobStartDate", "RemoteWallClockTime", "Owner", "Machine"),
    ):
        assert name in usage
    for name in ("CompletionDate", "ExitCode", "ExitBySignal", "ExitSignal", "HoldReasonCode"):
        assert name not in usage
    assert usage["AcctdState"] == "running"
    assert usage["AcctdTagSlotName"] == "slot1_1@h"
    assert usage["NetworkOutgoingExternal"] == shown["totals"]["network"]["OutgoingExternal"]
    assert usage["NetworkOutputMb"] == sum(
        count for rule, count in shown["totals"]["network"].items() if rule.startswith("Outgoing")
    ) / 10**6  # fmt: skip
    record = read(ok(served, "finish", "--job", "7.0", "--exit-code", "0"))
    assert record == expected(json.loads(ok(served, "finish", "--job", "7.0", "--json")))
    assert record.keys() - usage.keys() == {"CompletionDate", "ExitCode", "ExitBySignal"}
    # What is only now so is in no record.
    assert usage.keys() - record.keys() <= {metric.attribute for metric in CATALOGUE if metric.kind == "gauge"}


# The cron's monitor


METRICS = "SUM:RemoteUserCpu,SUM:NetworkOutgoingExternal,PEAK:ResidentSetSize,PEAK:NumPids"


def monitor(served: Served, state: Path, *more: str) -> dict[str, dict[str, Any]]:
    return ads(ok(served, "monitor", "--state", str(state), "--metrics", METRICS, *more))


def test_the_monitors_sum_is_the_record(served: Served, tmp_path: Path) -> None:
    """Of a job that is reported when its last process has ended; its id is given to another one then."""
    state = tmp_path / "monitor"
    idle = {"UptimeRemoteUserCpuSeconds": 0, "UptimeNetworkOutgoingExternalSeconds": 0}
    assert monitor(served, state, "--slot", "slot1_1-2") == {"slot1_1": idle, "slot1_2": idle}
    for _ in range(2):
        ok(served, "create", "--job", "7.0", "--tag", "SlotName=slot1_2@node")
        ok(served, "create", "--job", "7.0.inner", "--parent", "7.0", "--tag", "SlotName=slot1_2@node")
        ok(served, "create", "--job", "elsewhere")
        sums = dict.fromkeys(idle, 0)
        peak = 0
        for job in ("7.0", "7.0.inner", "elsewhere", "7.0"):
            ok(served, "exec", "--job", job, "--", "bash", "-c", f"{SEND}; seq 99999 | wc")
            found = monitor(served, state)
            assert found["slot1_1"] == idle
            for name in sums:
                sums[name] += found["slot1_2"][name]
            peak = max(peak, found["slot1_2"]["UptimeResidentSetSizePeakUsage"])
        quiet = monitor(served, state)["slot1_2"]
        assert {name: quiet[name] for name in idle} == idle
        record = read(ok(served, "finish", "--job", "7.0", "--exit-code", "0"))
        assert sums["UptimeNetworkOutgoingExternalSeconds"] == record["NetworkOutgoingExternal"] > 0
        assert sums["UptimeRemoteUserCpuSeconds"] == pytest.approx(record["RemoteUserCpu"])
        assert peak == record["ResidentSetSize"]
        assert monitor(served, state) == {"slot1_1": idle, "slot1_2": idle}
        ok(served, "finish", "--job", "elsewhere")


def test_two_monitors_with_states_of_their_own(served: Served, tmp_path: Path) -> None:
    for name in "ab":
        assert monitor(served, tmp_path / name) == {}
    ok(served, "create", "--job", "7.0", "--tag", "SlotName=slot1")
    seen = []
    for round_ in range(2):
        ok(served, "exec", "--job", "7.0", "--", "bash", "-c", SEND)
        names = "ab"[: 1 + round_]
        seen.append(
            [monitor(served, tmp_path / name)["slot1"]["UptimeNetworkOutgoingExternalSeconds"] for name in names]
        )
    assert seen[1] == [seen[0][0], 2 * seen[0][0]]


def test_an_agent_that_restarts_is_no_break_and_one_that_is_away_no_report(
    served: Served, tmp_path: Path, sleeper: Callable[[], subprocess.Popen[bytes]]
) -> None:
    state = tmp_path / "monitor"
    monitor(served, state)
    child = sleeper()
    ok(served, "create", "--job", "7.0", "--tag", "SlotName=slot1")
    ok(served, "attach", "--job", "7.0", str(child.pid))  # a job that is alive: one that has ended is finished then
    ok(served, "exec", "--job", "7.0", "--", "bash", "-c", SEND)
    first = monitor(served, state)["slot1"]["UptimeNetworkOutgoingExternalSeconds"]
    ok(served, "exec", "--job", "7.0", "--", "bash", "-c", SEND)
    served.process.kill()
    served.process.wait()
    done = hook(served, "monitor", "--state", str(state), "--metrics", METRICS)
    assert (done.returncode, done.stdout) == (69, "")
    served.start()
    assert monitor(served, state)["slot1"]["UptimeNetworkOutgoingExternalSeconds"] == first


@dataclass
class User:
    """An ordinary user with the hook as it is installed, and a directory of its own."""

    served: Served
    hook: Path
    home: Path

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        person = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        argv = [*person, str(self.hook), *arguments, "--socket", str(self.served.path)]
        environ = {**os.environ, **variables}
        return subprocess.run(
            argv, capture_output=True, text=True, check=False, timeout=60, env=environ, cwd=self.home
        )  # fmt: skip


@pytest.fixture
def user(served: Served) -> Iterator[User]:
    with tempfile.TemporaryDirectory(prefix=BASE) as name:
        directory = Path(name)
        directory.chmod(0o755)
        home = directory / "home"
        home.mkdir()
        os.chown(home, 65534, 65534)
        yield User(served, install(directory, "/usr/bin/python3").hook, home)


def test_a_user_is_told_that_it_sees_its_own_jobs_only_until_it_sees_all(served: Served, user: User) -> None:
    ok(served, "create", "--job", "7.0", "--tag", "SlotName=slot1")
    ok(served, "create", "--job", "8.0", "--user", "nobody", "--tag", "SlotName=slot2")
    done = user.run("monitor", "--state", str(user.home / "state"))
    assert done.returncode == 0, done.stderr
    assert list(ads(done.stdout)) == ["slot2"]
    assert "uid 65534 sees what its own jobs use" in done.stderr
    with served.node.config.open("a") as config:
        config.write('[access]\nread = ["nobody"]\n')
    served.ok("Reload")
    done = user.run("monitor", "--state", str(user.home / "state"))
    assert (done.returncode, done.stderr) == (0, "")
    assert list(ads(done.stdout)) == ["slot1", "slot2"]


# The page's scripts, as HTCondor calls them


def scripts(directory: Path) -> dict[str, Path]:
    """Those of docs/htcondor.md by the name that the text before them calls them, with the hook where it is here."""
    caller = directory / "acctd-hook"
    caller.write_text(f'#!/bin/sh\nexec {sys.executable} -m acctd.hook "$@"\n')
    made = {"acctd-hook": caller}
    page = (REPO / "docs" / "htcondor.md").read_text()
    for name, body in re.findall(r"^`(acctd-\w+)`[^\n]*:\n\n((?:    .*\n)+)", page, re.MULTILINE):
        made[name] = directory / name
        made[name].write_text(textwrap.dedent(body).replace("/opt/acctd/bin/acctd-hook", str(caller)))
    for path in made.values():
        path.chmod(0o755)
    return made


def test_the_pages_scripts_do_what_it_says(served: Served, starter: Starter, tmp_path: Path) -> None:
    made = scripts(tmp_path)
    assert made.keys() == {"acctd-hook", "acctd-prepare", "acctd-wrapper", "acctd-exit"}
    ad = tmp_path / "job.ad"
    text = 'Owner = "root"\nClusterId = 12\nGlobalJobId = "schedd.example.org#12.0#1700000000"\nCmd = "/bin/sh"\n'
    ad.write_text(text)
    environ = {
        **os.environ, "PYTHONPATH": str(REPO), "ACCTD_SOCKET": str(served.path), "_CONDOR_JOB_AD": str(ad),
        "_CONDOR_SLOT": "slot1_3", "_CONDOR_CHIRP_CONFIG": str(starter.config(tmp_path / ".chirp.config")),
    }  # fmt: skip

    def call(name: str, *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
        argv = [str(made[name]), *arguments]
        return subprocess.run(
            argv, input=given, capture_output=True, text=True, check=False, timeout=60, env=environ
        )  # fmt: skip

    job = "schedd.example.org@12.0@1700000000"
    for reason, more, ending in (
        ("exit", "ExitBySignal = false\nExitCode = 3\n", ("done", 3, None)),
        ("exit", "ExitBySignal = true\nExitSignal = 11\nExitCode = 0\n", ("done", None, 11)),
        ("remove", "", ("lost", None, None)),
    ):
        done = call("acctd-prepare", given=text)
        # Root has to name the file, so Chirp is not for it; the job begins all the same.
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert "as root, chirp needs FILE" in done.stderr
        (shown,) = json.loads(ok(served, "dump"))
        assert (shown["id"], shown["tags"]) == (job, {"SlotName": "slot1_3", "Scheduler": "htcondor"})
        assert call("acctd-prepare", given=text).stdout == "HookStatusCode = 300\n"  # it is there already
        assert call("acctd-wrapper", "sh", "-c", 'echo "$1"; exit 3', "sh", "a  b").stdout == "a  b\n"
        done = call("acctd-exit", reason, given=text + more)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        record = json.loads(ok(served, "finish", "--job", job, "--json"))
        assert (record["state"], record["exit_code"], record["exit_signal"]) == ending


# Chirp


def test_a_starter_is_told_at_once_and_at_the_end(served: Served, starter: Starter, tmp_path: Path) -> None:
    config = starter.config(tmp_path / ".chirp.config")
    ok(served, "create", "--job", "7.0")
    assert ok(served, "chirp", "--job", "7.0", str(config)) == ""
    until(lambda: "ChirpNetworkOutgoingExternal" in starter.updates)
    assert starter.evaluated()["ChirpNetworkOutgoingExternal"] == 0
    ok(served, "exec", "--job", "7.0", "--", "bash", "-c", SEND)
    record = read(ok(served, "finish", "--job", "7.0", "--exit-code", "0"))
    # Before finish has returned: the starter waits for its hook, and goes then.
    sent = starter.evaluated()
    assert sent["ChirpNetworkOutgoingExternal"] == record["NetworkOutgoingExternal"] > 0
    assert sent == {name: record[name.removeprefix("Chirp")] for name in sent}
    assert sent.keys() >= {"ChirpAcctdJobId", "ChirpNetworkInputMb", "ChirpNetworkOutputMb"}
    assert {*starter.answers} == {0}


def test_a_hook_that_runs_as_the_jobs_user_finds_the_starter(served: Served, starter: Starter, user: User) -> None:
    """As HTCondor's hooks do: by the environment, or in the working directory. Not for another's job."""
    config = starter.config(user.home / "elsewhere")
    os.chown(config, 65534, 65534)
    ok(served, "create", "--job", "7.0")
    for job in ("8.0", "9.0"):
        ok(served, "create", "--job", job, "--user", "nobody")
        done = user.run("chirp", "--job", job, **{"_CONDOR_CHIRP_CONFIG": str(config)} if job == "8.0" else {})
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        until(lambda job=job: starter.updates.get("ChirpAcctdJobId") == f'"{job}"')  # type: ignore[misc]
        config = config.rename(user.home / ".chirp.config")
    done = user.run("chirp", "--job", "7.0")
    assert (done.returncode, done.stdout) == (77, "")
    assert "is not yours" in done.stderr
    done = hook(served, "chirp", "--job", "7.0", str(config))
    assert done.returncode == 77
    assert "belongs to uid 65534; it must be uid 0's" in done.stderr


def test_the_next_agent_tells_the_starter_too_and_nobody_else_the_cookie(
    served: Served, starter: Starter, tmp_path: Path
) -> None:
    ok(served, "create", "--job", "7.0")
    config = starter.config(tmp_path / ".chirp.config")
    ok(served, "chirp", "--job", "7.0", str(config))
    config.unlink()
    until(lambda: "ChirpNetworkOutgoingExternal" in starter.updates)
    served.process.kill()
    assert served.process.stderr is not None
    log = served.process.stderr.read()
    served.process.wait()
    served.start()
    ok(served, "limit", "--job", "7.0", "--pids", "77")  # writes the row to the cgroups again
    ok(served, "exec", "--job", "7.0", "--", "bash", "-c", SEND)
    shown = [served.node.acctd(*words.split()).stdout for words in ("ps", "events", "ps --json", "events --json")]
    told = [json.dumps(served.ok("List")), json.dumps(served.ok("Usage", job="7.0")), *shown]
    attributes = cgroup_attributes(served)
    told.append(ok(served, "finish", "--job", "7.0"))
    told += [served.node.acctd("show", "7.0", "--json").stdout, json.dumps(served.ok("Events"))]
    assert int(starter.updates["ChirpNetworkOutgoingExternal"]) > 0
    assert all(told)
    assert starter.cookie not in log + "".join(told)
    assert attributes
    assert not any(starter.cookie.encode() in value for value in attributes)
    ledger = served.node.directory / "state" / FILE
    holding = [path for path in served.node.directory.rglob("*") if holds(path, starter.cookie)]
    assert {path.name.removeprefix(FILE) for path in holding} <= {"", "-wal", "-shm"}
    assert holding
    assert all(path.stat().st_mode & 0o077 == 0 for path in [ledger, *holding])


def holds(path: Path, text: str) -> bool:
    return path.is_file() and text.encode() in path.read_bytes()


def cgroup_attributes(served: Served) -> list[bytes]:
    """All that the agent has written on cgroups of this node."""
    found = []
    for place in Path("/sys/fs/cgroup").rglob(f"{served.node.base}/job_7.0"):
        for name in os.listxattr(place):
            found.append(os.getxattr(place, name))
    return found


def test_an_agent_connects_to_no_other_host(served: Served, tmp_path: Path) -> None:
    ok(served, "create", "--job", "7.0")
    for line, said in (
        ("203.0.113.2 9618 abc", "host '203.0.113.2' is no address of this host"),
        ("starter.example.org 9618 abc", "is no address of this host"),
        ("127.0.0.1 22 abc", "port 22 is out of range; it takes 1024 to 65535"),
        ("127.0.0.1 9618 a=b", "cookie of 3 characters is none"),
    ):
        config = tmp_path / "config"
        config.write_text(f"{line}\n")
        done = hook(served, "chirp", "--job", "7.0", str(config))
        assert (done.returncode, done.stdout) == (64, "")
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
    # An address of an interface of its own it does connect to: of docker0, say.
    config.write_text("203.0.113.1 9618 abc\n")
    ok(served, "chirp", "--job", "7.0", str(config))
    until(lambda: any("cannot be reached" in event["text"] for event in served.ok("Events", job="7.0")["events"]))


def test_a_starter_that_is_gone_is_told_of_once_and_holds_nobody_up(
    served: Served, starter: Starter, tmp_path: Path
) -> None:
    config = starter.config(tmp_path / ".chirp.config")
    starter.close()
    ok(served, "create", "--job", "7.0")
    ok(served, "chirp", "--job", "7.0", str(config))

    def troubles() -> list[str]:
        return [event["text"] for event in served.ok("Events", job="7.0")["events"] if event["event"] == "trouble"]

    until(lambda: troubles() != [])
    ok(served, "snapshot")
    ok(served, "finish", "--job", "7.0")
    (said,) = troubles()
    assert said.startswith(
        f"no Chirp update: the starter's Chirp proxy at 127.0.0.1 port {starter.port} cannot be reached"
    )


def test_a_starter_that_hangs_keeps_neither_ticks_nor_others_waiting(
    served: Served, starter: Starter, tmp_path: Path
) -> None:
    starter.mood = "silent"
    config = starter.config(tmp_path / ".chirp.config")
    for job in ("7.0", "8.0"):
        ok(served, "create", "--job", job)
        ok(served, "chirp", "--job", job, str(config))
    until(lambda: starter.connections == 2)
    # It is being waited for. A tick in the meantime is over before the 5 s that this may take.
    assert served.ok("Snapshot")["seconds"] < 5
    finishing = subprocess.Popen(
        [*hook_argv(served), "finish", "--job", "7.0"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPO)},
    )
    until(lambda: starter.connections == 3)
    assert [job["id"] for job in served.ok("List")["jobs"]] == ["8.0"]
    assert finishing.poll() is None
    out, _ = finishing.communicate(timeout=DEADLINE)
    assert finishing.returncode == 0
    assert read(out.decode())["AcctdJobId"] == "7.0"


def hook_argv(served: Served) -> list[str]:
    return [sys.executable, "-m", "acctd.hook", "--socket", str(served.path)]


def test_htcondors_own_client_is_answered_the_same() -> None:
    """The same attributes, set by ours and by htchirp: the same expressions, which htchirp reads."""
    values: dict[str, Any] = {
        "ChirpInt": 2**62, "ChirpNegative": -5, "ChirpReal": 1e-07, "ChirpText": 'a "b"\\ c\n\t🧪', "ChirpTrue": True,
        "ChirpEmpty": "",
    }  # fmt: skip
    with Starter(names=5) as ours, Starter(names=5) as theirs:
        refused = asyncio.run(chirp.send(Proxy(ours.host, ours.port, ours.cookie), values, DEADLINE))
        client = htchirp.HTChirp(theirs.host, theirs.port, cookie=theirs.cookie)
        with client:
            for name, value in values.items():
                client.set_job_attr_delayed(name, chirp.expression(value))
        assert ours.updates == theirs.updates
        assert ours.answers[1:] == theirs.answers[2:] == [0] * 5 + [1]
        assert refused == ["ChirpEmpty"]
        assert ours.evaluated() == {name: value for name, value in values.items() if name != "ChirpEmpty"}
        with htchirp.HTChirp(ours.host, ours.port, cookie=ours.cookie) as reader:
            for name in ours.updates:
                assert classad2.ExprTree(reader.get_job_attr_delayed(name)).eval() == values[name]
            with pytest.raises(htchirp.HTChirp.DoesntExist):
                reader.get_job_attr_delayed("ChirpEmpty")
            with pytest.raises(htchirp.HTChirp.InvalidRequest):
                reader.get_job_attr("Owner")
    with Starter(delayed=False) as none:
        with pytest.raises(chirp.ChirpError, match="takes no delayed updates"):
            asyncio.run(chirp.send(Proxy(none.host, none.port, none.cookie), values, DEADLINE))
        client = htchirp.HTChirp(none.host, none.port, cookie=none.cookie)
        with client, pytest.raises(htchirp.HTChirp.InvalidRequest):
            client.set_job_attr_delayed("ChirpInt", "5")
        with pytest.raises(htchirp.HTChirp.NotAuthenticated):
            htchirp.HTChirp(none.host, none.port, cookie="wrong")
