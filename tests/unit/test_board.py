"""What a scrape is shown, and what it is not: who is living, who has ended, what is too old, too much or absurd."""

import threading
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from acctd.frames import AgentSample, EventFrame, Mark, RecordFrame, Sample, decode
from acctd.metrics import BY_NAME
from acctd.model import INT64_MAX, Limits, Record
from exporters import board as module
from exporters.board import JOBS_MOST, LABELS_MOST, REST, TEXT_MOST, Board

S = 10**9


def sample(job="1.0", *, ago=0.0, totals=None, **other):
    """As of so many seconds ago."""
    totals = {"pids": {"": 1}} if totals is None else totals
    first = {"owner": "alice", "uid": 1000, "started": 1.0, "network": "nat"}
    return Sample(time=time.time_ns() - round(ago * S), job=job, totals=totals, **{**first, **other})


def record(job="1.0", *, ago=0.0, totals=None, **other):
    first = {
        "id": job, "owner": "alice", "uid": 1000, "node": "n", "state": "done", "started": 1.0, "ended": 2.0,
        "wall_ns": S, "exit_code": 0, "exit_signal": None, "network": "nat", "limits": Limits(cpus=2.0), "tags": {},
        "totals": {"pids_peak": {"": 7}} if totals is None else totals,
    }  # fmt: skip
    body = msgspec.Raw(msgspec.json.encode(Record(**{**first, **other})))
    return RecordFrame(number=1, digest="d", time=time.time_ns() - round(ago * S), body=body)


def agent(*, ago=0.0, interval=10.0, **numbers):
    return AgentSample(time.time_ns() - round(ago * S), interval, "0.1", numbers)


def board(*frames, grace=300.0):
    made = Board(grace=grace, scheduler="slurm")
    for frame in frames:
        made.take(frame)
    return made


def shown(made):
    return {job.job: job for job in made.seen().jobs}


def test_a_job_is_shown_as_of_its_newest_sample():
    seen = shown(board(sample(ago=2, totals={"pids": {"": 1}}), sample(ago=1, totals={"pids": {"": 2}})))
    assert seen["1.0"].totals == {"pids": {"": 2}}
    assert not seen["1.0"].finished


def test_whose_it_is():
    job = shown(board(sample(tags={"Account": "phys", "SCHEDULER": "condor"}, parent="pilot.0")))["1.0"]
    assert (job.owner, job.account, job.scheduler, job.parent) == ("alice", "phys", "condor", "pilot.0")
    job = shown(board(sample()))["1.0"]
    assert (job.account, job.scheduler, job.parent) == ("-", "slurm", "-")


def test_one_that_has_ended_is_shown_by_its_record():
    job = shown(board(sample(ago=1), record()))["1.0"]
    assert job.finished
    assert job.totals == {"pids_peak": {"": 7}}
    assert job.limits == {"cpus": 2.0}


def test_a_sample_from_before_the_end_comes_too_late():
    assert shown(board(record(ago=1), sample(ago=2)))["1.0"].finished


def test_an_id_that_is_used_again_is_the_new_job():
    assert not shown(board(record(ago=2), sample(ago=1)))["1.0"].finished
    assert not shown(board(sample(ago=1), record(ago=2)))["1.0"].finished


def test_one_that_has_ended_goes_after_the_grace():
    assert shown(board(record(ago=200))).keys() == {"1.0"}
    assert shown(board(record(ago=400))) == {}
    assert shown(board(record(), grace=0)) == {}


def test_one_that_is_not_heard_of_goes():
    assert shown(board(sample(ago=20))).keys() == {"1.0"}
    assert shown(board(sample(ago=31))) == {}
    made = board(sample(ago=301), sample("2.0", ago=250), agent(interval=100.0))
    assert shown(made).keys() == {"2.0"}


def test_a_clock_that_was_set_back_makes_nothing_old():
    made = board(sample(ago=-3600), agent(ago=-3600))
    assert shown(made).keys() == {"1.0"}
    assert made.seen().up


def test_whether_the_agent_is_there():
    assert not board().seen().up
    assert board().seen().agent is None
    made = board(agent(ago=1, ticks=1.0), agent(ticks=2.0))
    assert made.seen().up
    assert made.seen().agent.numbers == {"ticks": 2.0}
    late = board(agent(ago=31)).seen()
    assert not late.up
    assert late.agent is not None


def test_what_lies_on_another_device_is_not_shown_twice():
    totals = {"block_read": {"253:0": 5, "8:0": 5}}
    for frame in (sample(totals=totals, stacked=("253:0",)), record(totals=totals, stacked=("253:0",))):
        assert shown(board(frame))["1.0"].totals == {"block_read": {"8:0": 5}}


@pytest.mark.parametrize(("metric", "kind"), [("block_read", "device"), ("nfs_read", "mount"), ("network", "class")])
def test_labels_are_bounded_and_their_sum_is_right(metric, kind):
    most = LABELS_MOST[kind]
    values = {f"{kind}{number}": number for number in range(most + 5)}
    totals = shown(board(sample(totals={metric: values})))["1.0"].totals[metric]
    assert len(totals) == most + 1
    assert totals[REST] == sum(range(most, most + 5))
    assert sum(totals.values()) == sum(values.values())


