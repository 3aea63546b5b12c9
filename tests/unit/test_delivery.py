"""One sink against a target that remembers: each good point kept, each bad one set aside once, whoever dies."""

import contextlib
import errno
import json
import logging
import os
import resource
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from acctd.errors import AcctdError, UsageError
from acctd.frames import EVENTS, RECORDS, SAMPLES, EventFrame, Mark, Sample, encode
from acctd.spool import Position, Writer, remove
from exporters import delivery, positions
from exporters.delivery import (
    Delivery,
    Item,
    RefusedError,
    TooLargeError,
    UnavailableError,
    check_directory,
    quarantine,
)


class KilledError(BaseException):
    """What nothing catches: SIGKILL for a test in one process."""


class Target:
    """A database that keeps points by what they are. `answers` are what it does next; then it takes what is good."""

    identity = "memory"
    streams = (RECORDS, EVENTS, SAMPLES)

    def __init__(self, *, batch=100, room=10**9, points=1, streams=None):
        self.batch, self.room, self.points = batch, room, points
        self.streams = streams or Target.streams
        self.kept: Counter[tuple[str, bytes]] = Counter()
        self.requests: list[tuple[str, int]] = []
        self.answers: list[Callable] = []
        self.otherwise: Callable | None = None
        self.memory: dict[str, int] = {}
        self.closed = 0

    def encode(self, frame):
        if isinstance(frame, Mark):
            return []
        if isinstance(frame, EventFrame):
            if frame.event == "unsayable":
                raise UsageError("it has no words for that")
            if frame.event == "bug":
                raise ZeroDivisionError("oh")
            return [Item("events", f"{frame.event} {frame.number}".encode())]
        return [Item("samples", f"{frame.job} {frame.time} {n}".encode()) for n in range(self.points)]

    def send(self, to, data):
        assert data
        self.requests.append((to, len(data)))
        if self.answers:
            return self.answers.pop(0)(self, to, data)
        if self.otherwise is not None:
            return self.otherwise(self, to, data)
        return takes(self, to, data)

    def state(self):
        return dict(self.memory)

    def resume(self, state):
        self.memory = dict(state)

    def close(self):
        self.closed += 1


def takes(target, to, data):
    if sum(map(len, data)) > target.room:
        raise TooLargeError("too large, said the server")
    if any(point.startswith(b"bad") for point in data):
        raise RefusedError("400 unable to parse")
    target.kept.update((to, point) for point in data)
    target.memory["requests"] = target.memory.get("requests", 0) + 1


def takes_the_good(target, to, data):
    """As InfluxDB 1 does on a partial write: keeps what it can, and does not say which."""
    target.kept.update((to, point) for point in data if not point.startswith(b"bad"))
    if any(point.startswith(b"bad") for point in data):
        raise RefusedError("400 partial write: unable to parse")


def names_the_bad(target, to, data):
    """As InfluxDB 3 does: keeps what it can, and says which it cannot."""
    target.kept.update((to, point) for point in data if not point.startswith(b"bad"))
    if bad := {n: f"line {n} is bad" for n, point in enumerate(data) if point.startswith(b"bad")}:
        raise RefusedError("partial write", bad)


def refuses_all(target, to, data):
    raise RefusedError("400 not today")


def unavailable(words="503 busy", retry_after=None):
    def answer(target, to, data):
        raise UnavailableError(words, retry_after)

    return answer


def dies_before(target, to, data):
    raise KilledError


def dies_after(target, to, data):
    takes_the_good(target, to, data)
    raise KilledError


class Clock:
    """Stands in for the event that ends a delivery: nobody waits, and how long they would have is remembered."""

    def __init__(self):
        self.waits = []
        self.stop_after = None

    def is_set(self):
        return self.stop_after is not None and len(self.waits) >= self.stop_after

    def wait(self, seconds):
        self.waits.append(seconds)
        return self.is_set()

    def set(self):
        self.stop_after = 0


