"""Records as APEL's messages, read back by the rules that APEL's loader reads them by; and the escapes it has not."""

import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acctd.errors import AcctdError, UsageError
from acctd.model import INT64_MAX, Limits, Record
from exporters.apel import HEADER, Benchmark, check_site, message

KEYS = [
    *("Site", "SubmitHost", "MachineName", "Queue", "LocalJobId", "LocalUserId", "GlobalUserName"),
    *("FQAN", "VO", "VOGroup", "VORole"),
    *("WallDuration", "CpuDuration", "Processors", "NodeCount", "StartTime", "EndTime"),
    *("InfrastructureDescription", "InfrastructureType", "MemoryReal", "MemoryVirtual"),
    *("ServiceLevelType", "ServiceLevel"),
]
NEEDED = {"Site", "LocalJobId", "WallDuration", "CpuDuration", "StartTime", "EndTime"}
NUMBERS = {
    *("WallDuration", "CpuDuration", "Processors", "NodeCount", "StartTime", "EndTime", "MemoryReal", "MemoryVirtual"),
}
WIDTHS = {"InfrastructureDescription": 100, "InfrastructureType": 20, "ServiceLevelType": 50}
SPEED = Benchmark.parse("hepscore23=12.5")
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=400)


def record(**changes):
    fields = {
        "id": "12.0", "owner": "ada", "uid": 1000, "node": "wn1.example.org", "state": "done",
        "started": 1_700_000_000.9, "ended": 1_700_009_999.0, "wall_ns": 90_500_000_000, "exit_code": 0,
        "exit_signal": None, "network": "nat", "limits": Limits(cpus=1.5), "tags": {},
        "totals": {
            "cpu_user": {"": 60 * 10**9}, "cpu_system": {"": 499_999_999},
            "memory_resident_peak": {"": 1025}, "memory_peak": {"": 4096},
        },
    }  # fmt: skip
    return Record(**(fields | changes))


def read(data: bytes) -> list[dict[str, str]]:
    """As the loader does: it splits at every %%, a record into lines, and a line at the first colon."""
    head, _, rest = data.decode("ascii").strip().partition("\n")  # ssmsend gives up on any other character
    assert head == HEADER
    records = []
    for part in rest.strip().split("%%"):
        if not part or part.isspace():
            continue
        found = {}
        for line in part.strip().splitlines():
            key, value = (side.strip() for side in line.split(":", 1))
            assert key in KEYS and key not in found
            assert 0 < len(value) <= WIDTHS.get(key, 255)
            if key in NUMBERS:
                assert 0 <= int(value) < 2**64
            found[key] = value
        assert all(found.get(key, "").lower() not in ("", "none", "null") for key in NEEDED)
        assert list(found) == [key for key in KEYS if key in found]
        assert int(found["StartTime"]) <= int(found["EndTime"])
        assert (
            found["ServiceLevelType"].lower() in ("si2k", "hepspec", "hepscore23") and float(found["ServiceLevel"]) > 0
        )
        records.append(found)
    return records


def test_a_record_is_written_as_the_wiki_has_it():
    tags = {
        "DN": "/DC=org/CN=Ada Lovelace", "FQAN": "/atlas/uk/Role=production", "Queue": "long",
        "SubmitHost": "ce1.example.org:9619/long", "Scheduler": "htcondor",
    }  # fmt: skip
    text = message([record(tags=tags)], site="EX-SITE", benchmark=SPEED).decode()
    assert text == (
        "APEL-individual-job-message: v0.3\n"
        "Site: EX-SITE\n"
        "SubmitHost: ce1.example.org:9619/long\n"
        "MachineName: wn1.example.org\n"
        "Queue: long\n"
        "LocalJobId: 12.0@wn1.example.org\n"
        "LocalUserId: ada\n"
        "GlobalUserName: /DC=org/CN=Ada Lovelace\n"
        "FQAN: /atlas/uk/Role=production\n"
        "VO: atlas\n"
        "WallDuration: 91\n"
        "CpuDuration: 60\n"
        "Processors: 2\n"
        "NodeCount: 1\n"
        "StartTime: 1700000000\n"
        "EndTime: 1700000091\n"
        "InfrastructureDescription: acctd-htcondor\n"
        "InfrastructureType: grid\n"
        "MemoryReal: 2\n"
        "MemoryVirtual: 4\n"
        "ServiceLevelType: HEPscore23\n"
        "ServiceLevel: 12.5\n"
        "%%\n"
    )


def test_what_is_not_known_has_no_line():
    (found,) = read(message([record(limits=Limits(), totals={})], site="EX", benchmark=SPEED))
    assert found == {
        "Site": "EX", "MachineName": "wn1.example.org", "LocalJobId": "12.0@wn1.example.org", "LocalUserId": "ada",
        "WallDuration": "91", "CpuDuration": "0", "NodeCount": "1", "StartTime": "1700000000", "EndTime": "1700000091",
        "InfrastructureDescription": "acctd", "InfrastructureType": "local",
        "ServiceLevelType": "HEPscore23", "ServiceLevel": "12.5",
    }  # fmt: skip


