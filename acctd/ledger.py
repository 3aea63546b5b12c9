"""The ledger: one SQLite file with the open jobs, their leases and totals, and the records of the closed ones.

Intent is written here before the kernel is changed. A record is signed off by a digest over itself and its predecessor,
so that a changed one shows, and a missing one unless
it is the newest. Stores and finds; decides nothing. Several acctd processes may have it open.
"""

import hashlib
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

import msgspec

from acctd.errors import AcctdError, ConfigError, ExhaustedError, InUseError, NotFoundError, NotPermittedError
from acctd.meter import State
from acctd.model import JobSpec, Limits, Owner, Record, chain_name, parse_class

SCHEMA = 1
FILE = "ledger.sqlite"
"""The ledger's name in state_dir."""

Phase = Literal["making", "running", "closed"]
"""making: kernel objects may be half there. running: all there, the command has been started. closed: record written,
objects not yet all removed."""

_TABLES = """
CREATE TABLE job (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    phase TEXT NOT NULL,
    chain TEXT NOT NULL UNIQUE,    -- two ids may come to one chain name: the second is refused
    slot INTEGER UNIQUE,           -- the lease: which pair of addresses of the pool, NULL without a pipe
    place BLOB NOT NULL,           -- JSON of Place
    spec BLOB NOT NULL,            -- JSON of model.JobSpec
    created REAL NOT NULL,         -- s since the epoch, a label
    boot_id TEXT NOT NULL,
    boot_ns INTEGER NOT NULL,      -- CLOCK_BOOTTIME when the command started, before that when the job was made
    seen_ns INTEGER NOT NULL,      -- CLOCK_BOOTTIME when the totals were stored last
    keeper TEXT NOT NULL,          -- who watches the job: pid and start time
    totals BLOB NOT NULL,
    kept BLOB NOT NULL
);
CREATE TABLE record (
    number INTEGER PRIMARY KEY,    -- in the order of signing
    seq INTEGER NOT NULL UNIQUE,   -- that of the job: one job, one record
    id TEXT NOT NULL,
    owner TEXT NOT NULL,
    ended REAL NOT NULL,
    body BLOB NOT NULL,            -- JSON of model.Record
    digest TEXT NOT NULL           -- SHA-256 of the previous digest and the body
);
CREATE INDEX record_id ON record (id);
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
"""


_COLUMNS = "phase, slot, place, spec, created, boot_id, boot_ns, seen_ns, keeper, totals, kept"
"""What a row of the table job says of an OpenJob beside its seq, in the order of the fields."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a job's kernel objects are, as configured when it was made; a later configuration may say otherwise."""

    base: str  # cgroup.base
    backend: str | None = None  # which netfilter back end made the chain, None without a pipe
    pool4: str = ""  # networks in which the slot's addresses lie
    pool6: str = ""  # "" without IPv6


@dataclass(frozen=True, slots=True)
class OpenJob:
    """One row of the open jobs."""

    seq: int
    phase: Phase
    slot: int | None
    place: Place
    spec: JobSpec
    created: float
    boot_id: str
    boot_ns: int
    seen_ns: int
    keeper: str
    totals: State = field(default_factory=dict)
    kept: State = field(default_factory=dict)