class Site:
    """A spool with a writer for each stream, and one sink's position."""

    def __init__(self, directory: Path, target: Target) -> None:
        self.spool, self.at, self.target = directory / "spool", directory / "positions", target
        self.at.mkdir()
        for stream in (RECORDS, EVENTS, SAMPLES):
            (self.spool / stream).mkdir(parents=True)
        self.writers = {}
        self.number = 0
        self.clock = Clock()
        self.renew()

    def renew(self):
        """The agent was started again."""
        for writer in self.writers.values():
            writer.close()
        least = positions.furthest(self.at, positions.names(self.at))
        self.writers = {
            stream: Writer(self.spool / stream, at_least=least[stream], segment_bytes=200)
            for stream in (RECORDS, EVENTS, SAMPLES)
        }

    def event(self, *words):
        """Leave events that the target takes or not, by their first letters."""
        frames = []
        for word in words:
            self.number += 1
            frames.append(EventFrame(self.number, 0.0, word, ""))
        self.writers[EVENTS].append([encode(frame) for frame in frames])

    def sample(self, count, job="job"):
        first = self.number + 1
        self.number += count
        frames = [Sample(first + n, job, "me", 1, 0.0, "host", {}) for n in range(count)]
        self.writers[SAMPLES].append([encode(frame) for frame in frames])

    def sink(self):
        made = Delivery("sink", self.target, self.spool, self.at)
        made._stop = self.clock
        return made

    def deliver(self):
        """Until there is nothing, or it dies; the sink."""
        sink = self.sink()
        with contextlib.suppress(KilledError):
            sink.run(until_empty=True)
        return sink

    @property
    def stored(self):
        return positions.load(self.at, "sink")

    def set_aside(self):
        path = quarantine(self.at, "sink")
        data = b""
        for each in (Path(f"{path}.old"), path):
            data += each.read_bytes() if each.exists() else b""
        assert not data or data.endswith(b"\n")
        return [json.loads(line) for line in data.splitlines()]


@pytest.fixture
def site(tmp_path):
    """`site(**options)`: with a target made of these."""
    made = []

    def make(**options):
        made.append(Site(tmp_path, Target(**options)))
        return made[-1]

    yield make
    for each in made:
        for writer in each.writers.values():
            writer.close()


def points(*words, first=1):
    return {("events", f"{word} {first + n}".encode()): 1 for n, word in enumerate(words)}


# What goes well


def test_all_streams_arrive_once_and_are_counted(site):
    s = site(points=3)
    s.writers[RECORDS].append([encode(Mark(0))])
    s.event("a", "b")
    s.sample(5)
    sink = s.deliver()
    assert len(s.target.kept) == 2 + 15
    assert set(s.target.kept.values()) == {1}
    assert (sink.numbers().counts.sent, sink.numbers().counts.quarantined) == (17, 0)
    assert s.stored == sink.numbers()
    assert {stream: at.number for stream, at in s.stored.positions.items()} == {RECORDS: 1, EVENTS: 2, SAMPLES: 5}
    assert s.target.closed == 1
    assert s.stored.accepted > 0
    before = len(s.target.requests)
    s.deliver()
    assert len(s.target.requests) == before


def test_a_record_does_not_wait_behind_samples(site):
    s = site(batch=8)
    s.sample(50)
    s.event("late")
    s.deliver()
    assert s.target.requests[0] == ("events", 1)


@pytest.mark.parametrize("batch", [1, 2, 7, 100])
def test_no_request_has_more_points_than_a_batch(site, batch):
    s = site(batch=batch, points=5)
    s.sample(40)
    s.deliver()
    assert max(count for _, count in s.target.requests) <= batch
    assert len(s.target.kept) == 200
    assert set(s.target.kept.values()) == {1}


def test_a_sink_gets_only_its_streams_and_holds_up_no_other(site):
    s = site(streams=(EVENTS,))
    s.event("a")
    s.sample(5)
    s.deliver()
    assert s.target.kept == points("a")
    assert positions.consumed(s.at, ["sink"]) == {EVENTS: 1}


def test_a_sink_says_at_once_what_it_wants(site):
    s = site()
    s.event("a")
    s.target.answers = [dies_before]
    s.deliver()
    assert positions.consumed(s.at, ["sink"]) == {RECORDS: 0, EVENTS: 0, SAMPLES: 0}


