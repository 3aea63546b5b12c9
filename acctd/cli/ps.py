"""`acctd ps`: the open jobs as of this moment, one line each."""

import sys
from functools import cache

import click
import msgspec

from acctd import client
from acctd.cli.asking import agent_options, all_now, connect, no_color_option, readable
from acctd.cli.output import emit
from acctd.cli.rates import amounts
from acctd.cli.table import Column, duration, plain, short, tree
from acctd.client import Job
from acctd.kernel import procs

COLUMNS = (
    Column("JOB", right=False, style="bold"),
    Column("OWNER", spare=2, right=False),
    Column("PHASE", spare=4, right=False),
    Column("PROCS", spare=3),
    Column("CPU"),
    Column("MEMORY"),
    Column("IN"),
    Column("OUT"),
    Column("WALL", spare=1),
    Column("NETWORK", spare=5, right=False),
)


@click.command("ps")
@click.option("--all", "everyone", is_flag=True, help="Also the jobs of others that you may see and not read.")
@click.option("--json", "as_json", is_flag=True, help="The jobs as a JSON array, sizes in bytes, times in ns.")
@no_color_option
@agent_options
def command(everyone: bool, as_json: bool, socket_path: str | None, config_path: str | None) -> None:
    """List the open jobs and what they have used so far.

    Root sees every job. Another user sees own jobs, and with --all those of others as far as the configuration lets
    them be seen: their owner, phase and processes, and no totals. A family inside a job stands below it, indented; the
    job's numbers include the family's. CPU is user and system time; MEMORY is what is resident now; IN and OUT are the
    network bytes received and sent. A number that is not counted is left blank.
    """
    with connect(socket_path, config_path) as agent:
        answers = [(answer, client.job(answer)) for answer in all_now(agent)]
    if not everyone:
        answers = [(answer, job) for answer, job in answers if readable(job)]
    if as_json:
        emit(msgspec.json.format(msgspec.json.encode([answer for answer, _ in answers]), indent=2).decode())
        return
    rows = [row(depth, job) for depth, job in tree([job for _, job in answers], key=lambda job: job.started)]
    if sys.stdout.isatty():
        from acctd.cli import screen  # rich, which takes its time to load

        screen.show_once(COLUMNS, rows)
    else:
        for line in plain(COLUMNS, rows):
            emit(line)


def row(depth: int, job: Job) -> list[str]:
    """One job's cells."""
    used = amounts(job, _lies_on_others)
    return [
        "  " * depth + job.id,
        job.owner,
        job.phase,
        str(len(job.pids)),
        duration(used.cpu),
        short(used.memory),
        short(used.received),
        short(used.sent),
        duration(job.wall_ns),
        job.network,
    ]


_lies_on_others = cache(procs.lies_on_others)
