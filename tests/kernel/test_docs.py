"""The examples of the README and of docs/, run as they stand: each line of a console block must exit 0.

A line that ends in `# exits N` must exit N.
"""

import os
import re
import sys
from pathlib import Path

import pytest

from tests.kernel.conftest import REPO, Node

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]


def examples(page: Path) -> list[str]:
    blocks = re.findall(r"^```console\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.name)
def test_examples_of(page: Path, node: Node) -> None:
    binaries = node.directory / "bin"
    binaries.mkdir()
    for name, module in (("acctd", "acctd"), ("acctd-hook", "acctd.hook")):
        command = binaries / name
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        command.chmod(0o755)
    if not any("poll_interval" in line for line in examples(page)):
        # Some examples wait for the next tick, and show no less if it comes soon.
        node.config.write_text("poll_interval = 0.5\n" + node.config.read_text())
    socket = str(node.directory / "run" / "s")
    environ = {**node.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "ACCTD_SOCKET": socket}
    for line in examples(page):
        wanted = re.search(r"# exits (\d+)$", line)
        done = node.topology.run(
            node.topology.node,
            ["sh", "-c", line],
            env=environ,
            cwd=node.directory,
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == int(wanted[1] if wanted else 0), f"{page.name}: {line}\n{done.stdout}{done.stderr}"


def test_there_are_examples() -> None:
    assert sum(len(examples(page)) for page in PAGES) >= 15
