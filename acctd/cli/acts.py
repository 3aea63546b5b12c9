"""`acctd kill`, `suspend`, `continue` and `reload`: what an admin does to jobs, done by the agent."""

from collections.abc import Callable

import click

from acctd.cli.asking import agent_options, connect, jobs_argument
from acctd.cli.output import say
from acctd.client import Client
from acctd.errors import AcctdError, KernelRefusedError


@click.command("kill")
@jobs_argument
@agent_options
def kill(jobs: tuple[str, ...], socket_path: str | None, config_path: str | None) -> int:
    """End every process of each JOB, its families' too.

    They get SIGKILL. The job itself stays open until its starter finishes it. Processes that do not die within ten
    seconds are named, and the exit code is then 71. One line for each job that could not be ended; the others are.
    """
    return _each(jobs, socket_path, config_path, _kill)


@click.command("suspend")
@jobs_argument
@agent_options
def suspend(jobs: tuple[str, ...], socket_path: str | None, config_path: str | None) -> int:
    """Stop every process of each JOB where it is, until acctd continue.

    They do not notice; no signal is sent. Wall time goes on.
    """
    return _each(jobs, socket_path, config_path, lambda agent, job: agent.call("Suspend", job=job))


@click.command("continue")
@jobs_argument
@agent_options
def continue_(jobs: tuple[str, ...], socket_path: str | None, config_path: str | None) -> int:
    """Let every process of each suspended JOB go on."""
    return _each(jobs, socket_path, config_path, lambda agent, job: agent.call("Continue", job=job))


@click.command("reload")
@agent_options
def reload(socket_path: str | None, config_path: str | None) -> None:
    """Have the agent read its configuration again.

    No job is disturbed, and what jobs were made with stays theirs. A file with a mistake changes nothing, and the
    mistake is told here.
    """
    with connect(socket_path, config_path) as agent:
        agent.call("Reload")


def _kill(agent: Client, job: str) -> None:
    if survivors := agent.call("Kill", job=job)["survivors"]:
        listed = ", ".join(map(str, survivors))
        raise KernelRefusedError(f"job {job!r}: processes {listed} do not die on SIGKILL; see /proc/PID/stack for why")


def _each(
    jobs: tuple[str, ...], socket_path: str | None, config_path: str | None, act: Callable[[Client, str], object]
) -> int:
    """Act on each job; one that cannot be acted on is told of and does not stop the others. The highest exit code."""
    code = 0
    with connect(socket_path, config_path) as agent:
        for job in dict.fromkeys(jobs):
            try:
                act(agent, job)
            except AcctdError as e:
                say(f"acctd: {e}")
                code = max(code, e.exit_code)
    return code