def test_a_new_sink_begins_with_the_oldest_there_is_and_misses_nothing(site):
    s = site()
    s.event(*"abcdefgh")
    s.event(*"ijklm")
    gone = s.writers[EVENTS].full()[0]
    remove(gone)
    sink = s.deliver()
    assert s.target.kept == points(*"ijklm", first=9)
    assert sink.numbers().counts.dropped == {}


def test_backlog_is_what_is_not_read(site):
    s = site()
    s.event(*"abcdefgh")
    s.event(*"ijklm")
    size = sum(path.stat().st_size for path in (s.spool / EVENTS).iterdir())
    assert s.sink().backlog() == size
    assert s.deliver().backlog() == 0
    s.event("n")
    assert 0 < s.sink().backlog() < 100


def test_what_the_first_batch_begins_with_is_stored_before_it(site):
    """Else a file that was appended to could not be cut, should the first batch be the last."""

    class File(Target):
        def resume(self, state):
            self.memory = {"size": state.get("size", 17)}

    s = site()
    s.target = File()
    s.event("a")
    s.target.answers = [dies_after]
    s.deliver()
    assert s.stored.target == {"size": 17}
    assert s.stored.positions[EVENTS].number == 0


def test_the_targets_own_memory_goes_with_the_position(site):
    s = site(batch=8)
    s.event(*"abc")
    s.target.answers = [takes, dies_after]
    s.deliver()
    assert s.stored.target == {"requests": 1}
    s.target.memory = {"requests": 99}
    s.deliver()
    assert s.stored.target == {"requests": 3}


# What the target will never take


@pytest.mark.parametrize("answer", [takes, takes_the_good, names_the_bad])
@pytest.mark.parametrize("batch", [1, 2, 3, 100])
@pytest.mark.parametrize(
    "words", ["x", "-", "x-", "-x", "--x--", "x-x-x", "-" * 9, "x" * 12 + "-" + "x" * 12, "xx--xxxx-xxx"]
)
def test_the_bad_are_set_aside_and_the_good_are_kept(site, answer, batch, words):
    s = site(batch=batch)
    s.target.otherwise = answer
    names = ["bad" if word == "-" else "good" for word in words]
    s.event(*names)
    sink = s.deliver()
    wanted = [(to, point) for to, point in points(*names) if point.startswith(b"good")]
    assert set(s.target.kept) == set(wanted)
    refused = [point.decode() for _, point in points(*names) if point.startswith(b"bad")]
    assert [entry["point"] for entry in s.set_aside()] == refused
    assert all(entry["to"] == "events" and entry["words"] and entry["time"] for entry in s.set_aside())
    counts = sink.numbers().counts
    assert (counts.sent, counts.quarantined, counts.failures) == (len(wanted), len(refused), 0)


def test_the_servers_words_are_kept_with_the_point(site):
    s = site()
    s.target.otherwise = names_the_bad
    s.event("good", "bad")
    s.deliver()
    assert [entry["words"] for entry in s.set_aside()] == ["line 1 is bad"]


@pytest.mark.parametrize("bad", [{}, {7: "no such"}, {-1: "nor this"}])
def test_a_refusal_that_names_nothing_usable_is_found_by_halving(site, bad):
    def answer(target, to, data):
        if any(point.startswith(b"bad") for point in data):
            raise RefusedError("400", bad)
        takes(target, to, data)

    s = site()
    s.target.otherwise = answer
    s.event("good", "bad", "good")
    s.deliver()
    assert len(s.target.kept) == 2
    assert [entry["point"] for entry in s.set_aside()] == ["bad 2"]


def test_finding_one_in_a_thousand_takes_few_requests(site):
    s = site(batch=1000)
    s.event(*["good"] * 77, "bad", *["good"] * 47)  # a read is of batch / 8 lines
    s.deliver()
    assert len(s.target.kept) == 124
    assert len(s.target.requests) <= 2 * 7 + 1


