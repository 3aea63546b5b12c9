"""The emitted ad against HTCondor's own parser: same number of attributes, same values."""

from dataclasses import replace
from typing import Any

import classad2
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from acctd.errors import UsageError
from acctd.metrics import CATALOGUE, NETWORK_BYTES, NETWORK_PACKETS
from acctd.model import INT64_MAX, Limits, Record
from acctd.policies import LargeProcess, Shortage
from exporters.classad import format_ad, format_value, record_ad

RECORD = Record(
    id="12.0",
    owner="alice",
    uid=1000,
    node="node7.example.org",
    state="done",
    started=1_700_000_000.9,
    ended=1_700_000_004.2,
    wall_ns=4_000_000_000,
    exit_code=3,
    exit_signal=None,
    network="nat",
    limits=Limits(memory=2 << 30, memory_soft=1 << 30, cpus=1.5, cpuset="0-3"),
    tags={"project": "cms"},
    totals={
        "cpu_user": {"": 5_000_000_001},
        "cpu_system": {"": 999_999_999},
        "cpu_throttled": {"": 77},
        "memory_resident_peak": {"": (1 << 20) + 1},
        "memory_peak": {"": 3 << 20},
        "memory_anon_peak": {"": 5},
        "block_read": {"254:0": 1024, "254:16": 1},
        "block_write": {"254:0": 0},
        "block_reads": {"254:0": 2, "254:16": 3},
        "block_writes": {"254:0": 9},
        "pids_peak": {"": 11},
        "network": {"IncomingInternal": 1_500_000, "IncomingExternal": 500_000, "OutgoingInternal": 7},
        "network_packets": {"OutgoingInternal": 1},
    },
)

SHORTAGE = Shortage(
    time=1_700_000_003.9,
    level="job",
    whose="12.0",
    action="held",
    limit=2 << 30,
    usage=(2 << 30) - 4096,
    memory={"anon": 2_000_000_000, "kernel": 4096, "kernel_stack": 0},
    processes=(LargeProcess(4711, "python3", 1_900_000_000, 1.5), LargeProcess(4712, 'a "b"\n', 5, 1.5)),
    text="Job 12.0 went over its memory limit.",
)

ENDED = replace(RECORD, exit_code=None, exit_signal=9)

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
NASTY = st.text(st.sampled_from('\\"\n\r\t %,()/*#a\x01\x7fé'), max_size=12)


def parsed(text: str, parser: Any = classad2.Parser.Auto) -> dict[str, object]:
    """What HTCondor reads. A malformed line ends its parsing without an error, so the count is held too."""
    ad = classad2.parseOne(text, parser)
    assert len(ad) == text.count("\n"), text
    return {name: ad.eval(name) for name in ad}


def same(read: dict[str, object], ours: dict[str, Any]) -> bool:
    """Equal in value and in type: 1, 1.0 and true are three things in a ClassAd."""
    return read == ours and all(type(read[name]) is type(value) for name, value in ours.items())


def test_a_record_in_htcondors_words_and_units():
    assert record_ad(RECORD) == {
        "AcctdJobId": "12.0",
        "AcctdState": "done",
        "Owner": "alice",
        "AcctdUid": 1000,
        "Machine": "node7.example.org",
        "JobStartDate": 1_700_000_000,
        "CompletionDate": 1_700_000_004,
        "RemoteWallClockTime": 4.0,
        "ExitBySignal": False,
        "ExitCode": 3,
        "RemoteUserCpu": 5.000000001,
        "RemoteSysCpu": 0.999999999,
        "CpusUsage": 1.5,
        "AcctdCpuThrottled": 77,
        "ResidentSetSize": 1025,
        "MemoryUsage": 2,
        "ImageSize": 3072,
        "AcctdMemoryAnonPeak": 5,
        "BlockReadKbytes": 2,
        "BlockWriteKbytes": 0,
        "BlockReads": 5,
        "BlockWrites": 9,
        "NumPids": 11,
        "NetworkIncomingInternal": 1_500_000,
        "NetworkIncomingExternal": 500_000,
        "NetworkOutgoingInternal": 7,
        "AcctdNetworkPacketsOutgoingInternal": 1,
        "NetworkInputMb": 2.0,
        "NetworkOutputMb": 7e-06,
        "AcctdNetworkMode": "nat",
        "AcctdLimitMemory": 2 << 30,
        "AcctdLimitMemorySoft": 1 << 30,
        "AcctdLimitCpus": 1.5,
        "AcctdLimitCpuset": "0-3",
        "AcctdTagproject": "cms",
    }


