"""Frames as lines: every declared metric under its names, escaping by the format's own rules, nothing that cannot be
written. That real servers read them so is shown in tests/db.
"""

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from acctd.frames import AgentSample, EventFrame, Frame, Mark, RecordFrame, Sample, limits_of
from acctd.metrics import CATALOGUE
from acctd.model import INT64_MAX, Limits, Record
from acctd.sinks import ExportConfig, InfluxSink
from exporters import lineprotocol
from exporters.lineprotocol import Lines, string, tag_value

SINK = InfluxSink(name="x", url="http://127.0.0.1:1", version=1, bucket="b", records_bucket="b")
TIME = 1_700_000_000_123_456_789
LABELS = {
    "acctd_blkio": ("8:0", "253:0"),
    "acctd_nfs": ("/home", "/data set"),
    "acctd_network": ("OutgoingInternal", "IncomingExternal"),
}


def lines(*, job_tag: bool = True, cluster: str = "default", scheduler: str = "none", host: str = "node1") -> Lines:
    sink = SINK if job_tag else InfluxSink(**{**vars_of(SINK), "job_tag": False})
    return Lines(sink, ExportConfig(cluster=cluster, scheduler=scheduler), host)


def vars_of(sink: InfluxSink) -> dict:
    return {name: getattr(sink, name) for name in sink.__dataclass_fields__}


def encoded(frame: Frame, **options) -> list[tuple[str, str]]:
    return [(to, data.decode()) for to, data in lines(**options).encode(frame)]


def sample(**other) -> Sample:
    values = {
        "time": TIME,
        "job": "1.0",
        "owner": "ada",
        "uid": 1000,
        "started": 1.7e9,
        "network": "nat",
        "totals": {"cpu_user": {"": 5}},
    }
    return Sample(**{**values, **other})


def record(**other) -> Record:
    values = {
        "id": "1.0",
        "owner": "ada",
        "uid": 1000,
        "node": "node1",
        "state": "done",
        "started": 1_700_000_000.5,
        "ended": 1_700_000_010.25,
        "wall_ns": 9_750_000_000,
        "exit_code": 0,
        "exit_signal": None,
        "network": "nat",
        "limits": Limits(),
        "tags": {},
        "totals": {"cpu_user": {"": 5}, "memory_peak": {"": 4096}},
    }
    return Record(**{**values, **other})


def frame(of: Record, number: int = 7) -> RecordFrame:
    return RecordFrame(number, "digest", TIME, msgspec.Raw(msgspec.json.encode(of)))


def everything() -> dict[str, dict[str, int]]:
    """Every metric, each with a value of its own, labelled ones twice."""
    totals = {}
    for number, metric in enumerate(CATALOGUE):
        labels = LABELS.get(metric.measurement, ("",))
        totals[metric.name] = {label: 1000 * number + at for at, label in enumerate(labels)}
    return totals


def test_a_sample_is_one_point_a_measurement() -> None:
    totals = {"cpu_user": {"": 5}, "cpu_system": {"": 6}, "memory_anon": {"": 7}, "io_stall": {"": 8}, "pids": {"": 2}}
    tags = "cluster=default,host=node1,owner=ada,parent=-,scheduler=none,job=1.0"
    assert encoded(sample(totals=totals)) == [
        ("samples", f"acctd_cpu,{tags} user_ns=5i,system_ns=6i {TIME}"),
        ("samples", f"acctd_memory,{tags} anon_bytes=7i {TIME}"),
        ("samples", f"acctd_pressure,{tags} io_stall_us=8i {TIME}"),
        ("samples", f"acctd_pids,{tags} tasks=2i {TIME}"),
    ]


def test_what_has_labels_is_one_point_each() -> None:
    found = encoded(sample(totals={"network": {"OutgoingInternal": 1}, "network_packets": {"OutgoingInternal": 2}}))
    assert len(found) == 1
    assert found[0][1].endswith(f",job=1.0,class=Internal,direction=outgoing bytes=1i,packets=2i {TIME}")
    found = encoded(sample(totals={"block_read": {"8:0": 1, "8:16": 2}, "nfs_reads": {"/a b": 3}}))
    assert [line.partition(",job=1.0,")[2] for _, line in found] == [
        f"device=8:0 read_bytes=1i {TIME}",
        f"device=8:16 read_bytes=2i {TIME}",
        f"mount=/a\\ b reads=3i {TIME}",
    ]


def test_stacked_devices_are_left_out() -> None:
    totals = {"block_read": {"8:0": 1, "7:0": 2}}
    assert [("device=8:0" in line) for _, line in encoded(sample(totals=totals, stacked=("7:0",)))] == [True]
    point = encoded(frame(record(totals=totals, stacked=("7:0",))))[0][1]
    assert "block_read_bytes=1i" in point


