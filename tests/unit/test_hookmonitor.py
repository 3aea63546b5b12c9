"""The monitor for condor_startd's cron: deltas, slots, the state file, and how HTCondor's own parser reads its ads."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import classad2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acctd import hook, hookcall, hookmonitor
from acctd.hookmonitor import Seen, State, parse_metrics, parse_slots, report

METRICS = parse_metrics("SUM:RemoteUserCpu,SUM:NetworkOutgoingLan,PEAK:ResidentSetSize")
REPO = Path(__file__).parents[2]


def seen(key: str = "1.0 5.0", slot: str = "slot1_1", started: float = 5.0, **numbers: Any) -> Seen:
    return Seen(key, slot, started, {name.lower(): value for name, value in numbers.items()})


def ads(text: str) -> dict[str, dict[str, Any]]:
    """The ads by the name that ends each, as condor_startd takes a monitor's lines; one it cannot read fails here."""
    found: dict[str, dict[str, Any]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith("-"):
            lines.append(line)
            continue
        name = line[1:].strip()
        assert name not in found
        assert name.split() == [name]
        assert ":" not in name
        ad = classad2.parseOne("\n".join(lines), classad2.Parser.Old)
        assert len(ad) == len(lines)
        found[name] = {key: ad.eval(key) for key in ad if key != "SlotMergeConstraint"}
        for slot in (name, f"{name}0", "other"):
            target = classad2.ClassAd({"Name": f"{slot}@node.example.org"})
            assert ad.lookup("SlotMergeConstraint").eval(ad, target) is (slot == name)
        lines = []
    assert lines == []
    return found


# Deltas


def test_a_jobs_day() -> None:
    state, text = report(State(), [], METRICS, ["slot1_1"])
    assert ads(text) == {"slot1_1": {"UptimeRemoteUserCpuSeconds": 0, "UptimeNetworkOutgoingLanSeconds": 0}}
    job: dict[str, Any] = {"RemoteUserCpu": 1.5, "NetworkOutgoingLan": 1000, "ResidentSetSize": 300}
    state, text = report(state, [seen(**job)], METRICS, [])
    assert ads(text)["slot1_1"] == {
        "UptimeRemoteUserCpuSeconds": 1.5,  # it began after the last report: all of it
        "UptimeNetworkOutgoingLanSeconds": 1000,
        "UptimeResidentSetSizePeakUsage": 300,
    }
    state, text = report(state, [seen(**job | {"RemoteUserCpu": 4.0, "ResidentSetSize": 300})], METRICS, [])
    assert ads(text)["slot1_1"] == {
        "UptimeRemoteUserCpuSeconds": 2.5,
        "UptimeNetworkOutgoingLanSeconds": 0,
        "UptimeResidentSetSizePeakUsage": 300,
    }
    state, text = report(state, [], METRICS, [])
    assert ads(text) == {"slot1_1": {"UptimeRemoteUserCpuSeconds": 0, "UptimeNetworkOutgoingLanSeconds": 0}}
    # The id again, as another job.
    state, text = report(state, [seen("1.0 9.0", RemoteUserCpu=0.25)], METRICS, [])
    assert ads(text)["slot1_1"] == {"UptimeRemoteUserCpuSeconds": 0.25}


def test_without_a_state_what_was_used_before_is_left_out() -> None:
    state, text = report(None, [seen(RemoteUserCpu=3600, ResidentSetSize=5)], METRICS, [])
    assert ads(text)["slot1_1"] == {"UptimeRemoteUserCpuSeconds": 0, "UptimeResidentSetSizePeakUsage": 5}
    _, text = report(state, [seen(RemoteUserCpu=3601)], METRICS, [])
    assert ads(text)["slot1_1"] == {"UptimeRemoteUserCpuSeconds": 1}


def test_a_counter_that_comes_back_lower_adds_nothing_until_it_has_caught_up() -> None:
    state, _ = report(State(), [seen(RemoteUserCpu=10)], METRICS, [])
    for value, delta in ((7, 0), (9, 0), (12, 2)):
        state, text = report(state, [seen(RemoteUserCpu=value)], METRICS, [])
        assert ads(text)["slot1_1"]["UptimeRemoteUserCpuSeconds"] == delta


def test_a_metric_asked_for_later_begins_then() -> None:
    state, _ = report(State(), [seen(RemoteUserCpu=10, BlockReads=5)], METRICS, [])
    more = [*METRICS, ("SUM", "BlockReads")]
    state, text = report(state, [seen(RemoteUserCpu=10, BlockReads=8)], more, [])
    assert ads(text)["slot1_1"]["UptimeBlockReadsSeconds"] == 0
    _, text = report(state, [seen(RemoteUserCpu=10, BlockReads=9)], more, [])
    assert ads(text)["slot1_1"]["UptimeBlockReadsSeconds"] == 1


def test_several_jobs_of_a_slot_are_added_and_the_newest_has_the_peak() -> None:
    """One that has ended and not been finished keeps its peak to itself."""
    old, new = seen("a", started=1.0, RemoteUserCpu=1, ResidentSetSize=900), seen("b", started=2.0, RemoteUserCpu=2)
    new.numbers["residentsetsize"] = 100
    for jobs in ([old, new], [new, old]):
        _, text = report(State(), jobs, METRICS, [])
        ad = ads(text)["slot1_1"]
        assert (ad["UptimeRemoteUserCpuSeconds"], ad["UptimeResidentSetSizePeakUsage"]) == (3, 100)


def test_slots_in_order_and_remembered() -> None:
    wanted = parse_slots("slot1_8-11")
    state, text = report(State(slots=["slot1_2"]), [seen(slot="slot2")], METRICS, wanted)
    assert list(ads(text)) == ["slot1_2", "slot1_8", "slot1_9", "slot1_10", "slot1_11", "slot2"]
    _, text = report(state, [], METRICS, [])
    assert len(ads(text)) == 6
    full, _ = report(State(slots=[f"x{n}" for n in range(5000)]), [seen()], METRICS, ["mine"])
    assert len(full.slots) == 1024
    assert {"slot1_1", "mine"} <= {*full.slots}


@given(st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 2**59), max_size=3), max_size=12))
def test_what_is_reported_of_a_slot_is_what_its_jobs_used(history: list[dict[str, int]]) -> None:
    """Of jobs whose counters only grow, as acctd's do: the sum of all reports is the sum of all last readings."""
    state, total = State(), 0
    high: dict[str, int] = {}
    gone: set[str] = set()
    for jobs in history:
        gone |= high.keys() - jobs.keys()
        for name, value in jobs.items():
            if name not in gone:
                high[name] = max(value, high.get(name, 0))
        now = [seen(name, RemoteUserCpu=high[name]) for name in jobs if name not in gone]
        state, text = report(state, now, METRICS, ["slot1_1"])
        delta = ads(text)["slot1_1"]["UptimeRemoteUserCpuSeconds"]
        assert delta >= 0
        total += delta
    assert total == sum(high.values())


