"""`acctd events`: what happened on this node, from the ledger, and with --follow what happens from now on.

Numbers only grow, so the two join without a gap and without a repetition, also when the agent is started anew.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec

from acctd import client
from acctd.cli.asking import agent_options, complete_job, where
from acctd.cli.output import emit, say
from acctd.cli.table import clean
from acctd.client import Client, Event
from acctd.errors import UnavailableError

ANSWER = 1000
"""Events in one answer, at most; the agent gives the newest."""

_RETRY = 0.5  # s between two attempts to reach an agent that went away


@click.command("events")
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens from now on, until interrupted.")
@click.option("--job", metavar="ID", shell_complete=complete_job, help="Of this job only.")
@click.option("--since", metavar="NUMBER", type=click.IntRange(min=0), help="Only events after this number.")
@click.option(
    "-n",
    "--limit",
    metavar="N",
    type=click.IntRange(1, ANSWER),
    help=f"At most N, {ANSWER} at most: the newest, or with --since the first. [default: 20; with --since all]",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@agent_options
def command(
    follow: bool,
    job: str | None,
    since: int | None,
    limit: int | None,
    as_json: bool,
    socket_path: str | None,
    config_path: str | None,
) -> None:
    """List what happened to jobs and to the agent, the oldest first.

    Each line has the event's number, the time, the job (- is the agent itself), what it was, and a few words. Numbers
    only grow: --since with the last one seen goes on where you were. Root sees all events, another user those of own
    jobs. With -f an agent that is started anew is waited for, and what it did meanwhile is listed too.
    """
    path = where(socket_path, config_path)
    log = Log(path, job)
    wanted = limit if limit is not None or since is not None else 20
    for event in log.follow(since, wanted) if follow else log.past(since, wanted):
        emit(msgspec.json.encode(event).decode() if as_json else line(event))


def line(event: Event) -> str:
    """One event for a person."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time))
    return f"{event.number:>6}  {stamp}  {event.job or '-':<12}  {event.event:<10}  {clean(event.text)}".rstrip()


class Log:
    """The agent's events, of one job if it is named."""

    def __init__(self, path: Path, job: str | None) -> None:
        self._path, self._job = path, job

    def past(self, since: int | None = None, limit: int | None = None) -> list[Event]:
        """What the ledger has, the oldest first: all after a number, or the newest."""
        events: list[Event] = []
        with Client(self._path) as agent:
            while True:
                wanted = {"since": since, "job": self._job, "limit": limit}
                answer = agent.call("Events", **{name: value for name, value in wanted.items() if value is not None})
                page = [client.event(event) for event in answer["events"]]
                events += page
                if since is None or limit is not None or len(page) < ANSWER:
                    return events
                since = page[-1].number

    def follow(self, since: int | None, limit: int | None) -> Iterator[Event]:
        """What the ledger has, then what happens, for ever; each event once.

        Raises UnavailableError where no agent answers at first; one that goes away later is waited for.
        """
        last, heard = since or 0, False
        while True:
            try:
                with Client(self._path) as agent:
                    # Asked for before the ledger is: what happens in between is in both, and not in neither.
                    news = agent.stream("Watch")
                    for event in self.past(last) if heard else self.past(since, limit):
                        last = event.number
                        yield event
                    heard = True
                    for event in self._of_job(news):
                        # What lies between may be another's, or it happened before we were heard, or was dropped while
                        # our reader slept: the ledger knows.
                        missed = self.past(last) if event.number > last + 1 else []
                        for each in (*missed, event):
                            if each.number > last:
                                last = each.number
                                yield each
            except UnavailableError as e:
                if not heard:
                    raise
                say(f"acctd: {e}; waiting for it")
            self._wait()

    def _of_job(self, news: Iterator[dict[str, object]]) -> Iterator[Event]:
        for reply in news:
            event = client.event(reply["event"])
            if self._job in (None, event.job):
                yield event

    def _wait(self) -> None:
        """Until an agent answers."""
        while True:
            time.sleep(_RETRY)
            try:
                with Client(self._path):
                    return
            except UnavailableError:
                continue
