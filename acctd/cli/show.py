"""`acctd show JOB`: a living job as of this moment, or an ended one's record; for a person, as JSON or as a ClassAd."""

import os
import shutil
import sys

import click
import msgspec

from acctd import client, history, ledger, points
from acctd import config as configuration
from acctd.cli import course
from acctd.cli.asking import agent_options, complete_job, connect, no_color_option
from acctd.cli.output import emit, say
from acctd.cli.spark import coloured, usable
from acctd.cli.summary import living, shortages, summary
from acctd.client import Client, Job
from acctd.errors import AcctdError, NotFoundError, NotPermittedError, UnavailableError
from acctd.ledger import Ledger
from acctd.model import Record
from acctd.points import Point
from exporters.classad import format_ad, record_ad


@click.command("show")
@click.argument("job", shell_complete=complete_job)
@click.option("--json", "form", flag_value="json", help="As JSON: the job as the agent tells it, or the record.")
@click.option("--classad", "form", flag_value="classad", help="As a ClassAd in long form.")
@no_color_option
@agent_options
def command(job: str, form: str | None, socket_path: str | None, config_path: str | None) -> None:
    """Show what JOB uses now, or its record if it has ended.

    The agent is asked first, and reads the job for it. Where none answers, or it has no such job, the ledger is looked
    into, which takes root.

    On a terminal there are small plots of how memory, CPU, network and disks were used in the course of the job, as far
    as samples of it are kept. In a pipe there are none.
    """
    kept: list[Point] = []
    try:
        with connect(socket_path, config_path) as agent:
            answer = agent.call("Usage", job=job)
            shown = client.job(answer["job"])
            if form is None and _drawn():
                kept = _told(agent, shown)
    except (NotFoundError, UnavailableError) as e:
        # No agent is no error here: jobs of `acctd run` are none of its own.
        try:
            record = _record(job, config_path)
        except NotPermittedError:
            raise e from None  # to an ordinary user, what the agent said tells more
        _show_record(record, form, config_path)
        return
    if form == "json":
        emit(msgspec.json.format(msgspec.json.encode(answer["job"]), indent=2).decode())
    elif form == "classad":
        emit(str(answer["classad"]).removesuffix("\n"))
    else:
        plots = _plots(kept, course.now(shown))
        emit("\n".join(part for part in (living(shown), plots, shortages(shown.shortages)) if part))


def _record(job: str, config_path: str | None) -> Record:
    config = configuration.load(config_path, os.environ)
    with Ledger(config.state_dir / ledger.FILE) as book:
        try:
            return book.record(job)
        except NotFoundError:
            if any(row.spec.id == job for row in book.open_jobs()):
                raise NotFoundError(
                    f"job {job!r} is still open and has no record yet; ask again when it has ended"
                ) from None
            raise


def _show_record(record: Record, form: str | None, config_path: str | None) -> None:
    if form == "json":
        emit(msgspec.json.format(msgspec.json.encode(record), indent=2).decode())
    elif form == "classad":
        emit(format_ad(record_ad(record)).removesuffix("\n"))
    else:
        plots = _plots(_kept(record, config_path), None) if _drawn() else ""
        told = shortages(record.shortages, record.shortages_dropped)
        emit("\n".join(part for part in (summary(record), plots, told) if part))


def _drawn() -> bool:
    """Whether plots can be seen."""
    return sys.stdout.isatty() and usable(sys.stdout.encoding, os.environ)


def _plots(kept: list[Point], now: Point | None) -> str:
    return course.plots(kept, now, shutil.get_terminal_size().columns, colour=coloured(os.environ))


def _told(agent: Client, job: Job) -> list[Point]:
    """A living job's samples. That there are none is no reason to keep back what it uses."""
    try:
        return msgspec.convert(agent.call("Samples", job=job.id, started=job.started)["samples"], list[Point])
    except AcctdError as e:
        say(f"acctd: {e}")
        return []


def _kept(record: Record, config_path: str | None) -> list[Point]:
    """An ended job's."""
    path = configuration.load(config_path, os.environ).state_dir / history.FILE
    try:
        return points.ended(history.kept(path, record.id, record.started), record)
    except AcctdError as e:  # also a file of a newer acctd, or another's: its account the job has all the same
        say(f"acctd: {e}")
        return []
