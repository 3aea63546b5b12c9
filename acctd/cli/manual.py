"""The manual pages, made from the commands themselves and from the hook's own usage text. Not part of any command.

    python -m acctd.cli.manual DIRECTORY

One page a command: acctd(1), acctd-SUBCOMMAND(1), acctd-hook(1). Roff by the macros of man(7), nothing else. What the
pages say stands in the commands' help, and below.
"""

import contextlib
import inspect
import io
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from acctd import __version__, hook
from acctd.cli.main import acctd

CODES = {
    0: "Done.",
    64: "The request makes no sense: an id, limit, class or tag that cannot be, an unknown option.",
    66: "What was named does not exist: a job, a user, a file.",
    69: "No agent answers, or this host lacks what is needed; see acctd-doctor(1).",
    70: "A file cannot be used, or acctd itself failed.",
    71: "The kernel refused a change, or processes do not die.",
    73: "Something the job needs is taken, such as its id.",
    74: "The ledger cannot be read or written.",
    75: "Nothing is free at the moment. Trying later may help.",
    77: "The caller may not do this.",
    78: "The configuration is wrong; see acctd-config-check(1).",
    130: "Interrupted.",
    141: "Whoever read the output closed it.",
}
"""What the exit codes mean, those of errors.py among them, in fewer words than docs/exit-codes.md."""

_COMMANDS_CODES = [
    ("1-255", "The command's own exit status."),
    ("128+n", "The command was ended by signal n."),
    ("126", "The command was found and cannot be executed."),
    ("127", "The command was not found."),
]
"""What `acctd run` exits with beside them."""

_ENVIRONMENT = [
    ("ACCTD_CONFIG", "The configuration file, where no option names one."),
    ("ACCTD_SOCKET", "The agent's socket, where no option names one."),
    ("NO_COLOR", "If set to anything, tables have no colours."),
]

_FILES = [
    ("/etc/acctd/acctd.toml", "The configuration."),
    ("/run/acctd/acctd.sock", "The agent's socket, if the configuration says no other."),
]


def pages() -> dict[str, str]:
    """File name -> text, of every page."""
    found = {"acctd-hook.1": _hook_page()}
    contexts = list(_commands(click.Context(acctd, info_name="acctd", **acctd.context_settings)))
    names = sorted([_page_name(context) for context in contexts] + ["acctd-hook"])
    for context in contexts:
        found[f"{_page_name(context)}.1"] = _page(context, names)
    return found


def write(directory: Path) -> None:
    """Write all pages."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (directory / name).write_text(text)


def _commands(context: click.Context) -> Iterator[click.Context]:
    """A command and those below it."""
    yield context
    if isinstance(context.command, click.Group):
        for name in context.command.list_commands(context):
            command = context.command.get_command(context, name)
            if command is not None:
                yield from _commands(click.Context(command, info_name=name, parent=context))


def _page_name(context: click.Context) -> str:
    return context.command_path.replace(" ", "-")


def _page(context: click.Context, names: Sequence[str]) -> str:
    command = context.command
    first, *rest = _paragraphs(command.help or "")
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [*_head(_page_name(context), first), *_synopsis(context.command_path, usage)]
    lines += _section("DESCRIPTION", [first, *rest])
    if isinstance(command, click.Group):
        below = [(name, command.get_command(context, name)) for name in command.list_commands(context)]
        entries = [(name, _paragraphs(found.help or "")[0]) for name, found in below if found]
        lines += _list("COMMANDS", entries)
    options = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    # An argument has no help of its own: the description says what it is.
    lines += _list("OPTIONS", [record for record in options if record is not None and record[1]])
    lines += _list("EXIT STATUS", _codes(_COMMANDS_CODES if _page_name(context) == "acctd-run" else []))
    lines += _list("ENVIRONMENT", _ENVIRONMENT)
    lines += _list("FILES", _FILES)
    others = [name for name in names if name != _page_name(context)]
    lines += [".SH SEE ALSO", " ,\n".join(f".BR {_escaped(name)} (1)" for name in others)]
    return "\n".join(lines) + "\n"


def _hook_page() -> str:
    """The hook has no click: its page is what it says when asked for help, and the first words of its module."""
    title = _paragraphs(hook.__doc__ or "")[0].removeprefix("acctd-hook: ")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        hook.run(["--help"])
    synopsis, _, verbs = said.getvalue().removeprefix("usage: ").partition("\n")
    lines = [*_head("acctd-hook", title), ".SH SYNOPSIS", *_filled(synopsis)]
    lines += _section("DESCRIPTION", [title[:1].upper() + title[1:], f"\b\n{inspect.cleandoc(verbs)}"])
    lines += _list("EXIT STATUS", _codes([]))
    lines += _list("ENVIRONMENT", [entry for entry in _ENVIRONMENT if entry[0] == "ACCTD_SOCKET"])
    lines += [".SH SEE ALSO", ".BR acctd (1)"]
    return "\n".join(lines) + "\n"


def _head(name: str, what: str) -> list[str]:
    # As reproducible-builds.org has it: who packages the pages says of which day they are.
    day = time.strftime("%Y-%m-%d", time.gmtime(float(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))
    title = f'.TH {_escaped(name.upper())} 1 {day} "acctd {__version__}" "acctd"'
    short = re.split(r"[.:;]( |$)", what)[0]  # one line, for whatis(1)
    return [title, ".SH NAME", f"{_escaped(name)} \\- {_escaped(short[:1].lower() + short[1:])}"]


def _synopsis(path: str, usage: str) -> list[str]:
    return [".SH SYNOPSIS", f".B {_escaped(path)}", _escaped(usage)]


def _section(title: str, paragraphs: Sequence[str]) -> list[str]:
    lines = [f".SH {title}"]
    for number, text in enumerate(paragraphs):
        if number:
            lines.append(".PP")
        if text.startswith("\b"):
            # A blank line is a fault in roff.
            lines += [".nf", *(_escaped(line) if line.strip() else ".sp" for line in text.splitlines()[1:]), ".fi"]
        else:
            lines += _filled(text)
    return lines


def _list(title: str, entries: Sequence[tuple[str, str]]) -> list[str]:
    lines = [f".SH {title}"]
    for term, text in entries:
        lines += [".TP", f".B {_escaped(term)}", *_filled(text)]
    return lines


def _codes(own: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [*own, *((str(code), text) for code, text in CODES.items())]


def _paragraphs(text: str) -> list[str]:
    r"""The paragraphs of a docstring, each on one line; one that starts with \b is verbatim, as click has it."""
    found = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        verbatim = block.startswith("\b") or all(line.startswith("    ") for line in block.splitlines())
        found.append(block if block.startswith("\b") else f"\b\n{block}" if verbatim else " ".join(block.split()))
    return found


def _filled(text: str) -> list[str]:
    """One sentence a line, as roff wants it."""
    return [_escaped(part) for part in re.split(r"(?<=[.!?]) +(?=[A-Z])", " ".join(text.split()))]


def _escaped(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "\\(ga").replace("^", "\\(ha")
    text = text.replace("~", "\\(ti")
    return f"\\&{text}" if text.startswith((".", "'")) else text


if __name__ == "__main__":
    write(Path(sys.argv[1]))
