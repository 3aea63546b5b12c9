"""What the commands that ask the agent have in common: where it is, the JOB argument, and all jobs as of this moment.

Shell completion runs through here at every press of a key, so nothing heavy is imported.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from acctd import client
from acctd import config as configuration
from acctd.client import Client, Job
from acctd.errors import AcctdError, NotFoundError, NotPermittedError

_COMPLETION_TIMEOUT = 1.0  # s; nobody waits longer for a key

_Command = TypeVar("_Command", bound=Callable[..., Any])


def agent_options(command: _Command) -> _Command:
    """Adds --socket and --config; the command gets them as `socket_path` and `config_path`."""
    command = click.option("--config", "config_path", metavar="FILE", type=click.Path(), help="Configuration file.")(
        command
    )
    return click.option(
        "--socket",
        "socket_path",
        metavar="PATH",
        type=click.Path(),
        envvar="ACCTD_SOCKET",
        help="The agent's socket. [default: $ACCTD_SOCKET, then the configuration's]",
    )(command)


def connect(socket_path: str | None, config_path: str | None, *, timeout: float = client.TIMEOUT) -> Client:
    """A connection to the node's agent. Raises UnavailableError where none answers."""
    return Client(where(socket_path, config_path), timeout=timeout)


def where(socket_path: str | None, config_path: str | None) -> Path:
    """The agent's socket: as given, else as configured."""
    if socket_path:
        return Path(socket_path)
    try:
        return configuration.load(config_path, os.environ).socket
    except NotPermittedError:
        # An ordinary user need not be able to read root's configuration; the agent is where it is by default.
        default, _ = configuration.parse("", None)
        if default is None:
            raise
        return default.socket


def complete_job(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The open jobs that begin so; none where no agent answers, since a key press is no place to complain."""
    options = context.params
    try:
        with connect(
            options.get("socket_path") or os.environ.get("ACCTD_SOCKET"),
            options.get("config_path"),
            timeout=_COMPLETION_TIMEOUT,
        ) as agent:
            jobs = [client.job(answer) for answer in agent.call("List")["jobs"]]
    except AcctdError:
        return []
    return [
        CompletionItem(job.id, help=f"{job.phase}, of {job.owner}") for job in jobs if job.id.startswith(incomplete)
    ]


def no_color_option(command: _Command) -> _Command:
    """Adds --no-color, which is NO_COLOR for one call: whoever colours something looks at that anyway."""

    def note(_context: click.Context, _parameter: click.Parameter, given: bool) -> None:
        if given:
            os.environ["NO_COLOR"] = "1"

    return click.option(
        "--no-color", is_flag=True, expose_value=False, callback=note, help="No colours. [default: as NO_COLOR says]"
    )(command)


def jobs_argument(command: _Command) -> _Command:
    """Adds JOB..., at least one; the command gets them as `jobs`."""
    return click.argument("jobs", metavar="JOB...", nargs=-1, required=True, shell_complete=complete_job)(command)


def all_now(agent: Client) -> list[dict[str, Any]]:
    """Every job the caller may see, those it may read as of this moment, as the agent tells them.

    Root has all read at once, which costs the agent one tick. Others ask for each job of their own.
    """
    try:
        agent.call("Snapshot")
    except NotPermittedError:
        found = []
        for answer in agent.call("List")["jobs"]:
            try:
                found.append(agent.call("Usage", job=answer["id"])["job"] if readable(client.job(answer)) else answer)
            except NotFoundError:
                continue  # ended since it was listed
        return found
    jobs: list[dict[str, Any]] = agent.call("List")["jobs"]
    return jobs


def readable(job: Job) -> bool:
    """Whether the caller may read a job's totals, and not only see that it is there."""
    return bool(job.totals) or os.geteuid() in (0, job.uid)
