from pathlib import Path

import pytest

from acctd.kernel.mntns import Mount, parse_mounts
from acctd.metrics import NFS, NFS_OPERATIONS, NFS_READ_BYTES, NFS_READS, NFS_SERVER_TIME, NFS_TIME, NFS_WRITE_BYTES
from collectors.nfs import METRICS, MountStats, NfsHost, NfsReader, parse_mountstats
from collectors.parse import MalformedFile

# Linux 6.1, two mounts of one server, one of them also bound elsewhere.
FIXTURES = Path(__file__).parents[2] / "fixtures" / "nfs"
STATS = (FIXTURES / "mountstats").read_bytes()
MOUNTINFO = (FIXTURES / "mountinfo").read_bytes()


def counted(mount):
    return dict(zip(METRICS, mount.counts, strict=True))


def test_mounts_of_any_kind_between_them():
    data, old, bound = parse_mountstats(STATS, "mountstats")
    assert [mount.point for mount in (data, old, bound)] == ["/mnt/my\\040data", "/mnt/old", "/mnt/bound"]
    assert data.counts == bound.counts
    numbers = counted(data)
    assert numbers[NFS_READ_BYTES] == 4 << 20
    assert numbers[NFS_WRITE_BYTES] == (4 << 20) + 1_001_000
    assert numbers[NFS_READS] == 32
    assert 0 < numbers[NFS_SERVER_TIME] < numbers[NFS_TIME]
    assert METRICS == NFS


def test_requests_that_all_mounts_of_a_server_make_in_common_are_left_out():
    block = STATS.split(b"per-op statistics\n")[1].partition(b"\n\n")[0]
    made = {words[0]: int(words[1]) for words in map(bytes.split, block.splitlines())}
    common = sum(made[name] for name in (b"NULL:", b"EXCHANGE_ID:", b"CREATE_SESSION:", b"RECLAIM_COMPLETE:"))
    assert common > 0
    assert counted(parse_mountstats(STATS, "")[0])[NFS_OPERATIONS] == sum(made.values()) - common


def test_a_request_that_is_not_known_counts_as_one():
    more = STATS.replace(b"\t        READ:", b"\t     NEW_REQ: 7 7 0 1 1 0 3 4 0\n\t        READ:", 1)
    before, after = (counted(parse_mountstats(text, "")[0]) for text in (STATS, more))
    assert after[NFS_OPERATIONS] == before[NFS_OPERATIONS] + 7
    assert after[NFS_SERVER_TIME] == before[NFS_SERVER_TIME] + 3
    assert after[NFS_TIME] == before[NFS_TIME] + 4


def test_kernels_before_5_3_have_no_column_of_errors():
    old = b"\n".join(
        line.rpartition(b" ")[0] if line.count(b" ") >= 9 and line[:1] == b"\t" and b"bytes" not in line else line
        for line in STATS.splitlines()
    ).replace(b"statvers=1.1", b"statvers=1.0")
    assert [mount.counts for mount in parse_mountstats(old, "")] == [m.counts for m in parse_mountstats(STATS, "")]


def test_statistics_of_another_version_are_passed_over():
    assert parse_mountstats(STATS.replace(b"statvers=1.1", b"statvers=2.0"), "") == []
    assert parse_mountstats(b"", "") == []
    assert parse_mountstats(b"no device mounted on /x with fstype nfs4\n", "") == []


def test_a_point_that_is_no_utf_8_becomes_text():
    text = STATS.replace(b"/mnt/old", b"/mnt/\xff\xfe")
    assert parse_mountstats(text, "")[1].point == "/mnt/\\xff\\xfe"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\tage:\t0", b"\tage:\tx"),
        (b"\tage:\t0", b"\tage:"),
        (b"\tbytes:\t8388608 1001000 0 4194304 4194304 ", b"\tbytes:\t8388608 1001000 0 4194304 -1 "),
        (b"\tbytes:\t8388608 1001000 0 4194304 4194304 5195304 1024 245 ", b"\tbytes:\t1 2 3"),
        (b"\t        READ: 32 32 0 ", b"\t        READ: 32 x 0 "),
        (b"\t        READ: 32 32 0 ", b"\t        READ: 32\n\t     X: 32 32 0 "),
    ],
)
def test_garbage_names_the_file(old, new):
    assert old in STATS
    with pytest.raises(MalformedFile, match="/proc/7/mountstats: cannot read"):
        parse_mountstats(STATS.replace(old, new, 1), "/proc/7/mountstats")


@pytest.mark.parametrize("missing", [b"\tage:", b"\tbytes:", b"\tper-op"])
def test_a_mount_without_its_numbers_is_malformed(missing):
    with pytest.raises(MalformedFile, match="my"):
        parse_mountstats(STATS.replace(missing, b"\tother", 1), "")


