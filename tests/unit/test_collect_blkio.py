import pytest
from hypothesis import given
from hypothesis import strategies as st

from acctd.metrics import (
    BLOCK_DISCARD_BYTES,
    BLOCK_READ_BYTES,
    BLOCK_READS,
    BLOCK_WRITE_BYTES,
    BLOCK_WRITES,
)
from collectors.blkio import _BYTES, METRICS, BlkioReader, parse_blkio, parse_io_stat
from collectors.parse import MalformedFile

THROTTLE = "blkio.throttle.io_service_bytes_recursive"
BFQ = "blkio.bfq.io_service_bytes_recursive"


def per_device(device, read, write):
    total = read + write
    lines = (("Read", read), ("Write", write), ("Sync", total), ("Async", 0), ("Total", total))
    return "".join(f"{device} {name} {value}\n" for name, value in lines).encode() + b"Total %d\n" % total


@pytest.mark.parametrize("name", ["v1-split", "hybrid"])
def test_v1_throttle(tree, opened, name):
    readings = opened(BlkioReader(tree(name).job("blkio"))).read()
    assert readings == {
        (BLOCK_READ_BYTES, "254:0"): 192_512,
        (BLOCK_WRITE_BYTES, "254:0"): 121_634_816,
        (BLOCK_DISCARD_BYTES, "254:0"): 104_857_600,
        (BLOCK_READS, "254:0"): 23,
        (BLOCK_WRITES, "254:0"): 104,
    }
    assert {metric for metric, _ in readings} == set(METRICS)


def test_v1_bfq_counts_where_throttle_is_not_armed(tree, opened):
    readings = opened(BlkioReader(tree("v1-joined").job("blkio"))).read()
    assert readings[BLOCK_WRITE_BYTES, "7:0"] == 17_039_360
    assert readings[BLOCK_WRITES, "7:0"] == 173


def test_rhel7_takes_the_source_that_missed_least_device_by_device(tree, opened):
    readings = opened(BlkioReader(tree("rhel7").job("blkio"))).read()
    assert readings[BLOCK_READS, "8:48"] == 383  # counted alike by both, not 766
    assert readings[BLOCK_READS, "8:16"] == 548_172  # CFQ: the nested cgroup's are in it
    assert readings[BLOCK_WRITES, "8:16"] == 931_000  # throttle: before merging
    assert readings[BLOCK_READ_BYTES, "8:16"] == 22_453_125_120
    assert not any(metric is BLOCK_DISCARD_BYTES for metric, _ in readings)


def test_v2(tree, opened):
    readings = opened(BlkioReader(tree("v2").job(""))).read()
    assert readings[BLOCK_READ_BYTES, "254:0"] == 10_489_856
    assert readings[BLOCK_WRITES, "254:0"] == 170
    assert {metric for metric, _ in readings} == set(METRICS)


def test_v2_lines_of_other_kernels():
    text = b"7:1 7:0 254:16 rbytes=4096 wios=1 cost.usage=42 weird\n8:0\n8:16 cost.wait=x\n"
    assert parse_io_stat(text, "") == {(BLOCK_READ_BYTES, "254:16"): 4096, (BLOCK_WRITES, "254:16"): 1}


def test_non_recursive_files_serve_where_there_are_no_others(tree, opened):
    host = tree("v1-split")
    for path in host.job("blkio").path.glob("*_recursive"):
        path.unlink()
    assert opened(BlkioReader(host.job("blkio"))).read()[BLOCK_READS, "254:0"] == 23


def test_arming_half_way_and_changing_the_scheduler_never_go_back_or_count_twice(tree, opened):
    host = tree("v1-joined")
    reader = opened(BlkioReader(host.job("blkio")))
    throttle, bfq = host.path("blkio", THROTTLE), host.path("blkio", BFQ)
    seen = []

    def step(throttled, scheduled):
        throttle.write_bytes(throttled)
        bfq.write_bytes(scheduled)
        seen.append(reader.read()[BLOCK_READ_BYTES, "7:0"])

    step(b"Total 0\n", per_device("7:0", 1000, 0))
    step(per_device("7:0", 10, 0), per_device("7:0", 1010, 0))  # armed: counts from here on
    step(per_device("7:0", 60, 0), b"Total 0\n")  # no longer scheduled by bfq: its lines go
    step(per_device("7:0", 2000, 0), b"Total 0\n")
    assert seen == [1000, 1010, 1010, 2000]


def test_a_reader_opened_anew_goes_on_where_the_old_one_was(tree, opened):
    host = tree("v1-joined")
    before = opened(BlkioReader(host.job("blkio"))).read()
    host.path("blkio", THROTTLE).write_bytes(per_device("7:0", 4096, 0))
    after = opened(BlkioReader(host.job("blkio"))).read()
    assert after[BLOCK_READ_BYTES, "7:0"] == before[BLOCK_READ_BYTES, "7:0"]


@pytest.mark.parametrize("line", [b"254:0 Read max", b"254:0 Read", b"254:0 Write 1 2", b"sda Read 1", b"8: Read 1"])
def test_garbage_names_file_and_line(tree, opened, line):
    host = tree("v1-split")
    host.path("blkio", THROTTLE).write_bytes(line + b"\nTotal 0\n")
    with pytest.raises(MalformedFile, match=f"job_42/{THROTTLE}: cannot read .*{line.decode()}"):
        opened(BlkioReader(host.job("blkio"))).read()


@pytest.mark.parametrize("line", [b"254:0 rbytes=max", b"rbytes=1", b"254:0 wios=", b"8:x rios=1"])
def test_garbage_in_io_stat_names_file_and_line(tree, opened, line):
    host = tree("v2")
    host.path("", "io.stat").write_bytes(line + b"\n")
    with pytest.raises(MalformedFile, match=f"job_42/io.stat: cannot read .*{line.decode()}"):
        opened(BlkioReader(host.job(""))).read()


def test_absent_files_give_no_reading(tree, opened):
    assert opened(BlkioReader(tree("v1-split").job("blkio").child("gone"))).read() == {}


def test_a_job_without_io_has_no_devices_rather_than_zeroes():
    assert parse_blkio(b"Total 0\n", "", _BYTES) == {}
    assert parse_io_stat(b"", "") == {}


@pytest.mark.parametrize("name", ["v1-split", "rhel7", "v2"])
def test_a_cgroup_that_vanished_gives_nothing(tree, opened, make_vanish, name):
    reader = opened(BlkioReader(tree(name).job("blkio")))
    vanish = make_vanish(reader)
    assert reader.read()
    vanish()
    assert reader.read() == {}


def test_a_kept_descriptor_sees_new_values_and_an_idle_job_none(tree, opened):
    host = tree("v1-split")
    reader = opened(BlkioReader(host.job("blkio")))
    first = reader.read()
    assert reader.changes() == []
    host.path("blkio", THROTTLE).write_bytes(per_device("254:0", 200_000, 121_634_816) + per_device("8:0", 5, 6))
    second = reader.read()
    assert second[BLOCK_READ_BYTES, "254:0"] == 200_000
    assert second[BLOCK_WRITE_BYTES, "8:0"] == 6
    assert first[BLOCK_READ_BYTES, "254:0"] == 192_512


@given(st.binary() | st.binary().map(lambda tail: b"8:0 Read 1\n8:0 rbytes=1 wios=" + tail))
@pytest.mark.parametrize("parse", [lambda text, path: parse_blkio(text, path, _BYTES), parse_io_stat])
def test_no_bytes_raise_anything_else(parse, text):
    try:
        assert {metric for metric, _ in parse(text, "x")} <= set(METRICS)
    except MalformedFile:
        pass
