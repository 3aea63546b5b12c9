"""The ledger: leases, phases, records and their chain of digests; many processes at once; and files that are wrong."""

import multiprocessing
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from acctd.errors import (
    AcctdError,
    ConfigError,
    ExhaustedError,
    InUseError,
    LedgerError,
    NotFoundError,
    NotPermittedError,
)
from acctd.integrals import Sums
from acctd.ledger import FILE, SCHEMA, Ledger
from acctd.meter import Stored
from acctd.model import JobSpec, Limits, Midnight, Owner, Record, parse_class
from acctd.rows import Account, Event, Place, Rule, Terms, decode_row, encode_row
from acctd.sqlitefile import move_aside

OWNER = Owner(uid=1000, gid=100, name="ada")
SPEC = JobSpec(
    id="12[3].server",
    owner=OWNER,
    limits=Limits(memory=1 << 30, cpus=0.5, cpuset="0-1"),
    network="nat",
    classes=(parse_class("Campus", ["10.0.0.0/8", "fd00::/8"]), parse_class("S3", ["192.0.2.1"])),
    tags={"Project": 'a "b"\nc', "Empty": ""},
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / FILE


@pytest.fixture
def ledger(path):
    with Ledger(path) as opened:
        yield opened


PLACE = Place(base="acctd", backend="nftables", pool4="10.181.0.0/18")


def open_job(ledger, spec=SPEC, slots=range(1, 5), keeper="1:2"):
    return ledger.open_job(spec, PLACE, slots=slots, boot_id="b", boot_ns=7, keeper=keeper)


def record(job="r1", **changes):
    fields = {
        "id": job, "owner": "ada", "uid": 1000, "node": "n", "state": "done", "started": 1.5, "ended": 2.5,
        "wall_ns": 10**9, "exit_code": 0, "exit_signal": None, "network": "nat", "limits": Limits(), "tags": {},
        "totals": {"cpu_user": {"": 5}},
    }  # fmt: skip
    return Record(**(fields | changes))


def finish(ledger, job="r1", **changes):
    row = open_job(ledger, replace(SPEC, id=job))
    ledger.sign_off(row.seq, made := record(job, **changes))
    ledger.forget(row.seq)
    return made


def test_a_job_comes_back_as_it_was_written(ledger):
    row = open_job(ledger)
    assert ledger.open_jobs() == [row]
    assert (row.phase, row.slot, row.spec) == ("making", 1, SPEC)


def test_phases_and_accounts_survive_a_restart(path):
    account = Account(
        Stored({"network": {"OutgoingCampus": 2**62}}, {"network": {"OutgoingCampus": 1}}),
        *("h7", ("a note",), {"8:0": False}, {"network": {"OutgoingCampus": 4}}),
        integrals=Sums(99, {"cpu_reserved": (2**62, 10**18 - 1, 500)}),
    )
    terms = Terms("1:2", 0.5, (Rule(login="ada"), Rule(group=9)), "3:4", 17, moved=True, families=True)
    with Ledger(path) as before:
        row = open_job(before)
        before.made(row.seq)
        assert before.open_jobs()[0].phase == "made"
        before.begin(row.seq, 99, row.terms)
        before.store([(row.seq, account)], row.keeper, 500)
        before.set_terms(row.seq, terms)
    with Ledger(path) as after:
        (found,) = after.open_jobs()
        assert found == replace(row, phase="running", boot_ns=99, seen_ns=500, account=account, terms=terms)
        after.sign_off(row.seq, record(SPEC.id))
        assert after.open_jobs()[0].phase == "closed"
        after.forget(row.seq)
        assert after.open_jobs() == []
        assert after.record(SPEC.id) == record(SPEC.id)


def test_a_record_tells_the_parent_in_the_same_transaction(ledger):
    parent = open_job(ledger)
    child = ledger.open_job(
        replace(SPEC, id="child", parent=SPEC.id),
        PLACE,
        slots=None,
        boot_id="b",
        boot_ns=7,
        keeper="",
        parent=parent.seq,
    )
    inside = {"network": {"OutgoingCampus": 5}}
    assert ledger.sign_off(child.seq, record("child"), inside)
    assert not ledger.sign_off(child.seq, record("child"), inside)  # one job, one record
    assert len(ledger.records()) == 1
    other = ledger.open_job(
        replace(SPEC, id="other", parent=SPEC.id),
        PLACE,
        slots=None,
        boot_id="b",
        boot_ns=7,
        keeper="",
        parent=parent.seq,
    )
    ledger.sign_off(other.seq, record("other"), inside)
    account = next(row.account for row in ledger.open_jobs() if row.seq == parent.seq)
    assert account == Account(families={"network": {"OutgoingCampus": 10}})


def test_a_row_outside_the_ledger_comes_back_as_it_was(ledger):
    row = replace(open_job(ledger), account=Account(Stored({"cpu_user": {"": 3}})), terms=Terms(watcher="1:2"))
    assert decode_row(encode_row(row)) == row


def test_events_are_numbered_and_found_again(ledger):
    made = [ledger.add_event(Event(0, 1.5, job, 7, "told", f"{n}")) for n, job in enumerate(["a", None, "b", "a"])]
    assert [event.number for event in made] == [1, 2, 3, 4]
    assert ledger.events() == made
    assert ledger.events(since=2) == made[2:]
    assert ledger.events(since=1, limit=1) == made[1:2]
    assert ledger.events(job="a") == [made[0], made[3]]
    assert ledger.events(limit=1) == made[3:]


def test_old_events_go(ledger, monkeypatch):
    monkeypatch.setattr("acctd.ledger.EVENTS_KEPT", 1500)
    for number in range(3000):
        ledger.add_event(Event(0, 1.5, None, None, "told", str(number)))
    assert [event.text for event in ledger.events(limit=5000)] == [str(number) for number in range(1500, 3000)]


@pytest.mark.parametrize("harm", ["header", "page"])
def test_a_corrupt_file_is_known_and_moved_aside(path, harm):
    with Ledger(path) as whole:
        for number in range(200):
            finish(whole, f"r{number}")
    with open(path, "r+b") as file:
        file.seek(0 if harm == "header" else 4096 * 3)
        file.write(b"not a ledger page at all, " * 300)
    with pytest.raises(LedgerError, match="corrupt") as caught, Ledger(path) as broken:
        broken.check()
    assert caught.value.corrupt
    aside = move_aside(path)
    assert aside.exists()
    with Ledger(path) as fresh:
        fresh.check()
        assert fresh.records() == []


def test_an_id_in_use_takes_no_lease(ledger):
    open_job(ledger)
    with pytest.raises(InUseError, match=r"job id '12\[3\]\.server' is in use"):
        open_job(ledger)
    assert open_job(ledger, replace(SPEC, id="next")).slot == 2


def test_an_exhausted_pool_names_its_size_and_takes_no_id(ledger):
    for number in range(3):
        open_job(ledger, replace(SPEC, id=f"j{number}"), slots=range(1, 4))
    with pytest.raises(ExhaustedError, match=r"all 3 pairs are leased; finish a job or enlarge network.pool4"):
        open_job(ledger, replace(SPEC, id="more"), slots=range(1, 4))
    assert len(ledger.open_jobs()) == 3
    # Without a pipe there is no need of one.
    assert ledger.open_job(replace(SPEC, id="more"), PLACE, slots=None, boot_id="", boot_ns=0, keeper="").slot is None


def test_slots_go_round(ledger):
    given = []
    for number in range(7):
        row = open_job(ledger, replace(SPEC, id=f"j{number}"), slots=range(1, 4))
        given.append(row.slot)
        ledger.forget(row.seq)
    assert given == [1, 2, 3, 1, 2, 3, 1]


def test_a_pool_that_was_made_smaller_starts_anew(ledger):
    for number in range(6):
        ledger.forget(open_job(ledger, replace(SPEC, id=f"j{number}"), slots=range(1, 100)).seq)
    assert open_job(ledger, slots=range(1, 3)).slot == 1


def test_only_one_takes_over(ledger):
    row = open_job(ledger)
    assert ledger.claim(row, "3:4")
    assert not ledger.claim(row, "5:6")
    assert ledger.open_jobs()[0].keeper == "3:4"


def test_a_job_has_one_record_at_most(ledger):
    row = open_job(ledger)
    assert ledger.sign_off(row.seq, record(SPEC.id))
    assert not ledger.sign_off(row.seq, record(SPEC.id, exit_code=1))
    assert ledger.records() == [record(SPEC.id)]


def test_the_newest_record_of_an_id_counts_and_limits_keep_the_newest(ledger):
    for code in range(3):
        finish(ledger, "again", exit_code=code)
    finish(ledger, "other")
    assert ledger.record("again").exit_code == 2
    assert [r.exit_code for r in ledger.records(2)] == [2, 0]
    assert [r.id for r in ledger.records()] == ["again", "again", "again", "other"]
    with pytest.raises(NotFoundError, match="no record of job 'nobody'"):
        ledger.record("nobody")


def test_ids_are_never_given_twice(ledger):
    assert [ledger.next_id(), ledger.next_id()] == ["r1", "r2"]
    open_job(ledger, replace(SPEC, id="r3"))
    finish(ledger, "r4")
    assert ledger.next_id() == "r5"


def test_a_changed_record_shows(ledger, path):
    finish(ledger, "a")
    finish(ledger, "b")
    with sqlite3.connect(path) as db:
        db.execute(
            "UPDATE record SET body = CAST(replace(CAST(body AS TEXT), ':1000,', ':1001,') AS BLOB) WHERE id = 'a'"
        )
    with pytest.raises(AcctdError, match="record 1 of job 'a' was altered after it was signed off"):
        ledger.record("a")
    assert ledger.record("b") == record("b")


def test_a_missing_record_shows_in_the_next(ledger, path):
    for job in ("a", "b", "c"):
        finish(ledger, job)
    with sqlite3.connect(path) as db:
        db.execute("DELETE FROM record WHERE id = 'b'")
    assert ledger.record("a") == record("a")
    with pytest.raises(AcctdError, match="was altered"):
        ledger.record("c")


def test_a_record_of_garbage_is_one_sentence_in_a_list_too(ledger, path):
    finish(ledger, "a")
    with sqlite3.connect(path) as db:
        db.execute("UPDATE record SET body = x'ff00'")
    with pytest.raises(AcctdError, match="altered"):
        ledger.record("a")
    with pytest.raises(AcctdError, match="altered"):
        ledger.records()


MIDNIGHTS = (
    Midnight(10**9, {"cpu_user": {"": 1}}),
    Midnight(86401 * 10**9, {"cpu_user": {"": 2}, "network": {"OutgoingCampus": 2**62}}),
)


def test_midnights_are_stored_with_the_account_and_go_with_the_job(ledger, path):
    rows = [open_job(ledger, replace(SPEC, id=job)) for job in ("a", "b")]
    ledger.store([(rows[0].seq, Account())], "1:2", 5, [(rows[0].seq, MIDNIGHTS[0])])
    ledger.store([(rows[0].seq, Account())], "1:2", 6, [(rows[0].seq, each) for each in MIDNIGHTS])
    for book in (ledger, Ledger(path)):
        assert [row.midnights for row in book.open_jobs()] == [MIDNIGHTS, ()]
    assert ledger.claim(ledger.open_jobs()[0], "3:4").midnights == MIDNIGHTS
    ledger.sign_off(rows[0].seq, record("a", midnights=MIDNIGHTS))
    ledger.forget(rows[0].seq)
    assert ledger._rows("SELECT * FROM midnight") == []
    assert ledger.record("a").midnights == MIDNIGHTS


def test_midnights_go_into_a_ledger_that_takes_anothers_place(ledger, tmp_path):
    row = open_job(ledger)
    ledger.store([], "1:2", 5, [(row.seq, each) for each in MIDNIGHTS])
    ledger.copy_to(tmp_path / "copy")
    with Ledger(tmp_path / "copy") as copy, Ledger(tmp_path / "new") as new:
        (found,) = copy.open_jobs()
        new.begin_numbers_anew()
        assert new.reinstate(found).seq != row.seq
        assert found.midnights == new.open_jobs()[0].midnights == MIDNIGHTS


def test_a_midnight_of_garbage_is_a_corrupt_ledger(ledger, path):
    row = open_job(ledger)
    ledger.store([], "1:2", 5, [(row.seq, MIDNIGHTS[0])])
    with sqlite3.connect(path) as db:
        db.execute("UPDATE midnight SET totals = x'ff'")
    with pytest.raises(LedgerError, match="corrupt") as e:
        ledger.open_jobs()
    assert e.value.corrupt


def test_limits_and_the_account_up_to_their_change_are_one(ledger):
    row = open_job(ledger)
    account = Account(integrals=Sums(7, {"cpu_reserved": (1, 2, 3)}))
    ledger.set_spec(row.seq, replace(SPEC, limits=Limits(cpus=2)), account)
    (found,) = ledger.open_jobs()
    assert (found.spec.limits, found.account) == (Limits(cpus=2), account)


def test_failure_inside_a_transaction_leaves_nothing(ledger):
    with pytest.raises(RuntimeError), ledger._writing() as db:
        db.execute("INSERT INTO meta VALUES ('x', 'y')")
        raise RuntimeError
    assert ledger._rows("SELECT * FROM meta") == []
    open_job(ledger)


def test_only_the_owner_may_read_it(ledger, path):
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_newer_schema_is_left_alone(path):
    with Ledger(path):
        pass
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=f"has schema {SCHEMA + 1} and this acctd knows {SCHEMA}"):
        Ledger(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"this is no database\n" * 100, b"SQLite format 3\0" + b"\xff" * 200])