def test_lines_that_are_none_and_frames_without_words_are_set_aside(site, caplog):
    s = site()
    s.writers[EVENTS].append([b"\0\0\0", b'{"kind":"event"}'])
    s.event("unsayable", "bug", "good")
    sink = s.deliver()
    assert list(s.target.kept) == [("events", b"good 3")]
    aside = s.set_aside()
    assert [entry["to"] for entry in aside] == [EVENTS] * 4
    assert aside[2]["words"] == "it has no words for that"
    assert "ZeroDivisionError" in aside[3]["words"]
    assert "could not be encoded" in caplog.text
    assert sink.numbers().counts.unreadable == sink.numbers().counts.quarantined == 4


# Fewer at a time


def test_too_many_at_a_time_loses_and_doubles_nothing(site):
    """What was cut off for one request is not skipped by the next ones."""
    s = site(batch=64, room=200, points=40)
    s.sample(60)
    s.deliver()
    assert len(s.target.kept) == 60 * 40
    assert set(s.target.kept.values()) == {1}
    assert s.set_aside() == []


def test_a_point_too_large_for_any_request_is_set_aside_and_batches_grow_again(site):
    s = site(batch=64, room=200 * 64)
    s.sample(64)
    s.sample(1, job="j" * 80_000)
    s.sample(1500)
    s.deliver()
    assert len(s.target.kept) == 1564
    assert [entry["words"] for entry in s.set_aside()] == ["too large, said the server"]
    sizes = [count for _, count in s.target.requests]
    assert min(sizes) == 1
    assert sizes[-2] == 8  # 64 // 8 lines a read


def test_a_small_point_that_is_too_large_says_that_something_on_the_way_takes_nothing(site):
    s = site(batch=64, room=1)
    s.sample(20)
    s.clock.stop_after = 20
    s.deliver()
    assert s.stored.trouble == "too large, said the server"
    assert s.set_aside() == []
    s.clock.stop_after = None
    s.target.room = 10**9
    s.deliver()
    assert set(s.target.kept.values()) == {1}
    assert len(s.target.kept) == 20


def test_a_server_that_takes_little_is_seldom_asked_for_more(site):
    s = site(batch=64, room=200, points=8)
    s.sample(800)
    s.deliver()
    assert len(s.target.kept) == 6400
    refused = len(s.target.requests) - s.stored.counts.requests
    assert refused < len(s.target.requests) / 10


# A target that is away


def test_the_same_is_asked_again_until_there_is_an_answer(site, caplog):
    caplog.set_level(logging.INFO, "acctd")
    s = site()
    s.event("a", "b")
    s.target.answers = [unavailable(f"503 number {n}") for n in range(20)]
    sink = s.deliver()
    assert s.target.kept == points("a", "b")
    assert sink.numbers().counts.failures == 20
    assert sink.numbers().counts.requests == 1
    assert sink.numbers().trouble is None
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "sink sink: 503 number 0; what it is to get waits in the spool",
        "sink sink takes points again",
    ]


def test_back_off_doubles_with_jitter_up_to_a_minute(site):
    s = site()
    s.event("a")
    s.target.answers = [unavailable() for _ in range(12)]
    s.deliver()
    for number, wait in enumerate(s.clock.waits):
        pause = min(60.0, 0.5 * 2**number)
        assert pause / 2 <= wait <= pause
    assert len(s.clock.waits) == 12
    assert len({wait / min(60.0, 0.5 * 2**n) for n, wait in enumerate(s.clock.waits)}) == 12


def test_back_off_begins_anew_with_the_next_batch(site):
    s = site(batch=8)
    s.event("a", "b")
    s.target.answers = [unavailable()] * 5 + [takes] + [unavailable()]
    s.deliver()
    assert s.clock.waits[-1] <= 0.5


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [(7.0, 7.25, 7.5), (1e9, 600.25, 600.5), (0.0, 0.25, 0.5), (-5.0, 0.25, 0.5), (float("nan"), 0.25, 0.5)],
)
def test_a_server_that_says_when_is_asked_then_and_not_by_all_at_once(site, asked, least, most):
    s = site()
    s.event("a")
    s.target.answers = [unavailable("429", asked)]
    s.deliver()
    assert least <= s.clock.waits[0] <= most
    assert s.target.kept == points("a")


