"""What the spool keeps, and what goes: on files made for the test."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from acctd import spool
from acctd.errors import NotFoundError
from acctd.frames import EVENTS, RECORDS, SAMPLES, STREAMS
from acctd.sinks import ExportConfig, JsonSink, PrometheusSink
from acctd.spool import Position, Reader
from acctd.spoolroom import SpoolRoom
from exporters import positions
from exporters.positions import State

_LINE = b"x" * 99
_PER_SEGMENT = 340  # lines of 100 bytes until a segment of 2**20 / 32 bytes is full, and some


def config(tmp_path: Path, **more: object) -> ExportConfig:
    made = ExportConfig(
        spool_dir=tmp_path / "spool",
        positions_dir=tmp_path / "positions",
        spool_max=2**20,
        json=(JsonSink(name="one", path=tmp_path / "out"),),
    )
    (tmp_path / "positions").mkdir(exist_ok=True)
    return replace(made, **more)


def fill(room: SpoolRoom, stream: str, segments: int) -> None:
    for _ in range(segments):
        room.writers[stream].append([_LINE] * _PER_SEGMENT)


def read_to(settings: ExportConfig, name: str, number: int) -> None:
    at = {stream: Position(number) for stream in STREAMS}
    positions.store(settings.positions_dir, name, State(identity=name, positions=at))


def kept(settings: ExportConfig, stream: str) -> list[int]:
    return [segment.first for segment in spool.segments(settings.spool_dir / stream)]


def test_what_all_sinks_have_read_goes(tmp_path: Path) -> None:
    settings = config(tmp_path)
    room = SpoolRoom(settings)
    fill(room, RECORDS, 4)
    read_to(settings, "one", 2 * _PER_SEGMENT)
    room.tidy()
    assert kept(settings, RECORDS) == [2 * _PER_SEGMENT, 3 * _PER_SEGMENT]
    read_to(settings, "one", 4 * _PER_SEGMENT)
    room.tidy()
    assert kept(settings, RECORDS) == [3 * _PER_SEGMENT], "the newest line says how far export has come"
    assert room.bytes == 100 * _PER_SEGMENT


def test_the_slowest_sink_decides(tmp_path: Path) -> None:
    settings = config(tmp_path)
    settings = replace(settings, json=(*settings.json, JsonSink(name="two", path=tmp_path / "other")))
    room = SpoolRoom(settings)
    fill(room, EVENTS, 4)
    read_to(settings, "one", 4 * _PER_SEGMENT)
    room.tidy()
    assert len(kept(settings, EVENTS)) == 4, "of the other nothing is known yet"
    read_to(settings, "two", _PER_SEGMENT)
    room.tidy()
    assert kept(settings, EVENTS)[0] == _PER_SEGMENT


def test_a_sink_that_was_taken_out_holds_nothing_up(tmp_path: Path) -> None:
    settings = config(tmp_path)
    read_to(settings, "gone", 0)
    read_to(settings, "one", 3 * _PER_SEGMENT)
    room = SpoolRoom(settings)
    fill(room, RECORDS, 4)
    room.tidy()
    first = 3 * _PER_SEGMENT  # a new writer begins behind what any sink has read
    assert kept(settings, RECORDS)[0] == first


def test_a_full_spool_loses_the_oldest_samples_then_events_never_records(tmp_path: Path) -> None:
    settings = config(tmp_path)
    room = SpoolRoom(settings)
    for stream in STREAMS:
        fill(room, stream, 16)
    whole = sum(spool.size(settings.spool_dir / stream) for stream in STREAMS)
    assert whole > settings.spool_max
    room.tidy()
    assert len(kept(settings, RECORDS)) == 16
    assert kept(settings, SAMPLES)[0] > 0
    assert room.bytes <= settings.spool_max or kept(settings, SAMPLES) == [15 * _PER_SEGMENT]
    fill(room, RECORDS, 40)
    room.tidy()
    assert len(kept(settings, RECORDS)) == 56
    assert len(kept(settings, SAMPLES)) == len(kept(settings, EVENTS)) == 1
    assert room.bytes == sum(spool.size(settings.spool_dir / stream) for stream in STREAMS)


def test_a_reader_counts_what_went(tmp_path: Path) -> None:
    settings = config(tmp_path)
    room = SpoolRoom(settings)
    fill(room, SAMPLES, 50)
    reader = Reader(settings.spool_dir / SAMPLES)
    seen = reader.read(Position(), 10)
    room.tidy()
    gone = kept(settings, SAMPLES)[0]
    position, missing, lines = seen.position, seen.missing, len(seen.lines)
    while True:
        batch = reader.read(position, 1000)
        position, missing, lines = batch.position, missing + batch.missing, lines + len(batch.lines)
        if not batch.lines:
            break
    assert missing > 0
    assert missing + lines == 50 * _PER_SEGMENT
    # The segment that was open when the others went is read to its end.
    assert missing == gone - _PER_SEGMENT


def test_what_waits_long_is_compressed_and_read_all_the_same(tmp_path: Path) -> None:
    settings = config(tmp_path)
    room = SpoolRoom(settings)
    for number in range(3):
        room.writers[RECORDS].append([b"%d %d" % (number, line) + _LINE for line in range(_PER_SEGMENT)])
    before = Reader(settings.spool_dir / RECORDS).read(Position(), 3 * _PER_SEGMENT).lines
    for segment in spool.segments(settings.spool_dir / RECORDS):
        os.utime(segment.path, (0, 0))
    room.tidy()
    assert [segment.packed for segment in spool.segments(settings.spool_dir / RECORDS)] == [True, True, False]
    assert room.bytes < 2 * 100 * _PER_SEGMENT
    reader, found, position = Reader(settings.spool_dir / RECORDS), [], Position()
    while batch := reader.read(position, 100).lines and reader.read(position, 100):
        found += batch.lines
        position = batch.position
    assert found[: len(before)] == before
    assert len(found) == 3 * _PER_SEGMENT


def test_without_a_sink_that_reads_it_a_stream_stays_small(tmp_path: Path) -> None:
    settings = config(tmp_path, json=(), prometheus=PrometheusSink(address=("127.0.0.1", 1), grace=1.0))
    room = SpoolRoom(settings)
    fill(room, SAMPLES, 5)
    room.tidy()
    assert kept(settings, SAMPLES) == [3 * _PER_SEGMENT, 4 * _PER_SEGMENT]


def test_a_group_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"export\.group 'nobody-has-this' does not exist"):
        SpoolRoom(config(tmp_path, group="nobody-has-this"))
