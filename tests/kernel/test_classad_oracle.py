"""A real job's ClassAd, by the real CLI, read by HTCondor's own parser and held against the JSON record.

tests/unit/test_classad.py does the same for made-up records; here the text goes the whole way: command line, ledger,
`acctd show`, parser.
"""

import json
from typing import Any

import classad2
import pytest

from acctd.metrics import BY_NAME
from acctd.wording import clean
from tests.kernel.conftest import Node

LONGEST = 4096  # characters of a tag's value, the most that model.check_tag lets through

TAGS = {
    "Empty": "",
    "Quotes": "say \"yes\" and 'no'",
    "Newlines": "\none\n\ntwo\r\n",
    "Backslashes": "\\",
    "Path": "C:\\new\\table\\",
    "EscapeLookalikes": '\\" \\n \\t \\\\" \\',
    "Both": 'first "line"\\\nsecond\\',
    "Unicode": "Jürgen Müller · 加速器 · 🧪 · \u2028 · e\u0301",
    "Controls": "tab\tbell\x07escape\x1bdelete\x7f",
    "LooksLikeAnAttribute": "Owner = root\nAcctdUid = 0",
    "LooksLikeAnExpression": 'strcat("a","b")',
    "Comment": "# no comment // none /* here */",
    "Longest": "x" * LONGEST,
    "LongestOfQuotes": '"' * LONGEST,
    "LongestOfBackslashes": "\\" * LONGEST,
    "LongestOfNewlines": "\n" * LONGEST,
    "LongestUnicode": "🧪" * LONGEST,
    "_" * 64: "the longest key",
}

# Owners as directories of accounts have them, put where no passwd entry is needed: the agent itself.
OWNERS = ["54321", 'o"neill', "DOMAIN\\alice", "DOMAIN\\", "jürgen müller@example.org", "two\nlines"]
_JOB_OF = """
import os, sys
from acctd import config, launch
from acctd.agent import Agent
from acctd.job import Ending
from acctd.model import JobSpec, Owner
with Agent(config.load(None, os.environ)) as agent:
    job = agent.create(JobSpec(id="odd", owner=Owner(4294967294, 4294967294, sys.argv[1]), network="none"))
    process, at = launch.start(job, ["true"], isolation=None, groups=[], environ=os.environ, blocked=set())
    agent.begin(job, at)
    agent.finish(job, Ending.now(process.wait()))
"""

# Two processes with a name that holds all that a ClassAd minds. The newest shortage is the one that is told whole.
_OUT_OF_MEMORY = r"""
import os, sys, time
from dataclasses import replace
from acctd import config, launch
from acctd.agent import Agent
from acctd.cgroup import evidence
from acctd.job import Ending
from acctd.model import JobSpec, Limits, Owner
from acctd.policies import Shortage
from acctd.wording import sentence
script = r'''
import ctypes, os, time
ctypes.CDLL(None).prctl(15, b'(a\n"b\\', 0, 0, 0)
os.fork()
time.sleep(1000)
'''
with Agent(config.load(None, os.environ)) as agent:
    spec = JobSpec(id="short", owner=Owner(0, 0, "root"), network="none", limits=Limits(memory=64 << 20))
    job = agent.create(spec)
    command = [sys.executable, "-c", script]
    process, at = launch.start(job, command, isolation=None, groups=[], environ=os.environ, blocked=set())
    agent.begin(job, at)
    deadline = time.monotonic() + 60
    while [process.name[0] for process in evidence.largest(job.cgroups.procs(), budget=60).processes] != ["(", "("]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    found = evidence.largest(job.cgroups.procs(), budget=60)
    for _ in range(20):
        job.ran_out(Shortage(time.time(), "host", None, "killed by the kernel", None, None))
    kinds = evidence.breakdown(job.cgroups.directory("memory"))
    last = Shortage(time.time(), "job", "short", "killed", 64 << 20, 60 << 20, 0, kinds, found.processes)
    job.ran_out(replace(last, text=sentence("short", last)))
    assert job.cgroups.kill() == set()
    agent.finish(job, Ending.now(process.wait()))
"""