def test_trouble_is_stored_while_it_lasts(site):
    s = site()
    s.event("a")

    def looks(target, to, data):
        assert s.stored.trouble == "503 busy"
        assert s.stored.positions[EVENTS].number == 0
        takes(target, to, data)

    s.target.answers = [unavailable(), looks]
    s.deliver()
    assert s.stored.trouble is None


def test_an_error_of_the_network_is_no_end(site):
    def breaks(target, to, data):
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    s = site()
    s.event("a")
    s.target.answers = [breaks, breaks]
    assert s.deliver().numbers().counts.failures == 2
    assert s.target.kept == points("a")


@pytest.mark.parametrize("answers", [[], [unavailable("429", 500.0)] * 10])
def test_stop_ends_a_wait_at_once(site, answers):
    """A real one: with nothing to do, and in mid-pause."""
    s = site()
    asked = threading.Event()
    if answers:
        s.event("a")
        s.target.otherwise = lambda *_: asked.set() or answers[0](*_)
    sink = Delivery("sink", s.target, s.spool, s.at)
    thread = threading.Thread(target=sink.run)
    thread.start()
    if answers:
        assert asked.wait(30)
    sink.stop()
    thread.join(30)
    assert not thread.is_alive()
    assert s.target.closed == 1
    s.target.otherwise = None
    s.deliver()
    assert s.target.kept == (points("a") if answers else {})


def test_end_when_empty_ends_one_that_waits_and_leaves_nothing(site):
    """A real wait: lines that were there before the word are delivered, however soon it comes."""
    s = site(batch=8)
    for round_ in range(5):
        sink = Delivery("sink", s.target, s.spool, s.at)
        thread = threading.Thread(target=sink.run)
        thread.start()
        s.event("a", "b", "c")
        sink.end_when_empty()
        thread.join(30)
        assert not thread.is_alive()
        assert len(s.target.kept) == 3 * (round_ + 1)


def test_until_empty_ends_when_it_is_and_takes_what_came_meanwhile(site):
    s = site(batch=8)

    def adds(target, to, data):
        takes(target, to, data)
        s.event("later")

    s.event("a")
    s.target.answers = [adds, adds]
    s.deliver()
    assert s.target.kept == points("a", "later", "later")


# Dying


@pytest.mark.parametrize("answer", [takes, takes_the_good, names_the_bad])
@pytest.mark.parametrize("dies", range(1, 9))
@pytest.mark.parametrize("death", [dies_before, dies_after])
def test_killed_around_any_request(site, answer, dies, death):
    s = site(batch=16)
    words = ["good", "bad", "good", "good", "good", "bad"]
    s.event(*words)
    s.target.otherwise = answer
    s.target.answers = [answer] * dies + [death]
    for _ in range(20):
        s.deliver()
    assert {point for _, point in s.target.kept} == {b"good 1", b"good 3", b"good 4", b"good 5"}
    assert [entry["point"] for entry in s.set_aside()] == ["bad 2", "bad 6"]
    counts = s.stored.counts
    assert (counts.sent, counts.quarantined) == (4, 2)


@pytest.mark.parametrize("dies", range(1, 12))
@pytest.mark.parametrize("before", [True, False])
def test_killed_around_any_store(site, monkeypatch, dies, before):
    """The quarantine may be written and the position not."""
    s = site(batch=8)
    s.event("good", "bad", "good", "bad", "bad", "good")
    left, real = [dies], positions.store

    def store(*arguments):
        left[0] -= 1
        if left[0] == 0 and before:
            raise KilledError
        real(*arguments)
        if left[0] == 0:
            raise KilledError

    monkeypatch.setattr(positions, "store", store)
    monkeypatch.setattr(delivery, "_QUARANTINE_MOST", 100)  # every second one begins it anew
    s.deliver()
    s.deliver()
    assert {point for _, point in s.target.kept} == {b"good 1", b"good 3", b"good 6"}
    # Two files are kept and no more: of three, turned over each time, the last ones, each once.
    kept = [entry["point"] for entry in s.set_aside()]
    assert kept == ["bad 2", "bad 4", "bad 5"][-len(kept) :]
    assert kept
    assert (s.stored.counts.sent, s.stored.counts.quarantined) == (3, 3)


