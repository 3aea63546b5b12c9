"""The spool's newest lines come to the board: a real spool, written while it is followed."""

import time

import msgspec
import pytest

from acctd.frames import AgentSample, RecordFrame, Sample, encode
from acctd.model import Limits, Record
from acctd.spool import Reader, Writer
from exporters import follow as module
from exporters.board import Board
from exporters.follow import Follower


def sample(job, **totals):
    named = {name: {"": value} for name, value in totals.items()}
    return encode(Sample(time.time_ns(), job, "alice", 1000, 1.0, "nat", named))


def record(job):
    body = Record(
        id=job, owner="alice", uid=1, node="n", state="done", started=1.0, ended=2.0, wall_ns=1, exit_code=0,
        exit_signal=None, network="nat", limits=Limits(), tags={}, totals={},
    )  # fmt: skip
    return encode(RecordFrame(1, "d", time.time_ns(), msgspec.Raw(msgspec.json.encode(body))))


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def followed(tmp_path):
    """(board, a function that begins to follow, writers of both streams)"""
    for name in ("samples", "records"):
        (tmp_path / name).mkdir()
    board = Board(grace=300)
    follower = Follower(board, tmp_path)
    yield board, follower.start, Writer(tmp_path / "samples"), Writer(tmp_path / "records")
    follower.close()


def test_what_is_written_is_shown(followed):
    board, start, samples, records = followed
    samples.append([sample("1.0", pids=1), sample("2.0", pids=5)])
    start()
    until(lambda: len(board.seen().jobs) == 2)
    samples.append([sample("1.0", pids=2), encode(AgentSample(time.time_ns(), 10.0, "0.1", {}))])
    until(lambda: board.seen().up)
    assert {job.job: job.totals["pids"][""] for job in board.seen().jobs} == {"1.0": 2, "2.0": 5}
    records.append([record("1.0")])
    until(lambda: {job.job for job in board.seen().jobs if job.finished} == {"1.0"})


def test_a_spool_that_is_not_there_yet(tmp_path):
    board = Board(grace=300)
    follower = Follower(board, tmp_path / "spool")
    follower.start()
    (tmp_path / "spool" / "samples").mkdir(parents=True)
    Writer(tmp_path / "spool" / "samples").append([sample("1.0")])
    until(lambda: board.seen().jobs)
    follower.close()


def test_lines_that_are_none_are_counted(followed):
    board, start, samples, _ = followed
    samples.append([b"none", b"\xff", b'{"kind":"sample"}', sample("1.0")])
    start()
    until(lambda: board.seen().jobs)
    assert board.seen().errors == 3


def test_a_line_too_deep_to_be_read_is_counted(followed, caplog):
    board, start, samples, records = followed
    deep = b"[" * 100_000 + b"]" * 100_000
    samples.append([b'{"kind":"sample","new":' + deep + b"}", sample("1.0")])
    records.append([b'{"kind":"record","number":1,"digest":"d","time":1,"body":{"new":' + deep + b"}}", record("2.0")])
    start()
    until(lambda: len(board.seen().jobs) == 2)
    assert board.seen().errors == 2
    assert caplog.text == "", "it is no defect of ours"


def test_a_defect_costs_the_line_and_is_told_of(followed, monkeypatch, caplog):
    board, start, samples, _ = followed
    take = board.take

    def picky(frame):
        if frame.job == "1.0":
            raise ZeroDivisionError("a defect")
        take(frame)

    monkeypatch.setattr(board, "take", picky)
    samples.append([sample("1.0"), sample("2.0")])
    start()
    until(lambda: board.seen().jobs)
    assert [job.job for job in board.seen().jobs] == ["2.0"]
    assert board.seen().errors == 1
    assert "a line of samples could not be shown" in caplog.text


def test_a_defect_elsewhere_ends_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "_AGAIN", 0.01)
    (tmp_path / "samples").mkdir()
    board = Board(grace=300)
    follower = Follower(board, tmp_path)
    defects, newest = [ZeroDivisionError("a defect")], Reader.newest

    def picky(reader):
        if defects:
            raise defects.pop()
        return newest(reader)

    monkeypatch.setattr(Reader, "newest", picky)
    Writer(tmp_path / "samples").append([sample("1.0")])
    follower.start()
    try:
        until(lambda: board.seen().jobs)
    finally:
        follower.close()
    assert "ZeroDivisionError: a defect" in caplog.text


def test_only_the_newest_segment_is_read_at_first(followed, tmp_path):
    board, start, samples, _ = followed
    samples.append([sample("1.0")])
    samples.close()
    newer = Writer(tmp_path / "samples")
    newer.append([sample("2.0")])
    start()
    until(lambda: board.seen().jobs)
    assert [job.job for job in board.seen().jobs] == ["2.0"]
    third = Writer(tmp_path / "samples")
    third.append([sample("3.0")])
    until(lambda: len(board.seen().jobs) == 2)


def test_a_spool_that_cannot_be_read_is_told_of_once(followed, tmp_path, caplog):
    board, start, samples, _ = followed
    damaged = tmp_path / "samples" / f"{0:020d}.jsonl"
    damaged.mkdir()
    start()
    until(lambda: caplog.text)
    damaged.rmdir()
    samples.append([sample("1.0")])
    until(lambda: board.seen().jobs)
    assert caplog.text.count("cannot read the spool") == 1
