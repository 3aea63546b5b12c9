"""Frames are one line each, come back as they were, and are read also from an agent that knows more."""

from dataclasses import fields

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acctd.frames import (
    AgentSample,
    EventFrame,
    Mark,
    RecordFrame,
    Sample,
    decode,
    encode,
    limits_of,
    tag,
)
from acctd.metrics import LIMITS
from acctd.model import Limits

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
whole = st.integers(0, 2**64)
totals = st.dictionaries(text, st.dictionaries(text, whole, max_size=3), max_size=3)
finite = st.floats(allow_nan=False, allow_infinity=False)
frames = st.one_of(
    st.builds(
        Sample,
        time=st.integers(0, 2**63 - 1),
        job=text,
        owner=text,
        uid=st.integers(0, 2**32),
        started=finite,
        network=text,
        totals=totals,
        parent=st.none() | text,
        tags=st.dictionaries(text, text, max_size=3),
        limits=st.dictionaries(text, st.integers(0, 2**63) | finite, max_size=3),
        stacked=st.lists(text, max_size=3).map(tuple),
    ),
    st.builds(
        AgentSample,
        time=st.integers(0, 2**63 - 1),
        interval=finite,
        version=text,
        numbers=st.dictionaries(text, finite, max_size=3),
    ),
    st.builds(
        EventFrame,
        number=whole,
        time=finite,
        event=text,
        text=text,
        job=st.none() | text,
        uid=st.none() | st.integers(0, 2**32),
        owner=st.none() | text,
    ),
    st.builds(
        RecordFrame,
        number=whole,
        digest=text,
        time=st.integers(0, 2**63 - 1),
        body=totals.map(lambda body: msgspec.Raw(msgspec.json.encode(body))),
    ),
    st.builds(Mark, number=whole, digest=text),
)


@given(frames)
def test_a_frame_is_one_line_and_comes_back(frame):
    line = encode(frame)
    assert b"\n" not in line
    assert decode(line) == frame


def test_the_first_key_names_the_kind():
    assert encode(Mark(3)).startswith(b'{"kind":"mark",')
    assert encode(EventFrame(1, 2.0, "started", "")).startswith(b'{"kind":"event",')


def test_a_record_is_kept_byte_for_byte():
    body = b'{ "job" : "1" ,"unknown":1e3}'
    assert bytes(decode(encode(RecordFrame(1, "d", 2, msgspec.Raw(body)))).body) == body


def test_what_a_newer_agent_adds_is_passed_over():
    assert decode(b'{"kind":"mark","number":3,"digest":"","colour":{"of":["it"]}}') == Mark(3)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"[]",
        b'{"kind":"mark"}',
        b'{"kind":"nothing","number":1}',
        b'{"kind":"mark","number":"1"}',
        b'{"kind":"mark","number":1',
        b"\0" * 40,
        b"\xff\xfe",
        b'{"kind":"agent","time":1,"interval":null,"version":"","numbers":{}}',
    ],
)
def test_what_is_no_frame_is_one_kind_of_error(line):
    with pytest.raises((msgspec.MsgspecError, UnicodeDecodeError)):
        decode(line)


def test_tags_that_mean_something_are_found_in_any_case():
    assert tag({"Account": "physics", "x": "y"}, "account") == "physics"
    assert tag({"SCHEDULER": "slurm"}, "scheduler") == "slurm"
    assert tag({"accounts": "no"}, "account") is None


def test_limits_that_are_published_are_those_of_the_model():
    limits = Limits(memory=2**30, memory_soft=2**29, swap=0, cpus=1.5, cpu_burst=1.0, cpu_shares=7, cpuset="0", pids=9)
    amounts = {"memory": 2**30, "memory_soft": 2**29, "swap": 0, "cpus": 1.5, "pids": 9}
    assert limits_of(limits) == amounts
    assert limits_of(Limits()) == {}
    # One that is added to the model is an amount, to be published; or it stands here.
    named = {each.name for each in fields(Limits)} - {"cpu_burst", "cpu_shares", "cpuset", "memory_policy"}
    assert named == LIMITS.keys()
