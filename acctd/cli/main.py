"""The `acctd` command: finds the subcommand, loads that one alone, turns errors into a sentence and an exit code."""

import importlib
import os
import sys
from typing import Any

import click
from click.shell_completion import CompletionItem

from acctd import __version__
from acctd.cli.output import say
from acctd.errors import AcctdError, UsageError

_COMMANDS = {
    "bill": "Say what was used and what it costs.",
    "config": "Check the configuration.",
    "continue": "Let suspended jobs go on.",
    "doctor": "Say what this host can do, and what to do about what it cannot.",
    "events": "List what happened, and follow what happens.",
    "export": "Deliver what the agent leaves to databases and scrapers.",
    "kill": "End all processes of jobs.",
    "ledger": "Show, verify, archive and vacuum the ledger.",
    "limit": "Change the limits of a job.",
    "ls": "List open jobs and records.",
    "ps": "List the open jobs and what they have used so far.",
    "reload": "Have the agent read its configuration again.",
    "report": "Write a page about a job, a user or the node.",
    "run": "Run a command as a job and account for it.",
    "serve": "Run the node agent.",
    "show": "Show what a job uses, or its record.",
    "sinks": "Show how far the sinks of acctd export are.",
    "suspend": "Stop all processes of jobs for a while.",
    "top": "Show what jobs use now, refreshed.",
    "usage-records": "Write records for a grid's accounting.",
}

_SHARED = {name: ("acts", name) for name in ("kill", "reload", "suspend")} | {"continue": ("acts", "continue_")}
"""Commands that share a module, and their names in it."""


class _Lazy(click.Group):
    """Subcommands by name; most live in a module of the same name. They are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, name = _SHARED.get(cmd_name, (cmd_name, "command"))
        command: click.Command = getattr(importlib.import_module(f"acctd.cli.{module.replace('-', '')}"), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """As click does it, without importing every command for its help."""
        named = [CompletionItem(name, help=text) for name, text in _COMMANDS.items() if name.startswith(incomplete)]
        return named + click.Command.shell_complete(self, ctx, incomplete)


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
