"""The ledger: one SQLite file with the open jobs, their leases and totals, and the records of the closed ones.

Intent is written here before the kernel is changed. A record is signed off by a digest over itself and its predecessor,
so that a changed one shows, and a missing one unless it is the newest. Stores and finds; decides nothing. Several acctd
processes may have it open.
"""

import hashlib
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from acctd.errors import AcctdError, ExhaustedError, InUseError, LedgerError, NotFoundError, UsageError
from acctd.meter import State, add
from acctd.model import JobSpec, Midnight, Record, chain_name
from acctd.rows import Account, Event, OpenJob, Place, Terms, decode_columns
from acctd.sqlitefile import SqliteFile

SCHEMA = 3
FILE = "ledger.sqlite"
"""The ledger's name in state_dir."""

EVENTS_KEPT = 100_000
"""Older events go: some 20 MB, and months on an ordinary node."""

_TABLES = """
CREATE TABLE job (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    phase TEXT NOT NULL,
    chain TEXT NOT NULL UNIQUE,    -- two ids may come to one chain name: the second is refused
    slot INTEGER UNIQUE,           -- the lease: which pair of addresses of the pool, NULL without a pipe
    place BLOB NOT NULL,           -- JSON of Place
    spec BLOB NOT NULL,            -- JSON of model.JobSpec
    created REAL NOT NULL,         -- s since the epoch, a label: of the same moment as boot_ns
    boot_id TEXT NOT NULL,
    boot_ns INTEGER NOT NULL,      -- CLOCK_BOOTTIME when the command started, before that when the job was made
    seen_ns INTEGER NOT NULL,      -- CLOCK_BOOTTIME when the totals were stored last
    keeper TEXT NOT NULL,          -- who watches the job: pid and start time
    account BLOB NOT NULL,         -- JSON of Account
    parent INTEGER,                -- seq of the job that this family is inside of
    terms BLOB NOT NULL            -- JSON of Terms
);
CREATE TABLE record (
    number INTEGER PRIMARY KEY,    -- in the order of signing
    seq INTEGER NOT NULL UNIQUE,   -- that of the job: one job, one record
    id TEXT NOT NULL,
    owner TEXT NOT NULL,
    ended REAL NOT NULL,           -- s since the epoch: started + wall, which a step of the clock does not touch
    body BLOB NOT NULL,            -- JSON of model.Record
    digest TEXT NOT NULL           -- SHA-256 of the previous digest and the body
);
CREATE INDEX record_id ON record (id);
CREATE INDEX record_owner ON record (owner);
CREATE INDEX record_ended ON record (ended);
CREATE TABLE midnight (
    seq INTEGER NOT NULL,          -- that of the open job
    ns INTEGER NOT NULL,           -- since its start
    totals BLOB NOT NULL,          -- JSON of model.Midnight.totals
    PRIMARY KEY (seq, ns)
) WITHOUT ROWID;
CREATE TABLE event (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    time REAL NOT NULL,            -- s since the epoch, a label
    job TEXT,                      -- NULL: the agent itself
    uid INTEGER,                   -- of the job's owner
    event TEXT NOT NULL,
    text TEXT NOT NULL
);
CREATE INDEX event_job ON event (job);
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""

_COLUMNS = "phase, slot, place, spec, created, boot_id, boot_ns, seen_ns, keeper, account, parent, terms"
"""What a row of the table job says of an OpenJob beside its seq, in the order of the fields."""


_CHUNK = 500
"""Records read at once by who reads many: about a MB."""

_SLACK = 0.001
"""s by which a time may be rounded that stands in a column."""


@dataclass(frozen=True, slots=True)
class Span:
    """Which records there are: numbers and digests of the first and the last; 0 and "" where there is none."""

    first: int
    first_digest: str
    last: int
    last_digest: str
    count: int


class Ledger(SqliteFile):
    """The open file. Use as a context manager."""

    kind, schema, tables = "ledger", SCHEMA, _TABLES

    def check(self) -> None:
        """Read the whole file. Raises LedgerError if it is corrupt."""
        super().check()
        self.open_jobs()

    def begin_numbers_anew(self) -> None:
        """Let a new ledger give numbers that the one before has not given: times grow faster than they are used."""
        now = int(time.time())
        with self._writing() as db:
            db.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('event', ?), ('job', ?)", (now, now))
            db.execute("INSERT INTO meta VALUES ('last_id', ?)", (str(now),))

    def open_job(
        self,
        spec: JobSpec,
        place: Place,
        *,
        slots: range | None,
        boot_id: str,
        boot_ns: int,
        keeper: str,
        parent: int | None = None,
        terms: Terms | None = None,
        cores: Callable[[list[str]], tuple[str, str]] | None = None,
    ) -> OpenJob:
        """Write the intent to make a job, and lease it a slot and cores of its own, in one transaction.

        Slots are handed out in turn, not the lowest free one: a stray packet for a finished job finds nobody. `cores`
        chooses CPUs and memory nodes beside those that other jobs have. Raises InUseError for an id that is open,
        ExhaustedError where no slot is free, and what `cores` does.
        """
        with self._writing():
            slot = self._free_slot(slots) if slots is not None else None
            if cores is not None:
                cpus, mems = cores(self._cores_beside(parent))
                place = replace(place, cpus=cpus, mems=mems)
            row = OpenJob(
                *(0, "making", slot, place, spec, time.time(), boot_id, boot_ns, boot_ns, keeper),
                parent=parent,
                terms=terms or Terms(),
            )
            return replace(row, seq=self._insert(row))

    def reinstate(self, row: OpenJob) -> OpenJob:
        """Put a job back that this ledger does not know, under a new seq. Raises InUseError for an id that is open."""
        with self._writing():
            return replace(row, seq=self._insert(row))

    def _insert(self, row: OpenJob) -> int:
        body = (
            *(row.phase, row.slot, msgspec.json.encode(row.place), msgspec.json.encode(row.spec, enc_hook=str)),
            *(row.created, row.boot_id, row.boot_ns, row.seen_ns, row.keeper, msgspec.json.encode(row.account)),
            *(row.parent, msgspec.json.encode(row.terms)),
        )
        try:
            cursor = self._db.execute(
                f"INSERT INTO job (id, chain, {_COLUMNS}) VALUES (?, ?{', ?' * len(body)})",  # noqa: S608  # our names
                (row.spec.id, chain_name(row.spec.id), *body),
            )
        except sqlite3.IntegrityError as e:
            if "job.id" not in str(e) and "job.chain" not in str(e):
                raise
            raise InUseError(f"job id {row.spec.id!r} is in use by a living job; choose another") from None
        seq = cursor.lastrowid or 0
        self._keep((seq, midnight) for midnight in row.midnights)
        return seq

    def _keep(self, midnights: Iterable[tuple[int, Midnight]]) -> None:
        self._db.executemany(
            "INSERT OR REPLACE INTO midnight VALUES (?, ?, ?)",
            [(seq, midnight.ns, msgspec.json.encode(midnight.totals)) for seq, midnight in midnights],
        )

    def next_id(self) -> str:
        """An id nobody has had: r and a number that is never given twice."""
        with self._writing() as db:
            row = db.execute("SELECT value FROM meta WHERE key = 'last_id'").fetchone()
            number = int(row[0]) if row else 0
            taken: tuple[int] | None = (1,)
            while taken:
                number += 1
                name = f"r{number}"
                taken = db.execute(
                    "SELECT 1 FROM job WHERE id = ? UNION SELECT 1 FROM record WHERE id = ?", (name, name)
                ).fetchone()
            db.execute("INSERT OR REPLACE INTO meta VALUES ('last_id', ?)", (str(number),))
        return name

    def begin(self, seq: int, boot_ns: int, terms: Terms) -> None:
        """All is made and the command runs since then; its stamp moves there, too."""
        with self._writing() as db:
            db.execute(
                "UPDATE job SET phase = 'running', created = created + (? - boot_ns) / 1e9, boot_ns = ?, terms = ? "
                "WHERE seq = ?",
                (boot_ns, boot_ns, msgspec.json.encode(terms), seq),
            )

    def made(self, seq: int) -> None:
        """All is made and waits for somebody to enter."""
        with self._writing() as db:
            db.execute("UPDATE job SET phase = 'made' WHERE seq = ?", (seq,))

    def store(
        self,
        accounts: Iterable[tuple[int, Account]],
        keeper: str,
        seen_ns: int,
        midnights: Iterable[tuple[int, Midnight]] = (),
    ) -> None:
        """Put accounts and new midnights of some jobs (by seq) away as of `seen_ns` (CLOCK_BOOTTIME), as their keeper.

        Midnights stand apart, so that an account that is written at each reading stays small.
        """
        with self._writing() as db:
            db.executemany(
                "UPDATE job SET account = ?, keeper = ?, seen_ns = ? WHERE seq = ?",
                [(msgspec.json.encode(account), keeper, seen_ns, seq) for seq, account in accounts],
            )
            self._keep(midnights)

    def seen(self, keeper: str, boot_ns: int) -> None:
        """A keeper has read all its jobs (CLOCK_BOOTTIME): those that used nothing are not stored anew each time."""
        with self._writing() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('seen', ?)", (f"{keeper} {boot_ns}",))

    def set_terms(self, seq: int, terms: Terms) -> None:
        """On what other terms a job is held from now on."""
        with self._writing() as db:
            db.execute("UPDATE job SET terms = ? WHERE seq = ?", (msgspec.json.encode(terms), seq))

    def set_spec(self, seq: int, spec: JobSpec, account: Account) -> None:
        """What else a job may use from now on, and its account up to now: both, or neither."""
        with self._writing() as db:
            db.execute(
                "UPDATE job SET spec = ?, account = ? WHERE seq = ?",
                (msgspec.json.encode(spec, enc_hook=str), msgspec.json.encode(account), seq),
            )

    def claim(self, job: OpenJob, keeper: str) -> OpenJob | None:
        """Take over a job whose keeper is dead: its row as it is now, or None if somebody else was first."""
        with self._writing() as db:
            changed = db.execute(
                "UPDATE job SET keeper = ?, seen_ns = ? WHERE seq = ? AND keeper = ?",
                (keeper, job.seen_ns, job.seq, job.keeper),
            ).rowcount
        return self._open_jobs("WHERE seq = ?", job.seq)[0] if changed == 1 else None

    def sign_off(self, seq: int, record: Record, inside: State | None = None) -> bool:
        """Commit the final record on stable storage, and mark the job closed; False if it has its record already.

        In the same transaction a family's parent is told what the family used that is not in its own counts (`inside`).
        """
        body = msgspec.json.encode(record)
        with self._synchronous("FULL"), self._writing() as db:
            if self._row("SELECT 1 FROM record WHERE seq = ?", seq) is not None:
                return False
            number, before = self.last()
            digest, ended = _digest(before, body), record.started + record.wall_ns / 1e9
            db.execute(
                "INSERT INTO record (number, seq, id, owner, ended, body, digest) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (number + 1, seq, record.id, record.owner, ended, body, digest),
            )
            db.execute("INSERT OR REPLACE INTO meta VALUES ('last', ?)", (f"{number + 1} {digest}",))
            db.execute("UPDATE job SET phase = 'closed' WHERE seq = ?", (seq,))
            if inside:
                self._tell_parent(seq, inside)
        return True

    def _tell_parent(self, seq: int, inside: State) -> None:
        parent = self._row("SELECT p.seq, p.account FROM job p JOIN job j ON p.seq = j.parent WHERE j.seq = ?", seq)
        if parent is not None:
            account = msgspec.json.decode(parent[1], type=Account)
            body = msgspec.json.encode(replace(account, families=add(account.families, inside)))
            self._db.execute("UPDATE job SET account = ? WHERE seq = ?", (body, parent[0]))

    def add_event(self, event: Event) -> Event:
        """Keep an event; gives it with its number."""
        with self._writing() as db:
            number = db.execute(
                "INSERT INTO event (time, job, uid, event, text) VALUES (?, ?, ?, ?, ?)",
                (event.time, event.job, event.uid, event.event, event.text),
            ).lastrowid
            if number and number % 1000 == 0:
                db.execute("DELETE FROM event WHERE number <= ?", (number - EVENTS_KEPT,))
        return replace(event, number=number or 0)

    def events(self, *, since: int | None = None, job: str | None = None, limit: int = 1000) -> list[Event]:
        """The first events after a number, or the newest ones; of one job where one is named. Oldest first."""
        which, values = ("AND job = ?", (job,)) if job is not None else ("", ())
        order = "DESC" if since is None else "ASC"
        rows = self._rows(
            f"SELECT number, time, job, uid, event, text FROM event WHERE number > ? {which} "  # noqa: S608  # our own words
            f"ORDER BY number {order} LIMIT ?",
            *(since or 0, *values, limit),
        )
        return sorted((Event(*row) for row in rows), key=lambda event: event.number)

    def forget(self, seq: int) -> None:
        """Everything of the job is gone from the kernel: give its id and its lease back."""
        with self._writing() as db:
            db.execute("DELETE FROM job WHERE seq = ?", (seq,))
            db.execute("DELETE FROM midnight WHERE seq = ?", (seq,))

    def open_jobs(self) -> list[OpenJob]:
        return self._open_jobs("ORDER BY seq")

    def _open_jobs(self, clause: str, *values: object) -> list[OpenJob]:
        rows = self._rows(f"SELECT seq, {_COLUMNS} FROM job {clause}", *values)  # noqa: S608  # our own words
        seen = self._row("SELECT value FROM meta WHERE key = 'seen'")
        keeper, _, at = seen[0].partition(" ") if seen else ("", "", "0")
        midnights: dict[int, list[tuple[int, bytes]]] = {}
        kept = "SELECT seq, ns, totals FROM midnight"
        one = f"{kept} WHERE seq = {rows[0][0]:d} ORDER BY ns" if len(rows) == 1 else f"{kept} ORDER BY seq, ns"
        for seq, ns, totals in self._rows(one) if rows else ():
            midnights.setdefault(seq, []).append((ns, totals))
        jobs = [_open_job(self.path, row, midnights.get(row[0], [])) for row in rows]
        return [replace(job, seen_ns=max(job.seen_ns, int(at))) if job.keeper == keeper else job for job in jobs]

    def open_seqs(self) -> list[int]:
        """Which open jobs there are, without all that is known of them."""
        return [seq for (seq,) in self._rows("SELECT seq FROM job")]

    def leases_beside(self, job: OpenJob) -> list[Place]:
        """Where the other open jobs have their leases."""
        rows = self._rows("SELECT DISTINCT place FROM job WHERE slot IS NOT NULL AND seq != ?", job.seq)
        return [msgspec.json.decode(place, type=Place) for (place,) in rows]

    def _cores_beside(self, parent: int | None) -> list[str]:
        """The CPUs that each open job has for itself, less those of the job a new one is inside of, and those above."""
        rows = self._rows(
            "WITH RECURSIVE above (seq, parent) AS (SELECT seq, parent FROM job WHERE seq = ? "
            "UNION SELECT job.seq, job.parent FROM job JOIN above ON job.seq = above.parent) "
            "SELECT place FROM job WHERE seq NOT IN (SELECT seq FROM above)",
            parent,
        )
        return [cpus for (place,) in rows if (cpus := msgspec.json.decode(place, type=Place).cpus)]

    def records(self, limit: int | None = None) -> list[Record]:
        """The newest records, oldest first; all without a limit."""
        number = -1 if limit is None else limit
        rows = self._rows("SELECT number, body FROM record ORDER BY number DESC LIMIT ?", number)
        return [self._decoded(number, body) for number, body in reversed(rows)]

    def record(self, job: str) -> Record:
        """The newest record of an id. NotFoundError where there is none, AcctdError where its digest does not fit."""
        row = self._row("SELECT number, body, digest FROM record WHERE id = ? ORDER BY number DESC LIMIT 1", job)
        if row is None:
            raise NotFoundError(f"no record of job {job!r}; `acctd ls` lists what there is")
        number, body, digest = row
        before = self._row("SELECT digest FROM record WHERE number < ? ORDER BY number DESC LIMIT 1", number)
        if not fits(before[0] if before else self.anchor()[1], body, digest):
            raise AcctdError(f"record {number} of job {job!r} was altered after it was signed off; restore {self.path}")
        return self._decoded(number, body)

    def records_after(self, number: int, limit: int) -> list[tuple[int, str, bytes]]:
        """The first records after a number as they were signed: number, digest, body."""
        return self._rows(
            "SELECT number, digest, body FROM record WHERE number > ? ORDER BY number LIMIT ?", number, limit
        )

    def digest(self, number: int) -> str | None:
        """That of a record; None where there is none of this number."""
        row = self._row("SELECT digest FROM record WHERE number = ?", number)
        if row is None and number == self.anchor()[0] != 0:
            return self.anchor()[1]
        return row[0] if row else None

    def newest(self) -> tuple[int, str, Event]:
        """Number and digest of the last record, and the last event; 0, "" and an event 0 where there is none."""
        events = self.events(limit=1)
        return *self.last(), events[0] if events else Event(0, 0.0, None, None, "", "")

    def last(self) -> tuple[int, str]:
        """Number and digest of the record that was signed last, whatever became of it; 0 and "" where none was."""
        row = self._row("SELECT number, digest FROM record ORDER BY number DESC LIMIT 1") or (0, "")
        signed = self._signature("last")
        return signed if signed[0] > row[0] else row

    # Many records at once

    def span(self) -> Span:
        """Which records there are now."""
        first, last, count = self._row("SELECT MIN(number), MAX(number), COUNT(*) FROM record") or (None, None, 0)
        if not count:
            return Span(0, "", 0, "", 0)
        return Span(first, self.digest(first) or "", last, self.digest(last) or "", count)

    def stream(
        self, *, owner: str | None = None, since: float | None = None, after: int = 0, upto: int | None = None
    ) -> Iterator[tuple[int, str, bytes]]:
        """Records in order of their numbers, `after` one and up to one: number, digest and JSON, as they were signed.

        Of one owner; of jobs whose time goes on after `since` (s since the epoch; some that ended up to a millisecond
        before are among them). Some hundred are in memory at a time, and nobody who writes is held up in between. Up
        to the last one that is there at the first; those of a job that is signed off meanwhile are not read.
        """
        upto = self.last()[0] if upto is None else upto
        wanted, values = "", list[object]()
        if owner is not None:
            wanted, values = " AND owner = ?", [owner]
        if since is not None:
            # Nearly all after the first one are wanted: from there they are read as they lie in the file.
            query = "SELECT MIN(number) FROM record INDEXED BY record_ended WHERE ended >= ?"
            first = self._row(query, since - _SLACK)
            if first is None or first[0] is None:
                return
            after = max(after, first[0] - 1)
            wanted, values = f"{wanted} AND +ended >= ?", [*values, since - _SLACK]
        query = (
            f"SELECT number, digest, body FROM record WHERE number > ? AND number <= ?{wanted} "  # noqa: S608  # our own words
            "ORDER BY number LIMIT ?"
        )
        while rows := self._rows(query, after, upto, *values, _CHUNK):
            yield from rows
            after = rows[-1][0]

    def signed_after(self, number: int, limit: int) -> list[tuple[int, str, str, float, str, bytes]]:
        """The first records after a number, with what they are found by: number, id, owner, end, digest, body."""
        return self._rows(
            "SELECT number, id, owner, ended, digest, body FROM record WHERE number > ? ORDER BY number LIMIT ?",
            *(number, limit),
        )

    def take_out(self, upto: int) -> int:
        """Remove the records up to a number, which are safe elsewhere; how many.

        The chain of digests goes on after them. One whose job is not yet removed from the kernel stays, and all after.
        """
        with self._synchronous("FULL"), self._writing() as db:
            held = self._row("SELECT MIN(number) FROM record WHERE seq IN (SELECT seq FROM job)")
            if held is not None and held[0] is not None:
                upto = min(upto, held[0] - 1)
            last = self._row("SELECT number, digest FROM record WHERE number <= ? ORDER BY number DESC LIMIT 1", upto)
            if last is None:
                return 0
            ended = self._row("SELECT MAX(ended) FROM record WHERE number <= ?", upto) or (0.0,)
            until = max(self.taken_until(), ended[0])
            db.execute(
                "INSERT OR REPLACE INTO meta VALUES ('anchor', ?), ('taken_until', ?)",
                (f"{last[0]} {last[1]}", str(until)),
            )
            return db.execute("DELETE FROM record WHERE number <= ?", (upto,)).rowcount

    def anchor(self) -> tuple[int, str]:
        """Number and digest of the last record that was taken out; 0 and "" where none was."""
        return self._signature("anchor")

    def taken_until(self) -> float:
        """Until when the jobs of records that were taken out went on, s since the epoch; 0.0 where none was."""
        row = self._row("SELECT value FROM meta WHERE key = 'taken_until'")
        return float(row[0]) if row else 0.0

    def _signature(self, key: str) -> tuple[int, str]:
        row = self._row("SELECT value FROM meta WHERE key = ?", key)
        number, _, digest = str(row[0]).partition(" ") if row else ("0", "", "")
        if not number.isdecimal():
            raise LedgerError(f"ledger {self.path} is corrupt ({key} {row and row[0]!r})", corrupt=True)
        return int(number), digest

    def _decoded(self, number: int, body: bytes) -> Record:
        try:
            return msgspec.json.decode(body, type=Record)
        except (msgspec.DecodeError, UnicodeDecodeError) as e:
            raise AcctdError(f"record {number} is altered beyond reading ({e}); restore {self.path}") from e

    def _free_slot(self, slots: range) -> int:
        row = self._row("SELECT value FROM meta WHERE key = 'last_slot'")
        last = int(row[0]) if row else slots.start - 1
        start = last + 1 if last + 1 in slots else slots.start
        for offset in range(len(slots)):
            slot = slots[(start - slots.start + offset) % len(slots)]
            if self._row("SELECT 1 FROM job WHERE slot = ?", slot) is None:
                self._db.execute("INSERT OR REPLACE INTO meta VALUES ('last_slot', ?)", (str(slot),))
                return slot
        raise ExhaustedError(
            f"the address pool is exhausted: all {len(slots)} pairs are leased; finish a job or enlarge network.pool4"
        )


def _open_job(path: Path, row: tuple, midnights: list[tuple[int, bytes]]) -> OpenJob:  # type: ignore[type-arg]  # seq and _COLUMNS
    try:
        kept = tuple(Midnight(ns, msgspec.json.decode(totals, type=State)) for ns, totals in midnights)
        return replace(decode_columns(row), midnights=kept)
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError, TypeError, ValueError, UsageError) as e:
        raise LedgerError(f"ledger {path} is corrupt (open job {row[0]}: {e})", corrupt=True) from e


def fits(previous: object, body: object, digest: str) -> bool:
    """Whether a record is the one that was signed after another with this digest; columns may hold anything."""
    return isinstance(previous, str) and isinstance(body, bytes) and _digest(previous, body) == digest


def _digest(previous: str, body: bytes) -> str:
    return hashlib.sha256(previous.encode() + body).hexdigest()
