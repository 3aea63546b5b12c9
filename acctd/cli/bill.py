"""`acctd bill`: what was used and what it costs, line by line, from this node's ledger or records of many nodes."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import click

from acctd import config as configuration
from acctd import tariff
from acctd.bill import Selection, Tally
from acctd.cli import billforms, billtime
from acctd.cli.asking import agent_options, complete_job, where
from acctd.cli.billagent import from_agent
from acctd.cli.billforms import Sheet
from acctd.cli.output import Output, emit, say
from acctd.cli.progress import progress
from acctd.cli.thisnode import ledger_or_agent, living
from acctd.client import Client
from acctd.config import Config
from acctd.errors import AcctdError, NotFoundError, NotPermittedError, UsageError
from acctd.ledger import Ledger
from acctd.sources import gather
from acctd.sources.crew import Reader
from acctd.sources.files import usage_of
from acctd.sources.gather import Begin, Gathered, Make
from acctd.sources.looked import Key
from acctd.tariff import Tariff

_FORMATS = ("table", "csv", "json", "html")


@click.command("bill")
@click.option("--job", metavar="ID", shell_complete=complete_job, help="Only this job, on all nodes.")
@click.option("--user", metavar="NAME", help="Only jobs of this user.")
@click.option("--account", metavar="NAME", help="Only jobs that this account pays for, or this user without account.")
@click.option("--tag", "tags", metavar="KEY=VALUE", multiple=True, help="Only jobs with this tag; may be given again.")
@click.option("--since", metavar="TIME", help="From this month, day or time on. [default: this month]")
@click.option(
    "--until", metavar="TIME", help="Up to this month, day or time, which is not in it. [default: next month]"
)
@click.option("--group-by", metavar="WORD,...", default="", help="user, account, class, day, job, node, month.")
@click.option("--tariff", "tariff_path", metavar="FILE", type=click.Path(), help="Prices. [default: as configured]")
@click.option(
    "--format", "form", type=click.Choice(_FORMATS), default="table", show_default=True, help="What to write."
)
@click.option("--output", metavar="FILE", help="Write there instead of standard output.")
@click.option(
    "--from",
    "sources",
    metavar="SOURCE",
    multiple=True,
    help="ledger, records DIR..., both, or influxdb://HOST:PORT?db=NAME. [default: ledger]",
)
@click.argument("directories", metavar="[DIR]...", nargs=-1, type=click.Path())
@agent_options
def command(
    job: str | None,
    user: str | None,
    account: str | None,
    tags: tuple[str, ...],
    since: str | None,
    until: str | None,
    group_by: str,
    tariff_path: str | None,
    form: str,
    output: str | None,
    sources: tuple[str, ...],
    directories: tuple[str, ...],
    socket_path: str | None,
    config_path: str | None,
) -> None:
    """Say what was used and what it costs, one line an item, so that anyone can check the sum.

    Without --from it is about this node: the records of its ledger, and the open jobs as far as they have come. An
    ordinary user gets the bill of own jobs, from the agent. With `--from records DIR...` it is about the records below
    these directories, of as many nodes as there are: lines of JSON as a [json.NAME] sink writes them or `acctd ledger
    archive` does, packed or not, and files of one record. A record that was delivered twice counts once. With `--from
    ledger --from records DIR...` it is about both: what was archived, and what came after. With `--from
    influxdb://HOST:PORT?db=NAME` the database adds up what it has.

    --since and --until take a month (2026-11), a day or a time in the tariff's timezone; what begins at --until is not
    in the bill. Tiers, allowances and minimums are those of whole months and of all jobs that a payer has, whatever is
    selected.
    """
    config = load_config(config_path)
    prices = load_tariff(tariff_path, config)
    now = time.time()
    begin, end = billtime.period(since, until, prices.zone, now)
    for option, value in (("--job", job), ("--user", user), ("--account", account)):
        if value == "":  # as of a variable that a script has not set: all jobs would be as wrong as none
            raise UsageError(f"{option} is empty; give a name, or leave it out")
    groups = tuple(word.strip() for word in group_by.split(",") if word.strip())
    select = Selection(job=job, user=user, account=account, tags=_tags(tags))

    def make(watched: frozenset[Key]) -> Reader:
        tally = Tally(prices, begin, end, select=select, group_by=groups)
        return Reader(tally, tally.needed_from, watched)

    make(frozenset())  # what is wrong with the question is said before anything is opened
    target = Output("--output", output) if output is not None else None
    path = where(socket_path, config_path)
    database, of_ledger, places = _places(sources, directories)
    with progress("reading records") as bar:
        if database is not None:
            from acctd.sources.influx import Question, from_database  # urllib3, which takes its time to load

            gathered = from_database(database, Question(select, groups, begin, end), make, bar, os.environ)
        elif of_ledger:
            gathered = of_this_node(config, path, make, bar, directories=places, partly=False)
        else:
            gathered = gather.from_files(places, make, bar)
    looked = gathered.reader.looked
    for sentence in (*looked.told, *looked.torn):
        say(f"acctd: {sentence}")
    chosen = {"job": job, "user": user, "account": account, "tag": ", ".join(tags)}
    sheet = Sheet(
        bill=gathered.reader.tally.bill(),
        selection={name: value for name, value in chosen.items() if value},
        kind=gathered.kind,
        places=gathered.places,
        looked=looked,
        own=gathered.own,
        asked=now,
    )
    text = _written(sheet, form, terminal=billforms.on_terminal(output))
    if target is not None:
        target.write(f"{text}\n")
    else:
        emit(text)
    if looked.broken:
        raise AcctdError(
            f"{billforms.so_many_lines(looked.broken)} could not be read and are not in the bill; mend or remove them"
        )
    if torn := len(looked.torn):
        what = "1 packed file" if torn == 1 else f"{torn} packed files"
        raise AcctdError(f"{what} could not be read to the end; restore or remove what is named")


def load_config(path: str | None) -> Config:
    """The configuration, for commands that an ordinary user may give too."""
    try:
        return configuration.load(path, os.environ)
    except NotPermittedError as e:
        # As for the agent's socket: an ordinary user need not be able to read root's configuration.
        default, _ = configuration.parse("", None)
        if default is None:
            raise
        # Root's bill may have other prices, and nothing but the tariff's digest would tell.
        say(f"acctd: {e}; without --tariff the prices are those of {default.tariff}")
        return default


def load_tariff(path: str | None, config: Config) -> Tariff:
    """The tariff as given, else as configured. Raises NotFoundError, ConfigError."""
    try:
        return tariff.load(path or str(config.tariff))
    except NotFoundError:
        if path is not None:
            raise
        raise NotFoundError(
            f"there is no tariff {config.tariff}; write one like tariffs/example.toml, or give --tariff"
        ) from None


def _tags(texts: tuple[str, ...]) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UsageError(f"--tag {text!r} is not usable; write it like account=physics")
        if found.setdefault(key.lower(), value) != value:
            raise UsageError(f"--tag {key} is given with two values, and a job has one; leave one out")
    return found


def _places(sources: tuple[str, ...], directories: tuple[str, ...]) -> tuple[str | None, bool, list[Path]]:
    """A database's URL; whether the ledger is meant; directories. Raises UsageError."""
    databases = [source for source in sources if "://" in source]
    records = list(map(Path, directories))
    other = [source for source in sources if "://" not in source and source not in ("ledger", "records")]
    if other:
        raise UsageError(
            f"--from {other[0]!r} is none; write --from ledger, --from records DIR..., or "
            "--from influxdb://HOST:PORT?db=NAME"
        )
    if directories and "records" not in sources:
        raise UsageError(f"{directories[0]!r} belongs to nothing; write --from records before directories")
    if databases and len(sources) > 1:
        raise UsageError("--from names a database and something else; take one source, else records would count twice")
    if len(sources) > sources.count("ledger") and not databases and not records:
        raise UsageError("--from records has no directory; name at least one")
    return databases[0] if databases else None, "ledger" in sources or not sources, records


