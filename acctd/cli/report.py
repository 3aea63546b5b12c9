"""`acctd report JOB|--user NAME|--node --html FILE`: one page for a browser and for paper, which needs nothing else."""

import os
import time
from zoneinfo import ZoneInfo

import click
from msgspec.structs import replace

from acctd.bill import Bill, Selection, Tally
from acctd.cli import billforms, billtime
from acctd.cli.asking import agent_options, complete_job, where
from acctd.cli.bill import load_config, load_tariff, of_this_node
from acctd.cli.billforms import Sheet
from acctd.cli.output import Output, say
from acctd.cli.progress import progress
from acctd.cli.reportdata import Source, source
from acctd.config import Config
from acctd.errors import NotFoundError, NotPermittedError, UsageError
from acctd.report import job as of_job
from acctd.report import period as of_period
from acctd.report.markup import Html
from acctd.report.sums import Sums
from acctd.sources.crew import Reader
from acctd.sources.looked import Key
from acctd.tariff import Tariff
from acctd.usage import nanoseconds


@click.command("report")
@click.argument("job", required=False, shell_complete=complete_job)
@click.option("--user", metavar="NAME", help="All jobs of this user.")
@click.option("--node", is_flag=True, help="All jobs of this node.")
@click.option("--since", metavar="TIME", help="From this month, day or time on. [default: this month]")
@click.option("--until", metavar="TIME", help="Up to this month, day or time, which is not in it.")
@click.option("--tariff", "tariff_path", metavar="FILE", type=click.Path(), help="Prices. [default: as configured]")
@click.option("--html", "html_path", metavar="FILE", required=True, help="Write the page there; - is standard output.")
@agent_options
def command(
    job: str | None,
    user: str | None,
    node: bool,
    since: str | None,
    until: str | None,
    tariff_path: str | None,
    html_path: str,
    socket_path: str | None,
    config_path: str | None,
) -> None:
    """Write a page about JOB, or about the jobs of a user or of this node in a period.

    Of a job it says what to ask for next time, what went wrong, how memory, CPU, network and disks were used over its
    time, and what it cost. The page is one file that loads nothing: it can be sent, kept and printed. Without a tariff
    it has quantities and no prices.

    An ordinary user gets own jobs, from the agent.
    """
    if (job is not None) + (user is not None) + node != 1:
        raise UsageError("give one of JOB, --user NAME and --node")
    if job is not None and (since or until):
        raise UsageError("--since and --until are for --user and --node; the report of a job is about all of its time")
    config = load_config(config_path)
    socket = where(socket_path, config_path)
    prices = _prices(tariff_path, config)
    zone = prices.zone if prices is not None else ZoneInfo("UTC")
    now = time.time()
    begin, end = billtime.period(since, until, zone, now)
    data = source(config, socket)
    record = data.job(job) if job is not None else None
    # Before the long work: a bad path costs none of it. Root's has what the ledger has, and nobody else may read that.
    target = Output("--html", html_path, private=os.geteuid() == 0)

    def bill(since: float, until: float, select: Selection) -> tuple[Bill | None, str]:
        """And what it rests on."""
        if prices is None:
            return None, data.looked

        def make(watched: frozenset[Key]) -> Reader:
            tally = Tally(prices, since, until, select=select)
            return Reader(tally, tally.needed_from, watched)

        with progress("reading records for the bill") as bar:
            gathered = of_this_node(config, socket, make, bar)
        reader = gathered.reader
        sheet = Sheet(reader.tally.bill(), {}, gathered.kind, gathered.places, reader.looked, gathered.own, now)
        header = dict(billforms.facts(sheet))
        return replace(sheet.bill, notes=tuple(sheet.notes)), "; ".join(
            f"{name}: {header[name]}" for name in ("records", "first", "last") if name in header
        )

    if record is not None:
        started, wall = nanoseconds(record.started) / 1e9, record.wall_ns / 1e9
        last = max(now, started + wall) if record.state == "running" else started + wall + 0.001
        made, looked = bill(started, last, Selection(job=record.id))
        points, why = data.points(record)
        subject = of_job.Subject(record=record, points=points, why_no_points=why, bill=made, looked=looked, zone=zone)
        page = of_job.job_page(subject)
    else:
        page = _period(data, user, begin, end, zone, bill(begin, end, Selection(user=user)))
    target.write(page)


def _prices(path: str | None, config: Config) -> Tariff | None:
    """None where there is no tariff, or where the usual one is none of this user's business, which is said."""
    try:
        return load_tariff(path, config)
    except NotFoundError:
        if path is not None:
            raise
    except NotPermittedError as e:
        if path is not None:
            raise
        say(f"acctd: {e}; the report has no prices")
    return None


def _period(
    data: Source, user: str | None, begin: float, end: float, zone: ZoneInfo, billed: tuple[Bill | None, str]
) -> Html:
    sums = Sums(begin, end, zone)
    with progress("adding up") as bar:
        advance = bar(0, 0)
        for number, each in enumerate(data.jobs(user, begin), 1):
            sums.add(each)
            if number % 1000 == 0:
                advance(1000, 0)
    title = f"Jobs of {user}" if user is not None else "Jobs of this node"
    made, looked = billed
    subject = of_period.Subject(
        title=title, sums=sums, bill=made, looked=looked if made is not None else data.looked, owners=user is None
    )
    return of_period.period_page(subject)
