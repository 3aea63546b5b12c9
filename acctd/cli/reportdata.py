"""What a report is made from: records, living jobs and samples, from this node's ledger where it may be read, else from
the agent, which tells an ordinary user of own jobs. Prints nothing.
"""

import os
import pwd
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec

from acctd import history, ledger
from acctd.cli import thisnode
from acctd.client import Client
from acctd.config import Config
from acctd.errors import AcctdError, LedgerError, NotFoundError, NotPermittedError, UnavailableError
from acctd.ledger import Ledger
from acctd.model import Record
from acctd.points import Point
from acctd.report import sums
from acctd.report.sums import Ended
from acctd.sources import books


class Source(Protocol):
    """Where all of it comes from."""

    def job(self, name: str) -> Record:
        """The living job of that id as of now, else the newest record. Raises NotFoundError."""

    def jobs(self, owner: str | None, since: float) -> Iterator[Ended]:
        """Of one owner or of all: what may have some of its time after `since`, s since the epoch. Living ones last."""

    def points(self, record: Record) -> tuple[list[Point], str]:
        """The kept samples of a job; else one sentence on why there are none, "" where it was too short."""

    @property
    def looked(self) -> str:
        """What was read, for the end of a report."""


def source(config: Config, socket: Path) -> Source:
    """The ledger if this user may read it, else the agent. Raises what thisnode.ledger_or_agent() does."""
    return _OfAgent(socket) if thisnode.ledger_or_agent(config, socket) is None else _OfLedger(config, socket)


@dataclass(slots=True)
class _Range:
    """The records that were read, from the first to the last."""

    count: int = 0
    first: str = ""
    last: str = ""

    def add(self, number: int, digest: str) -> None:
        self.count += 1
        self.last = f"{number} (digest {digest[:16]})"
        self.first = self.first or self.last

    def said(self, where: str) -> str:
        return f"{self.count:,} records of {where}" + (f", from {self.first} to {self.last}" if self.count else "")


@dataclass(slots=True)
class _OfLedger:
    config: Config
    socket: Path
    seen: _Range = field(default_factory=_Range)
    absent: str = ""  # a sentence on records that were archived

    @property
    def looked(self) -> str:
        return self.seen.said("the ledger of this node") + (f"; {self.absent}" if self.absent else "")

    def job(self, name: str) -> Record:
        with Ledger(self.config.state_dir / ledger.FILE) as book:
            phase = next((row.phase for row in book.open_jobs() if row.spec.id == name), "closed")
            if phase == "running":
                living = next((record for record in self._living(book) if record.id == name), None)
                if living is not None:
                    return living
            elif phase != "closed":
                raise NotFoundError(f"job {name!r} has not begun; ask again when something runs in it")
            return book.record(name)

    def jobs(self, owner: str | None, since: float) -> Iterator[Ended]:
        with Ledger(self.config.state_dir / ledger.FILE) as book:
            living = self._living(book)  # first: who ends meanwhile has a record, and is known by its start
            ended: set[tuple[str, float]] = set()
            watched = {(record.id, record.started) for record in living}
            for number, digest, body in book.stream(owner=owner, since=since):
                self.seen.add(number, digest)
                job = _decoded(number, body)
                if watched and (job.id, job.started) in watched:
                    ended.add((job.id, job.started))
                yield job
            self.absent = books.missing(book, since)
            for record in living:
                if (record.id, record.started) not in ended and owner in (None, record.owner):
                    yield sums.decode(msgspec.json.encode(record))

    def points(self, record: Record) -> tuple[list[Point], str]:
        try:
            return history.kept(self.config.state_dir / history.FILE, record.id, record.started), ""
        except AcctdError as e:  # of another acctd, not to be opened, broken: the numbers are in the record
            return [], f"The samples cannot be read: {e}."

    def _living(self, book: Ledger) -> list[Record]:
        """What the agent holds as of now; as of their last readings jobs of `acctd run`, or all if no agent answers."""
        told = [_record(msgspec.json.decode(body)) for body in thisnode.living(book, self.socket)]
        return list({(record.id, record.started): record for record in told}.values())


@dataclass(slots=True)
class _OfAgent:
    socket: Path
    seen: _Range = field(default_factory=_Range)

    @property
    def looked(self) -> str:
        return self.seen.said("this node, told by its agent")

    def job(self, name: str) -> Record:
        with Client(self.socket) as agent:
            for page in thisnode.pages(agent, "Interim"):
                for body in page["records"]:
                    if body["id"] == name:
                        return _record(body)
            found = None
            for page in thisnode.pages(agent, "Records"):
                found = next((each["body"] for each in reversed(page["records"]) if each["body"]["id"] == name), found)
        if found is None:
            raise NotFoundError(f"no job {name!r} of yours; jobs of others are for their owners and root")
        return _record(found)

    def jobs(self, owner: str | None, since: float) -> Iterator[Ended]:
        own = _name()
        with Client(self.socket) as agent:
            living = [record for page in thisnode.pages(agent, "Interim") for record in page["records"]]
            ended = set()
            for page in thisnode.pages(agent, "Records"):
                if not page["all"] and owner != own:
                    what = "all jobs" if owner is None else f"jobs of {owner!r}"
                    raise NotPermittedError(f"{what} are for root to see; ask for --user {own}, or run as root")
                for each in page["records"]:
                    self.seen.add(each["number"], each["digest"])
                    job = _decoded(each["number"], msgspec.json.encode(each["body"]))
                    ended.add((job.id, job.started))
                    if owner in (None, job.owner) and job.started + job.wall_ns / 1e9 >= since:
                        yield job
        for body in living:
            job = sums.decode(msgspec.json.encode(body))
            if (job.id, job.started) not in ended and owner in (None, job.owner):
                yield job

    def points(self, record: Record) -> tuple[list[Point], str]:
        with Client(self.socket) as agent:
            try:
                told = agent.call("Samples", job=record.id, started=record.started)["samples"]
            except (NotFoundError, LedgerError, UnavailableError) as e:
                return [], f"There are no plots: {e}."
        try:
            return msgspec.convert(told, list[Point]), ""
        except msgspec.ValidationError as e:
            raise AcctdError(
                f"the agent's answer is not as expected: {e}; see that it is of the same version"
            ) from None


def _record(body: object) -> Record:
    try:
        return msgspec.convert(body, Record)
    except msgspec.ValidationError as e:
        raise AcctdError(f"the agent's answer is not as expected: {e}; see that it is of the same version") from None


def _decoded(number: int, body: bytes) -> Ended:
    try:
        return sums.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise AcctdError(f"record {number} cannot be read ({e}); restore the ledger") from e


def _name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())
