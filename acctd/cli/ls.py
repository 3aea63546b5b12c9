"""`acctd ls`: the open jobs and the newest records, one line each."""

import os
import time

import click

from acctd import config as configuration
from acctd import ledger
from acctd.cli.output import emit
from acctd.cli.summary import ending, seconds, size
from acctd.cli.table import Column, plain
from acctd.ledger import Ledger
from acctd.model import Record

_COLUMNS = [
    Column(title, right=False) for title in ("JOB", "OWNER", "STATE", "STARTED", "WALL", "CPU", "RESIDENT", "NETWORK")
]


@click.command("ls")
@click.option("--config", "config_path", metavar="FILE", help="Configuration file.")
@click.option("-n", "--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Records to list.")
def command(config_path: str | None, limit: int) -> None:
    """List open jobs and the newest records."""
    config = configuration.load(config_path, os.environ)
    with Ledger(config.state_dir / ledger.FILE) as book:
        rows = [_row(record) for record in book.records(limit)]
        rows += [
            (job.spec.id, job.spec.owner.name, job.phase, _stamp(job.created), "", "", "", "")
            for job in book.open_jobs()
        ]
    for line in plain(_COLUMNS, rows):
        emit(line)


def _row(record: Record) -> tuple[str, ...]:
    totals = record.totals
    cpu = sum(totals.get(name, {}).get("", 0) for name in ("cpu_user", "cpu_system"))
    resident = totals.get("memory_resident_peak", {}).get("")
    network = totals.get("network")
    return (
        record.id,
        record.owner,
        ending(record),
        _stamp(record.started),
        seconds(record.wall_ns),
        seconds(cpu),
        "-" if resident is None else size(resident),
        "-" if network is None else size(sum(network.values())),
    )


def _stamp(epoch: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(epoch))
