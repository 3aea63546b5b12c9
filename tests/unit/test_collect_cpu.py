import pytest
from hypothesis import given
from hypothesis import strategies as st

from acctd.metrics import CPU_PERIODS, CPU_SYSTEM, CPU_THROTTLED, CPU_THROTTLED_PERIODS, CPU_USER
from collectors.cpu import METRICS, TICK_NS, CpuReader, divide, parse_cpu_stat, parse_cpuacct_stat
from collectors.parse import MalformedFile

NS = st.integers(0, 10**12)


def reader_of(host):
    return CpuReader(cpu=host.job("cpu"), cpuacct=host.job("cpuacct"))


def times(readings):
    return readings[CPU_USER, ""], readings[CPU_SYSTEM, ""]


def test_v1_and_v2_mean_the_same_in_ns():
    assert parse_cpu_stat(b"nr_throttled 5\nthrottled_time 242281479\n", "")[CPU_THROTTLED, ""] == 242_281_479
    assert parse_cpu_stat(b"nr_throttled 5\nthrottled_usec 7\n", "")[CPU_THROTTLED, ""] == 7_000


def test_cpuacct_stat_is_in_ticks():
    assert times(parse_cpuacct_stat(b"user 28\nsystem 3\n", "")) == (28 * TICK_NS, 3 * TICK_NS)


@pytest.mark.parametrize("name", ["v1-split", "v1-joined", "hybrid"])
def test_v1_adds_up_to_the_exact_usage(tree, opened, name):
    readings = opened(reader_of(tree(name))).read()
    assert {metric for metric, _ in readings} == set(METRICS)
    assert sum(times(readings)) == 317_158_342  # usage_user and usage_sys, sampled, come to 331_982_745
    assert readings[CPU_SYSTEM, ""] == 317_158_342 * 35_982_745 // 331_982_745
    assert readings[CPU_PERIODS, ""] == 9
    assert readings[CPU_THROTTLED_PERIODS, ""] == 5
    assert readings[CPU_THROTTLED, ""] == 242_281_479


def test_v2(tree, opened):
    readings = opened(reader_of(tree("v2"))).read()
    assert {metric for metric, _ in readings} == set(METRICS)
    assert times(readings) == (263_054_000, 1_267_835_000)


def test_rhel7_divides_the_exact_usage_by_ticks(tree, opened):
    user, system = times(opened(reader_of(tree("rhel7"))).read())
    assert user + system == 31_415_926_535
    assert system == 31_415_926_535 * 800 // 3100


def test_on_a_hybrid_host_the_unified_directory_can_stand_in_for_cpuacct(tree, opened):
    host = tree("hybrid")
    (host.path("", "cpu.stat")).write_bytes(b"usage_usec 30\nuser_usec 10\nsystem_usec 20\nnice_usec 0\n")
    readings = opened(CpuReader(cpu=host.job("cpu"), cpuacct=host.job(""))).read()
    assert times(readings) == (10_000, 20_000)
    assert readings[CPU_PERIODS, ""] == 9


def test_a_job_too_short_for_a_tick_is_still_counted(tree, opened):
    host = tree("v1-split")
    for file, text in (("usage", b"1576736\n"), ("usage_user", b"0\n"), ("usage_sys", b"0\n")):
        host.path("cpuacct", f"cpuacct.{file}").write_bytes(text)
    assert times(opened(reader_of(host)).read()) == (1_576_736, 0)


def test_neither_goes_back_when_the_proportion_shifts(tree, opened):
    host = tree("rhel7")
    reader = opened(reader_of(host))
    before = times(reader.read())
    host.path("cpuacct", "cpuacct.stat").write_bytes(b"user 2300\nsystem 900\n")
    host.path("cpuacct", "cpuacct.usage").write_bytes(b"31415926540\n")
    after = times(reader.read())
    assert after == (before[0], before[1] + 5)


def test_a_new_reader_goes_on_from_the_last_readings(tree, opened):
    host = tree("v1-split")
    last = {(CPU_USER, ""): 300_000_000, (CPU_SYSTEM, ""): 17_000_000}
    reader = opened(CpuReader(cpu=host.job("cpu"), cpuacct=host.job("cpuacct"), last=last))
    user, system = times(reader.read())
    assert (user, system) == (300_000_000, 17_158_342)


def test_last_readings_do_not_matter_where_the_kernel_divides(tree, opened):
    directory = tree("v2").job("")
    last = {(CPU_USER, ""): 10**15, (CPU_SYSTEM, ""): 10**15}
    assert times(opened(CpuReader(cpu=directory, cpuacct=directory, last=last)).read()) == (263_054_000, 1_267_835_000)


@given(st.lists(st.tuples(NS, NS, NS), min_size=1, max_size=20))
def test_a_division_is_exact_and_monotonic(steps):
    usage = user = system = 0
    last = (0, 0)
    for more_usage, more_user, more_system in steps:
        usage, user, system = usage + more_usage, user + more_user, system + more_system
        divided = divide(usage, (user, system), last)
        assert sum(divided) == usage
        assert divided[0] >= last[0]
        assert divided[1] >= last[1]
        last = divided


def test_a_usage_that_began_anew_is_divided_anew():
    assert divide(100, (3, 1), (5000, 5000)) == (75, 25)


@pytest.mark.parametrize(
    ("controller", "file"),
    [("cpu", "cpu.stat"), ("cpuacct", "cpuacct.usage"), ("cpuacct", "cpuacct.usage_user")],
)
def test_garbage_names_file_and_line(tree, opened, controller, file):
    host = tree("v1-split")
    host.path(controller, file).write_bytes(b"nr_periods max\n")
    with pytest.raises(MalformedFile, match=f"job_42/{file}: cannot read .*nr_periods max"):
        opened(reader_of(host)).read()


def test_absent_controllers_give_no_reading_rather_than_zero(tree, opened):
    host = tree("v1-split")
    host.path("cpu", "cpu.stat").unlink()
    assert {metric for metric, _ in opened(reader_of(host)).read()} == {CPU_USER, CPU_SYSTEM}
    gone = host.job("cpu").child("gone")
    assert opened(CpuReader(cpu=gone, cpuacct=gone)).read() == {}


def test_a_cgroup_that_vanished_gives_nothing(tree, opened, make_vanish):
    reader = opened(reader_of(tree("v1-split")))
    vanish = make_vanish(reader)
    assert reader.read()
    vanish()
    assert reader.read() == {}


def test_a_kept_descriptor_sees_new_values_and_an_idle_job_none(tree, opened):
    host = tree("v2")
    reader = opened(reader_of(host))
    reader.read()
    assert reader.changes() == []
    host.path("", "cpu.stat").write_bytes(b"usage_usec 3\nuser_usec 1\nsystem_usec 2\n")
    assert times(reader.read()) == (1000, 2000)


@given(st.binary() | st.binary().map(lambda tail: b"user 1\nuser_usec " + tail))
@pytest.mark.parametrize("parse", [parse_cpu_stat, parse_cpuacct_stat])
def test_no_bytes_raise_anything_else(parse, text):
    try:
        assert {metric for metric, _ in parse(text, "x")} <= set(METRICS)
    except MalformedFile:
        pass
