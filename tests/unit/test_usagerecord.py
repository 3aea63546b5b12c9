"""Records as OGF Usage Record 2.0, held against what chapter 12 and 14 of GFD.204 ask for, and read back."""

import re
from datetime import UTC, datetime
from decimal import Decimal
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acctd.errors import AcctdError
from acctd.model import INT64_MAX, Limits, Record
from exporters.apel import Benchmark
from exporters.usagerecord import document, record_id

NS = "{http://schema.ogf.org/urf/2013/04/urf}"
CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z").fullmatch
DURATION = re.compile(r"PT\d+(\.\d+)?S").fullmatch
NUMBER = re.compile(r"\d+").fullmatch
FROM_ONE = re.compile(r"[1-9]\d*").fullmatch
REAL = re.compile(r"\d+(\.\d+)?").fullmatch
INTEGER = re.compile(r"[+-]?\d+").fullmatch
ANY = re.compile(r".*", re.DOTALL).fullmatch

MUST, MAY, MANY = (1, 1), (0, 1), (0, 10**9)
PERIOD = [("StartTime", MUST, TIME), ("EndTime", MUST, TIME)]
HOST = [("Hostname", MUST, ANY), ("ProcessId", MANY, FROM_ONE), ("Benchmark", MANY, REAL)]
BLOCKS = {
    "RecordIdentityBlock": [
        *[("RecordId", MUST, ANY), ("CreateTime", MUST, TIME), ("Site", MAY, ANY), ("Infrastructure", MAY, ANY)],
    ],
    "SubjectIdentityBlock": [
        *[("LocalUserId", MAY, ANY), ("LocalGroupId", MAY, ANY), ("GlobalUserId", MAY, ANY)],
        *[("GlobalGroupId", MAY, ANY), ("GlobalGroupAttribute", MANY, ANY)],
    ],
    "ComputeUsageBlock": [
        *[("CpuDuration", MUST, DURATION), ("WallDuration", MUST, DURATION), *PERIOD, ("ExecutionHost", MANY, HOST)],
        *[("HostType", MAY, ANY), ("Processors", MAY, FROM_ONE), ("NodeCount", MAY, FROM_ONE)],
        *[("ExitStatus", MAY, INTEGER), ("Charge", MAY, REAL)],
    ],
    "JobUsageBlock": [
        *[("GlobalJobId", MAY, ANY), ("LocalJobId", MAY, ANY), ("JobName", MAY, ANY), ("MachineName", MAY, ANY)],
        *[("SubmitHost", MAY, ANY), ("SubmitType", MAY, ANY), ("Queue", MAY, ANY), ("TimeInstant", MANY, TIME)],
        *[("ServiceLevel", MAY, ANY), ("Status", MUST, ANY)],
    ],
    "MemoryUsageBlock": [
        *[("MemoryClass", MUST, ANY), ("MemoryResourceCapacityUsed", MUST, NUMBER)],
        *[("MemoryResourceCapacityAllocated", MAY, NUMBER), ("MemoryResourceCapacityRequested", MAY, NUMBER)],
        *[*PERIOD, ("ExecutionHost", MAY, HOST), ("HostType", MAY, ANY), ("Charge", MAY, REAL)],
    ],
    "NetworkUsageBlock": [
        *[("NetworkClass", MUST, ANY), ("NetworkInboundUsed", MUST, NUMBER), ("NetworkOutboundUsed", MUST, NUMBER)],
        *[("Charge", MAY, REAL)],
    ],
}
ORDER = {
    "RecordIdentityBlock": MUST, "SubjectIdentityBlock": MAY, "ComputeUsageBlock": MANY, "JobUsageBlock": MAY,
    "MemoryUsageBlock": MANY, "NetworkUsageBlock": MANY,
}  # fmt: skip
ATTRIBUTES = {"GlobalGroupAttribute": {"type"}, "Benchmark": {"type"}, "SubmitType": {"description"}}

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60)


def record(**changes):
    fields = {
        "id": "12.0", "owner": "ada", "uid": 1000, "node": "wn1", "state": "done", "started": 1_700_000_000.25,
        "ended": 1.0, "wall_ns": 90_500_000_001, "exit_code": 0, "exit_signal": None, "network": "nat",
        "limits": Limits(), "tags": {}, "totals": {},
    }  # fmt: skip
    return Record(**(fields | changes))


def local(element: ET.Element) -> str:
    assert element.tag.startswith(NS)
    return element.tag.removeprefix(NS)


