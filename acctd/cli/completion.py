"""Shell completion: writes the files of completions/ anew, which click makes for each shell. Not part of any command.

    python -m acctd.cli.completion completions

The files only call `acctd` with _ACCTD_COMPLETE set, which main.py's click group answers, so that they need no change
when a command gets an option. A test holds them against what click makes now.
"""

import sys
from pathlib import Path

from click.shell_completion import get_completion_class

from acctd.cli.main import acctd

FILES = {"bash": "acctd.bash", "zsh": "_acctd", "fish": "acctd.fish"}
"""Shell -> file, named as the shells look for them."""

_CALLED = "if [[ $zsh_eval_context[-1] == loadautofunc ]]; then"
_CALLED_AGAIN = 'if [[ "$funcstack[1]" == _acctd ]]; then'
"""How the zsh file knows that it is called, and not sourced. Click's way holds for the first call of a session alone:
the second would complete nothing."""


def text(shell: str) -> str:
    """What one shell is to read."""
    kind = get_completion_class(shell)
    if kind is None:
        raise ValueError(f"click knows no completion for {shell}")
    # The template alone: source() would also start the shell to ask for its version.
    maker = kind(acctd, {}, "acctd", "_ACCTD_COMPLETE")
    made = (maker.source_template % maker.source_vars()).strip() + "\n"
    return made.replace(_CALLED, _CALLED_AGAIN)


def write(directory: Path) -> None:
    """Write all files."""
    directory.mkdir(parents=True, exist_ok=True)
    for shell, name in FILES.items():
        (directory / name).write_text(text(shell))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
