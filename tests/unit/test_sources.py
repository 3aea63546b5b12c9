"""Where bills have their records from: files of all kinds, each record once, and a ledger that is as it was signed."""

import gzip
import hashlib
import io
import os
import random
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest

from acctd import tariff
from acctd.bill import Tally
from acctd.errors import AcctdError, ExhaustedError, NotFoundError, UsageError
from acctd.frames import EventFrame, Mark, RecordFrame, Sample, encode
from acctd.ledger import Ledger
from acctd.model import Limits, Record
from acctd.sinks import JsonSink
from acctd.sources import crew, files, gather, unpack
from acctd.sources.crew import Reader
from acctd.sources.gather import Gathered
from acctd.sources.looked import NAMED_MOST, Key, Looked, key
from acctd.sources.seen import Seen
from acctd.usage import decode
from exporters.jsonlines import JsonTarget

TARIFF = tariff.parse(
    b"""
name = "test"
currency = "EUR"
[[period]]
valid_from = 2020-01-01
[[period.item]]
name = "CPU"
meter = "cpu"
unit = "core-second"
price = 1
[[period.item]]
name = "Jobs"
meter = "jobs"
unit = "job"
price = 1
""",
    "test",
)
BEGAN = 1_800_000_000.25


def record(number: int = 1, node: str = "node1", cpu: int = 10**9, **changes: object) -> Record:
    made = Record(
        id=f"{number}.0", owner="ada", uid=1000, node=node, state="done", started=BEGAN + number, ended=BEGAN + number,
        wall_ns=5 * 10**9, exit_code=0, exit_signal=None, network="nat", limits=Limits(), tags={},
        totals={"cpu_user": {"": cpu}, "network": {"OutgoingExternal": 2**60}},
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def body(made: Record) -> bytes:
    return msgspec.json.encode(made)


def line(made: Record, number: int = 1) -> bytes:
    return encode(RecordFrame(number, "d" * 64, 1, msgspec.Raw(body(made)))) + b"\n"


def make(watched: frozenset[Key] = frozenset()) -> Reader:
    tally = Tally(TARIFF, None, BEGAN + 10**7)
    return Reader(tally, tally.needed_from, watched)


def begin(_things: int, _size: int):
    return lambda _records, _bytes: None


def read(*places: Path) -> Gathered:
    return gather.from_files(places, make, begin)


def jobs(gathered: Gathered) -> int:
    """How many the bill has."""
    lines = gathered.reader.tally.bill().lines
    return int(sum(line.quantity for line in lines if line.item == "Jobs"))


def test_what_a_sink_writes_is_read_with_what_was_rotated_and_packed(tmp_path: Path) -> None:
    target = JsonTarget(JsonSink(name="log", path=tmp_path / "log.jsonl", rotate=4096, keep=100))
    target.resume({})
    for number in range(100):
        frames = [
            RecordFrame(number, "d" * 64, 1, msgspec.Raw(body(record(number)))),
            EventFrame(number, 1.0, "begin", "of a job"),
            Sample(1, "1.0", "ada", 1000, 1.0, "nat", {}),
            Mark(number),
        ]
        target.send("", [item.data for frame in frames for item in target.encode(frame)])
    target.close()
    rotated = sorted(tmp_path.glob("log.jsonl.*"))
    assert len(rotated) > 5
    for path in rotated[::2]:
        Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    found = read(tmp_path)
    assert (jobs(found), found.reader.looked.records, found.reader.looked.broken) == (100, 100, 0)


def test_bare_records_on_a_line_each_or_on_many_lines_or_in_a_packed_file(tmp_path: Path) -> None:
    (tmp_path / "bare").write_bytes(b"\n".join(body(record(number)) for number in range(3)) + b"\n\n")
    (tmp_path / "pretty.json").write_bytes(msgspec.json.format(body(record(3)), indent=2))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "packed").write_bytes(gzip.compress(body(record(4))) + gzip.compress(b"\n" + body(record(5))))
    (tmp_path / ".hidden").write_text("nothing of ours")
    (tmp_path / "empty").touch()
    found = read(tmp_path)
    assert (jobs(found), found.reader.looked.broken) == (6, 0)
    assert jobs(read(tmp_path / "pretty.json")) == 1


