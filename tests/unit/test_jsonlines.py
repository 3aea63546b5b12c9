"""Lines of JSON in files and through sockets: each exactly once in a file, whoever is killed when, or moves it away."""

import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from acctd.frames import AgentSample, EventFrame, Mark, RecordFrame, Sample, encode
from acctd.model import Limits, Record
from acctd.sinks import JsonSink
from acctd.spool import Writer
from exporters.delivery import UnavailableError
from exporters.jsonlines import JsonTarget

REPO = Path(__file__).parents[2]


def target(path, *, rotate=10**9, keep=10, state=None):
    made = JsonTarget(JsonSink(name="a", path=path, rotate=rotate, keep=keep))
    made.resume(state or {})
    return made


def lines(path):
    return path.read_text().splitlines()


def files(directory):
    """Every file's lines, by name."""
    return {path.name: lines(path) for path in sorted(directory.iterdir())}


# Lines


def test_a_line_is_the_frame_with_the_time_in_words(tmp_path):
    (item,) = target(tmp_path / "a").encode(EventFrame(3, 1700000000.25, "started", 'a "job"\n', "1.0", 0))
    assert item.data.count(b"\n") == 0
    assert json.loads(item.data) == {
        "at": "2023-11-14T22:13:20.250000Z", "kind": "event", "number": 3, "time": 1700000000.25, "event": "started",
        "text": 'a "job"\n', "job": "1.0", "uid": 0,
    }  # fmt: skip


def test_a_record_is_what_was_signed_byte_for_byte(tmp_path):
    record = Record(
        id="1.0", owner="alice", uid=1, node="n", state="done", started=1.0, ended=2.5, wall_ns=1, exit_code=0,
        exit_signal=None, network="nat", limits=Limits(), tags={}, totals={"pids_peak": {"": 3}},
    )  # fmt: skip
    body = msgspec.json.encode(record).replace(b":", b": ")
    (item,) = target(tmp_path / "a").encode(RecordFrame(1, "digest", 1_700_000_000_123_456_789, msgspec.Raw(body)))
    assert b'"body":' + body in item.data
    line = json.loads(item.data)
    assert (line["at"], line["time"]) == ("2023-11-14T22:13:20.123456Z", 1_700_000_000_123_456_789)


def test_samples_and_marks(tmp_path):
    made = target(tmp_path / "a")
    assert made.encode(Mark(1)) == []
    (one,) = made.encode(Sample(1, "1.0", "a", 1, 1.0, "nat", {}))
    (two,) = made.encode(AgentSample(1, 10.0, "0.1", {}))
    assert [json.loads(item.data)["kind"] for item in (one, two)] == ["sample", "agent"]


# Files


def test_what_was_written_after_the_position_is_cut_off(tmp_path):
    path = tmp_path / "a"
    first = target(path)
    first.send("", [b"1", b"2"])
    state = first.state()
    first.send("", [b"3", b"4"])
    first.close()
    with open(path, "ab") as stream:
        stream.write(b"half a li")
    then = target(path, state=json.loads(json.dumps(state)))
    assert lines(path) == ["1", "2"]
    then.send("", [b"3"])
    assert lines(path) == ["1", "2", "3"]


def test_what_was_there_before_acctd_stays(tmp_path):
    path = tmp_path / "a"
    path.write_text("0\n")
    target(path).send("", [b"1"])
    assert lines(path) == ["0", "1"]


def test_it_is_rotated_before_it_is_too_large(tmp_path):
    made = target(tmp_path / "a", rotate=4, keep=2)
    for number in range(9):
        made.send("", [b"%d" % number])
    # The oldest one goes once the batch for which it was rotated is done.
    assert files(tmp_path) == {"a": ["8"], "a.1": ["6", "7"], "a.2": ["4", "5"], "a.3": ["2", "3"]}
    made.send("", [b"9"])
    assert files(tmp_path) == {"a": ["8", "9"], "a.1": ["6", "7"], "a.2": ["4", "5"]}


def test_a_batch_that_is_larger_than_a_file_is_one(tmp_path):
    made = target(tmp_path / "a", rotate=4, keep=5)
    made.send("", [b"12345678"])
    made.send("", [b"x"])
    assert files(tmp_path) == {"a": ["x"], "a.1": ["12345678"]}


@pytest.mark.parametrize("keep", [0, 1, 5])
def test_killed_after_a_rotation(tmp_path, keep):
    """The rotated file ends where it did; what is in the new one was never stored as done."""
    first = target(tmp_path / "a", rotate=4, keep=keep)
    first.send("", [b"1", b"2"])
    state = first.state()
    first.send("", [b"3"])
    first.close()
    assert files(tmp_path) == {"a": ["3"], "a.1": ["1", "2"]}
    then = target(tmp_path / "a", rotate=4, keep=keep, state=state)
    assert files(tmp_path) == {"a": [], "a.1": ["1", "2"]}
    then.send("", [b"3"])
    then.send("", [b"4"])
    assert files(tmp_path) == {"a": ["3", "4"], **({"a.1": ["1", "2"]} if keep else {})}


