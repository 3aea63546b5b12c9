"""`acctd usage-records`: the ledger's records as files for a grid's accounting, each record once.

The command decides which format, where and since when; exporters/outgoing.py that nothing is lost or written twice.
"""

import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from zoneinfo import ZoneInfo

import click

from acctd import config as configuration
from acctd import ledger
from acctd.cli.billtime import instant
from acctd.cli.output import emit
from acctd.cli.progress import progress
from acctd.errors import NotPermittedError, UsageError
from acctd.kernel import filelock
from acctd.ledger import Ledger
from acctd.model import Record
from exporters import apel, usagerecord
from exporters.outgoing import NOTES, Batch, Outgoing, Sent, send

_PATIENCE = 0.0  # another run writes the same records


@click.command("usage-records")
@click.argument("kind", metavar="FORMAT", type=click.Choice(["apel", "ur"]))
@click.argument("target", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--site", metavar="NAME", help="The site, as the accounting server knows it.")
@click.option(
    "--benchmark",
    metavar="TYPE=VALUE",
    help="What a core of this node achieves, like HEPscore23=12.5; Si2k and HEPSPEC are known too.",
)
@click.option(
    "--since",
    metavar="TIME",
    help="Leave out jobs that ended earlier, for good: 2026-01, 2026-01-31, 2026-01-31T12:00; UTC unless it says so.",
)
@click.option(
    "--anew", is_flag=True, help="Begin with the first record that the ledger has, whatever was written before."
)
@click.option("--config", "config_path", metavar="FILE", help="Configuration file.")
def command(
    kind: str,
    target: Path,
    site: str | None,
    benchmark: str | None,
    since: str | None,
    anew: bool,
    config_path: str | None,
) -> None:
    """Write the records that were not written to DIR yet.

    FORMAT apel writes messages into the outgoing queue of ssmsend (path_type dirq) and needs --site and --benchmark;
    FORMAT ur writes files of OGF Usage Record 2.0. What was written is noted in state_dir, for each DIR: the next run
    goes on after it. Whoever fetches a file may remove it. Records of families are left out: what they used is in their
    parent's.
    """
    encode = _encoder(kind, site, benchmark)
    earliest = instant("since", since, ZoneInfo("UTC")) if since is not None else None
    config = configuration.load(config_path, os.environ)
    notes = config.state_dir / NOTES
    with Ledger(config.state_dir / ledger.FILE) as book:
        try:
            notes.mkdir(mode=0o700, exist_ok=True)
        except OSError as e:
            raise NotPermittedError(f"cannot make {notes} ({e.strerror}); run as root") from e
        place = _queued if kind == "apel" else _named
        with (
            filelock.held(str(notes / "lock"), patience=_PATIENCE),
            Outgoing(kind, target, notes, place) as outgoing,
            progress("Writing") as begin,
        ):
            done = send(book, outgoing, encode, since=earliest, anew=anew, progress=begin)
    emit(_told(done))


def _encoder(kind: str, site: str | None, benchmark: str | None) -> Callable[[Sequence[Record]], bytes]:
    speed = apel.Benchmark.parse(benchmark) if benchmark is not None else None
    if kind == "ur":
        if site is not None and not site.isprintable():
            raise UsageError(f"--site {site!r} is no name of a site; leave out what is not printable")
        return lambda records: usagerecord.document(records, created=datetime.now(UTC), site=site, benchmark=speed)
    if site is None or speed is None:
        raise UsageError(
            "apel needs --site, the site's name in GOCDB, and --benchmark, like HEPscore23=12.5; give both"
        )
    return partial(apel.message, site=apel.check_site(site), benchmark=speed)


def _queued(batch: Batch) -> tuple[str, str]:
    """As the directory queue `dirq` has it: a folder of 8 hexadecimal digits, a file of 14."""
    return f"{max(0, int(batch.ended)) >> 16 << 16 & 0xFFFFFFFF:08x}", batch.digest[:14]


def _named(batch: Batch) -> tuple[str, str]:
    return "", f"ur-{batch.first:09}-{batch.last:09}-{batch.digest[:12]}.xml"


def _told(done: Sent) -> str:
    text = f"{_count(done.records, 'record')} in {_count(done.files, 'file')}"
    left = [
        (done.families, "of families, which are in their parents' records"),
        (done.early, "that ended before --since"),
        (done.archived, "that are in an archive only"),
    ]
    return "; left out: ".join(
        part for part in (text, ", ".join(f"{number} {what}" for number, what in left if number)) if part
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