def test_a_record_that_comes_twice_counts_once_in_whatever_notation(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"".join(line(record(number)) for number in range(50)) * 2)
    (tmp_path / "b.gz").write_bytes(gzip.compress(b"".join(line(record(number), 7) for number in range(25, 75))))
    (tmp_path / "c.json").write_bytes(msgspec.json.format(body(record(10)), indent=4))
    (tmp_path / "d").write_bytes(line(record(1, "node2")) + line(record(1, started=BEGAN + 77)))
    os.link(tmp_path / "a", tmp_path / "e")
    os.symlink(tmp_path / "a", tmp_path / "f")
    found = read(tmp_path)
    looked = found.reader.looked
    assert (jobs(found), looked.records, looked.repeated, looked.nodes) == (77, 77, 76, {"node1", "node2"})


def test_two_records_of_one_job_that_differ_are_an_error_that_names_both(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(line(record(1)) + line(record(2)))
    (tmp_path / "b").write_bytes(line(record(3)) + line(record(2, cpu=7)))
    with pytest.raises(UsageError) as caught:
        read(tmp_path)
    words = str(caught.value)
    assert f"{tmp_path}/a:2" in words and f"{tmp_path}/b:2" in words
    assert "'2.0'" in words and "'node1'" in words


BROKEN = {
    "no JSON": b"{]\n",
    "half a record": line(record(5))[:99] + b"\n",
    "another kind of value": b"[1]\n",
    "no body": b'{"kind":"record","number":1}\n',
    "negative": line(record(6)).replace(b'"cpu_user":{"":1', b'"cpu_user":{"":-1'),
    "a time before all": line(record(7, started=-1.0)),
    "a time that is none": line(record(8)).replace(b'"started":1800000008.25', b'"started":1e300'),
    "no UTF-8": line(record(9)).replace(b"ada", b"\xff\xfe"),
    "nested": b"[" * 100_000 + b"\n",
    "a string for a number": line(record(9)).replace(b'"wall_ns":5000000000', b'"wall_ns":"5"'),
}


@pytest.mark.parametrize("wrong", BROKEN.values(), ids=BROKEN)
def test_a_broken_line_is_named_and_the_others_count(tmp_path: Path, wrong: bytes) -> None:
    (tmp_path / "log").write_bytes(line(record(1)) + wrong + line(record(2)))
    found = read(tmp_path)
    looked = found.reader.looked
    assert (jobs(found), looked.broken) == (2, 1)
    assert looked.told[0].startswith(f"{tmp_path}/log:2 ")
    assert "\n" not in looked.told[0]


def test_the_end_that_somebody_is_writing_is_no_error(tmp_path: Path) -> None:
    whole = line(record(1)) + line(record(2))
    for cut in range(len(line(record(1))) + 1, len(whole)):
        (tmp_path / "log").write_bytes(whole[:cut])
        found = read(tmp_path)
        done = cut == len(whole) - 1  # only its newline is missing
        assert jobs(found) == 1 + done
        assert found.reader.looked.unfinished == ([] if done else [f"{tmp_path}/log"])
        assert found.reader.looked.broken == 0


def test_a_packed_file_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(line(record(number)) for number in range(1000)))
    (tmp_path / "log.gz").write_bytes(packed[: len(packed) // 2])
    found = read(tmp_path)
    assert 0 < jobs(found) < 1000
    (sentence,) = found.reader.looked.torn
    assert f"log.gz is packed and not whole (it ends too early); what is behind line {jobs(found)} of it" in sentence


@pytest.mark.parametrize(
    "harm",
    [
        lambda packed: packed[:-1],
        lambda packed: packed[:-8],
        lambda packed: packed[:-8] + b"\0" * 8,
        lambda packed: packed + b"no member of it",
    ],
    ids=["a byte is missing", "the trailer is missing", "another checksum", "something behind it"],
)
def test_what_can_be_unpacked_of_a_damaged_file_is_billed(
    tmp_path: Path, harm: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log.gz").write_bytes(harm(gzip.compress(b"".join(line(record(number)) for number in range(50)))))
    for chunk in (2**16, 1):
        monkeypatch.setattr(unpack, "_CHUNK", chunk)
        found = read(tmp_path)
        (sentence,) = found.reader.looked.torn
        assert jobs(found) == 50 and "behind line 50 of it" in sentence


def test_members_of_a_packed_file_with_zeros_between_them_are_one_content() -> None:
    rng = random.Random(3)
    texts = [b"", b"x", rng.randbytes(200_000), b"ab" * 10**6, b""]
    packed = b"\0\0\0".join(map(gzip.compress, texts)) + b"\0" * 9
    with io.BufferedReader(unpack.Unpacked(io.BytesIO(packed)), 2**18) as stream:
        assert stream.read() == b"".join(texts)


def test_where_a_line_is_is_not_asked_of_more_than_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log").write_bytes(b"no record\n" * 500)
    asked = []
    real = files.where
    monkeypatch.setattr(files, "where", lambda file, offset: asked.append(offset) or real(file, offset))
    looked = read(tmp_path).reader.looked
    assert (looked.broken, len(looked.told), len(asked)) == (500, NAMED_MOST, NAMED_MOST)


def test_a_file_without_a_newline_is_read_once_by_all_its_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PIECE", 1000)
    monkeypatch.setattr(files, "LINE_MOST", 100)
    (tmp_path / "log").write_bytes(b"x" * 20_000)
    (file,) = files.find([tmp_path])
    looked, passed = Looked(), []
    real = files.Piece._past_the_end_of_a_line
    monkeypatch.setattr(
        files.Piece,
        "_past_the_end_of_a_line",
        lambda self, stream, at: passed.append((at, real(self, stream, at))) or passed[-1][1],
    )
    for piece in files.pieces([file]):
        assert not [usage for batch in piece.batches(looked) for usage in batch.usages]
    assert sum(end - begin for begin, end in passed) <= 20_000 + 20 * 100
    assert looked.broken == 1 and "more than 100 bytes" in looked.told[0]


def test_places_of_as_many_files_as_there_may_be_are_integers_of_sqlite() -> None:
    file = files.File(files.FILES_MOST - 1, Path("x"), 1, (0, 0), packed=False)
    number = files.place(file, 2**40 - 1)
    assert number == 2**63 - 1
    assert files.at({files.FILES_MOST - 1: file}, number) == (file, 2**40 - 1)


def test_more_files_than_there_may_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FILES_MOST", 2)
    for name in "ab":
        (tmp_path / name).write_bytes(line(record(1)))
    assert jobs(read(tmp_path)) == 1
    (tmp_path / "c").write_bytes(line(record(1)))
    with pytest.raises(UsageError, match="more than 2 files"):
        read(tmp_path)


@pytest.mark.parametrize("inside", [False, True])
def test_a_pipe_is_no_file(tmp_path: Path, *, inside: bool) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "log").write_bytes(line(record(1)))
    if inside:
        assert jobs(read(tmp_path)) == 1
        return
    with pytest.raises(UsageError, match="pipe is neither a file nor a directory"):
        read(tmp_path / "pipe")


@pytest.mark.parametrize(
    "content",
    [b"(\xb5/\xfd packed otherwise", line(record(1))[:200], line(record(1)) + b"(\xb5/\xfd"],
    ids=["another packer", "half of the first line", "what is no line of JSON behind one"],
)
def test_what_was_never_a_line_is_not_one_that_somebody_writes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "log").write_bytes(content)
    looked = read(tmp_path).reader.looked
    assert (looked.broken, looked.unfinished) == (1, [])


def test_names_of_files_cannot_act_on_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "a\x1b[31m\x9b\n").write_bytes(b"{]\n")
    (tmp_path / "b\x1b.gz").write_bytes(gzip.compress(line(record(1)))[:-3])
    looked = read(tmp_path).reader.looked
    assert len(looked.told) == len(looked.torn) == 1
    assert all(sentence.isprintable() for sentence in (*looked.told, *looked.torn))
    (tmp_path / "c\x1b").write_bytes(line(record(1, cpu=7)))
    with pytest.raises(UsageError) as caught:
        read(tmp_path)
    assert str(caught.value).isprintable()
    with pytest.raises(NotFoundError) as missing:
        read(tmp_path / "d\x1b")
    assert str(missing.value).isprintable()


