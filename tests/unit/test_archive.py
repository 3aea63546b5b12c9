"""`acctd ledger`: records into files and out of the ledger, with every signature still to be followed, whoever dies."""

import gzip
import json
import os
import re
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from acctd.cli.ledger import command
from acctd.errors import AcctdError, ExhaustedError, NotFoundError, UsageError
from acctd.frames import RECORDS, Mark, RecordFrame, decode
from acctd.frames import encode as encode_frame
from acctd.history import FILE as SAMPLES
from acctd.history import History, Whose
from acctd.ledger import FILE, Ledger, fits
from acctd.model import JobSpec, Limits, Owner, Record
from acctd.outbox import Outbox
from acctd.points import Point
from acctd.rows import Place
from acctd.sinks import ExportConfig
from acctd.sources.files import find
from acctd.verification import verify
from exporters.outgoing import NOTES, Outgoing, send

REPO = Path(__file__).parents[2]
NODE = socket.gethostname()
SPEC = JobSpec(id="x", owner=Owner(uid=1000, gid=100, name="ada"), network="host")


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes straight to the descriptor of standard error, click's runner does not see."""
    monkeypatch.setattr("acctd.cli.ledger.say", click.echo)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "acctd.toml").write_text(f'state_dir = "{tmp_path}/state"\n')
    return tmp_path / "state"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return tmp_path / "archive"


def sign(ledger: Ledger, job: str, day: str, *, keep_job: bool = False, node: str = NODE) -> None:
    """A record of a job that ran for an hour and ended at noon of a day."""
    ended = datetime.fromisoformat(f"{day}T12:00:00+00:00").timestamp()
    row = ledger.open_job(replace(SPEC, id=job), Place("acctd"), slots=None, boot_id="b", boot_ns=1, keeper="1:1")
    ledger.sign_off(row.seq, Record(
        id=job, owner="ada", uid=1000, node=node, state="done", started=ended - 3600, ended=ended + 5,
        wall_ns=3600 * 10**9, exit_code=0, exit_signal=None, network="host", limits=Limits(), tags={"t": "é\n\"x"},
        totals={"cpu_user": {"": 2**53 + 1}},
    ))  # fmt: skip
    if not keep_job:
        ledger.forget(row.seq)


def fill(state: Path, *days: str) -> None:
    with Ledger(state / FILE) as ledger:
        at = ledger.newest()[0]
        for number, day in enumerate(days, at + 1):
            sign(ledger, f"j{number}", day)


def run(state: Path, *arguments: str) -> Result:
    return CliRunner().invoke(command, [arguments[0], "--config", str(state.parent / "acctd.toml"), *arguments[1:]])


