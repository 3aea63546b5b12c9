"""`acctd show JOB`: one record, for a person, as JSON or as a ClassAd."""

import os

import click
import msgspec

from acctd import config as configuration
from acctd import ledger
from acctd.cli.output import emit
from acctd.cli.summary import summary
from acctd.errors import NotFoundError
from acctd.ledger import Ledger
from exporters.classad import format_ad, record_ad


@click.command("show")
@click.argument("job")
@click.option("--json", "form", flag_value="json", help="The record as JSON.")
@click.option("--classad", "form", flag_value="classad", help="The record as a ClassAd in long form.")
@click.option("--config", "config_path", metavar="FILE", help="Configuration file.")
def command(job: str, form: str | None, config_path: str | None) -> None:
    """Show the record of JOB."""
    config = configuration.load(config_path, os.environ)
    with Ledger(config.state_dir / ledger.FILE) as book:
        try:
            record = book.record(job)
        except NotFoundError:
            if any(row.spec.id == job for row in book.open_jobs()):
                raise NotFoundError(
                    f"job {job!r} is still open and has no record yet; ask again when it has ended"
                ) from None
            raise
    if form == "json":
        emit(msgspec.json.format(msgspec.json.encode(record), indent=2).decode())
    elif form == "classad":
        emit(format_ad(record_ad(record)).removesuffix("\n"))
    else:
        emit(summary(record))