def check(element: ET.Element, content: list) -> None:
    """Each child is known, in order, often enough, and of its type."""
    names = [local(child) for child in element]
    assert names == [name for name, _, _ in content for found in names if found == name]
    for name, (least, most), kind in content:
        found = element.findall(f"{NS}{name}")
        assert least <= len(found) <= most
        for child in found:
            if isinstance(kind, list):
                check(child, kind)
            else:
                assert kind(child.text or "") and not len(child), f"{name} {child.text!r}"
            assert {key.removeprefix(NS) for key in child.attrib} == ATTRIBUTES.get(name, set())
    if local(element) == "SubjectIdentityBlock" and "GlobalGroupAttribute" in names:
        assert "GlobalGroupId" in names


def read(data: bytes) -> list[ET.Element]:
    data.decode("ascii")
    root = ET.fromstring(data)  # noqa: S314  # we wrote it
    assert local(root) == "UsageRecords"
    for usage in root:
        assert local(usage) == "UsageRecord"
        names = [local(block) for block in usage]
        assert names == [name for name in ORDER for found in names if found == name]
        assert all(least <= names.count(name) <= most for name, (least, most) in ORDER.items())
        for block in usage:
            check(block, BLOCKS[local(block)])
    return list(root)


def one(usage: ET.Element, path: str) -> str | None:
    return usage.findtext("/".join(NS + part for part in path.split("/")))


def test_a_record_with_all_that_has_a_place():
    tags = {
        "account": "physics", "dn": "/CN=Ada", "fqan": "/atlas/uk/Role=production", "queue": "long",
        "SubmitHost": "ce1:9619", "Scheduler": "htcondor",
    }  # fmt: skip
    totals = {
        "cpu_user": {"": 2 * 10**9}, "cpu_system": {"": 1}, "memory_resident_peak": {"": 1025},
        "memory_swap_peak": {"": 0},
        "network": {"OutgoingInternal": 7, "IncomingInternal": 8, "IncomingExternal": 2**60},
    }  # fmt: skip
    limits = Limits(memory=1 << 30, cpus=1.5)
    made = record(tags=tags, totals=totals, limits=limits)
    data = document([made], created=CREATED, site="EX-SITE", benchmark=Benchmark("HEPscore23", Decimal("12.5")))
    read(data)
    assert data.decode() == (
        "<?xml version='1.0' encoding='us-ascii'?>\n"
        """<ur:UsageRecords xmlns:ur="http://schema.ogf.org/urf/2013/04/urf">
  <ur:UsageRecord>
    <ur:RecordIdentityBlock>
      <ur:RecordId>wn1/12.0/2023-11-14T22:13:20.250000Z</ur:RecordId>
      <ur:CreateTime>2026-01-02T03:04:05Z</ur:CreateTime>
      <ur:Site>EX-SITE</ur:Site>
    </ur:RecordIdentityBlock>
    <ur:SubjectIdentityBlock>
      <ur:LocalUserId>ada</ur:LocalUserId>
      <ur:LocalGroupId>physics</ur:LocalGroupId>
      <ur:GlobalUserId>/CN=Ada</ur:GlobalUserId>
      <ur:GlobalGroupId>atlas</ur:GlobalGroupId>
      <ur:GlobalGroupAttribute ur:type="FQAN">/atlas/uk/Role=production</ur:GlobalGroupAttribute>
    </ur:SubjectIdentityBlock>
    <ur:ComputeUsageBlock>
      <ur:CpuDuration>PT2.000000001S</ur:CpuDuration>
      <ur:WallDuration>PT90.500000001S</ur:WallDuration>
      <ur:StartTime>2023-11-14T22:13:20.250000Z</ur:StartTime>
      <ur:EndTime>2023-11-14T22:14:50.750000Z</ur:EndTime>
      <ur:ExecutionHost>
        <ur:Hostname>wn1</ur:Hostname>
        <ur:Benchmark ur:type="HEPscore23">12.5</ur:Benchmark>
      </ur:ExecutionHost>
      <ur:Processors>2</ur:Processors>
      <ur:NodeCount>1</ur:NodeCount>
      <ur:ExitStatus>0</ur:ExitStatus>
    </ur:ComputeUsageBlock>
    <ur:JobUsageBlock>
      <ur:LocalJobId>12.0</ur:LocalJobId>
      <ur:MachineName>wn1</ur:MachineName>
      <ur:SubmitHost>ce1:9619</ur:SubmitHost>
      <ur:SubmitType ur:description="htcondor">grid</ur:SubmitType>
      <ur:Queue>long</ur:Queue>
      <ur:Status>completed</ur:Status>
    </ur:JobUsageBlock>
    <ur:MemoryUsageBlock>
      <ur:MemoryClass>RAM</ur:MemoryClass>
      <ur:MemoryResourceCapacityUsed>1025</ur:MemoryResourceCapacityUsed>
      <ur:MemoryResourceCapacityRequested>1073741824</ur:MemoryResourceCapacityRequested>
      <ur:StartTime>2023-11-14T22:13:20.250000Z</ur:StartTime>
      <ur:EndTime>2023-11-14T22:14:50.750000Z</ur:EndTime>
    </ur:MemoryUsageBlock>
    <ur:MemoryUsageBlock>
      <ur:MemoryClass>swap</ur:MemoryClass>
      <ur:MemoryResourceCapacityUsed>0</ur:MemoryResourceCapacityUsed>
      <ur:StartTime>2023-11-14T22:13:20.250000Z</ur:StartTime>
      <ur:EndTime>2023-11-14T22:14:50.750000Z</ur:EndTime>
    </ur:MemoryUsageBlock>
    <ur:NetworkUsageBlock>
      <ur:NetworkClass>External</ur:NetworkClass>
      <ur:NetworkInboundUsed>1152921504606846976</ur:NetworkInboundUsed>
      <ur:NetworkOutboundUsed>0</ur:NetworkOutboundUsed>
    </ur:NetworkUsageBlock>
    <ur:NetworkUsageBlock>
      <ur:NetworkClass>Internal</ur:NetworkClass>
      <ur:NetworkInboundUsed>8</ur:NetworkInboundUsed>
      <ur:NetworkOutboundUsed>7</ur:NetworkOutboundUsed>
    </ur:NetworkUsageBlock>
  </ur:UsageRecord>
</ur:UsageRecords>
"""
    )


