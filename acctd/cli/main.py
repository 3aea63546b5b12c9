"""The `acctd` command: finds the subcommand, loads that one alone, turns errors into a sentence and an exit code."""

import importlib
import os
import sys
from typing import Any

import click

from acctd import __version__
from acctd.cli.output import say
from acctd.errors import AcctdError, UsageError

_COMMANDS = {
    "config": "Check the configuration.",
    "doctor": "Say what this host can do, and what to do about what it cannot.",
    "ls": "List open jobs and records.",
    "serve": "Run the node agent.",
    "run": "Run a command as a job and account for it.",
    "show": "Show a job's record.",
}


class _Lazy(click.Group):
    """Subcommands by name; each lives in a module of the same name and is imported when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"acctd.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def acctd() -> None:
    """The accounting agent of a batch worker node: what a job used, exact to the byte."""


def main(argv: list[str] | None = None) -> Any:
    """Entry point. Exit codes: those of the command that `run` ran; else sysexits.h (docs/exit-codes.md)."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            # Closed by the caller: the next file opened would take its place, and get what is meant for a person.
            os.open(os.devnull, os.O_RDWR)
    try:
        sys.exit(acctd.main(argv, prog_name="acctd", standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as e:
        e.show()
        sys.exit(UsageError.exit_code)
    except click.ClickException as e:
        say(f"acctd: {e.format_message()}")
        sys.exit(UsageError.exit_code)
    except click.Abort:
        sys.exit(130)
    except AcctdError as e:
        say(f"acctd: {e}")
        sys.exit(e.exit_code)