def ok(state: Path, *arguments: str) -> str:
    done = run(state, *arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def refused(done: Result, kind: type[AcctdError] = AcctdError) -> str:
    assert isinstance(done.exception, kind), (done.output, done.exception)
    return str(done.exception)


def in_files(directory: Path) -> dict[str, list[int]]:
    """The numbers in each file; each line is a whole frame that begins with its time in words."""
    found = {}
    for path in sorted(directory.glob("*.jsonl.gz")):
        numbers = []
        for line in gzip.decompress(path.read_bytes()).splitlines():
            assert re.match(rb'\{"at":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z","kind":"record",', line)
            frame = decode(line)
            assert isinstance(frame, RecordFrame)
            numbers.append(frame.number)
        found[path.name] = numbers
    return found


def chain(directory: Path, ledger: Path) -> list[tuple[int, str, bytes]]:
    """All there is of signed records, each number once, held against its signature; from the first one on."""
    there: dict[int, tuple[str, bytes]] = {}
    for path in directory.glob("*.jsonl.gz"):
        for line in gzip.decompress(path.read_bytes()).splitlines():
            frame = decode(line)
            assert isinstance(frame, RecordFrame)
            assert there.setdefault(frame.number, (frame.digest, bytes(frame.body)))[0] == frame.digest
    with Ledger(ledger) as book:
        for number, digest, body in book.stream():
            assert there.setdefault(number, (digest, body)) == (digest, body)
    previous = ""
    for number in range(1, len(there) + 1):
        digest, body = there[number]
        assert fits(previous, body, digest)
        previous = digest
    return [(number, *there[number]) for number in sorted(there)]


DAYS = ("2026-01-02", "2026-01-31", "2026-02-01", "2026-02-28", "2026-03-01")


def test_whole_months_go_into_a_file_each_and_stay_in_the_ledger(state: Path, files: Path) -> None:
    fill(state, *DAYS)
    before = chain(files, state / FILE)
    assert "4 records of 2 months" in ok(state, "archive", "--before", "2026-03", str(files))
    assert in_files(files) == {
        f"{NODE}-2026-01-1.jsonl.gz": [1, 2],
        f"{NODE}-2026-02-3.jsonl.gz": [3, 4],
    }
    assert chain(files, state / FILE) == before and len(before) == 5
    with Ledger(state / FILE) as book:
        assert book.span().count == 5
    assert stat.S_IMODE(files.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in files.iterdir()} == {0o600}


def test_asked_again_nothing_is_written(state: Path, files: Path) -> None:
    fill(state, *DAYS)
    ok(state, "archive", "--before", "2026-03", str(files))
    times = {path: path.stat().st_mtime_ns for path in files.iterdir()}
    assert (
        "4 records of 2 months" in (said := ok(state, "archive", "--before", "2026-03", str(files))) and "0 new" in said
    )
    assert {path: path.stat().st_mtime_ns for path in files.iterdir()} == times


def test_what_is_removed_leaves_a_chain_that_goes_on(state: Path, files: Path) -> None:
    fill(state, *DAYS)
    before = chain(files, state / FILE)
    assert "4 records removed" in ok(state, "archive", "--before", "2026-03", "--remove", str(files))
    fill(state, "2026-03-02", "2026-03-03")
    with Ledger(state / FILE) as book:
        assert (book.span().first, book.span().last, book.newest()[0]) == (5, 7, 7)
        assert [*verify(book)][-1] == 7 and book.record("j5").id == "j5"
        with pytest.raises(NotFoundError):
            book.record("j2")
        assert book.digest(4) == before[3][1], "who follows the ledger finds where it was"
        assert book.next_id() == "r1"
    assert chain(files, state / FILE)[:5] == before
    assert f"4 records of {NODE} in {files}: as they were signed, 1 to 4, which the ledger" in ok(
        state, "verify", str(files)
    )
    assert "records up to 4 were archived" in ok(state, "verify")
    assert "0 records of 0 months" in ok(state, "archive", "--before", "2026-03", "--remove", str(files))
    assert "3 records of 1 month " in ok(state, "archive", "--before", "2026-04", "--remove", str(files))
    assert in_files(files)[f"{NODE}-2026-03-5.jsonl.gz"] == [5, 6, 7]
    fill(state, "2026-04-01")
    with Ledger(state / FILE) as book:
        assert book.span().first == book.span().last == 8, "no number is given twice, not even by an empty ledger"
    assert len(chain(files, state / FILE)) == 8
    ok(state, "verify", str(files))


def test_records_that_are_late_go_with_those_they_are_signed_after(state: Path, files: Path) -> None:
    fill(state, "2026-01-02", "2026-02-01", "2026-01-31", "2026-02-02", "2026-03-01", "2026-02-20")
    ok(state, "archive", "--before", "2026-03", "--remove", str(files))
    assert list(in_files(files).values()) == [[1], [2, 3, 4]]
    with Ledger(state / FILE) as book:
        assert (book.span().first, book.span().last) == (5, 6)


def test_a_record_that_is_late_after_its_month_was_removed_has_a_file_of_its_own(state: Path, files: Path) -> None:
    fill(state, "2026-01-02", "2026-01-03")
    ok(state, "archive", "--before", "2026-02", "--remove", str(files))
    fill(state, "2026-01-31")
    ok(state, "archive", "--before", "2026-02", str(files))
    ok(state, "archive", "--before", "2026-02", "--remove", str(files))
    assert list(in_files(files).values()) == [[1, 2], [3]]
    ok(state, "verify", str(files))


def test_a_record_of_a_time_to_come_keeps_others_back_and_says_so(state: Path, files: Path) -> None:
    fill(state, "2026-01-02", "2036-01-01", "2026-01-03")
    assert "record 2 of job 'j2' says that it ended on 2036-01-01" in ok(
        state, "archive", "--before", "2026-02", str(files)
    )
    assert list(in_files(files).values()) == [[1]]


def test_a_job_that_is_not_dismantled_keeps_its_record(state: Path, files: Path) -> None:
    fill(state, "2026-01-02")
    with Ledger(state / FILE) as book:
        sign(book, "busy", "2026-01-03", keep_job=True)
        sign(book, "j3", "2026-01-04")
    said = ok(state, "archive", "--before", "2026-02", "--remove", str(files))
    assert "1 record removed" in said and "the others stay" in said
    with Ledger(state / FILE) as book:
        assert book.span().first == 2
        book.forget(book.open_jobs()[0].seq)
    assert "2 records removed" in ok(state, "archive", "--before", "2026-02", "--remove", str(files))
    assert list(in_files(files).values()) == [[1, 2, 3]]


def test_two_nodes_may_share_a_directory(state: Path, files: Path, tmp_path: Path) -> None:
    fill(state, "2026-01-02")
    other = tmp_path / "other" / "state"
    other.parent.mkdir()
    (other.parent / "acctd.toml").write_text(f'state_dir = "{other}"\n')
    with Ledger(other / FILE) as book:
        sign(book, "j1", "2026-01-05", node="wn/2 é")
    for each in (state, other):
        ok(each, "archive", "--before", "2026-02", "--remove", str(files))
    assert sorted(in_files(files)) == sorted([f"{NODE}-2026-01-1.jsonl.gz", "wn_2__-2026-01-1.jsonl.gz"])
    for each in (state, other):
        assert ok(each, "verify", str(files)).count("as they were signed") == 3
    (files / "wn_2__-2026-01-1.jsonl.gz").unlink()
    assert "is in no file" in refused(run(other, "verify", str(files)))


def test_a_sink_reads_what_is_archived(state: Path, files: Path) -> None:
    fill(state, *DAYS)
    ok(state, "archive", "--before", "2026-03", str(files))
    assert [file.packed for file in find([files])] == [True, True]


@pytest.mark.parametrize("harm", ["other", "torn", "nonsense", "altered"])
def test_files_that_are_not_the_ledgers_are_told_and_nothing_is_removed(state: Path, files: Path, harm: str) -> None:
    fill(state, *DAYS)
    ok(state, "archive", "--before", "2026-03", str(files))
    path = files / f"{NODE}-2026-01-1.jsonl.gz"
    whole = path.read_bytes()
    if harm == "torn":
        path.write_bytes(whole[: len(whole) // 2])
    elif harm == "nonsense":
        path.write_bytes(gzip.compress(b"{}\n"))
    else:
        lines = gzip.decompress(whole)
        changed = (
            lines.replace(b'"ada"', b'"eve"') if harm == "altered" else lines.replace(b'"number":2', b'"number":2000')
        )
        path.write_bytes(gzip.compress(changed))
    if harm == "other":  # its record 2 is missing, and is written again
        assert "1 new" in ok(state, "archive", "--before", "2026-03", str(files))
        return
    assert str(path) in refused(run(state, "archive", "--before", "2026-03", "--remove", str(files)))
    with Ledger(state / FILE) as book:
        assert book.span().first == 1


def test_an_altered_archive_shows(state: Path, files: Path) -> None:
    fill(state, *DAYS)
    ok(state, "archive", "--before", "2026-03", "--remove", str(files))
    path = files / f"{NODE}-2026-02-3.jsonl.gz"
    whole = path.read_bytes()
    path.write_bytes(gzip.compress(gzip.decompress(whole).replace(b'"j4"', b'"jX"')))
    assert "record 4 of job 'jX'" in refused(run(state, "verify", str(files)))
    path.write_bytes(gzip.compress(gzip.decompress(whole).splitlines(keepends=True)[1]))
    assert "record 3 is missing" in refused(run(state, "verify", str(files)))
    path.unlink()
    assert "record 4, after which the ledger goes on, is in no file" in refused(run(state, "verify", str(files)))


def alter(state: Path, statement: str) -> None:
    with closing(sqlite3.connect(state / FILE)) as db, db:
        db.execute(statement)


@pytest.mark.parametrize(
    ("statement", "first"),
    [
        ("UPDATE record SET body = CAST(replace(body, 'ada', 'eve') AS BLOB) WHERE number = 3", "record 3 of job 'j3'"),
        ("UPDATE record SET body = replace(body, 'ada', 'eve') WHERE number = 3", "record 3 of job 'j3'"),
        ("UPDATE record SET digest = 'x' WHERE number = 2", "record 2 of job 'j2'"),
        ("DELETE FROM record WHERE number = 2", "record 2 is missing"),
        ("DELETE FROM record WHERE number = 1", "record 1 is missing"),
    ],
)
def test_verify_names_the_first_record_that_is_wrong_and_archive_takes_none(
    state: Path, files: Path, statement: str, first: str
) -> None:
    fill(state, *DAYS)
    assert "5 records" in ok(state, "verify")
    alter(state, statement)
    done = run(state, "verify")
    assert first in refused(done) and done.exit_code == 1
    refused(run(state, "archive", "--before", "2026-03", "--remove", str(files)))
    assert not files.exists()


def test_verify_reads_the_whole_file(state: Path) -> None:
    fill(state, *DAYS)
    alter(state, "CREATE TABLE more (x)")
    with closing(sqlite3.connect(state / FILE)) as db, db:
        db.executemany("INSERT INTO more VALUES (?)", [("y" * 3000,)] * 100)
    with open(state / FILE, "r+b") as stream:
        stream.seek(-40 * 4096, os.SEEK_END)
        stream.write(b"\xff" * 8192)
    assert "corrupt" in refused(run(state, "verify"))


@pytest.mark.parametrize("month", ["2026", "2026-13", "26-01", "2026-1", "0000-01", "2999-01", "x"])
def test_a_month_that_is_none_is_refused(state: Path, files: Path, month: str) -> None:
    fill(state, *DAYS)
    assert month in refused(run(state, "archive", "--before", month, str(files)), UsageError)
    assert not files.exists()


def test_without_a_ledger_nothing_is_made(state: Path, files: Path) -> None:
    for arguments in (("size",), ("verify",), ("vacuum",), ("archive", "--before", "2026-01", str(files))):
        assert str(state) in refused(run(state, *arguments), NotFoundError)
    assert not state.exists()


def test_two_archives_at_once_are_refused(state: Path, files: Path) -> None:
    import fcntl

    fill(state, *DAYS)
    with open(state / "archive.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = refused(run(state, "archive", "--before", "2026-03", str(files)), ExhaustedError)
    assert f"another program holds {state}/archive.lock; find it" in said


@pytest.mark.parametrize("spooled", [None, -1, 0, 2, 4])
def test_what_exporters_have_not_got_yet_stays(state: Path, files: Path, tmp_path: Path, spooled: int | None) -> None:
    fill(state, *DAYS)
    config = tmp_path / "acctd.toml"
    config.write_text(
        f'{config.read_text()}[export]\nspool_dir = "{tmp_path}/spool"\n[json.x]\npath = "{tmp_path}/x.jsonl"\n'
    )
    if spooled is not None:
        (tmp_path / "spool" / RECORDS).mkdir(parents=True)
        with Ledger(state / FILE) as book:
            frames = [encode_frame(Mark(number, book.digest(number) or "")) for number in range(spooled + 1)]
        (tmp_path / "spool" / RECORDS / f"{1:020d}.jsonl").write_bytes(b"\n".join([*frames, b"\0\0"]) + b"\n")
    said = ok(state, "archive", "--before", "2026-03", "--remove", str(files))
    left = 4 if spooled is None else max(0, spooled)
    assert f"{left} record" in said and ("in the spool" in said) == (left != 4)
    with Ledger(state / FILE) as book:
        assert book.span().first == left + 1


def test_size_counts_all(state: Path, files: Path) -> None:
    fill(state, *DAYS)
    with closing(History(state / SAMPLES)) as history:
        history.append(
            [(Whose(1, "a", 1.0), Point(n, 0, 0, 0, 0, 0, None, 0, 0, 0, 0, 0, 0, 0, 0)) for n in range(7)], 5.0
        )
    found = json.loads(ok(state, "size", "--json"))
    book, samples = found["ledger"], found["samples"]
    assert book["rows"]["record"] == 5 and book["oldest"]["number"] == 1 and book["newest"]["id"] == "j5"
    assert book["newest"]["ended"] == datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()
    assert (samples["jobs"], samples["points"], samples["dropped"], samples["lost"]) == (1, 7, 0, 0)
    assert book["archived"] is None and book["bytes"] >= (state / FILE).stat().st_size
    told = ok(state, "size")
    assert (
        "record: 5" in told and "7 points of 1 job" in told and "oldest record: 1, job j1, 2026-01-02 12:00:00" in told
    )
    ok(state, "archive", "--before", "2026-03", "--remove", str(files))
    assert "archived: records up to 4" in ok(state, "size")
    assert json.loads(ok(state, "size", "--json"))["ledger"]["archived"]["number"] == 4


def test_an_empty_ledger_has_a_size_and_is_in_order(state: Path, files: Path) -> None:
    with Ledger(state / FILE):
        pass
    assert "samples: none" in ok(state, "size") and "0 records" in ok(state, "verify")
    assert "0 records of 0 months" in ok(state, "archive", "--before", "2026-01", "--remove", str(files))


def test_vacuum_gives_room_back_while_another_has_the_file_open(state: Path) -> None:
    fill(state, *DAYS)
    with Ledger(state / FILE) as other:
        alter(state, "CREATE TABLE more (x)")
        with closing(sqlite3.connect(state / FILE)) as db, db:
            db.executemany("INSERT INTO more VALUES (?)", [("y" * 3000,)] * 1000)
        alter(state, "DROP TABLE more")
        before = (state / FILE).stat().st_size
        assert re.search(r"ledger .*ledger.sqlite: \S+ MiB before, \S+ (KiB|B) after", ok(state, "vacuum"))
        assert (state / FILE).stat().st_size < before // 4
        sign(other, "j6", "2026-03-02")
        assert [*verify(other)][-1] == 6
    assert not [path.name for path in state.iterdir() if "etilqs" in path.name]


def test_vacuum_refuses_where_the_disk_has_no_room(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(state, *DAYS)

    class Full:
        f_bavail, f_frsize = 3, 4096

    monkeypatch.setattr(os, "statvfs", lambda _: Full)
    before = (state / FILE).read_bytes()
    assert "12288 B" in refused(run(state, "vacuum"), ExhaustedError).replace("12.0 KiB", "12288 B")
    assert (state / FILE).read_bytes() == before


# Dies before or after the N-th call of a function, or when SQLite begins a statement.
_DYING = """
import os, signal, sys
import acctd.archive, acctd.ledger, acctd.sqlitefile
from acctd.cli.ledger import command
what, when, number, *arguments = sys.argv[1:]
left = int(number)
def count():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
def dying(function):
    def call(*a, **k):
        if when == "before": count()
        found = function(*a, **k)
        if when == "after": count()
        return found
    return call
if what.isupper():
    made = acctd.sqlitefile.SqliteFile.__init__
    def init(self, *a, **k):
        made(self, *a, **k)
        self._db.set_trace_callback(lambda text: count() if text.startswith(what) else None)
    acctd.sqlitefile.SqliteFile.__init__ = init
else:
    holder, name = {"fsync": (os, "fsync"), "rename": (os, "rename"), "write": (acctd.archive, "_line"),
                    "take_out": (acctd.ledger.Ledger, "take_out"), "read": (acctd.archive, "decode")}[what]
    setattr(holder, name, dying(getattr(holder, name)))
command(arguments)
"""

DEATHS = [
    *[("write", "before", n) for n in (1, 3, 6, 7, 12)],
    *[(what, when, n) for what in ("fsync", "rename") for when in ("before", "after") for n in (1, 2, 3)],
    *[("read", "before", n) for n in (1, 7, 13)],
    *[("take_out", when, n) for when in ("before", "after") for n in (1, 2, 3)],
    *[("DELETE", "before", n) for n in (1, 2, 3)],
]


@pytest.mark.parametrize("death", DEATHS, ids=lambda death: "-".join(map(str, death)))
def test_who_is_killed_loses_nothing(state: Path, files: Path, death: tuple[str, str, int]) -> None:
    days = [f"2026-{month:02}-{day:02}" for month in (1, 2, 3) for day in (1, 2, 3, 4, 5, 6)]
    fill(state, *days, "2026-04-01")
    before = chain(files, state / FILE)
    arguments = ["archive", "--config", str(state.parent / "acctd.toml"), "--before", "2026-04", "--remove", str(files)]
    script = _DYING.replace("import acctd.archive,", "import acctd.archive\nacctd.archive._AT_ONCE = 2\nimport")
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, death), *arguments],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done
    files.mkdir(exist_ok=True)
    assert chain(files, state / FILE) == before
    with Ledger(state / FILE) as book:
        assert [*verify(book)][-1] == 19
    ok(state, *arguments[:1], *arguments[3:])
    assert chain(files, state / FILE) == before
    with Ledger(state / FILE) as book:
        assert book.span().first == 19 and [*verify(book)] == [19]
    assert list(in_files(files).values()) == [[*range(1, 7)], [*range(7, 13)], [*range(13, 19)]]
    assert not [path for path in files.iterdir() if path.name.startswith(".")]
    ok(state, "verify", str(files))


def test_the_outbox_goes_on_after_records_were_removed(state: Path, files: Path, tmp_path: Path) -> None:
    import asyncio

    fill(state, *DAYS)
    config = ExportConfig(spool_dir=tmp_path / "spool")
    troubles: list[Any] = []
    box = Outbox(config, troubles.append)
    with Ledger(state / FILE) as book:
        box.begin(book)
        ok(state, "archive", "--before", "2026-04", "--remove", str(files))
        sign(book, "j6", "2026-04-01")
        asyncio.run(box.follow(book))
        box.close()
        again = Outbox(config, troubles.append)
        again.begin(book)
        sign(book, "j7", "2026-04-02")
        asyncio.run(again.follow(book))
        again.close()
    lines = b"".join(path.read_bytes() for path in sorted((tmp_path / "spool" / RECORDS).glob("*.jsonl"))).splitlines()
    frames = [decode(line) for line in lines]
    assert [frame.record().id for frame in frames if isinstance(frame, RecordFrame)] == ["j6", "j7"] and not troubles


def archived(state: Path, files: Path) -> None:
    """Records 1 and 2 of January, 3 and 4 of February; 5 stays."""
    fill(state, *DAYS)
    ok(state, "archive", "--before", "2026-03", "--remove", str(files))


def rewrite(path: Path, old: bytes, new: bytes) -> None:
    before = gzip.decompress(path.read_bytes())
    assert old in before
    path.write_bytes(gzip.compress(before.replace(old, new)))


def test_verify_says_which_records_are_not_there_and_whose_signature_hangs_on_them(state: Path, files: Path) -> None:
    archived(state, files)
    (files / f"{NODE}-2026-01-1.jsonl.gz").unlink()
    said = ok(state, "verify", str(files))
    assert f"1 record of {NODE} in {files}: as they were signed, 4 to 4, which the ledger goes on from" in said
    assert f"records 1 to 2 are not in {files}: whether 3 of {NODE} is as it was signed, is unknown" in said
    rewrite(files / f"{NODE}-2026-02-3.jsonl.gz", b'"id":"j3"', b'"id":"jX"')
    assert "whether 3 of" in ok(state, "verify", str(files)), "nothing is there that could tell"


@pytest.mark.parametrize("remove", [[], ["--remove"]])
def test_the_first_record_of_all_is_held_against_its_signature(state: Path, files: Path, remove: list[str]) -> None:
    fill(state, *DAYS)
    ok(state, "archive", "--before", "2026-03", *remove, str(files))
    assert "unknown" not in ok(state, "verify", str(files))
    rewrite(files / f"{NODE}-2026-01-1.jsonl.gz", b'"id":"j1"', b'"id":"jX"')
    assert f"record 1 of job 'jX' of {NODE} was altered" in refused(run(state, "verify", str(files)))


def test_the_first_record_is_held_against_the_one_before_in_the_ledger(state: Path, files: Path) -> None:
    fill(state, *DAYS)
    ok(state, "archive", "--before", "2026-03", str(files))
    (files / f"{NODE}-2026-01-1.jsonl.gz").unlink()
    assert "as they were signed, 3 to 4" in ok(state, "verify", str(files))
    rewrite(files / f"{NODE}-2026-02-3.jsonl.gz", b'"id":"j3"', b'"id":"jX"')
    assert "record 3 of job 'jX'" in refused(run(state, "verify", str(files)))


def test_a_node_that_was_renamed_goes_on_where_the_one_of_the_old_name_ended(state: Path, files: Path) -> None:
    with Ledger(state / FILE) as book:
        sign(book, "j1", "2026-01-02", node="old")
        sign(book, "j2", "2026-02-02", node="new")
    ok(state, "archive", "--before", "2026-03", "--remove", str(files))
    said = ok(state, "verify", str(files))
    assert "1 record of old in" in said and "1 record of new in" in said and "unknown" not in said
    (files / "old-2026-01-1.jsonl.gz").unlink()
    said = ok(state, "verify", str(files))
    assert f"record 1 is not in {files}: whether 2 of new is as it was signed, is unknown" in said
    assert "as they were signed, 2" not in said


def test_files_that_overlap_say_the_same(state: Path, files: Path) -> None:
    archived(state, files)
    jan, feb = files / f"{NODE}-2026-01-1.jsonl.gz", files / f"{NODE}-2026-02-3.jsonl.gz"
    second, third = gzip.decompress(jan.read_bytes()).splitlines()[1], gzip.decompress(feb.read_bytes()).splitlines()[0]
    extra = files / f"{NODE}-2026-01-2.jsonl.gz"
    extra.write_bytes(gzip.compress(second + b"\n" + third + b"\n"))
    assert f"4 records of {NODE} in {files}: as they were signed, 1 to 4, which" in ok(state, "verify", str(files))
    rewrite(extra, b'"id":"j2"', b'"id":"jX"')
    assert f"{extra} has another record 2 than a file beside it" in refused(run(state, "verify", str(files)))
    rewrite(extra, b'"id":"jX"', b'"id":"j2"')
    rewrite(extra, b'"id":"j3"', b'"id":"jX"')
    assert f"record 3 of job 'jX' in {extra} was altered" in refused(run(state, "verify", str(files)))
    misnamed = extra.rename(files / f"{NODE}-2026-02-9.jsonl.gz")
    assert f"{misnamed} does not begin with the record that its name says" in refused(run(state, "verify", str(files)))
    misnamed.unlink()
    extra.write_bytes(gzip.compress(second + b"\n" + second + b"\n"))
    assert "record 2 comes after record 2" in refused(run(state, "verify", str(files)))


@pytest.mark.parametrize("harm", ["directory", "schema"])
def test_the_ledgers_size_does_not_hang_on_the_samples(state: Path, harm: str) -> None:
    fill(state, *DAYS)
    if harm == "directory":
        (state / SAMPLES).mkdir()
    else:
        with closing(History(state / SAMPLES)):
            pass
        with closing(sqlite3.connect(state / SAMPLES)) as db:
            db.execute("PRAGMA user_version = 9")
    done = run(state, "size")
    assert "record: 5" in done.output and "samples" not in done.output and str(SAMPLES) in refused(done)
    done = run(state, "size", "--json")
    assert json.loads(done.output)["ledger"]["rows"]["record"] == 5 and str(SAMPLES) in refused(done)


def test_what_was_not_written_for_a_grid_yet_stays(state: Path, files: Path, tmp_path: Path) -> None:
    fill(state, *DAYS[:2])
    (tmp_path / "ur").mkdir()
    (state / NOTES).mkdir()

    def write() -> int:
        with (
            Ledger(state / FILE) as book,
            Outgoing("ur", tmp_path / "ur", state / NOTES, lambda batch: ("", f"{batch.last}")) as outgoing,
        ):
            return send(book, outgoing, lambda records: b"x" * len(records)).records

    assert write() == 2
    fill(state, *DAYS[2:])
    said = ok(state, "archive", "--before", "2026-03", "--remove", str(files))
    assert "2 records removed" in said
    assert f"after record 2 was not written by acctd usage-records to {tmp_path}/ur (noted in {state}" in said
    assert write() == 3
    assert "2 records removed" in ok(state, "archive", "--before", "2026-03", "--remove", str(files))
    with Ledger(state / FILE) as book:
        assert book.span().first == 5