def test_killed_in_the_middle_of_a_rotation(tmp_path):
    made = target(tmp_path / "a", rotate=4, keep=5)
    for number in range(7):
        made.send("", [b"%d" % number])
    state = made.state()
    made.close()
    assert files(tmp_path) == {"a": ["6"], "a.1": ["4", "5"], "a.2": ["2", "3"], "a.3": ["0", "1"]}
    os.rename(tmp_path / "a.3", tmp_path / "a.4")
    os.rename(tmp_path / "a.2", tmp_path / "a.3")
    then = target(tmp_path / "a", rotate=4, keep=5, state=state)
    then.send("", [b"7"])
    then.send("", [b"8"])
    assert files(tmp_path) == {
        "a": ["8"], "a.1": ["6", "7"], "a.2": ["4", "5"], "a.3": ["2", "3"], "a.4": ["0", "1"],
    }  # fmt: skip


def test_killed_between_the_old_file_and_the_new_one(tmp_path):
    made = target(tmp_path / "a", rotate=4)
    made.send("", [b"1", b"2"])
    state = made.state()
    made.close()
    os.rename(tmp_path / "a", tmp_path / "a.1")
    target(tmp_path / "a", rotate=4, state=state).send("", [b"3"])
    assert files(tmp_path) == {"a": ["3"], "a.1": ["1", "2"]}


def test_one_that_was_moved_away_is_begun_anew(tmp_path):
    made = target(tmp_path / "a")
    made.send("", [b"1"])
    os.rename(tmp_path / "a", tmp_path / "a-20250101")
    made.send("", [b"2"])
    assert files(tmp_path) == {"a": ["2"], "a-20250101": ["1"]}
    state = made.state()
    made.close()
    os.rename(tmp_path / "a", tmp_path / "a-20250102")
    (tmp_path / "a").write_text("")  # logrotate's `create`
    target(tmp_path / "a", state=state).send("", [b"3"])
    assert files(tmp_path) == {"a": ["3"], "a-20250101": ["1"], "a-20250102": ["2"]}


def test_one_that_was_emptied_is_gone_on_with(tmp_path):
    made = target(tmp_path / "a")
    made.send("", [b"1" * 100])
    os.truncate(tmp_path / "a", 0)  # logrotate's `copytruncate`
    made.send("", [b"2"])
    assert lines(tmp_path / "a") == ["2"]
    state = made.state()
    os.truncate(tmp_path / "a", 0)
    target(tmp_path / "a", state=state).send("", [b"3"])
    assert lines(tmp_path / "a") == ["3"]


