"""`acctd limit JOB`: other limits for a job that is there, set by the agent."""

import click

from acctd.cli.asking import agent_options, complete_job, connect
from acctd.cli.options import limit_options, limits_given
from acctd.cli.output import emit
from acctd.errors import UsageError


@click.command("limit")
@click.argument("job", shell_complete=complete_job)
@limit_options
@click.option("--reclaim", is_flag=True, help="Where more is in use, have the kernel make room first.")
@agent_options
def command(job: str, reclaim: bool, socket_path: str | None, config_path: str | None, **limits: str | None) -> None:
    """Change the limits of JOB, and print what is in force then.

    Those not named stay as they are; the value none takes a limit away. A memory limit below what is in use is refused,
    with how much of that is page cache; with --reclaim the kernel drops cache and swaps out first, and it is refused
    only if that does not do. Nothing of the job is killed for it.
    """
    changed = limits_given(limits)
    if not changed:
        raise UsageError("limit changes nothing: name a limit, such as --memory 2G, or none to take it away")
    with connect(socket_path, config_path) as agent:
        answer = agent.call("SetLimits", job=job, limits=changed, reclaim=reclaim)["limits"]
    emit("\n".join(f"{name} {value}" for name, value in answer.items() if value is not None))