def test_a_file_that_is_no_ledger(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(AcctdError, match=r"ledger .*ledger\.sqlite is corrupt .*; acctd serve moves it aside"):
        Ledger(path)
    assert path.read_bytes() == content


def test_a_state_directory_that_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    for state in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(AcctdError, match=r"ledger .*file"):
            Ledger(state / FILE)


def test_a_state_directory_without_rights():
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)  # noqa: S103  # the way there is open
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                Ledger(Path(place, "state", FILE))
            except NotPermittedError as e:
                code = 0 if "run as root or set state_dir" in str(e) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_full_disk_is_one_sentence_and_costs_nothing_already_there(ledger):
    open_job(ledger)
    pages = ledger._rows("PRAGMA page_count")[0][0]
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(AcctdError, match="full"):
        for number in range(1000):
            open_job(ledger, replace(SPEC, id=f"j{number}", tags={"Big": "x" * 4096}), slots=range(1, 2000))
    ledger._db.execute("PRAGMA max_page_count = 1000000")
    assert ledger.open_jobs()[0].spec == SPEC
    open_job(ledger, replace(SPEC, id="after"), slots=range(1, 5000))


def _work(path, number, results):
    """A process that opens, finishes and forgets jobs as fast as it can."""
    leases = []
    with Ledger(path) as ledger:
        for turn in range(10):
            job = f"{ledger.next_id()}-{number}-{turn}"
            row = open_job(ledger, replace(SPEC, id=job), slots=range(1, 9))
            leases.append((time.monotonic_ns(), 1, row.slot))
            ledger.begin(row.seq, 1, row.terms)
            ledger.sign_off(row.seq, record(job))
            leases.append((time.monotonic_ns(), -1, row.slot))
            ledger.forget(row.seq)
    results.put(leases)