def test_a_sum_beyond_64_bits_is_read_as_it_is() -> None:
    jobs = [seen(name, NetworkOutgoingLan=2**62) for name in "ab"]
    assert ads(report(State(), jobs, METRICS, [])[1])["slot1_1"]["UptimeNetworkOutgoingLanSeconds"] == 2.0**63


# Options


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("slot1", ["slot1"]), ("slot1_1-3", ["slot1_1", "slot1_2", "slot1_3"]), ("gpu-node", ["gpu-node"]),
        ("gpu-2", ["gpu-2"]), ("a-1-2", ["a-1", "a-2"]), ("slot7-7", ["slot7"]),
    ],
)  # fmt: skip
def test_slots_as_they_are_written(text: str, slots: list[str]) -> None:
    assert parse_slots(text) == slots


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "monitor needs --state PATH"),
        ("--state s --metrics RemoteUserCpu", "--metrics 'RemoteUserCpu' is not SUM:NAME or PEAK:NAME"),
        ("--state s --metrics MEAN:X", "--metrics 'MEAN:X' is not"),
        ("--state s --metrics SUM:", "--metrics 'SUM:' is not"),
        ("--state s --metrics SUM:1x", "--metrics 'SUM:1x' is not"),
        ("--state s --metrics SUM:A-B", "--metrics 'SUM:A-B' is not"),
        ("--state s --metrics SUM:A,peak:a", "--metrics names a twice"),
        ("--state s --metrics ,", "--metrics names none"),
        ("--state s --slot slot1_9-2", "--slot 'slot1_9-2' is no range"),
        ("--state s --slot slot1_1-99999", "--slot 'slot1_1-99999' is no range"),
        ("--state s --slot sl:ot", "--slot 'sl:ot' is no slot's name"),
        ("--state s --slot a@1-2", "--slot 'a@1-2' is no range"),
        ("--state s x", "monitor takes no word such as 'x'"),
    ],
)
def test_a_call_that_makes_no_sense(options: str, said: str) -> None:
    with pytest.raises(hookcall.UsageError, match=said.replace("(", r"\(")):
        hook.run(["monitor", *options.split()])


# The agent's answers and the state file