def test_every_metric_has_one_place_in_samples_and_one_in_records() -> None:
    found = encoded(sample(totals=everything()))
    written = [field for _, line in found for field in line.split(" ")[-2].split(",")]
    assert len(written) == sum(len(values) for values in everything().values())
    assert {int(field.partition("=")[2][:-1]) for field in written} == {
        value for values in everything().values() for value in values.values()
    }
    point = encoded(frame(record(totals=everything())))[0][1]
    names = [field.partition("=")[0] for field in point.split(" ")[1].split(",")]
    assert len(names) == len(set(names))
    for metric in CATALOGUE:
        assert (
            lineprotocol.record_field(metric, "OutgoingInternal" if metric.name.startswith("network") else "") in names
        )


def test_tags_of_a_job_and_of_the_node() -> None:
    tagged = sample(tags={"Scheduler": "slurm", "Account": "physics"}, parent="pilot 1")
    head = encoded(tagged, cluster="a b", host="n=1")[0][1].split(" user_ns")[0]
    assert head == r"acctd_cpu,cluster=a\ b,host=n\=1,owner=ada,parent=pilot\ 1,scheduler=slurm,job=1.0"
    assert "scheduler=htcondor," in encoded(sample(), scheduler="htcondor")[0][1]
    assert "owner=-," in encoded(sample(owner=""))[0][1]


def test_the_job_as_a_field() -> None:
    found = encoded(sample(limits={"pids": 3}), job_tag=False)
    tags = "cluster=default,host=node1,owner=ada,parent=-,scheduler=none"
    assert found == [
        ("samples", f'acctd_cpu,{tags} job="1.0",user_ns=5i {TIME}'),
        ("samples", f'acctd_limit,{tags} job="1.0",pids=3i {TIME}'),
    ]
    assert encoded(frame(record()), job_tag=False)[0][1].startswith(
        f'acctd_record,{tags},payer=ada job="1.0",cpu_user_ns=5i'
    )


def test_limits_have_types_that_do_not_change() -> None:
    for cpus in (2, 2.0, 0.5):
        found = encoded(sample(totals={}, limits={"memory": 2**30, "swap": 0, "cpus": cpus}))
        assert found[0][1].endswith(f" memory_bytes=1073741824i,swap_bytes=0i,cpus={float(cpus)} {TIME}")


def test_every_limit_has_a_field_in_samples_and_in_records() -> None:
    limits = Limits(memory=2**30, memory_soft=2**29, swap=5, cpus=1.5, cpu_shares=7, pids=9)
    fields = ["memory_bytes=1073741824i", "memory_soft_bytes=536870912i", "swap_bytes=5i", "cpus=1.5", "pids=9i"]
    assert encoded(sample(totals={}, limits=limits_of(limits)))[0][1].split(" ")[1].split(",") == fields
    written = encoded(frame(record(limits=limits)))[0][1].split(" ")[1].split(",")
    assert [field for field in written if field.startswith("limit_")] == [f"limit_{field}" for field in fields]


def test_a_record_is_one_point_and_the_last_sample() -> None:
    found = encoded(frame(record(tags={"account": "physics"}, notes=('a "note"',), limits=Limits(memory=2**30))))
    tags = "cluster=default,host=node1,owner=ada,parent=-,scheduler=none,job=1.0"
    assert found == [
        (
            "records",
            f"acctd_record,{tags},payer=physics cpu_user_ns=5i,memory_peak_bytes=4096i,exit_code=0i,"
            r'wall_ns=9750000000i,started_ns=1700000000500000000i,uid=1000i,state="done",network_mode="nat",'
            r'account="physics",tags="{\"account\":\"physics\"}",notes="a \"note\"",'
            r"limit_memory_bytes=1073741824i 1700000010250000007",
        ),
        ("samples", f"acctd_cpu,{tags} user_ns=5i {TIME}"),
        ("samples", f"acctd_memory,{tags} peak_bytes=4096i {TIME}"),
    ]


def test_rules_in_a_record() -> None:
    totals = {
        "network": {"OutgoingInternal": 1},
        "network_packets": {"OutgoingInternal": 2},
        "nfs_time": {"/a": 3, "/b": 4},
    }
    point = encoded(frame(record(totals=totals)))[0][1]
    assert " network_OutgoingInternal_bytes=1i,network_packets_OutgoingInternal=2i,nfs_time_ms=7i," in point


def test_records_and_events_of_one_time_are_two_points() -> None:
    times = {encoded(frame(record(), number))[0][1].rpartition(" ")[2] for number in range(1000)}
    assert len(times) == 1000