def both_forms(node: Node, job: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What HTCondor reads of the ad, and the record. A line it cannot read ends its reading silently: count them."""
    path = node.directory / "ad"
    with path.open("wb") as file:  # a pipe read as text would turn carriage returns into newlines
        assert node.acctd("show", job, "--classad", capture_output=False, stdout=file).returncode == 0
    text = path.read_bytes().decode()
    ad = classad2.parseOne(text, classad2.Parser.Old)
    assert len(ad) == text.count("\n")
    return {name: ad.eval(name) for name in ad}, json.loads(node.acctd("show", job, "--json").stdout)


def expected(record: dict[str, Any]) -> dict[str, Any]:
    """The attributes that a record without a hold must have, worked out from its JSON."""
    totals = record["totals"]
    wall = record["wall_ns"]
    ad = {
        "AcctdJobId": record["id"],
        "AcctdState": record["state"],
        "Owner": record["owner"],
        "AcctdUid": record["uid"],
        "Machine": record["node"],
        "JobStartDate": int(record["started"]),
        "CompletionDate": int(record["ended"]),
        "RemoteWallClockTime": wall / 10**9,
        "ExitBySignal": False,
        "ExitCode": record["exit_code"],
        "AcctdNetworkMode": record["network"],
        "CpusUsage": (totals["cpu_user"][""] + totals["cpu_system"][""]) / wall,
        "MemoryUsage": -(-totals["memory_resident_peak"][""] // 2**20),
    }
    for name, labels in totals.items():
        metric = BY_NAME[name]
        if name in ("network", "network_packets"):
            ad |= {metric.attribute + rule: value for rule, value in labels.items()}
        elif labels:
            value = sum(labels.values())
            if metric.scale != 1:
                value = -(-value // metric.scale) if metric.unit == "bytes" else value / metric.scale
            ad[metric.attribute] = value
    if "network" in totals:
        for name, way in (("NetworkInputMb", "Incoming"), ("NetworkOutputMb", "Outgoing")):
            ad[name] = sum(value for rule, value in totals["network"].items() if rule.startswith(way)) / 10**6
    for name, limit in record["limits"].items():
        if limit is not None and (name, limit) != ("memory_policy", "custom"):
            ad["AcctdLimit" + "".join(word.capitalize() for word in name.split("_"))] = limit
    if record["cpus"]:
        ad["AcctdCpus"] = record["cpus"]
    if record["shortages"]:
        ad |= out_of_memory(record)
    return ad | {f"AcctdTag{key}": value for key, value in record["tags"].items()}


def out_of_memory(record: dict[str, Any]) -> dict[str, Any]:
    """The attributes of the newest shortage."""
    last = record["shortages"][-1]
    ad = {
        "AcctdOomCount": len(record["shortages"]) + record["shortages_dropped"],
        "AcctdOomTime": int(last["time"]),
        "AcctdOomLargest": ", ".join(f"{p['pid']} {clean(p['name'])} {p['resident']}" for p in last["processes"]),
    }
    for name in ("level", "whose", "action", "limit", "usage", "kills", "text"):
        ad[f"AcctdOom{name.capitalize()}"] = last[name]
    for kind, size in last["memory"].items():
        ad["AcctdOomMemory" + "".join(word.capitalize() for word in kind.split("_"))] = size
    return ad


def test_every_value_of_a_real_job_reads_back(node: Node) -> None:
    options = [word for key, value in TAGS.items() for word in ("--tag", f"{key}={value}")]
    limits = ["--memory", str(2**62), "--cpus", "65536", "--pids", "4194304", "--cpu-shares", "262144"]
    command = ["dd", "if=/dev/zero", "of=/dev/null", "count=1"]
    done = node.acctd("run", "-q", "--id", "a.b@c:d+e[1]-f", *limits, *options, "--", *command)
    assert done.returncode == 0, done.stderr
    read, record = both_forms(node, "a.b@c:d+e[1]-f")
    assert record["tags"] == TAGS
    wanted = expected(record)
    assert len(read) == len(wanted)
    assert read == wanted
    # 1, 1.0 and true are equal in Python, and three things in a ClassAd.
    assert {name: type(value) for name, value in read.items()} == {name: type(wanted[name]) for name in read}


@pytest.mark.parametrize("owner", OWNERS)
def test_an_odd_owner_reads_back(node: Node, owner: str) -> None:
    done = node.python(_JOB_OF, owner)
    assert done.returncode == 0, done.stderr
    read, record = both_forms(node, "odd")
    assert record["owner"] == read["Owner"] == owner
    assert record["uid"] == read["AcctdUid"] == 4294967294
    assert read == expected(record)


def test_a_shortage_with_real_evidence_reads_back(node: Node) -> None:
    done = node.python(_OUT_OF_MEMORY)
    assert done.returncode == 0, done.stderr
    read, record = both_forms(node, "short")
    assert len(record["shortages"]) == 20
    assert record["shortages_dropped"] == 1
    last = record["shortages"][-1]
    assert [process["name"] for process in last["processes"]] == ['(a\n"b\\'] * 2
    assert last["memory"].keys() >= {"anon", "file", "swap"}
    wanted = expected(record)
    del wanted["ExitCode"]
    hold = {"HoldReasonCode": 34, "HoldReasonSubCode": 102, "HoldReason": last["text"]}
    assert read == wanted | hold | {"ExitBySignal": True, "ExitSignal": 9}
    shown = node.acctd("show", "short").stdout
    assert shown.count("out of memory at") == 20
    assert "  memory    out of memory 21 times, the last time: Job short went over its memory limit of 64 MB" in shown
    assert f"{last['processes'][0]['pid']}  " in shown


def test_a_user_that_does_not_exist_is_refused(node: Node) -> None:
    for user in ("no-such-user", "54321", "4294967296"):
        done = node.acctd("run", "--user", user, "--", "touch", f"{node.directory}/ran")
        assert done.returncode == 66
        assert f"user '{user}' does not exist on this host" in done.stderr
    assert not (node.directory / "ran").exists()


def test_a_tag_beyond_the_limit_is_refused(node: Node) -> None:
    done = node.acctd("run", "--tag", f"Big={'x' * (LONGEST + 1)}", "--", "touch", f"{node.directory}/ran")
    assert done.returncode == 64
    assert "tag Big" in done.stderr
    assert not (node.directory / "ran").exists()