def test_a_record_reads_back_the_same():
    ad = record_ad(RECORD)
    for parser in (classad2.Parser.Auto, classad2.Parser.Old):
        assert same(parsed(format_ad(ad), parser), ad)


def test_what_was_not_counted_is_absent():
    ad = record_ad(replace(RECORD, totals={}, exit_code=None, limits=Limits(), wall_ns=0))
    assert set(ad) == {
        "AcctdJobId", "AcctdState", "Owner", "AcctdUid", "Machine", "JobStartDate", "CompletionDate",
        "RemoteWallClockTime", "AcctdNetworkMode", "AcctdTagproject",
    }  # fmt: skip


def test_no_wall_time_gives_no_average():
    ad = record_ad(replace(RECORD, wall_ns=0))
    assert "CpusUsage" not in ad
    assert ad["RemoteWallClockTime"] == 0.0


def test_a_signal_is_told_from_an_exit_code():
    ad = record_ad(replace(RECORD, exit_code=None, exit_signal=15))
    assert (ad["ExitBySignal"], ad["ExitSignal"]) == (True, 15)
    assert "ExitCode" not in ad


def test_every_metric_has_one_attribute_of_its_own():
    totals = {m.name: {"Rule" if m in (NETWORK_BYTES, NETWORK_PACKETS) else "": 1} for m in CATALOGUE}
    bare = record_ad(replace(RECORD, totals={}))
    derived = {"CpusUsage", "MemoryUsage", "NetworkInputMb", "NetworkOutputMb"}
    emitted = set(record_ad(replace(RECORD, totals=totals))) - set(bare) - derived
    labelled = {NETWORK_BYTES: "Rule", NETWORK_PACKETS: "Rule"}
    assert emitted == {metric.attribute + labelled.get(metric, "") for metric in CATALOGUE}
    assert len({metric.attribute.lower() for metric in CATALOGUE}) == len(CATALOGUE)


def test_running_out_of_memory_holds_as_htcondor_does():
    totals = RECORD.totals | {"memory_oom_kills": {"": 1}}
    killed = record_ad(replace(RECORD, totals=totals, exit_code=None, exit_signal=9))
    assert (killed["HoldReasonCode"], killed["HoldReasonSubCode"]) == (34, 102)
    assert killed["HoldReason"] == (
        "The kernel killed the job for going over its memory limit of 2048 MB (highest use seen: 2 MB); "
        "submit it again with more memory."
    )
    # A pilot that outlives its payload is not to blame for it; SIGKILL alone may have come from anyone.
    assert "HoldReason" not in record_ad(replace(RECORD, totals=totals))
    assert "HoldReason" not in record_ad(replace(RECORD, exit_code=None, exit_signal=9))


def held(record: Record) -> bool:
    ad = record_ad(record)
    assert ("HoldReasonCode" in ad) == ("HoldReasonSubCode" in ad) == ("HoldReason" in ad)
    return "HoldReason" in ad


def test_a_shortage_is_told_in_plain_attributes():
    record = replace(ENDED, shortages=(replace(SHORTAGE, action="grown"), SHORTAGE), shortages_dropped=3)
    ad = record_ad(record)
    assert {name: value for name, value in ad.items() if "Oom" in name or "Hold" in name} == {
        "AcctdOomCount": 5,
        "AcctdOomTime": 1_700_000_003,
        "AcctdOomLevel": "job",
        "AcctdOomWhose": "12.0",
        "AcctdOomAction": "held",
        "AcctdOomLimit": 2 << 30,
        "AcctdOomUsage": (2 << 30) - 4096,
        "AcctdOomKills": 0,
        "AcctdOomMemoryAnon": 2_000_000_000,
        "AcctdOomMemoryKernel": 4096,
        "AcctdOomMemoryKernelStack": 0,
        "AcctdOomLargest": '4711 python3 1900000000, 4712 a "b"? 5',
        "AcctdOomText": "Job 12.0 went over its memory limit.",
        "HoldReasonCode": 34,
        "HoldReasonSubCode": 102,
        "HoldReason": "Job 12.0 went over its memory limit.",
    }
    for parser in (classad2.Parser.Auto, classad2.Parser.Old):
        assert same(parsed(format_ad(ad), parser), ad)


