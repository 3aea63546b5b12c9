"""One file a sink: whole or not at all, found again under another name, and what the agent may remove by them."""

import itertools
import os
import resource
import socket
from pathlib import Path

import pytest

from acctd.errors import AcctdError
from acctd.spool import Position
from exporters import positions
from exporters.positions import Counts, State


class KilledError(BaseException):
    """What nothing catches."""


def state(identity="http://a", **at):
    return State(identity=identity, positions={stream: Position(number) for stream, number in at.items()})


def identities(directory):
    return {name: positions.load(directory, name).identity for name in positions.names(directory)}


def test_all_of_it_is_there_again(tmp_path):
    wanted = State(
        identity="http://a/db",
        positions={"samples": Position(2**60, 2**59, 12345), "events": Position()},
        counts=Counts(sent=1, requests=2, failures=3, quarantined=4, dropped={"samples": 5}, unreadable=6),
        quarantine_bytes=7,
        target={"file": "x", "offset": 8},
        accepted=9.5,
        trouble="down",
    )
    positions.store(tmp_path, "a", wanted)
    assert positions.load(tmp_path, "a") == wanted
    assert os.listdir(tmp_path) == ["a.json"]


def test_one_that_is_not_there_is_none(tmp_path):
    assert positions.load(tmp_path, "a") is None
    assert positions.names(tmp_path / "nowhere") == []