def test_a_record_of_which_nothing_is_known():
    (usage,) = read(document([record()], created=CREATED))
    assert one(usage, "JobUsageBlock/SubmitType") == "local"
    assert one(usage, "ComputeUsageBlock/CpuDuration") == "PT0S"
    assert usage.find(f"{NS}MemoryUsageBlock") is usage.find(f"{NS}NetworkUsageBlock") is None


@pytest.mark.parametrize(
    ("state", "code", "signal", "status", "number"),
    [
        ("done", 0, None, "completed", "0"),
        ("done", 3, None, "failed", "3"),
        ("done", None, 9, "aborted", "137"),
        ("done", None, 15, "aborted", "143"),
        ("done", None, 11, "failed", "139"),
        ("done", None, None, "unknown", None),
        ("lost", None, None, "unknown", None),
    ],
)
def test_how_a_job_ended(state, code, signal, status, number):
    (usage,) = read(document([record(state=state, exit_code=code, exit_signal=signal)], created=CREATED))
    assert one(usage, "JobUsageBlock/Status") == status
    assert one(usage, "ComputeUsageBlock/ExitStatus") == number


def test_an_id_is_of_one_record_and_does_not_change():
    made = [record(), record(node="wn2"), record(id="12.1"), record(started=1_700_000_000.250001)]
    assert len({record_id(each) for each in made}) == 4
    assert record_id(record(totals={"cpu_user": {"": 1}}, ended=9.0)) == record_id(record())


@given(
    st.lists(
        st.dictionaries(st.sampled_from(["dn", "fqan", "vo", "queue", "submithost", "scheduler", "account"]), TEXT),
        max_size=3,
    ),
    st.lists(st.integers(0, INT64_MAX), min_size=5, max_size=5),
    st.integers(0, 253402300799 - INT64_MAX // 10**9 - 1),
)
def test_whatever_tags_and_totals_say_it_is_a_usage_record(tags, numbers, started):
    totals = {
        **{
            name: {"": number}
            for name, number in zip(
                ("cpu_user", "cpu_system", "memory_resident_peak", "memory_swap_peak"), numbers[:4], strict=True
            )
        },
        "network": {"OutgoingExternal": numbers[0], "IncomingExternal": numbers[1]},
    }
    jobs = [
        record(id=f"{i}[1].x", tags=each, totals=totals, wall_ns=numbers[4], started=float(started))
        for i, each in enumerate(tags)
    ]
    found = read(document(jobs, created=CREATED, site="Größe"))
    assert [one(usage, "JobUsageBlock/LocalJobId") for usage in found] == [job.id for job in jobs]
    for usage, job in zip(found, jobs, strict=True):
        seconds, _, rest = (
            (one(usage, "ComputeUsageBlock/CpuDuration") or "").removeprefix("PT").rstrip("S").partition(".")
        )
        assert int(seconds) * 10**9 + int(rest.ljust(9, "0")) == numbers[0] + numbers[1]
        assert one(usage, "NetworkUsageBlock/NetworkOutboundUsed") == str(numbers[0])
        if not re.search("[^\x20-\x7e\xa0-\u2027\u202a-\ufffd\U00010000-\U0010ffff]", text := job.tags.get("vo", "")):
            assert not text.strip() or one(usage, "SubjectIdentityBlock/GlobalGroupId") == text.strip()


def test_a_time_that_no_date_can_say_is_refused():
    with pytest.raises(AcctdError, match="no date can say"):
        document([record(started=1e300)], created=CREATED)