class Ledger:
    """The open file. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=30.0, isolation_level=None)
            os.chmod(path, 0o600)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._migrate()
            # NORMAL: a commit survives kill -9, and a power cut takes the jobs themselves along. Records use FULL.
            self._db.execute("PRAGMA synchronous = NORMAL")
        except (sqlite3.Error, OSError) as e:
            raise _trouble(path, e) from e

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def open_job(
        self, spec: JobSpec, place: Place, *, slots: range | None, boot_id: str, boot_ns: int, keeper: str
    ) -> OpenJob:
        """Write the intent to make a job and lease it a slot, in one transaction.

        Slots are handed out in turn, not the lowest free one: a stray packet for a finished job finds nobody. Raises
        InUseError for an id that is open, ExhaustedError where no slot is free.
        """
        now = time.time()
        with self._writing() as db:
            slot = self._free_slot(slots) if slots is not None else None
            try:
                cursor = db.execute(
                    f"INSERT INTO job (id, chain, {_COLUMNS}) "  # noqa: S608  # our own column names
                    "VALUES (?, ?, 'making', ?, ?, ?, ?, ?, ?, ?, ?, x'7b7d', x'7b7d')",
                    (
                        *(spec.id, chain_name(spec.id)),
                        *(slot, msgspec.json.encode(place), msgspec.json.encode(spec, enc_hook=str)),
                        *(now, boot_id, boot_ns, boot_ns, keeper),
                    ),
                )
            except sqlite3.IntegrityError as e:
                if "job.id" not in str(e) and "job.chain" not in str(e):
                    raise
                raise InUseError(f"job id {spec.id!r} is in use by a living job; choose another") from None
        return OpenJob(
            cursor.lastrowid or 0, "making", slot, place, spec, now, boot_id, boot_ns, boot_ns, keeper
        )  # fmt: skip

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

    def begin(self, seq: int, boot_ns: int) -> None:
        """All is made and the command runs since then."""
        with self._writing() as db:
            db.execute("UPDATE job SET phase = 'running', boot_ns = ? WHERE seq = ?", (boot_ns, seq))

    def store_totals(self, seq: int, totals: State, kept: State, seen_ns: int) -> None:
        """Put totals away as of `seen_ns` (CLOCK_BOOTTIME)."""
        with self._writing() as db:
            db.execute(
                "UPDATE job SET totals = ?, kept = ?, seen_ns = ? WHERE seq = ?",
                (msgspec.json.encode(totals), msgspec.json.encode(kept), seen_ns, seq),
            )

    def claim(self, job: OpenJob, keeper: str) -> OpenJob | None:
        """Take over a job whose keeper is dead: its row as it is now, or None if somebody else was first."""
        with self._writing() as db:
            changed = db.execute(
                "UPDATE job SET keeper = ? WHERE seq = ? AND keeper = ?", (keeper, job.seq, job.keeper)
            ).rowcount
        return self._open_jobs("WHERE seq = ?", job.seq)[0] if changed == 1 else None

    def sign_off(self, seq: int, record: Record) -> None:
        """Commit the final record, once and on stable storage, and mark the job closed."""
        body = msgspec.json.encode(record)
        self._db.execute("PRAGMA synchronous = FULL")
        try:
            with self._writing() as db:
                last = db.execute("SELECT digest FROM record ORDER BY number DESC LIMIT 1").fetchone()
                db.execute(
                    "INSERT INTO record (seq, id, owner, ended, body, digest) VALUES (?, ?, ?, ?, ?, ?)",
                    (seq, record.id, record.owner, record.ended, body, _digest(last[0] if last else "", body)),
                )
                db.execute("UPDATE job SET phase = 'closed' WHERE seq = ?", (seq,))
        finally:
            self._db.execute("PRAGMA synchronous = NORMAL")

    def forget(self, seq: int) -> None:
        """Everything of the job is gone from the kernel: give its id and its lease back."""
        with self._writing() as db:
            db.execute("DELETE FROM job WHERE seq = ?", (seq,))

    def open_jobs(self) -> list[OpenJob]:
        return self._open_jobs("ORDER BY seq")

    def _open_jobs(self, clause: str, *values: object) -> list[OpenJob]:
        rows = self._rows(f"SELECT seq, {_COLUMNS} FROM job {clause}", *values)  # noqa: S608  # our own words
        return [
            OpenJob(
                *(seq, phase, slot),
                msgspec.json.decode(place, type=Place),
                _spec(spec),
                *(created, boot_id, boot_ns, seen_ns, keeper),
                msgspec.json.decode(totals, type=State),
                msgspec.json.decode(kept, type=State),
            )
            for seq, phase, slot, place, spec, created, boot_id, boot_ns, seen_ns, keeper, totals, kept in rows
        ]

    def leases_beside(self, job: OpenJob) -> list[Place]:
        """Where the other open jobs have their leases."""
        rows = self._rows("SELECT DISTINCT place FROM job WHERE slot IS NOT NULL AND seq != ?", job.seq)
        return [msgspec.json.decode(place, type=Place) for (place,) in rows]

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
        if _digest(before[0] if before else "", body) != digest:
            raise AcctdError(f"record {number} of job {job!r} was altered after it was signed off; restore {self.path}")
        return self._decoded(number, body)

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

    def _migrate(self) -> None:
        with self._writing() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA:
                raise ConfigError(
                    f"{self.path} has schema {version} and this acctd knows {SCHEMA}; use the newer acctd that wrote it"
                )
            if version == 0:
                for statement in _TABLES.split(";\n"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {SCHEMA}")

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                # On some errors, a full disk among them, SQLite has rolled back by itself.
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
        except sqlite3.Error as e:
            raise _trouble(self.path, e) from e

    def _rows(self, query: str, *values: object) -> list[tuple]:  # type: ignore[type-arg]  # columns differ by query
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.Error as e:
            raise _trouble(self.path, e) from e

    def _row(self, query: str, *values: object) -> tuple | None:  # type: ignore[type-arg]
        rows = self._rows(query, *values)
        return rows[0] if rows else None


def _spec(body: bytes) -> JobSpec:
    """The JobSpec that open_job encoded; networks were written as text."""
    raw = msgspec.json.decode(body)
    return JobSpec(
        id=raw["id"],
        owner=Owner(**raw["owner"]),
        limits=Limits(**raw["limits"]),
        network=raw["network"],
        classes=tuple(parse_class(cls["name"], cls["networks"]) for cls in raw["classes"]),
        tags=raw["tags"],
    )


def _digest(previous: str, body: bytes) -> str:
    return hashlib.sha256(previous.encode() + body).hexdigest()


def _trouble(path: Path, error: Exception) -> AcctdError:
    if isinstance(error, PermissionError) or "readonly" in str(error) or "unable to open" in str(error):
        return NotPermittedError(f"cannot open the ledger {path}: {error}; run as root or set state_dir")
    return AcctdError(f"ledger {path}: {error}; see that the disk is not full and the file is whole")