def test_a_counter_may_be_large_and_not_out_of_the_world(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(line(record(1, cpu=2**64)) + line(record(2, cpu=10**300)))
    found = read(tmp_path)
    assert (jobs(found), found.reader.looked.broken) == (1, 1)
    (bought,) = [each for each in found.reader.tally.bill().lines if each.item == "CPU"]
    assert bought.quantity == Decimal(2**64).scaleb(-9)


def test_a_line_without_end_costs_no_memory_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LINE_MOST", 4096)
    (tmp_path / "log").write_bytes(line(record(1)) + b"x" * 100_000 + b"\n" + line(record(2)))
    found = read(tmp_path)
    assert (jobs(found), found.reader.looked.broken) == (2, 1)
    assert "more than 4096 bytes" in found.reader.looked.told[0]


@pytest.mark.parametrize("size", [1, 7, 100, 999, 10**6])
def test_however_a_file_is_cut_each_record_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    written = [line(record(number)) for number in range(20)]
    written.insert(3, b"\n")
    written.insert(9, b'{"kind":"event","number":1}\n')
    (tmp_path / "log").write_bytes(b"".join(written))
    monkeypatch.setattr(files, "PIECE", size)
    looked, found = Looked(), []
    for piece in files.pieces(files.find([tmp_path])):
        found += [usage for batch in piece.batches(looked) for usage in batch.usages]
    assert sorted(map(key, found)) == sorted(key(decode(body(record(number)))) for number in range(20))


def test_batches_say_how_much_of_the_file_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "log").write_bytes(b"".join(line(record(number)) for number in range(100)))
    monkeypatch.setattr(files, "PIECE", 10_000)
    monkeypatch.setattr(files, "BATCH", 3)
    (file,) = files.find([tmp_path])
    sizes = [[batch.size for batch in piece.batches(Looked())] for piece in files.pieces([file])]
    assert len(sizes) > 2
    assert file.size <= sum(map(sum, sizes)) <= file.size + len(sizes) * 1000  # a line may reach into the next piece
    assert max(map(max, sizes)) <= 4 * 1000


