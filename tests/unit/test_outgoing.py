"""Every record of a ledger in one file and no more, whoever is killed when, and whoever fetches files meanwhile."""

import os
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from dirq.QueueSimple import QueueSimple

from acctd.cli.main import acctd
from acctd.cli.usagerecords import _queued
from acctd.errors import AcctdError, LedgerError, NotFoundError
from acctd.ledger import FILE, Ledger
from acctd.model import Record
from exporters import outgoing
from exporters.outgoing import NOTES, Outgoing, furthest_behind, send
from tests.unit.test_apel import SPEED
from tests.unit.test_apel import record as made
from tests.unit.test_ledger import SPEC, open_job


def sign(book: Ledger, *jobs: str, **changes) -> None:
    for job in jobs:
        row = open_job(book, replace(SPEC, id=job))
        book.sign_off(row.seq, made(id=job, **changes))
        book.forget(row.seq)


@pytest.fixture
def book(tmp_path):
    with Ledger(tmp_path / "state" / FILE) as opened:
        (tmp_path / "state" / NOTES).mkdir()
        (tmp_path / "out").mkdir()
        yield opened


def names(records: list[Record]) -> bytes:
    return "".join(f"{record.id}\n" for record in records).encode()


def to(directory: Path, notes: Path | None = None) -> Outgoing:
    return Outgoing("apel", directory, notes or directory.parent / "state" / NOTES, _queued)


def write(book: Ledger, directory: Path, *, batch: int = 2, **options) -> outgoing.Sent:
    with to(directory) as out:
        return send(book, out, names, batch=batch, **options)


def fetch(directory: Path) -> list[str]:
    """What ssmsend does: lock, read, remove; and tidy up."""
    queue, found = QueueSimple(str(directory)), []
    for name in queue:
        assert queue.lock(name)
        found += queue.get(name).decode("ascii").splitlines()
        queue.remove(name)
    queue.purge()
    return found


def test_what_was_written_is_not_written_again(book, tmp_path):
    sign(book, "1", "2", "3")
    assert write(book, tmp_path / "out") == outgoing.Sent(records=3, files=2)
    assert sorted(fetch(tmp_path / "out")) == ["1", "2", "3"]
    assert write(book, tmp_path / "out") == outgoing.Sent()
    sign(book, "4")
    assert write(book, tmp_path / "out") == outgoing.Sent(records=1, files=1)
    assert fetch(tmp_path / "out") == ["4"]
    (tmp_path / "other").mkdir()
    assert write(book, tmp_path / "other").records == 4


def test_families_and_what_ended_earlier_are_left_out_for_good(book, tmp_path):
    sign(book, "1", "2", parent="0")
    sign(book, "3", started=100.0, wall_ns=10**9)
    sign(book, "4", started=100.0, wall_ns=2 * 10**9)
    assert write(book, tmp_path / "out", since=102.0) == outgoing.Sent(records=1, files=1, families=2, early=1)
    assert write(book, tmp_path / "out") == outgoing.Sent()
    assert fetch(tmp_path / "out") == ["4"]


def test_killed_at_any_line_no_record_is_lost_or_doubled(book):
    """Each line of the room is where one run dies; then files are fetched at once, or only at the end."""
    sign(book, "1", "2", "3")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as fast:  # where nothing waits for a disk, hundreds of times
        for fetching in (True, False):
            lines, died = 0, True
            while died:
                lines += 1
                directory, notes = Path(fast) / f"out{fetching}{lines}", Path(fast) / f"notes{fetching}{lines}"
                directory.mkdir()
                notes.mkdir()
                died = killed_after(lines, book, directory, notes)
                found = fetch(directory) if fetching else []
                with to(directory, notes) as out:
                    send(book, out, names, batch=2)
                    assert (out.state.records, out.state.files) == (3, 2)
                assert sorted(found + fetch(directory)) == ["1", "2", "3"], f"killed at line {lines}"
                assert not [name for name in os.listdir(directory) if name.startswith(".")]
            assert lines > 100


def killed_after(lines: int, book: Ledger, directory: Path, notes: Path) -> bool:
    """Whether a run in a process of its own died at that line that it executed of exporters/outgoing.py."""
    child = os.fork()
    if child == 0:
        left = lines

        def trace(frame, event, argument):
            nonlocal left
            if frame.f_code.co_filename != outgoing.__file__:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            sys.settrace(trace)
            # A ledger is not for use after a fork.
            with Ledger(book.path) as own, to(directory, notes) as out:
                send(own, out, names, batch=2)
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def test_another_ledger_is_noticed(book, tmp_path):
    sign(book, "1", "2")
    write(book, tmp_path / "out")
    (tmp_path / "new").mkdir()
    for jobs in (["9"], ["8", "9"], ["7", "8", "9"]):  # shorter, as long, longer
        with Ledger(tmp_path / "new" / f"{len(jobs)}.sqlite") as new:
            sign(new, *jobs)
            with pytest.raises(
                LedgerError, match=r"is not the one that was written .* let a new one begin with --anew"
            ):
                write(new, tmp_path / "out")
    with Ledger(tmp_path / "new" / "3.sqlite") as new:
        assert write(new, tmp_path / "out", anew=True).records == 3
        assert write(new, tmp_path / "out").records == 0
    assert sorted(fetch(tmp_path / "out")) == ["1", "2", "7", "8", "9"]