def test_what_is_not_known_of_a_shortage_is_absent():
    ad = record_ad(replace(RECORD, shortages=(Shortage(1.5, "host", None, "killed by the kernel", None, None),)))
    assert {name for name in ad if "Oom" in name} == {
        "AcctdOomCount", "AcctdOomTime", "AcctdOomLevel", "AcctdOomAction", "AcctdOomKills",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("level", "action", "kills", "signal", "code", "counted", "hold"),
    [
        ("job", "held", 0, 9, None, 0, True),
        ("job", "killed", 0, 9, None, 0, True),
        ("job", "killed", 0, None, None, 0, True),  # its exit status is lost
        ("job", "killed by the kernel", 1, 9, None, 1, True),
        ("job", "killed by the kernel", 0, 9, None, 0, True),  # the kernel does not count
        ("job", "released", 0, 9, None, 1, True),
        # It went on, or ended by itself: a process of it was killed, or nothing happened at all.
        ("job", "grown", 0, 9, None, 0, False),
        ("job", "killed by the kernel", 1, None, 0, 1, False),
        ("job", "killed by the kernel", 1, 15, None, 1, False),
        ("job", "held", 0, None, 137, 0, False),
        ("job", "released", 0, 9, None, 0, False),
        # Another's limit, or none.
        ("family", "held", 0, 9, None, 1, False),
        ("parent", "killed", 1, 9, None, 1, False),
        ("host", "killed by the kernel", 1, 9, None, 1, False),
    ],
)
def test_a_hold_is_for_who_went_over_its_own_limit_and_was_ended(level, action, kills, signal, code, counted, hold):
    shortage = replace(SHORTAGE, level=level, action=action, kills=kills)
    totals = RECORD.totals | {"memory_oom_kills": {"": counted}}
    assert held(replace(RECORD, exit_signal=signal, exit_code=code, totals=totals, shortages=(shortage,))) == hold


def test_the_newest_shortage_is_what_ended_the_job():
    own, foreign = replace(SHORTAGE, action="killed by the kernel", kills=1), replace(SHORTAGE, level="host")
    assert held(replace(ENDED, shortages=(foreign, own)))
    assert not held(replace(ENDED, shortages=(own, foreign)))


def test_a_shortage_without_words_gets_some():
    ad = record_ad(replace(ENDED, shortages=(replace(SHORTAGE, text=""),)))
    assert str(ad["HoldReason"]).startswith("Job 12.0 went over its memory limit of 2048 MB (in use 2048 MB")


def test_a_policy_that_is_not_the_usual_one_and_own_cores_are_told():
    ad = record_ad(replace(RECORD, limits=Limits(memory=2 << 30, memory_policy="soft"), cpus="2,5-7"))
    assert (ad["AcctdLimitMemoryPolicy"], ad["AcctdCpus"]) == ("soft", "2,5-7")
    assert not {"AcctdLimitMemoryPolicy", "AcctdCpus"} & set(record_ad(RECORD))


@given(name=TEXT | NASTY, text=TEXT | NASTY, kind=st.text(max_size=8), size=st.integers(0, 2**64))
@settings(deadline=None)
def test_any_shortage_reads_back_the_same(name, text, kind, size):
    processes = (LargeProcess(1, name, size, 0.0),)
    shortage = replace(SHORTAGE, usage=size, memory={kind: size}, processes=processes, text=text)
    ad = record_ad(replace(ENDED, shortages=(shortage,)))
    assert same(parsed(format_ad(ad)), ad)
    assert ad["HoldReasonCode"] == 34


def test_an_integer_that_classad_would_read_as_0_is_left_out_by_name():
    totals = {"cpu_throttled": {"": INT64_MAX + 1}, "memory_failcnt": {"": INT64_MAX}, "block_reads": {"8:0": 0}}
    ad = record_ad(replace(RECORD, totals=totals))
    assert "AcctdCpuThrottled" not in ad
    assert (ad["AcctdMemoryFailcnt"], ad["BlockReads"]) == (INT64_MAX, 0)
    assert ad["AcctdOmitted"] == "AcctdCpuThrottled"
    assert same(parsed(format_ad(ad)), ad)