def test_the_end_is_the_start_and_the_wall_time_whatever_the_clock_did():
    (found,) = read(message([record(ended=5.0, wall_ns=499_999_999)], site="EX", benchmark=SPEED))
    assert (found["StartTime"], found["WallDuration"], found["EndTime"]) == ("1700000000", "0", "1700000000")


def test_cores_of_its_own_count_where_they_are_more_than_the_quota():
    (found,) = read(message([record(cpus="0-2,8")], site="EX", benchmark=SPEED))
    assert found["Processors"] == "4"


@pytest.mark.parametrize("job", ["none", "NULL", "Null"])
def test_a_job_named_nothing_is_still_somebody(job):
    (found,) = read(message([record(id=job)], site="EX", benchmark=SPEED))
    assert found["LocalJobId"] == f"{job}@wn1.example.org"


def test_parts_of_one_job_on_many_nodes_are_told_apart():
    found = read(message([record(node="a"), record(node="b")], site="EX", benchmark=SPEED))
    # What the server keeps one record of.
    assert len({(job["Site"], job["LocalJobId"], job["EndTime"]) for job in found}) == 2


@pytest.mark.parametrize(
    ("dn", "written"),
    [
        ("/CN=a\nWallDuration: 1", "/CN=a%0AWallDuration: 1"),
        ("/CN=a%%\nSite: X", "/CN=a%25%25%0ASite: X"),
        ("/CN=100%", "/CN=100%"),
        ("%%%", "%25%25%25"),
        ("5%\x08", "5%25%08"),
        ("/CN=Zoë\u2028\x85.", "/CN=Zo%C3%AB%E2%80%A8%C2%85."),
        ("  /CN=a\t", "/CN=a"),
    ],
)
def test_nobody_writes_a_line_of_their_own(dn, written):
    found = read(message([record(tags={"dn": dn}), record(id="2")], site="EX", benchmark=SPEED))
    assert [job.get("GlobalUserName") for job in found] == [written, None]
    assert [job["WallDuration"] for job in found] == ["91", "91"]


def test_htcondor_names_the_owner_its_own_way():
    tags = {
        "x509userproxysubject": "/CN=a", "x509UserProxyFirstFQAN": "/cms/Role=NULL", "x509UserProxyVOName": "cms",
    }  # fmt: skip
    (found,) = read(message([record(tags=tags)], site="EX", benchmark=SPEED))
    assert (found["GlobalUserName"], found["FQAN"], found["VO"]) == ("/CN=a", "/cms/Role=NULL", "cms")


@given(
    st.lists(
        st.dictionaries(st.sampled_from(["dn", "fqan", "vo", "queue", "submithost", "scheduler", "account"]), TEXT),
        max_size=4,
    ),
    st.lists(st.integers(0, INT64_MAX), min_size=5, max_size=5),
)
def test_whatever_tags_say_there_are_as_many_records_as_jobs(tags, numbers):
    totals = {
        name: {"": number}
        for name, number in zip(
            ("cpu_user", "cpu_system", "memory_resident_peak", "memory_peak"), numbers, strict=False
        )
    }
    jobs = [record(id=f"{i}", tags=each, totals=totals, wall_ns=numbers[4]) for i, each in enumerate(tags)]
    found = read(message(jobs, site="EX", benchmark=Benchmark("Si2k", Decimal("0.001"))))
    assert [job["LocalJobId"] for job in found] == [f"{job.id}@wn1.example.org" for job in jobs]
    for job in found:
        assert int(job["WallDuration"]) == (numbers[4] + 5 * 10**8) // 10**9
        assert int(job["MemoryReal"]) == -(-numbers[2] // 1024)
        assert not re.search(r"[^ -~]", "".join(job.values()))


@pytest.mark.parametrize("started", [-1.0, float("inf"), 1e300])
def test_a_time_that_no_date_can_say_is_refused(started):
    with pytest.raises(AcctdError, match="no date can say; see the clock of wn1"):
        message([record(started=started)], site="EX", benchmark=SPEED)


@pytest.mark.parametrize("site", ["", "none", "Null", " EX", "E\nX", "É", "a%%b", "x" * 256])
def test_a_site_must_reach_the_server_unchanged(site):
    with pytest.raises(UsageError, match="is no name of a site"):
        check_site(site)


@pytest.mark.parametrize("text", ["", "HEPSPEC", "HEPSPEC=", "HEPSPEC=0", "HEPSPEC=-1", "HEPSPEC=nan", "HEPSPEC=1.2345",
                                  "HEPSPEC=1e9", "mips=5"])  # fmt: skip
def test_a_benchmark_is_one_that_apel_knows(text):
    with pytest.raises(UsageError, match="--benchmark"):
        Benchmark.parse(text)