def of_this_node(
    config: Config,
    socket: Path,
    make: Make,
    begin: Begin,
    *,
    directories: Sequence[Path] = (),
    partly: bool = True,
) -> Gathered:
    """From the ledger where it may be read, and from directories; else what the agent tells.

    Raises AcctdError where the ledger's records of the period were archived; with `partly` that is only told.
    """
    path = ledger_or_agent(config, socket)
    if path is not None:
        with Ledger(path) as book:
            open_jobs = [usage_of(body) for body in living(book, socket)]
        return gather.from_ledger(path, open_jobs, make, begin, directories=directories, partly=partly)
    if directories:
        raise NotPermittedError(f"the ledger in {config.state_dir} is not yours to read beside files; run as root")
    with Client(socket) as agent:
        return from_agent(agent, socket, make, begin)


def _written(sheet: Sheet, form: str, *, terminal: bool) -> str:
    def page() -> str:
        from acctd.cli.billpage import html_text  # nobody else needs it

        return html_text(sheet).removesuffix("\n")

    forms: dict[str, Callable[[], str]] = {
        "table": lambda: billforms.table(sheet, terminal=terminal),
        "csv": lambda: billforms.csv_text(sheet),
        "json": lambda: billforms.json_text(sheet),
        "html": page,
    }
    return forms[form]()