def test_processes_side_by_side_share_no_lease_and_one_chain_of_records(path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_work, args=(path, number, results)) for number in range(4)]
    for worker in workers:
        worker.start()
    events = sorted(event for _ in workers for event in results.get(timeout=60))
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    held = set()
    for _, step, slot in events:
        assert (slot in held) == (step < 0)
        (held.add if step > 0 else held.discard)(slot)
    with Ledger(path) as ledger:
        records = ledger.records()
        assert len({r.id for r in records}) == 40
        for found in records:
            assert ledger.record(found.id) == found  # every digest fits


def test_what_is_committed_survives_kill_9(path):
    code = (
        "import os, signal, sys; from pathlib import Path; from tests.unit.test_ledger import *\n"
        "ledger = Ledger(Path(sys.argv[1])); row = open_job(ledger); ledger.begin(row.seq, 3, row.terms)\n"
        "ledger.sign_off(row.seq, record(SPEC.id))\n"
        "ledger._db.execute('BEGIN IMMEDIATE'); ledger._db.execute('DELETE FROM record')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-9, "")
    with Ledger(path) as ledger:
        assert ledger.record(SPEC.id) == record(SPEC.id)
        assert ledger.open_jobs()[0].phase == "closed"


def test_who_looks_waits_for_nobody_who_writes_and_a_writer_hears_that_somebody_does(path: Path) -> None:
    with Ledger(path) as first:
        open_job(first)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with Ledger(path, patience=0.0) as looking:
                assert len(looking.open_jobs()) == 1
                with pytest.raises(LedgerError, match=r"is locked\): another program writes to it; try again"):
                    looking.made(1)