TOTALS = {"cpu_user": {"": 1}}
Agent = Callable[[dict[str, dict[str, Any]]], None]


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Jobs by id: owner's uid, tags, parent, and their ClassAd; what the agent's List and Usage say of them."""
    jobs: dict[str, dict[str, Any]] = {}

    def call(path: str, method: str, **parameters: Any) -> dict[str, Any]:
        shown = {
            name: {"id": name, "uid": os.geteuid(), "parent": None, "started": 1.5, "tags": {}, "totals": TOTALS} | job
            for name, job in jobs.items()
        }
        if method == "List":
            return {"jobs": [{**job, "classad": None} for job in shown.values()]}
        job = shown[parameters["job"]]
        if job.get("finished"):
            raise hookcall.HookError("no open job", 66)
        return {"job": job, "classad": job["classad"]}

    monkeypatch.setattr(hookcall, "call", call)
    return jobs


AD = (
    'AcctdJobId = "7"\nRemoteUserCpu = 1.25\nCpusUsage = 1e-07\nNetworkOutgoingLan = 5\nDown = -3\nGood = true\n'
    'Owner = strcat("a",formatTime(0,"%n"))\nResidentSetSize = 12\n'
)


def monitor(path: Path, *more: str) -> int:
    metrics = "SUM:remoteusercpu,SUM:NetworkOutgoingLan,PEAK:ResidentSetSize,SUM:Owner,SUM:Good"
    return hook.run(["monitor", "--state", str(path), "--metrics", metrics, *more])


def test_the_verb(agent: dict[str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "state"
    agent["7"] = {"tags": {"slotname": "slot1_1@node"}, "classad": AD}
    agent["in"] = {"tags": {"SlotName": "slot1_1"}, "classad": AD, "parent": "7"}
    agent["deep"] = {"tags": {"SlotName": "slot1_1"}, "classad": AD, "parent": "in"}
    agent["glidein"] = {"tags": {"SlotName": "slot9"}, "classad": AD, "parent": "deep"}
    agent["other"] = {"tags": {"Vo": "cms"}, "classad": AD}
    agent["gone"] = {"tags": {"SlotName": "slot5"}, "finished": True}
    assert monitor(path) == 0
    first = {
        "UptimeremoteusercpuSeconds": 0,
        "UptimeNetworkOutgoingLanSeconds": 0,
        "UptimeResidentSetSizePeakUsage": 12,
    }
    assert ads(capsys.readouterr().out) == {"slot1_1": first, "slot9": first}
    assert path.stat().st_mode & 0o777 == 0o600
    agent["7"]["classad"] = AD.replace("1.25", "3.5")
    assert monitor(path, "--slot", "slot1_1-2") == 0
    read = ads(capsys.readouterr().out)
    assert read["slot1_1"] == first | {"UptimeremoteusercpuSeconds": 2.25}
    assert read["slot1_2"]["UptimeNetworkOutgoingLanSeconds"] == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["state", "state.lock"]


@pytest.mark.parametrize("slot", ["", "a b", "slot1\nEvil = 1", 'x" || true || "', "x:y", "@node", "x" * 65, "é"])
def test_a_tag_that_names_no_slot_is_told_and_left_out(
    agent: dict[str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str], slot: str
) -> None:
    agent["7"] = {"tags": {"SlotName": slot}, "classad": AD}
    assert monitor(tmp_path / "state") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("acctd-hook: job 7 is left out: its tag SlotName")
    assert err.count("\n") == 1


def test_who_cannot_see_others_jobs_is_told(
    agent: dict[str, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent["7"] = {"uid": 4712, "totals": {}}  # as the agent shows it to a stranger
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    assert monitor(tmp_path / "state") == 0
    assert "uid 4711 sees what its own jobs use, and no other's" in capsys.readouterr().err
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert monitor(tmp_path / "state") == 0
    assert capsys.readouterr().err == ""


def test_who_sees_all_jobs_is_not_told_otherwise(
    agent: dict[str, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of access.read, with a stranger's job that has a slot, and one that has none."""
    agent["7"] = {"uid": 4712, "tags": {"SlotName": "slot1"}, "classad": AD}
    agent["8"] = {"uid": 4713}
    agent["mine"] = {"uid": 4711, "totals": {}}  # not read yet
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    assert monitor(tmp_path / "state") == 0
    out, err = capsys.readouterr()
    assert (list(ads(out)), err) == (["slot1"], "")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", '{"jobs": {}}', '{"jobs": {"a": 7}, "slots": []}', '{"jobs": [], "slots": []}',
             "[" * 9999, '{"jobs": {"a": {"x": Infinity}}, "slots": []}', '{"jobs": {"a": {"x": ' + "9" * 5000 + "}}}",
             '{"jobs": {"a": {"x": -1}}, "slots": []}', '{"jobs": {"a": {"x": "1"}}, "slots": []}', "\udcff"],
)  # fmt: skip
def test_a_damaged_state_is_told_and_begun_anew(
    agent: dict[str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = tmp_path / "state"
    path.write_bytes(text.encode(errors="surrogateescape"))
    agent["7"] = {"tags": {"SlotName": "slot1"}, "classad": AD}
    assert monitor(path) == 0
    out, err = capsys.readouterr()
    assert ads(out)["slot1"]["UptimeremoteusercpuSeconds"] == 0
    assert err == f"acctd-hook: {path} holds no state; what was used until now is left out\n"
    assert monitor(path) == 0
    assert capsys.readouterr().err == ""


def test_a_state_that_cannot_be_kept_is_an_error(agent: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/nonexistent/x")
    (tmp_path / "directory").mkdir()
    (tmp_path / "trap.new").symlink_to("/nonexistent/x")
    for path in ("/nonexistent/state", "/proc/state", str(tmp_path / "directory"), str(tmp_path / "trap")):
        with pytest.raises(hookcall.HookError, match=r"state .* cannot be used: .*; name a file") as caught:
            monitor(Path(path))
        assert caught.value.code == 71


def test_an_agent_that_does_not_answer_changes_nothing(
    agent: dict[str, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "state"
    agent["7"] = {"tags": {"SlotName": "slot1"}, "classad": AD}
    assert monitor(path) == 0
    before = path.read_bytes()
    capsys.readouterr()

    def fail(*_: object, **__: object) -> dict[str, Any]:
        raise hookcall.HookError("no agent", 69, unreachable=True)

    monkeypatch.setattr(hookcall, "call", fail)
    with pytest.raises(hookcall.HookError, match="no agent"):
        monitor(path)
    assert (path.read_bytes(), capsys.readouterr().out) == (before, "")


def _count(path: Path, queue: Any, value: Any) -> None:
    """One monitor of many: a job whose counter grows at each look, in the state that all share."""

    def call(_path: str, method: str, **_: Any) -> dict[str, Any]:
        job = {"id": "7", "uid": os.geteuid(), "parent": None, "started": 1.5, "tags": {"SlotName": "s"}}
        if method == "List":
            return {"jobs": [job]}
        with value.get_lock():
            value.value += 1
            return {"job": job, "classad": f"RemoteUserCpu = {value.value}\n"}

    hookcall.call = call  # type: ignore[assignment]  # in a process of its own
    printed: list[str] = []
    sys.stdout.write = printed.append  # type: ignore[method-assign]
    for _ in range(20):
        hook.run(["monitor", "--state", str(path), "--metrics", "SUM:RemoteUserCpu"])
    queue.put("".join(printed))


def test_two_at_a_time_report_each_delta_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue, value = context.Queue(), context.Value("q", 0)
    path = tmp_path / "state"
    path.write_text(json.dumps({"jobs": {}, "slots": []}))
    children = [context.Process(target=_count, args=(path, queue, value)) for _ in range(4)]
    for child in children:
        child.start()
    texts = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join(60)
    deltas = [int(line.split(" = ")[1]) for text in texts for line in text.splitlines() if "Uptime" in line]
    assert len(deltas) == 80
    assert min(deltas) >= 0
    assert sum(deltas) == value.value == 80
    assert json.loads(path.read_text())["jobs"] == {"7 1.5": {"RemoteUserCpu": 80}}


_DYING = """
import os, sys
from acctd import hook, hookcall
step = int(sys.argv[2])
def call(path, method, **_):
    job = {"id": "7", "uid": os.geteuid(), "parent": None, "started": 1.5, "tags": {"SlotName": "s"}}
    return {"jobs": [job]} if method == "List" else {"job": job, "classad": "RemoteUserCpu = 9\\n"}
hookcall.call = call
count = 0
def trace(frame, event, arg):
    global count
    if event == "line" and frame.f_code.co_filename.endswith("hookmonitor.py"):
        count += 1
        if count == step:
            os.kill(os.getpid(), 9)
    return trace
from acctd import hookmonitor
sys.settrace(trace)
hook.run(["monitor", "--state", sys.argv[1], "--metrics", "SUM:RemoteUserCpu"])
sys.stdout.flush()
"""


def test_killed_at_any_line_the_state_is_whole_and_nothing_is_said_twice(tmp_path: Path) -> None:
    path = tmp_path / "state"
    environ = {**os.environ, "PYTHONPATH": str(REPO)}
    ways, code, step = set(), -9, 20
    while code == -9:
        step += 2  # the lines after the new state is in its place are few
        path.write_text(json.dumps({"jobs": {"7 1.5": {"RemoteUserCpu": 4}}, "slots": ["s"]}))
        argv = [sys.executable, "-c", _DYING, str(path), str(step)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, env=environ)
        code = done.returncode
        value = json.loads(path.read_text())["jobs"]["7 1.5"]["RemoteUserCpu"]
        ways.add((value, done.stdout.count("UptimeRemoteUserCpuSeconds = 5")))
    assert code == 0
    assert ways == {(4, 0), (9, 0), (9, 1)}


def test_the_default_metrics_are_some() -> None:
    assert len(parse_metrics(hookmonitor._METRICS)) == 8
