import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acctd.errors import KernelRefusedError
from acctd.kernel.cgroupfs import CounterFile
from acctd.metrics import CPU_STALL, IO_STALL, IO_STALL_FULL, MEMORY_STALL, MEMORY_STALL_FULL
from collectors.parse import MalformedFile
from collectors.pressure import METRICS, PressureReader, parse_pressure

BOTH = {b"some": MEMORY_STALL, b"full": MEMORY_STALL_FULL}


def test_v2(tree, opened):
    readings = opened(PressureReader(tree("v2").job(""))).read()
    assert readings == {
        (CPU_STALL, ""): 8_130,
        (IO_STALL, ""): 20_926,
        (IO_STALL_FULL, ""): 20_926,
        (MEMORY_STALL, ""): 27_808,
        (MEMORY_STALL_FULL, ""): 27_808,
    }
    assert {metric for metric, _ in readings} == set(METRICS)


def test_hybrid_has_them_in_the_unified_directory(tree, opened):
    host = tree("hybrid")
    assert opened(PressureReader(host.job(""))).read().keys() == {(metric, "") for metric in METRICS}
    assert opened(PressureReader(host.job("memory"))).read() == {}


@pytest.mark.parametrize("name", ["v1-split", "v1-joined", "rhel7"])
def test_v1_has_none(tree, opened, name):
    assert opened(PressureReader(tree(name).job("memory"))).read() == {}


class SwitchedOff(CounterFile):
    """A pressure file of a kernel with PSI compiled in and off: opens, and refuses to be read."""

    code = errno.EOPNOTSUPP

    def read(self) -> bytes | None:
        raise KernelRefusedError(f"cannot read {self.path}") from OSError(self.code, "")


class Broken(SwitchedOff):
    code = errno.EIO


def test_pressure_that_is_switched_off_is_absent(tree, monkeypatch, opened):
    directory = tree("v2").job("")
    monkeypatch.setattr("acctd.kernel.cgroupfs.CounterFile", SwitchedOff)
    assert opened(PressureReader(directory)).read() == {}
    monkeypatch.setattr("acctd.kernel.cgroupfs.CounterFile", Broken)
    with pytest.raises(KernelRefusedError):
        PressureReader(directory)


@pytest.mark.parametrize("line", [b"some", b"some avg10=0.00", b"full avg10=0.00 total=max", b"some avg10=0.00 total="])
def test_garbage_names_file_and_line(tree, opened, line):
    host = tree("v2")
    host.path("", "io.pressure").write_bytes(line + b"\n")
    with pytest.raises(MalformedFile, match=f"job_42/io.pressure: cannot read .*{line.decode()}"):
        opened(PressureReader(host.job(""))).read()


def test_a_cgroup_that_vanished_gives_nothing(tree, opened, make_vanish):
    reader = opened(PressureReader(tree("v2").job("")))
    vanish = make_vanish(reader)
    assert reader.read()
    vanish()
    assert reader.read() == {}


def test_a_kept_descriptor_sees_new_values_and_an_idle_job_none(tree, opened):
    host = tree("v2")
    reader = opened(PressureReader(host.job("")))
    reader.read()
    assert reader.changes() == []
    host.path("", "cpu.pressure").write_bytes(b"some avg10=1.00 avg60=0.00 avg300=0.00 total=9000\n")
    assert reader.read()[CPU_STALL, ""] == 9_000


@given(st.binary() | st.binary().map(lambda tail: b"some avg10=0.00 total=" + tail))
def test_no_bytes_raise_anything_else(text):
    try:
        assert {metric for metric, _ in parse_pressure(text, "x", BOTH)} <= set(METRICS)
    except MalformedFile:
        pass