def test_events() -> None:
    event = EventFrame(3, 1_700_000_000.25, "oom", 'job 1 "was"\nkilled', job="1.0", owner="ada", parent="p")
    head = "acctd_event,cluster=default,host=node1"
    assert encoded(event) == [
        (
            "samples",
            f"{head},owner=ada,parent=p,scheduler=none,job=1.0,event=oom "
            r'number=3i,text="job 1 \"was\"%0Akilled" 1700000000250000003',
        )
    ]
    own = encoded(EventFrame(4, 1.0, "started", "x"))
    assert own == [
        ("samples", f'{head},owner=-,parent=-,scheduler=-,job=-,event=started number=4i,text="x" 1000000004')
    ]


def test_the_agent_writes_floats_and_no_others() -> None:
    numbers = {"ticks": 3, "tick_seconds": 1e-7, "bad": float("inf"), "worse": float("nan")}
    assert encoded(AgentSample(TIME, 10.0, "1", numbers)) == [
        ("samples", f"acctd_agent,cluster=default,host=node1 ticks=3.0,tick_seconds=1e-07 {TIME}")
    ]
    assert encoded(AgentSample(TIME, 10.0, "1", {"bad": float("inf")})) == []


def test_a_mark_is_nothing() -> None:
    assert encoded(Mark(1)) == []


def test_what_cannot_be_written_is_left_out_and_nothing_else() -> None:
    totals = {"cpu_user": {"": INT64_MAX}, "cpu_system": {"": INT64_MAX + 1}, "a_newer_agents": {"": 1}}
    assert [line.split(" ")[1] for _, line in encoded(sample(totals=totals))] == [f"user_ns={INT64_MAX}i"]
    point = encoded(frame(record(totals=totals)))[0][1]
    assert f" cpu_user_ns={INT64_MAX}i," in point and "cpu_system" not in point
    two = {"block_read": {"8:0": INT64_MAX, "8:16": 1}}
    assert "block_read_bytes" not in encoded(frame(record(totals=two)))[0][1]
    many = {f"tag{number}": "x" * 4096 for number in range(20)}
    assert "tags=" not in encoded(frame(record(tags=many)))[0][1]


def test_a_record_that_is_none_is_an_error() -> None:
    with pytest.raises(msgspec.DecodeError):
        lines().encode(RecordFrame(1, "", TIME, msgspec.Raw(b"{}")))


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("a b,c=d", r"a\ b\,c\=d"),
        ('"quoted"', '"quoted"'),
        (r"DOMAIN\ada", r"DOMAIN\ada"),
        ("ends\\", "ends%5C"),
        (r"a\ b", r"a%5C\ b"),
        (r"a\\b", r"a%5C\b"),
        ("a\nb\tc\x00", "a%0Ab%09c%00"),
        ("Änne", "Änne"),
        ("", "-"),
    ],
)
def test_tag_values(value: str, written: str) -> None:
    assert tag_value(value) == written


def read_tag(text: str) -> tuple[str, str]:
    """By the format's rules: up to the first character of its own that no backslash precedes; and the rest."""
    for at, character in enumerate(text):
        if character in ", =" and text[at - 1 : at] != "\\":
            return unescaped(text[:at]), text[at:]
    return unescaped(text), ""


def unescaped(text: str) -> str:
    for character in ", =":
        text = text.replace("\\" + character, character)
    return text


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("\\")
@example("\\\\,")
@example("=\\")
def test_any_tag_value_is_read_back(value: str) -> None:
    """As it was, but for the percent signs that stand for what cannot be written; and nothing of it leaks out."""
    for behind in (",next=1 f=1i", " f=1i"):
        read, rest = read_tag(tag_value(value) + behind)
        assert rest == behind
        assert "\n" not in read
        if not any(ord(character) < 32 or character in "\x7f\\" for character in value):
            assert read == (value or "-")


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example('"\\')
def test_any_string_is_read_back(value: str) -> None:
    text = string(value)
    assert text is not None and text[0] == text[-1] == '"' and "\n" not in text
    read, inside = "", text[1:-1]
    while inside:
        taken = inside[1] if inside[0] == "\\" else inside[0]
        assert inside[0] != '"'
        read, inside = read + taken, inside[2 if inside[0] == "\\" else 1 :]
    assert read == "".join(f"%{ord(c):02X}" if ord(c) < 32 or c == "\x7f" else c for c in value)


def test_the_same_frame_gives_the_same_bytes() -> None:
    """Also in another process, after other jobs: or what is sent again would be there twice."""
    used = lines()
    for number in range(10):
        used.encode(sample(job=str(number), tags={"scheduler": "slurm"}, parent="9"))
    for one in (sample(totals=everything()), frame(record(totals=everything())), EventFrame(1, 1.0, "x", "y", job="1")):
        assert used.encode(one) == lines().encode(one)