@pytest.mark.parametrize("stamp", [float("nan"), float("inf"), -float("inf")])
def test_a_stamp_that_is_no_number_is_left_out_by_name(stamp):
    ad = record_ad(replace(RECORD, started=stamp))
    assert "JobStartDate" not in ad
    assert ad["AcctdOmitted"] == "JobStartDate"


def test_tags_that_differ_only_in_case_do_not_merge():
    ad = record_ad(replace(RECORD, tags={"vo": "b", "VO": "a"}))
    assert (ad["AcctdTagVO"], ad["AcctdOmitted"]) == ("a", "AcctdTagvo")
    assert same(parsed(format_ad(ad)), ad)


def test_a_metric_of_another_version_is_named_but_not_guessed():
    ad = record_ad(replace(RECORD, totals={"gpu_time": {"": 5}}))
    assert ad["AcctdOmitted"] == "AcctdGpuTime"


def test_notes_are_one_line():
    ad = record_ad(replace(RECORD, notes=("The watcher died.", "Chain was flushed twice.")))
    assert ad["AcctdNotes"] == "The watcher died. Chain was flushed twice."


@given(owner=TEXT | NASTY, value=TEXT | NASTY, note=TEXT | NASTY)
@settings(deadline=None)
def test_any_owner_tag_and_note_read_back_the_same(owner, value, note):
    ad = record_ad(replace(RECORD, owner=owner, tags={"a": value, "z": "last"}, notes=(note,)))
    assert "AcctdOmitted" not in ad
    assert same(parsed(format_ad(ad)), ad)


@given(st.one_of(TEXT, NASTY, st.integers(-INT64_MAX - 1, INT64_MAX), st.booleans()))
@example("\\")
@example('\\"')
@example('"\\\n\\"\\')
@example("\n" * 4096)
@example("y" * 200_000)
@example("\r")
@example(INT64_MAX)
@example(-INT64_MAX - 1)
@settings(max_examples=300, deadline=None)
def test_any_value_reads_back_the_same_by_both_parsers(value):
    text = format_ad({"Before": 1, "A": value, "After": True})
    for parser in (classad2.Parser.Auto, classad2.Parser.Old):
        assert same(parsed(text, parser), {"Before": 1, "A": value, "After": True})


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(deadline=None)
def test_any_finite_number_reads_back_the_same(value):
    assert same(parsed(format_ad({"A": value, "B": 1})), {"A": value, "B": 1})


@given(st.dictionaries(st.sampled_from(CATALOGUE), st.integers(0, 2**64)))
@settings(deadline=None)
def test_any_totals_read_back_or_are_named_as_left_out(totals):
    record = replace(RECORD, totals={metric.name: {"": total} for metric, total in totals.items()})
    ad = record_ad(record)
    assert same(parsed(format_ad(ad)), ad)
    omitted = set(str(ad.get("AcctdOmitted", "")).split(","))
    assert all(metric.attribute in ad or metric.attribute in omitted for metric in totals)


def test_half_a_surrogate_pair_becomes_a_replacement_character():
    assert parsed(format_ad({"A": os_text()}))["A"] == "caf\ufffd"


def os_text() -> str:
    return b"caf\xe9".decode("utf-8", "surrogateescape")


@pytest.mark.parametrize("value", [INT64_MAX + 1, -INT64_MAX - 2, float("nan"), float("inf"), "a\0b"])
def test_what_no_classad_can_carry_is_refused(value):
    with pytest.raises(UsageError, match="cannot be written to a ClassAd"):
        format_value(value)


@pytest.mark.parametrize("name", ["", "1a", "a b", "a=b", "a\n", "é"])
def test_a_name_that_would_break_the_line_is_refused(name):
    with pytest.raises(UsageError, match="is no ClassAd attribute name"):
        format_ad({name: 1})


def test_a_device_that_lies_on_another_is_not_summed_twice():
    totals = {"block_write": {"254:0": 4096, "7:0": 4096}, "block_writes": {"254:0": 2, "7:0": 1}}
    ad = record_ad(replace(RECORD, totals=totals, stacked=("7:0",)))
    assert (ad["BlockWriteKbytes"], ad["BlockWrites"]) == (4, 2)