@pytest.mark.parametrize("dies", [1, 2, 3])
def test_killed_while_the_quarantine_is_turned_over(site, monkeypatch, dies):
    s = site(batch=8)
    monkeypatch.setattr(delivery, "_QUARANTINE_MOST", 150)  # two fit
    left, real = [dies], os.replace

    def replace(source, to):
        real(source, to)
        left[0] -= 1
        if left[0] == 0:
            raise KilledError

    monkeypatch.setattr(os, "replace", replace)
    seen = []
    for number in range(8):
        s.event("bad")
        s.deliver()
        s.deliver()
        aside = [entry["point"] for entry in s.set_aside()]
        assert aside[-1] == f"bad {number + 1}"
        assert len(aside) == len(set(aside))
        seen += [point for point in aside if point not in seen]
    assert seen == [f"bad {number + 1}" for number in range(8)]


def test_lines_that_went_are_counted_once_whoever_dies(site):
    s = site(batch=8)
    s.event("a")
    s.deliver()
    s.event(*"bcdefghi")
    s.event(*"jklm")
    remove(s.writers[EVENTS].full()[0])
    s.event("n")
    gone = s.writers[EVENTS].full()[0].first - 1
    # It says that it is in trouble, which is stored; then it dies.
    s.target.answers = [unavailable(), dies_before]
    s.deliver()
    assert s.stored.trouble == "503 busy"
    assert s.stored.counts.dropped == {}
    s.deliver()
    assert s.stored.counts.dropped == {EVENTS: gone} == {EVENTS: 8}
    s.deliver()
    assert s.stored.counts.dropped == {EVENTS: 8}


# One's own disk


@contextlib.contextmanager
def files_end_at(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 10, 1000, 1700])
def test_a_full_disk_is_waited_for_and_nothing_is_doubled(site, room, caplog):
    """Neither a torn position nor a torn quarantine; and it goes on by itself when there is room."""
    s = site(batch=8)
    s.event("good", "bad", "bad", "bad", "good")

    def at_length(target, to, data):  # a position has some 300 bytes, so this is what comes to the end of the room
        if data[0].startswith(b"bad"):
            raise RefusedError("no " * 200)
        takes(target, to, data)

    s.target.otherwise = at_length

    class Full(Clock):
        def wait(self, seconds):
            if len(self.waits) == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            return super().wait(seconds)

    s.clock = Full()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with files_end_at(room):
        s.deliver()
    assert len(s.clock.waits) == 4
    assert s.target.kept == {("events", b"good 1"): 1, ("events", b"good 5"): 1}
    assert [entry["point"] for entry in s.set_aside()] == ["bad 2", "bad 3", "bad 4"]
    assert s.stored.trouble is None
    assert caplog.text.count("waiting for it") == 1


def test_stop_ends_the_wait_for_a_disk_and_the_next_one_begins_there(site):
    s = site(batch=8)
    s.event("bad", "good")
    s.clock.stop_after = 1
    with files_end_at(30):
        s.deliver()
    s.clock = Clock()
    s.deliver()
    assert [entry["point"] for entry in s.set_aside()] == ["bad 1"]
    assert list(s.target.kept) == [("events", b"good 2")]


def test_a_spool_that_cannot_be_read_is_waited_for(site, monkeypatch):
    s = site()
    s.event("a")
    real, left = os.pread, [2]

    def pread(*arguments):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments)

    monkeypatch.setattr(os, "pread", pread)
    s.deliver()
    assert s.clock.waits == [5.0, 5.0]
    assert s.target.kept == points("a")


@pytest.mark.parametrize("lost", ["all", "tail"])
def test_a_quarantine_that_somebody_cut_or_removed_is_not_filled_with_nothing(site, lost):
    s = site(batch=8)
    s.event("bad", "bad")
    sink = s.sink()
    path = quarantine(s.at, "sink")

    def meddles(target, to, data):
        assert path.stat().st_size > 100
        if lost == "all":
            path.unlink()
        else:
            os.truncate(path, 0)
        refuses_all(target, to, data)

    s.target.answers = [takes, takes, meddles]
    s.event("bad")
    sink.run(until_empty=True)
    s.event("bad")
    s.deliver()
    assert [entry["point"] for entry in s.set_aside()] == ["bad 3", "bad 4"]