def test_records_that_went_into_an_archive_unwritten_are_noticed(book, tmp_path):
    sign(book, "1", "2", "3")
    assert write(book, tmp_path / "out").records == 3
    sign(book, "4", "5", "6")
    book.take_out(3)
    assert write(book, tmp_path / "out").records == 3
    sign(book, "7", "8")
    book.take_out(7)
    with pytest.raises(LedgerError, match=r"records 7 to 7 were taken out .* go on without them with --anew"):
        write(book, tmp_path / "out")
    assert write(book, tmp_path / "out", anew=True) == outgoing.Sent(records=1, files=1, archived=1), "1 to 6 were sent"
    book.take_out(8)
    assert write(book, tmp_path / "out", anew=True) == outgoing.Sent(), "all were sent"
    (tmp_path / "late").mkdir()
    assert write(book, tmp_path / "late") == outgoing.Sent(archived=8)


def test_how_far_behind_the_last_directory_is(book, tmp_path):
    notes = tmp_path / "state" / NOTES
    assert furthest_behind(notes, book) is None
    sign(book, "1", "2")
    write(book, tmp_path / "out")
    (tmp_path / "late").mkdir()
    sign(book, "3")
    assert furthest_behind(notes, book)[0] == 2
    write(book, tmp_path / "late")
    assert furthest_behind(notes, book)[0] == 2 and str(tmp_path / "out") in furthest_behind(notes, book)[1]
    write(book, tmp_path / "out")
    assert furthest_behind(notes, book)[0] == 3
    book.take_out(3)
    assert furthest_behind(notes, book)[0] == 3
    with Ledger(tmp_path / "other.sqlite") as other:
        sign(other, "a", "b", "c")
        assert furthest_behind(notes, other)[0] == 0, "of this ledger no directory has anything"


def test_a_record_that_was_altered_is_not_written(book, tmp_path):
    sign(book, "1", "2", "3")
    book._db.execute("UPDATE record SET body = replace(body, '\"ada\"', '\"bob\"') WHERE number = 3")
    with pytest.raises(AcctdError, match=r"record 3 of .* was altered"):
        write(book, tmp_path / "out")
    assert sorted(fetch(tmp_path / "out")) == ["1", "2"]


def test_a_directory_that_is_not_mounted_says_nothing_about_its_files(book, tmp_path):
    sign(book, "1", "2")
    with to(tmp_path / "out") as out:
        out.begin(book)
        out._hand_over = lambda _pending: os.kill(os.getpid(), signal.SIGKILL)
        if os.fork() == 0:
            send(book, out, names)
    os.wait()
    (tmp_path / "out").rename(tmp_path / "mounted")
    (tmp_path / "out").mkdir()
    with pytest.raises(AcctdError, match=r"is another directory than when \w+ was written there"):
        write(book, tmp_path / "out")
    (tmp_path / "out").rmdir()
    (tmp_path / "mounted").rename(tmp_path / "out")
    write(book, tmp_path / "out")
    assert sorted(fetch(tmp_path / "out")) == ["1", "2"]


def test_what_cannot_be_is_one_sentence(book, tmp_path):
    with pytest.raises(NotFoundError, match=r"there is no directory .*/none; make it"):
        write(book, tmp_path / "none")
    sign(book, "1")
    write(book, tmp_path / "out")
    (note,) = (tmp_path / "state" / NOTES).glob("*.json")
    note.write_text("{")
    with pytest.raises(AcctdError, match=r"the note .* is damaged .* remove it"):
        write(book, tmp_path / "out")


def test_a_folder_of_the_queue_is_no_way_out_of_it(book, tmp_path):
    sign(book, "1")
    (tmp_path / "elsewhere").mkdir()
    folder = f"{int(1_700_000_091.4) >> 16 << 16:08x}"
    (tmp_path / "out" / folder).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AcctdError, match="cannot give"):
        write(book, tmp_path / "out")
    assert not os.listdir(tmp_path / "elsewhere")
    (tmp_path / "out" / folder).unlink()
    write(book, tmp_path / "out")
    assert fetch(tmp_path / "out") == ["1"]


def run(tmp_path: Path, *arguments: str, capsys) -> str:
    (tmp_path / "acctd.toml").write_text(f'state_dir = "{tmp_path}/state"\n')
    acctd.main(["usage-records", *arguments, "--config", str(tmp_path / "acctd.toml")], "acctd", standalone_mode=False)
    return capsys.readouterr().out


def test_the_command_writes_what_ssmsend_sends(book, tmp_path, capsys):
    sign(book, "1", "2")
    sign(book, "3", parent="1")
    out, speed = str(tmp_path / "out"), f"{SPEED.type}={SPEED.value}"
    said = run(tmp_path, "apel", out, "--site", "EX", "--benchmark", speed, capsys=capsys)
    assert said == "2 records in 1 file; left out: 1 of families, which are in their parents' records\n"
    lines = fetch(tmp_path / "out")
    assert lines[0] == "APEL-individual-job-message: v0.3"
    assert lines.count("%%") == lines.count("Site: EX") == 2
    assert run(tmp_path, "apel", out, "--site", "EX", "--benchmark", speed, capsys=capsys) == "0 records in 0 files\n"


def test_the_command_writes_usage_records(book, tmp_path, capsys):
    sign(book, "1", "2")
    assert run(tmp_path, "ur", str(tmp_path / "out"), "--since", "2020-01-01", capsys=capsys) == "2 records in 1 file\n"
    (file,) = (tmp_path / "out").iterdir()
    assert file.name == f"ur-000000001-000000002-{(book.digest(2) or '')[:12]}.xml"
    assert file.read_text().count("<ur:UsageRecord>") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["apel", "out"], "apel needs --site"),
        (["apel", "out", "--site", "none", "--benchmark", "si2k=1"], "no name of a site"),
        (["ur", "out", "--since", "yesterday"], "--since 'yesterday' is no time"),
        (["ur", "out", "--site", "a\nb"], "no name of a site"),
    ],
)
def test_options_that_make_no_sense(tmp_path, capsys, arguments, said):
    with pytest.raises(AcctdError, match=said):
        run(tmp_path, *arguments, capsys=capsys)
