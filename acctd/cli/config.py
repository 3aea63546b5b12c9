"""`acctd config`: is the configuration file right? Reads the file; asks neither the agent nor the kernel."""

import os

import click

from acctd.cli.output import emit
from acctd.config import check as check_file
from acctd.errors import ConfigError


@click.group("config")
def command() -> None:
    """The configuration file."""


@command.command("check")
@click.option(
    "--config", "path", metavar="FILE", help="The file to check. [default: $ACCTD_CONFIG, /etc/acctd/acctd.toml]"
)
@click.pass_context
def check(context: click.Context, path: str | None) -> None:
    """Say "ok", or every mistake in the file, one a line, and exit with 78."""
    name, loaded, mistakes = check_file(path, os.environ)
    if loaded is None:
        for mistake in mistakes:
            emit(f"{name}: {mistake}")
        context.exit(ConfigError.exit_code)
    emit(f"{name}: ok" if loaded.file else f"{name}: ok (there is no such file, so all is default)")
