import pytest
from hypothesis import given
from hypothesis import strategies as st

from acctd.metrics import (
    MEMORY_ANON,
    MEMORY_FAILCNT,
    MEMORY_FILE,
    MEMORY_KERNEL,
    MEMORY_OOM_KILLS,
    MEMORY_PEAK,
    MEMORY_RESIDENT,
    MEMORY_SHMEM,
    MEMORY_SWAP,
    MEMORY_SWAP_FAILCNT,
)
from collectors.memory import (
    METRICS,
    MemoryReader,
    parse_memory_events,
    parse_memory_stat_v1,
    parse_memory_stat_v2,
    parse_oom_control,
)
from collectors.parse import MalformedFile

V1_STAT = b"cache 1\nrss 2\nshmem 3\nswap 4\ntotal_cache 100\ntotal_rss 20\ntotal_shmem 30\ntotal_swap 4\n"


def read(readings, metric):
    return readings[metric, ""]


def test_v1_counts_the_subtree_and_takes_shared_memory_out_of_the_cache():
    readings = parse_memory_stat_v1(V1_STAT, "")
    assert (read(readings, MEMORY_ANON), read(readings, MEMORY_SHMEM), read(readings, MEMORY_FILE)) == (20, 30, 70)
    assert read(readings, MEMORY_RESIDENT) == 50
    assert read(readings, MEMORY_SWAP) == 4


def test_v2_takes_shared_memory_out_of_file():
    readings = parse_memory_stat_v2(b"anon 20\nfile 100\nkernel 7\nshmem 30\n", "")
    assert read(readings, MEMORY_FILE) == 70
    assert read(readings, MEMORY_RESIDENT) == 50
    assert read(readings, MEMORY_KERNEL) == 7


def test_file_never_goes_below_zero_while_pages_move():
    assert read(parse_memory_stat_v2(b"anon 0\nfile 4096\nshmem 8192\n", ""), MEMORY_FILE) == 0


@pytest.mark.parametrize("name", ["v1-split", "hybrid"])
def test_v1(tree, opened, name):
    readings = opened(MemoryReader(tree(name).job("memory"))).read()
    assert {metric for metric, _ in readings} == set(METRICS)
    assert read(readings, MEMORY_ANON) == read(readings, MEMORY_RESIDENT) == 339_968
    assert read(readings, MEMORY_FILE) == 48_431_104
    assert read(readings, MEMORY_KERNEL) == 1_544_192
    assert read(readings, MEMORY_PEAK) == 51_474_432
    assert read(readings, MEMORY_FAILCNT) == 54
    assert read(readings, MEMORY_OOM_KILLS) == 0


def test_v1_in_oom(tree, opened):
    readings = opened(MemoryReader(tree("v1-joined").job("memory"))).read()
    assert read(readings, MEMORY_RESIDENT) == 66_830_336
    assert read(readings, MEMORY_OOM_KILLS) == 1


def test_v2(tree, opened):
    host = tree("v2")
    host.path("", "memory.swap.current").write_bytes(b"8192\n")
    readings = opened(MemoryReader(host.job(""))).read()
    assert {metric for metric, _ in readings} == set(METRICS) - {MEMORY_SWAP_FAILCNT}
    assert read(readings, MEMORY_FILE) == 24_576
    assert read(readings, MEMORY_KERNEL) == 53_248
    assert read(readings, MEMORY_PEAK) == 134_217_728
    assert read(readings, MEMORY_SWAP) == 8192
    assert read(readings, MEMORY_FAILCNT) == 103
    assert read(readings, MEMORY_OOM_KILLS) == 1


def test_rhel7_knows_no_shared_memory_and_no_oom_kills(tree, opened):
    readings = opened(MemoryReader(tree("rhel7").job("memory"))).read()
    assert (MEMORY_SHMEM, "") not in readings
    assert (MEMORY_OOM_KILLS, "") not in readings
    assert read(readings, MEMORY_RESIDENT) == read(readings, MEMORY_ANON) == 634_880
    assert read(readings, MEMORY_FILE) == 1_048_576


@pytest.mark.parametrize("file", ["memory.peak", "memory.swap.current", "memory.events", "memory.stat"])
def test_a_file_the_kernel_lacks_gives_no_reading(tree, opened, file):
    host = tree("v2")
    host.path("", file).unlink(missing_ok=True)
    readings = opened(MemoryReader(host.job(""))).read()
    gone = {"memory.peak": MEMORY_PEAK, "memory.swap.current": MEMORY_SWAP, "memory.events": MEMORY_FAILCNT}
    assert (gone.get(file, MEMORY_ANON), "") not in readings
    assert readings


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("memory.stat", b"total_rss max\n"),
        ("memory.stat", b"total_rss\n"),
        ("memory.failcnt", b"max\n"),
        ("memory.max_usage_in_bytes", b"max\n"),
        ("memory.oom_control", b"oom_kill -1\n"),
    ],
)
def test_garbage_in_a_known_line_names_file_and_line(tree, opened, file, text):
    host = tree("v1-split")
    host.path("memory", file).write_bytes(text)
    reader = opened(MemoryReader(host.job("memory")))
    for _ in range(2):  # and does so each time
        with pytest.raises(MalformedFile, match=f"job_42/{file}: cannot read .*{text.split()[-1].decode()}"):
            reader.read()


def test_what_was_read_beside_a_bad_file_is_not_lost(tree, opened):
    host = tree("v1-split")
    reader = opened(MemoryReader(host.job("memory")))
    reader.read()
    host.path("memory", "memory.max_usage_in_bytes").write_bytes(b"60000000\n")
    host.path("memory", "memory.failcnt").write_bytes(b"?\n")
    with pytest.raises(MalformedFile):
        reader.read()
    host.path("memory", "memory.failcnt").write_bytes(b"54\n")
    assert read(reader.read(), MEMORY_PEAK) == 60_000_000


def test_a_cgroup_that_vanished_gives_nothing(tree, opened, make_vanish):
    reader = opened(MemoryReader(tree("v1-split").job("memory")))
    vanish = make_vanish(reader)
    assert reader.read()
    vanish()
    assert reader.read() == {}


def test_a_cgroup_that_never_was_gives_nothing(tree, opened):
    assert opened(MemoryReader(tree("v1-split").job("memory").child("gone"))).read() == {}


def test_a_kept_descriptor_sees_new_values_and_an_idle_job_none(tree, opened):
    host = tree("v1-split")
    reader = opened(MemoryReader(host.job("memory")))
    first = reader.read()
    assert reader.changes() == []
    stat = host.path("memory", "memory.stat")
    stat.write_bytes(stat.read_bytes().replace(b"total_shmem 0", b"total_shmem 4096"))
    second = reader.read()
    assert read(second, MEMORY_SHMEM) == 4096
    assert read(second, MEMORY_RESIDENT) == 339_968 + 4096
    assert read(first, MEMORY_SHMEM) == 0  # what was given out is not written to
    reader.close()
    assert reader.read() == {}


@given(st.binary() | st.sampled_from([b"total_rss", b"oom_kill", b"max", b"anon"]).map(lambda name: name + b" 1\nx"))
@pytest.mark.parametrize("parse", [parse_memory_stat_v1, parse_memory_stat_v2, parse_oom_control, parse_memory_events])
def test_no_bytes_raise_anything_else(parse, text):
    try:
        assert {metric for metric, _ in parse(text, "x")} <= set(METRICS)
    except MalformedFile:
        pass
