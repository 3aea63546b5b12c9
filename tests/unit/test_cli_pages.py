"""Completion files and manual pages: made from the commands, current, and whole."""

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from acctd import errors
from acctd.cli import main as cli
from acctd.cli import manual
from acctd.cli.completion import FILES, text
from acctd.cli.main import acctd
from acctd.errors import AcctdError

REPO = Path(__file__).parents[2]


def tool(name: str) -> str:
    """A program that tools/system-packages installs where there is apt-get."""
    found = shutil.which(name)
    if found is None:
        if shutil.which("apt-get"):
            pytest.fail(f"{name} is missing; run tools/system-packages")
        pytest.skip(f"{name} is not installed, and cannot be by apt-get")
    return found


@pytest.mark.parametrize("shell", FILES)
def test_the_completion_files_are_current(shell: str) -> None:
    assert (REPO / "completions" / FILES[shell]).read_text() == text(shell), (
        "run: python -m acctd.cli.completion completions"
    )


def test_zsh_completes_more_than_once_in_a_session() -> None:
    assert "zsh_eval_context" not in text("zsh"), "click's template has changed: see completion.py"
    assert 'if [[ "$funcstack[1]" == _acctd ]]' in text("zsh")


def test_the_names_of_commands_are_completed_without_loading_any() -> None:
    script = "import sys; from acctd.cli.main import main\ntry: main([])\nfinally: print(sorted(sys.modules))"
    environ = {**os.environ, "_ACCTD_COMPLETE": "bash_complete", "COMP_WORDS": "acctd s", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environ, cwd=REPO, capture_output=True, text=True, timeout=60
    )
    *offered, modules = done.stdout.splitlines()
    assert offered == ["plain,serve", "plain,show", "plain,sinks", "plain,suspend"]
    assert "'acctd.cli.main'" in modules
    for heavy in ("acctd.agent", "acctd.cli.show", "asyncio", "rich", "msgspec"):
        assert f"'{heavy}'" not in modules


@pytest.mark.parametrize("arguments", [["ps", "--help"], ["top", "--help"]])
def test_rich_is_not_loaded_before_it_is_needed(arguments: list[str]) -> None:
    script = (
        f"import sys; from acctd.cli.main import main\ntry: main({arguments})\nfinally: print('rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False"


def test_every_command_has_a_page_and_every_page_is_whole(tmp_path: Path) -> None:
    manual.write(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    inner = {f"ledger-{name}" for name in ("archive", "size", "vacuum", "verify")} | {"config-check"}
    assert names == {"acctd.1", "acctd-hook.1"} | {f"acctd-{name}.1" for name in (*cli._COMMANDS, *inner)}
    lint = subprocess.run(
        [tool("mandoc"), "-T", "lint", "-W", "warning", *sorted(tmp_path.iterdir())], capture_output=True, text=True
    )
    assert (lint.returncode, lint.stdout, lint.stderr) == (0, "", "")
    for page in tmp_path.iterdir():
        done = subprocess.run([tool("groff"), "-man", "-ww", "-z", str(page)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), page.name


def rendered(page: str) -> str:
    done = subprocess.run(
        [tool("mandoc"), "-T", "ascii", "-O", "width=100"], input=page, capture_output=True, text=True, check=True
    )
    return re.sub(".\b", "", done.stdout)


def test_a_page_says_what_the_help_says() -> None:
    pages = manual.pages()
    for name in cli._COMMANDS:
        context = acctd.make_context("acctd", [], resilient_parsing=True)
        command = acctd.get_command(context, name)
        assert command is not None
        shown = " ".join(rendered(pages[f"acctd-{name}.1"]).split())
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert all(option in shown for option in parameter.opts), (name, parameter.opts)
                assert " ".join((parameter.help or "").split()) in shown
        first = (command.help or "").split("\n\n")[0]
        assert " ".join(first.split()) in shown
    assert "acctd-hook [--socket PATH] VERB" in rendered(pages["acctd-hook.1"])


def test_the_pages_know_every_exit_code() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, AcctdError)]
    assert {kind.exit_code for kind in kinds} <= manual.CODES.keys()


def test_a_packager_chooses_the_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert manual.pages()["acctd-ps.1"].startswith('.TH ACCTD\\-PS 1 1970-01-01 "acctd ')