def test_a_full_disk_keeps_no_half_lines(tmp_path):
    made = target(tmp_path / "a")
    made.send("", [b"1"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(UnavailableError, match=rf"cannot write {tmp_path}/a \(File too large\)"):
            made.send("", [b"x" * 20])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert lines(tmp_path / "a") == ["1"]
    made.send("", [b"2"])
    assert lines(tmp_path / "a") == ["1", "2"]


def test_what_cannot_be_cut_off_yet_is_cut_off_later(tmp_path):
    folder, path = tmp_path / "log", tmp_path / "log" / "a"
    folder.mkdir()
    first = target(path)
    first.send("", [b"1"])
    state = first.state()
    first.send("", [b"2"])
    first.close()
    folder.rename(tmp_path / "away")
    then = target(path, state=state)
    with pytest.raises(UnavailableError):
        then.send("", [b"2"])
    assert then.state() == state
    (tmp_path / "away").rename(folder)
    then.send("", [b"2"])
    assert lines(path) == ["1", "2"]


def test_what_is_no_file_is_not_written(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    for path in (tmp_path / "pipe", tmp_path / "link", tmp_path / "no" / "where", tmp_path, Path("/dev/null")):
        made = target(path)
        with pytest.raises(UnavailableError, match="cannot write"):
            made.send("", [b"1"])
        assert made.state() == {}
        made.close()
    assert not (tmp_path / "victim").exists()


_CHILD = """
import sys
from pathlib import Path
from acctd.sinks import JsonSink
from exporters.delivery import Delivery
from exporters.jsonlines import JsonTarget
root = Path(sys.argv[1])
sink = JsonSink(name="a", path=root / "out" / "log", streams=("records", "events"), rotate=40_000, keep=1000)
Delivery("a", JsonTarget(sink), root / "spool", root / "positions").run(until_empty=True)
"""


def size(directory):
    """Bytes of all files, some of which are being renamed."""
    total = 0
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_each_line_is_there_once_whoever_is_killed(tmp_path):
    events = 6000
    for name in ("out", "positions", "spool/events", "spool/records"):
        (tmp_path / name).mkdir(parents=True)
    writer = Writer(tmp_path / "spool" / "events")
    for start in range(0, events, 500):
        writer.append([encode(EventFrame(n, 1.0 + n, "e", "x")) for n in range(start, start + 500)])
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    kills = 0
    argv = [sys.executable, "-c", _CHILD, str(tmp_path)]
    while True:
        child = subprocess.Popen(argv, cwd=REPO)
        log = tmp_path / "out" / "log"
        written = size(tmp_path / "out")
        more = chance.randrange(1, 100_000) if kills < 12 else 10**12
        while child.poll() is None:
            if size(tmp_path / "out") > written + more:
                child.send_signal(signal.SIGKILL)
                kills += child.wait() == -signal.SIGKILL
        if child.returncode == 0:
            break
    assert kills > 0
    older = sorted((tmp_path / "out").glob("log.*"), key=lambda path: -int(path.suffix[1:]))
    numbers = [json.loads(line)["number"] for path in [*older, log] for line in lines(path)]
    assert numbers == list(range(events)), f"seed {seed}, {kills} times killed"


# Sockets


class Receiver:
    """Takes connections one after the other and keeps what comes; `hold` keeps it from reading."""

    def __init__(self, family, address):
        self.server = socket.socket(family)
        self.server.bind(address)
        self.server.listen()
        self.server.settimeout(20)
        self.data, self.connections, self.most = b"", 0, None
        self.go = threading.Event()
        self.go.set()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            self.connections += 1
            with connection:
                self.go.wait(20)
                while piece := connection.recv(self.most or 65536):
                    self.data += piece
                    if self.most is not None:
                        self.most = None
                        break

    def close(self):
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        self.thread.join(20)


@pytest.fixture(params=["unix", "tcp"])
def receiver(request, tmp_path):
    made = (
        Receiver(socket.AF_UNIX, str(tmp_path / "s"))
        if request.param == "unix"
        else Receiver(socket.AF_INET, ("127.0.0.1", 0))
    )
    yield made
    made.close()


def over(receiver):
    return JsonTarget(JsonSink(name="a", address=receiver.server.getsockname()))


def received(receiver, wanted):
    deadline = time.monotonic() + 20
    while receiver.data != wanted and time.monotonic() < deadline:
        time.sleep(0.005)
    return receiver.data


def test_lines_over_a_socket(receiver):
    made = over(receiver)
    made.send("", [b"1", b"2"])
    made.send("", [b"3"])
    assert received(receiver, b"1\n2\n3\n") == b"1\n2\n3\n"
    assert receiver.connections == 1
    assert made.state() == {}
    made.close()


def test_a_connection_that_broke_is_made_anew_and_the_batch_comes_again(receiver):
    made = over(receiver)
    receiver.most = 10
    batch = [b"%01000d" % number for number in range(20_000)]  # more than fits between the two
    with pytest.raises(UnavailableError, match="does not take lines"):
        made.send("", batch)
    made.send("", batch)
    whole = b"\n".join(batch) + b"\n"
    assert received(receiver, whole[:10] + whole) == whole[:10] + whole
    assert receiver.connections == 2
    made.close()


def test_one_that_does_not_read_gets_it_later(receiver, monkeypatch):
    monkeypatch.setattr("exporters.jsonlines._TIMEOUT", 0.2)
    receiver.go.clear()
    made = over(receiver)
    batch = [b"x" * 1000] * 20_000
    with pytest.raises(UnavailableError, match="does not take lines"):
        made.send("", batch)
    receiver.go.set()
    monkeypatch.undo()
    made.send("", [b"1"])
    made.close()


def test_nobody_listens(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        for address in (free.getsockname(), str(tmp_path / "none")):
            made = JsonTarget(JsonSink(name="a", address=address))
            with pytest.raises(UnavailableError, match="does not take lines"):
                made.send("", [b"1"])
            made.close()


def test_what_a_unix_receiver_has_not_read_is_not_done(tmp_path, monkeypatch):
    receiver = Receiver(socket.AF_UNIX, str(tmp_path / "s"))
    made = over(receiver)
    for number in range(50):
        made.send("", [b"%d" % number])
    assert received(receiver, b"".join(b"%d\n" % number for number in range(50))).endswith(b"\n49\n")
    made.close()
    receiver.go.clear()
    monkeypatch.setattr("exporters.jsonlines._TIMEOUT", 0.2)
    with pytest.raises(UnavailableError, match="it does not read"):
        made.send("", [b"one short line"])
    receiver.go.set()
    receiver.close()