def test_the_rest_never_falls():
    most = LABELS_MOST["device"]
    first = {f"8:{number}": 10 for number in range(most + 2)}
    # Another device first, an old one gone: what was shown apart stays so, what was in the rest stays there.
    then = {"9:0": 1, **{f"8:{number}": 11 for number in range(1, most + 2)}}
    made = board(sample(ago=1, totals={"block_read": first, "block_write": {"10:0": 3}}))
    before = shown(made)["1.0"].totals
    made.take(sample(totals={"block_read": then}))
    after = shown(made)["1.0"].totals
    assert before["block_read"][REST] == 20
    assert before["block_write"] == {REST: 3}
    assert after["block_read"] == {**{f"8:{number}": 11 for number in range(1, most)}, REST: 23}


def test_a_label_that_is_too_long_is_in_the_rest():
    totals = {"nfs_read": {"/" + "x" * TEXT_MOST: 5, "/data": 6}}
    assert shown(board(sample(totals=totals)))["1.0"].totals == {"nfs_read": {REST: 5, "/data": 6}}


def test_texts_are_cut():
    job = shown(board(sample(tags={"account": "x" * 4096})))["1.0"]
    assert job.account == "x" * TEXT_MOST


@pytest.mark.parametrize("value", [-1, INT64_MAX + 1, 10**400])
def test_an_absurd_value_is_left_out_and_nothing_else(value):
    made = board(sample(totals={"pids": {"": value}, "block_read": {"8:0": value, "8:1": 2}}, limits={"cpus": value}))
    job = shown(made)["1.0"]
    assert job.totals == {"pids": {}, "block_read": {"8:1": 2}}
    assert job.limits == {}
    assert made.seen().errors == 3


def test_a_number_that_has_no_labels_has_one_value():
    made = board(sample(totals={"pids": {"": 1, "x": 2}}))
    assert shown(made)["1.0"].totals == {"pids": {"": 1}}
    assert made.seen().errors == 1


def test_what_a_newer_agent_counts_means_nothing():
    made = board(sample(totals={"memory_dreams": {"": 5}}, limits={"dreams": 1}))
    assert shown(made)["1.0"].totals == {}
    assert made.seen().errors == 0


@pytest.mark.parametrize(
    "frame",
    [
        sample(job=""),
        sample(job='x"y'),
        sample(job="x" * 129),
        sample(owner="a\0b"),
        sample(tags={"account": "\ud800"}),
        record(job="/"),
        RecordFrame(1, "d", 1, msgspec.Raw(b'{"id":3}')),
        agent(interval=0.0),
        agent(interval=float("inf")),
    ],
)
def test_a_frame_that_cannot_be_shown_is_counted(frame):
    made = board(frame, sample("2.0"), agent(ticks=1.0))
    assert shown(made).keys() == {"2.0"}
    assert made.seen().agent.interval == 10.0
    assert made.seen().errors == 1


def test_odd_labels_and_numbers_are_counted():
    made = board(sample(totals={"nfs_read": {"/a\0b": 1, "/c": 2}}), agent(**{"Bad Name": 1.0, "fine": 2.0}))
    assert shown(made)["1.0"].totals == {"nfs_read": {"/c": 2}}
    assert made.seen().agent.numbers == {"fine": 2.0}
    assert made.seen().errors == 2


def test_events_and_marks_are_not_for_it():
    made = board(EventFrame(1, 1.0, "started", "x"), Mark(1))
    assert made.seen() == ([], None, False, 0)


def test_jobs_are_bounded_and_the_oldest_finished_one_makes_room(monkeypatch):
    assert JOBS_MOST == 10_000
    monkeypatch.setattr(module, "JOBS_MOST", 3)
    made = board(record("1.0", ago=1), sample("2.0"), record("3.0"), sample("4.0"))
    assert shown(made).keys() == {"2.0", "3.0", "4.0"}
    made.take(sample("5.0"))
    made.take(sample("6.0"))
    assert shown(made).keys() == {"2.0", "4.0", "5.0"}
    assert made.seen().errors == 1
    made.take(sample("2.0", ago=-1, totals={"pids": {"": 9}}))
    assert shown(made)["2.0"].totals == {"pids": {"": 9}}


def test_many_feed_it_while_somebody_looks():
    made = board()
    rounds = 200

    def feed(name):
        for number in range(rounds):
            made.take(sample(f"{name}.{number % 10}", ago=-number, totals={"pids": {"": number}}))

    threads = [threading.Thread(target=feed, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert all(job.totals["pids"][""] < rounds for job in made.seen().jobs)
    for thread in threads:
        thread.join()
    assert {job.totals["pids"][""] for job in made.seen().jobs} == set(range(rounds - 10, rounds))
    assert len(made.seen().jobs) == 40


_LABELS = st.dictionaries(st.text(max_size=8), st.integers(), max_size=4)


@given(
    totals=st.dictionaries(st.sampled_from([*BY_NAME]) | st.text(max_size=8), _LABELS, max_size=5),
    tags=st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
    limits=st.dictionaries(st.sampled_from(["memory", "cpus", "x"]), st.integers() | st.floats(), max_size=3),
    owner=st.text(max_size=8),
)
def test_nothing_that_is_in_a_frame_makes_it_fail(totals, tags, limits, owner):
    made = board(sample(totals=totals, tags=tags, limits=limits, owner=owner), sample("2.0"))
    assert "2.0" in shown(made)


def test_what_comes_over_the_spool_is_taken_as_it_is():
    line = (
        b'{"kind":"sample","time":%d,"job":"1.0","owner":"a","uid":1,"started":1,"network":"nat","totals":{}}'
        % time.time_ns()
    )
    assert shown(board(decode(line))).keys() == {"1.0"}