def test_several_readers_give_the_same_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    for number in range(6):
        made = [record(rng.randrange(3000), f"node{rng.randrange(4)}") for _ in range(1000)]
        (tmp_path / f"log{number}").write_bytes(b"".join(map(line, made)) + b"{]\n")
    alone = read(tmp_path)
    monkeypatch.setattr(crew, "WORTH", 1)
    monkeypatch.setattr(files, "PIECE", 10_000)
    monkeypatch.setattr(files, "BATCH", 10)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 2})
    together = read(tmp_path)
    assert together.reader.looked == alone.reader.looked
    assert alone.reader.looked.repeated > 500 and alone.reader.looked.broken == 6
    assert together.reader.tally.bill() == alone.reader.tally.bill()
    assert jobs(together) + together.reader.looked.repeated == 6000


def test_what_one_of_several_readers_raises_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        (tmp_path / f"log{number}").write_bytes(line(record(1, cpu=number)) * 3)
    monkeypatch.setattr(crew, "WORTH", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    with pytest.raises(UsageError, match="differ"):
        read(tmp_path)

    class Task:
        def batches(self, _looked: Looked) -> Iterator[files.Batch]:
            raise ExhaustedError("it was moved")
            yield

    tasks: Sequence[Task] = [Task(), Task()]
    with pytest.raises(ExhaustedError, match="it was moved"):
        crew.read(tasks, make, size=2, check=None, progress=lambda _records, _size: None)

    class Death:
        def batches(self, _looked: Looked) -> Iterator[files.Batch]:
            os._exit(9)
            yield

    with pytest.raises(AcctdError, match="ended from outside"):
        crew.read([Death(), Death()], make, size=2, check=None, progress=lambda _records, _size: None)


def test_a_file_that_moves_while_it_is_read_is_no_smaller_bill(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(line(record(1)))
    found = files.find([tmp_path])
    path.rename(tmp_path / "log.1")
    with pytest.raises(ExhaustedError, match="ask again"):
        list(files.pieces(found)[0].batches(Looked()))
    path.write_bytes(line(record(2)) * 2)
    with pytest.raises(ExhaustedError, match="ask again"):
        list(files.pieces(found)[0].batches(Looked()))


def test_directories_that_are_not_there_or_are_empty(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")
    with pytest.raises(NotFoundError, match="no file"):
        read(tmp_path)


def test_more_keys_than_fit_into_the_cache_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acctd.sources.seen._CACHE", 64)
    with Seen(lambda _one, _other: pytest.fail("all are the same")) as seen:
        keys = [(f"node{n % 50}", n / 7, str(n)) for n in range(20_000)]
        digests = [b"d"] * len(keys)
        assert seen.repeated(keys, digests, range(len(keys))) == []
        assert seen.repeated(keys[::3], digests[::3], range(len(keys[::3]))) == list(range(len(keys[::3])))


def ledger(path: Path, made: Sequence[Record]) -> Path:
    with Ledger(path):
        pass
    digest = ""
    with sqlite3.connect(path) as db:
        for number, each in enumerate(made, 1):
            text = body(each)
            digest = hashlib.sha256(digest.encode() + text).hexdigest()
            db.execute(
                "INSERT INTO record (number, seq, id, owner, ended, body, digest) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (number, number, each.id, each.owner, each.started + each.wall_ns / 1e9, text, digest),
            )
    return path
