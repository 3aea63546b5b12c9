"""`acctd ledger`: how large it is, whether it is whole, its old records into files, its free pages to the disk.

Works on the files, whether an agent lives or not.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import msgspec

from acctd import archive as archives
from acctd import config as configuration
from acctd import history, verification
from acctd.cli.output import emit, say
from acctd.cli.progress import progress
from acctd.cli.summary import size as told_size
from acctd.cli.table import clean
from acctd.config import Config
from acctd.errors import AcctdError, ExhaustedError, NotFoundError
from acctd.kernel import filelock
from acctd.ledger import FILE, Ledger
from acctd.sqlitefile import SqliteFile
from exporters.outgoing import NOTES, furthest_behind

_SPARE = 16 * 2**20  # bytes that a vacuum leaves on the disk


@click.group("ledger")
def command() -> None:
    """The ledger, and the samples kept beside it."""


_config_option = click.option("--config", "config_path", metavar="FILE", help="Configuration file.")


@command.command("size")
@_config_option
@click.option("--json", "as_json", is_flag=True, help="All that is known, as JSON.")
def size(config_path: str | None, as_json: bool) -> None:
    """Show how much there is of records and samples."""
    config = configuration.load(config_path, os.environ)
    with _ledger(config) as book:
        found = _size(book)
    trouble: AcctdError | None = None
    try:
        with history.reading(config.state_dir / history.FILE) as samples:
            found["samples"] = None
            if samples is not None:
                found["samples"] = {"path": str(samples.path), **msgspec.to_builtins(samples.size())}
    except AcctdError as e:
        trouble = e
    if as_json:
        emit(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        for line in _told(found):
            emit(line)
    if trouble is not None:  # last: how large the ledger is, does not hang on it
        raise trouble


@command.command("verify")
@_config_option
@click.argument("directory", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
def verify(config_path: str | None, directory: Path | None) -> None:
    """Say whether all records are as they were signed, and none is missing.

    With DIR the archived records there are followed first, up to the ledger's own. Ends with the first record that is
    not in order, by its number and job.
    """
    config = configuration.load(config_path, os.environ)
    with _ledger(config) as book, progress("verifying") as begin:
        span, out = book.span(), book.anchor()[0]
        advance = begin(span.count, 0)
        chains = archives.follow(directory, book, advance) if directory is not None else []
        at = span.first - 1
        for number in verification.verify(book):
            advance(number - at, 0)
            at = number
        book.check()
    for chain in chains:
        emit(_followed(chain, directory))
    if out and directory is None:
        emit(f"records up to {out} were archived; name their directory, and they are verified too")
    until = f", the last one {span.last} with digest {span.last_digest}" if span.count else ""
    emit(f"{_records(span.count)} in {config.state_dir / FILE}: as they were signed{until}")
    with history.reading(config.state_dir / history.FILE) as samples:
        if samples is not None:
            samples.check()


def _followed(chain: archives.Chain, directory: Path | None) -> str:
    first = chain.first if chain.proved else chain.first + 1
    joins = ", which the ledger goes on from" if chain.joins else ""
    lines = []
    if chain.last >= first:
        what = f"{_records(chain.last - first + 1)} of {chain.node} in {directory}"
        lines.append(f"{what}: as they were signed, {first} to {chain.last}{joins}")
    if not chain.proved:
        before = "record 1 is" if chain.first == 2 else f"records 1 to {chain.first - 1} are"
        lines.append(
            f"{before} not in {directory}: whether {chain.first} of {chain.node} is as it was signed, is unknown"
        )
    return "\n".join(lines)


@command.command("archive")
@_config_option
@click.option(
    "--before", "month", metavar="YYYY-MM", required=True, help="Records of the months before this one (UTC)."
)
@click.option("--remove", is_flag=True, help="Remove from the ledger what is safely in files.")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
def archive(config_path: str | None, month: str, remove: bool, directory: Path) -> None:
    """Write the records of whole months into DIR, a file a month.

    A file that is there is compared, and not written again. `acctd bill --from records DIR` reads them.
    """
    now = datetime.now(UTC)
    before = archives.beginning(month, now)
    config = configuration.load(config_path, os.environ)
    with _ledger(config) as book, filelock.held(str(config.state_dir / "archive.lock"), patience=0.0):
        with progress("looking") as begin:
            plan = archives.plan(book, before, now, begin(book.span().count, 0))
        archives.make(directory)
        written: list[Path] = []
        with progress("archiving") as begin:
            advance = begin(0, 0)
            for each in plan.months:
                written += archives.write(book, each, directory, advance)
        emit(f"{_records(plan.records)} of {_count(len(plan.months), 'month')} in {directory}, {len(written)} new")
        if plan.stays:
            say(f"acctd: {plan.stays}")
        if remove and plan.months:
            _remove(config, book, plan, directory)


def _remove(config: Config, book: Ledger, plan: archives.Plan, directory: Path) -> None:
    last = plan.months[-1].last
    known = archives.spooled(config.export, book)
    if known is not None and known < last:
        say(f"acctd: what comes after record {known} is not in the spool of acctd export yet, and stays")
        last = known
    behind = furthest_behind(config.state_dir / NOTES, book)
    if behind is not None and behind[0] < last:
        say(
            f"acctd: what comes after record {behind[0]} was not written by acctd usage-records to {behind[1]} yet, "
            "and stays; write it, or remove the note"
        )
        last = behind[0]
    with progress("removing") as begin:
        removed = archives.take_out(book, plan.months, directory, last, begin(plan.records, 0))
    emit(f"{_records(removed)} removed from {book.path}; `acctd ledger vacuum` gives their room to the disk")
    if removed < plan.records and last == plan.months[-1].last:
        say("acctd: the others stay, as long as a job of theirs is not removed from the kernel")


@command.command("vacuum")
@_config_option
def vacuum(config_path: str | None) -> None:
    """Give the room of what was removed back to the disk.

    An agent may live: it waits meanwhile, a second or so for 100 MB, and jobs go on.
    """
    config = configuration.load(config_path, os.environ)
    with _ledger(config) as book:
        _vacuum("ledger", book)
    with history.reading(config.state_dir / history.FILE) as samples:
        if samples is not None:
            _vacuum("samples", samples)


def _vacuum(what: str, file: SqliteFile) -> None:
    before = file.disk_bytes()
    # Written twice: aside, in this directory too, and into SQLite's log.
    os.environ["SQLITE_TMPDIR"] = str(file.path.parent)
    need = 2 * file.used_bytes() + _SPARE
    room = os.statvfs(file.path.parent)
    if (free := room.f_bavail * room.f_frsize) < need:
        raise ExhaustedError(
            f"the {what} {file.path} needs {told_size(need)} to be written anew, and its disk has {told_size(free)}; "
            "make room first, or leave it: free pages are used again"
        )
    file.vacuum()
    emit(f"{what} {file.path}: {told_size(before)} before, {told_size(file.disk_bytes())} after")


@contextmanager
def _ledger(config: Config) -> Iterator[Ledger]:
    path = config.state_dir / FILE
    if not path.exists():
        raise NotFoundError(f"there is no ledger {path}; see state_dir, and run as root")
    with Ledger(path) as book:
        yield book


def _size(book: Ledger) -> dict[str, Any]:
    span, (out, digest) = book.span(), book.anchor()
    ends = {}
    for name, number, signed in (("oldest", span.first, span.first_digest), ("newest", span.last, span.last_digest)):
        rows = book.records_after(number - 1, 1) if number else []
        for _, _, body in rows:
            read = archives.Body.of(body)
            ends[name] = {"number": number, "digest": signed, "id": read.id, "ended": read.started + read.wall_ns / 1e9}
    return {
        "ledger": {
            "path": str(book.path), "bytes": book.disk_bytes(), "free_bytes": _free(book), "rows": book.rows(), **ends,
            "archived": {"number": out, "digest": digest} if out else None,
        }
    }  # fmt: skip


def _free(file: SqliteFile) -> int:
    return max(0, file.path.stat().st_size - file.used_bytes())


def _told(found: dict[str, Any]) -> list[str]:
    book = found["ledger"]
    lines = [f"ledger {book['path']}: {told_size(book['bytes'])}, {told_size(book['free_bytes'])} of it free"]
    lines += [f"  {name}: {rows:,}" for name, rows in book["rows"].items() if name != "meta"]
    for name in ("oldest", "newest"):
        if name in book:
            record = book[name]
            at = datetime.fromtimestamp(record["ended"], UTC)
            lines.append(f"  {name} record: {record['number']}, job {clean(record['id'])}, {at:%Y-%m-%d %H:%M:%S} UTC")
    if book["archived"]:
        lines.append(f"  archived: records up to {book['archived']['number']}")
    if samples := found.get("samples"):
        lines.append(f"samples {samples['path']}: {told_size(samples['bytes'])}")
        lines.append(f"  {_count(samples['points'], 'point')} of {_count(samples['jobs'], 'job')}")
        lines.append(f"  dropped for room: {samples['dropped']:,}; lost, not written: {samples['lost']:,}")
    elif "samples" in found:
        lines.append("samples: none")
    return lines


def _records(number: int) -> str:
    return _count(number, "record")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