def test_a_power_cut_that_shortened_the_quarantine_adds_nothing_to_it(site):
    s = site(batch=8)
    s.event("bad", "bad")
    s.deliver()
    path = quarantine(s.at, "sink")
    first = path.read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(first)
    s.event("bad")
    s.deliver()
    assert [entry["point"] for entry in s.set_aside()] == ["bad 1", "bad 3"]


def test_a_damaged_position_is_not_a_new_sink(site):
    s = site()
    (s.at / "sink.json").write_bytes(b"")
    with pytest.raises(AcctdError, match="is damaged"):
        s.sink()


def test_where_positions_cannot_be_stored_is_told_first(tmp_path):
    check_directory(tmp_path / "new" / "place")
    assert list((tmp_path / "new" / "place").iterdir()) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(AcctdError, match=r"export\.positions_dir .* cannot be made"):
        check_directory(tmp_path / "file")


# All of it in any order


class Deliveries(RuleBasedStateMachine):
    """A spool that is written, bounded and emptied, while everybody dies. What was read or dropped adds up."""

    def __init__(self) -> None:
        super().__init__()
        directory = Path(os.environ["DELIVERY_UNDER_TEST"]) / os.urandom(8).hex()
        directory.mkdir()
        self.site = Site(directory, Target(batch=24))
        self.site.deliver()
        self.good: set[bytes] = set()
        self.bad: set[bytes] = set()
        self.gone: set[bytes] = set()

    @rule(words=st.lists(st.sampled_from(["good", "bad", "unsayable"]), min_size=1, max_size=7))
    def write(self, words):
        first = self.site.number + 1
        self.site.event(*words)
        for number, word in enumerate(words, first):
            (self.good if word == "good" else self.bad).add(b"%d" % number)

    @rule()
    def agent_is_started_again(self):
        self.site.renew()

    @rule()
    def read_segments_go(self):
        wanted = positions.consumed(self.site.at, ["sink"])[EVENTS]
        for segment in self.site.writers[EVENTS].full():
            if segment.first + 7 < wanted:
                remove(segment)

    @rule()
    def the_spool_is_full(self):
        for segment in self.site.writers[EVENTS].full()[:1]:
            for line in segment.path.read_bytes().splitlines():
                self.gone.add(b"%d" % json.loads(line)["number"])
            remove(segment)

    @rule(
        answers=st.lists(
            st.sampled_from(
                [takes, takes_the_good, names_the_bad, unavailable(), unavailable("429", 3.0), dies_before, dies_after]
            ),
            max_size=6,
        ),
        room=st.sampled_from([1, 40, 10**6]),
    )
    def deliver(self, answers, room):
        self.site.target.answers, self.site.target.room = answers, max(room, 100)
        self.site.deliver()
        self.site.target.answers = []

    def teardown(self):
        self.site.target.room = 10**6
        self.site.deliver()
        kept = {point.split()[1] for _, point in self.site.target.kept}
        assert kept <= self.good
        assert self.good - kept <= self.gone
        aside = Counter(entry["point"] for entry in self.site.set_aside())
        assert set(aside.values()) <= {1}
        numbers = {
            b"%d" % json.loads(point)["number"] if point.startswith("{") else point.split()[1].encode()
            for point in aside
        }
        assert numbers <= self.bad
        assert self.bad - numbers <= self.gone
        state = self.site.stored
        counts = state.counts
        assert counts.quarantined == len(aside)
        assert counts.sent + counts.quarantined + counts.dropped.get(EVENTS, 0) == self.site.number
        assert state.positions[EVENTS].number == self.site.number
        assert state.positions[SAMPLES] == Position()
        for writer in self.site.writers.values():
            writer.close()


def test_any_order(tmp_path, monkeypatch):
    monkeypatch.setenv("DELIVERY_UNDER_TEST", str(tmp_path))
    run_state_machine_as_test(Deliveries, settings=settings(max_examples=100, stateful_step_count=25, deadline=None))