@pytest.mark.parametrize("data", [b"", b"{", b'{"identity": 3}', b'{"positions": {}}', b"\xff\xfe", b"null"])
def test_a_damaged_one_is_not_taken_for_a_new_sink(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(AcctdError, match=rf"the position {tmp_path}/a\.json is damaged .*; remove it to begin"):
        positions.load(tmp_path, "a")


@pytest.mark.parametrize("kind", ["directory", "fifo", "symlink", "socket", "huge"])
def test_what_is_no_file_of_ours_neither_hangs_nor_misleads_the_agent(tmp_path, kind):
    """Who runs as root reads a directory of who does not."""
    path = tmp_path / "a.json"
    positions.store(tmp_path, "elsewhere", state(samples=10**9))
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "symlink":
        path.symlink_to(tmp_path / "elsewhere.json")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    else:
        path.write_bytes(b" " * 2**20 + (tmp_path / "elsewhere.json").read_bytes())
    with pytest.raises(AcctdError, match=rf"the position {path} cannot be read"):
        positions.load(tmp_path, "a")
    assert positions.consumed(tmp_path, ["a"]) is None


def test_a_full_disk_leaves_the_old_one_and_nothing_beside_it(tmp_path):
    positions.store(tmp_path, "a", state(samples=1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            positions.store(tmp_path, "a", state(samples=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert positions.load(tmp_path, "a") == state(samples=1)
    assert os.listdir(tmp_path) == ["a.json"]


def test_it_is_on_disk_before_it_has_the_name(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")) or real(fd))
    positions.store(tmp_path, "a", state())
    assert synced == [f"{tmp_path}/a.partial", str(tmp_path)]


# Names


def test_a_renamed_sink_takes_all_its_files_along(tmp_path):
    positions.store(tmp_path, "old", state("http://a", samples=7))
    for name in ("old.quarantine", "old.quarantine.old", "older.json", "older.quarantine"):
        (tmp_path / name).write_bytes(b"{}")
    positions.store(tmp_path, "older", state("http://b"))
    assert positions.adopt(tmp_path, {"new": "http://a", "older": "http://b"}) == [("old", "new")]
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["new.json", "new.quarantine", "new.quarantine.old", "older.json", "older.quarantine"]
    )
    assert positions.load(tmp_path, "new") == state("http://a", samples=7)
    assert positions.adopt(tmp_path, {"new": "http://a", "older": "http://b"}) == []


def test_a_new_sink_beside_it_and_one_taken_out_change_nothing(tmp_path):
    positions.store(tmp_path, "a", state("http://a", samples=7))
    positions.store(tmp_path, "out", state("http://out", samples=3))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert positions.adopt(tmp_path, {"a": "http://a", "new": "http://new"}) == []
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_sink_whose_database_moved_goes_on_where_it_was(tmp_path):
    positions.store(tmp_path, "a", state("http://before", samples=7))
    assert positions.adopt(tmp_path, {"a": "http://after"}) == []
    assert positions.load(tmp_path, "a") == state("http://before", samples=7)


def test_a_name_that_was_given_to_another_sink_does_not_give_it_the_position(tmp_path):
    positions.store(tmp_path, "main", state("http://a", samples=7))
    assert positions.adopt(tmp_path, {"main": "http://b", "old": "http://a"}) == [("main", "old")]
    assert identities(tmp_path) == {"old": "http://a"}


def test_two_sinks_to_one_place_do_not_take_from_each_other(tmp_path):
    positions.store(tmp_path, "a", state("http://a", samples=1))
    positions.store(tmp_path, "b", state("http://a", samples=2))
    assert positions.adopt(tmp_path, {"a": "http://a", "b": "http://a", "c": "http://a"}) == []
    assert sorted(positions.adopt(tmp_path, {"c": "http://a", "d": "http://a"})) == [("a", "c"), ("b", "d")]
    assert positions.load(tmp_path, "c") == state("http://a", samples=1)


@pytest.mark.parametrize(
    "wanted", list(itertools.permutations(["http://a", "http://b", "http://c"])), ids=lambda order: "".join(order)[-1:]
)
@pytest.mark.parametrize("dies", range(12))
def test_sinks_that_change_places_keep_theirs_whoever_dies_in_between(tmp_path, monkeypatch, wanted, dies):
    for number, name in enumerate("abc"):
        positions.store(tmp_path, name, state(f"http://{name}", samples=number))
        (tmp_path / f"{name}.quarantine").write_text(name)
    kind, left = type(tmp_path), [dies]
    real = kind.rename

    def rename(path, to):
        left[0] -= 1
        if left[0] < 0:
            raise KilledError
        return real(path, to)

    configured = dict(zip("abc", wanted, strict=True))
    with monkeypatch.context() as patched:
        patched.setattr(kind, "rename", rename)
        try:
            positions.adopt(tmp_path, configured)
        except KilledError:
            pass
    positions.adopt(tmp_path, configured)
    assert identities(tmp_path) == configured
    for name, identity in configured.items():
        assert positions.load(tmp_path, name).positions == {"samples": Position("abc".index(identity[-1]))}
        assert (tmp_path / f"{name}.quarantine").read_text() == identity[-1]
    assert len(os.listdir(tmp_path)) == 6


# What the agent takes from them


def test_consumed_is_what_the_slowest_has_read(tmp_path):
    positions.store(tmp_path, "a", state(samples=10, events=3))
    positions.store(tmp_path, "b", state(samples=4, records=9))
    positions.store(tmp_path, "taken-out", state(samples=1))
    assert positions.consumed(tmp_path, ["a", "b"]) == {"samples": 4, "events": 3, "records": 9}
    assert positions.consumed(tmp_path, ["a"]) == {"samples": 10, "events": 3}
    assert positions.consumed(tmp_path, []) == {}


@pytest.mark.parametrize("data", [None, b""])
def test_with_one_unknown_nothing_is_known_to_be_consumed(tmp_path, data):
    positions.store(tmp_path, "a", state(samples=10))
    if data is not None:
        (tmp_path / "b.json").write_bytes(data)
    assert positions.consumed(tmp_path, ["a", "b"]) is None


def test_furthest_asks_all_that_ever_were_and_can_be_read(tmp_path):
    assert positions.furthest(tmp_path / "nowhere", ["a"]) == {"samples": 0, "events": 0, "records": 0}
    positions.store(tmp_path, "a", state(samples=10, events=3))
    positions.store(tmp_path, "b", state(samples=40))
    (tmp_path / "c.json").write_bytes(b"")
    assert positions.furthest(tmp_path, positions.names(tmp_path)) == {"samples": 40, "events": 3, "records": 0}


@pytest.mark.parametrize(
    "text",
    [
        '{"identity":"x","target":{"a":' + "[" * 5000 + "]" * 5000 + "}}",
        '{"identity":"x","positions":{"records":[999999999999999999999999999999,0,0]}}',
        '{"identity":"x","positions":{"records":[0,-1,0]}}',
        '{"identity":"x","positions":{"records":[0,0,9223372036854775807]}}',
    ],
    ids=["nested", "huge", "negative", "beyond"],
)
def test_what_no_exporter_has_written_is_damaged_and_moves_no_writer(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(AcctdError, match="is damaged"):
        positions.load(tmp_path, "x")
    assert positions.consumed(tmp_path, ["x"]) is None
    assert set(positions.furthest(tmp_path, ["x"]).values()) == {0}
