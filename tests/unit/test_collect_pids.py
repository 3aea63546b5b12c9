import pytest
from hypothesis import given
from hypothesis import strategies as st

from acctd.metrics import PIDS, PIDS_PEAK, PIDS_REFUSED
from collectors.parse import MalformedFile
from collectors.pids import (
    METRICS,
    PidsReader,
    parse_pids_current,
    parse_pids_events,
    parse_pids_peak,
)


@pytest.mark.parametrize("name", ["v1-split", "v1-joined", "hybrid"])
def test_v1(tree, opened, name):
    readings = opened(PidsReader(tree(name).job("pids"))).read()
    assert readings == {(PIDS, ""): 3, (PIDS_PEAK, ""): 3, (PIDS_REFUSED, ""): 0}
    assert {metric for metric, _ in readings} == set(METRICS)


def test_v2_without_a_peak_leaves_it_to_the_meter(tree, opened):
    host = tree("v2")
    host.path("", "pids.current").write_bytes(b"5\n")
    assert opened(PidsReader(host.job(""))).read() == {(PIDS, ""): 5, (PIDS_REFUSED, ""): 0}


def test_the_kernels_own_peak_is_taken_where_there_is_one(tree, opened):
    host = tree("v1-split")
    host.path("pids", "pids.peak").write_bytes(b"17\n")
    readings = opened(PidsReader(host.job("pids"))).read()
    assert (readings[PIDS, ""], readings[PIDS_PEAK, ""]) == (3, 17)


def test_rhel7_counts_no_refusals(tree, opened):
    assert opened(PidsReader(tree("rhel7").job("pids"))).read() == {(PIDS, ""): 3}


@pytest.mark.parametrize(
    ("file", "text"),
    [("pids.current", b"max\n"), ("pids.peak", b"\n"), ("pids.events", b"max max\n"), ("pids.events", b"max\n")],
)
def test_garbage_names_file_and_line(tree, opened, file, text):
    host = tree("v1-split")
    host.path("pids", file).write_bytes(text)
    with pytest.raises(MalformedFile, match=f"job_42/{file}: cannot read"):
        opened(PidsReader(host.job("pids"))).read()


def test_absent_and_vanished_give_nothing(tree, opened, make_vanish):
    directory = tree("v1-split").job("pids")
    assert opened(PidsReader(directory.child("gone"))).read() == {}
    reader = opened(PidsReader(directory))
    vanish = make_vanish(reader)
    assert reader.read()
    vanish()
    assert reader.read() == {}


def test_a_kept_descriptor_sees_new_values_and_an_idle_job_none(tree, opened):
    host = tree("v1-split")
    reader = opened(PidsReader(host.job("pids")))
    first = reader.read()
    assert reader.changes() == []
    host.path("pids", "pids.current").write_bytes(b"2\n")
    assert reader.read()[PIDS, ""] == 2
    assert first[PIDS, ""] == 3


@given(st.binary())
@pytest.mark.parametrize("parse", [parse_pids_current, parse_pids_peak, parse_pids_events])
def test_no_bytes_raise_anything_else(parse, text):
    try:
        assert {metric for metric, _ in parse(text, "x")} <= set(METRICS)
    except MalformedFile:
        pass