def test_mountinfo_tells_the_devices_in_the_same_order():
    nfs = [mount for mount in parse_mounts(MOUNTINFO) if mount.kind == "nfs4"]
    assert nfs == [
        Mount("0:33", "/mnt/my\\040data", "nfs4"),
        Mount("0:34", "/mnt/old", "nfs4"),
        Mount("0:33", "/mnt/bound", "nfs4"),
    ]
    assert [mount.point for mount in nfs] == [mount.point for mount in parse_mountstats(STATS, "")]
    assert parse_mounts(b"1 2 0:3 / /x rw shared:1 master:2 - nfs host:/ rw\ngarbage\n") == [Mount("0:3", "/x", "nfs")]


class Jobs:
    """Readers of jobs without processes, and superblocks of device numbers that no kernel has, as they are read."""

    def __init__(self):
        self.host = NfsHost()
        self.notes = {}

    def reader(self, job, parent=None, age=100.0, last=None):
        notes = self.notes[job] = []
        return NfsReader(
            self.host, job=job, parent=parent, pids=list, age=lambda: age, note=notes.append, last=last or {}
        )

    def see(self, reader, job, done, age=10, device="0:4194305", at="/mnt"):
        self.host.has(job, frozenset({device}))
        reader._changed.clear()
        reader._take(device, MountStats(at, age, (done,) * len(METRICS)))
        return reader._changed.get((NFS_READ_BYTES, at))


@pytest.fixture
def jobs():
    made = Jobs()
    yield made
    made.host.close()


def test_a_mount_of_the_job_counts_from_zero_and_an_older_one_from_its_first_reading(jobs):
    young, old = jobs.reader("a", age=10.0), jobs.reader("b", age=10.0)
    assert [jobs.see(young, "a", done, age=9) for done in (500, 500, 700)] == [500, None, 700]
    assert [jobs.see(old, "b", done, age=11, device="0:4194306") for done in (500, 700)] == [0, 200]


def test_a_device_number_that_is_given_again_adds_up(jobs):
    reader = jobs.reader("a")
    assert jobs.see(reader, "a", 500, age=50) == 500
    assert jobs.see(reader, "a", 600, age=2) == 1100  # younger: another one
    assert jobs.see(reader, "a", 100, age=2) == 1200  # lower: another one


def test_what_is_shared_is_nobodys_until_it_was_not_for_a_whole_span(jobs):
    a, b = jobs.reader("a"), jobs.reader("b")
    assert jobs.see(a, "a", 500) == 500
    assert jobs.see(b, "b", 600) is None
    assert jobs.see(a, "a", 700) is None
    b.close()
    assert jobs.see(a, "a", 800) is None
    assert jobs.see(a, "a", 900) == 600
    assert len(jobs.notes["a"]) == 2 and "job b" in jobs.notes["a"][0]
    assert "job a" in jobs.notes["b"][0]


def test_a_sharer_that_came_and_went_between_two_readings_is_noticed(jobs):
    a, b = jobs.reader("a"), jobs.reader("b")
    assert jobs.see(a, "a", 500) == 500
    jobs.see(b, "b", 600)
    b.close()
    assert jobs.see(a, "a", 700) is None
    assert jobs.notes["a"]


def test_a_family_is_part_of_what_it_is_in(jobs):
    outer = jobs.reader("outer")
    inner = jobs.reader("inner", parent="outer")
    assert jobs.see(outer, "outer", 500) == 500
    assert jobs.see(inner, "inner", 600) is None
    assert jobs.see(outer, "outer", 700) == 700
    inner.close()
    assert jobs.see(outer, "outer", 800) == 800
    assert not jobs.notes["outer"]


def test_what_a_family_was_billed_for_is_not_billed_again_to_whoever_takes_its_mount_over(jobs):
    outer = jobs.reader("outer")
    inner = jobs.reader("inner", parent="outer")
    assert jobs.see(inner, "inner", 500) == 500
    inner.close()
    assert jobs.see(outer, "outer", 700) == 200


def test_a_reader_of_another_agent_goes_on_from_the_totals(jobs):
    last = {(metric, "/mnt"): 500 for metric in METRICS}
    reader = jobs.reader("a", last=last)
    assert jobs.see(reader, "a", 700) == 700
    assert jobs.see(reader, "a", 50, age=1) == 750


def test_a_mount_that_is_older_than_the_job_goes_on_from_what_is_first_read(jobs):
    last = {(metric, "/mnt"): 500 for metric in METRICS}
    reader = jobs.reader("a", age=5.0, last=last)
    assert [jobs.see(reader, "a", done) for done in (10_000, 10_100)] == [500, 600]


def test_a_host_that_has_it_too_takes_it_away(jobs):
    a = jobs.reader("a")
    device = next(iter(jobs.host.mounted()))
    assert jobs.see(a, "a", 500, device=device) is None
    assert not jobs.notes["a"]


def test_without_processes_there_is_nothing(jobs):
    reader = jobs.reader("a")
    assert reader.changes() == []
    reader.close()
