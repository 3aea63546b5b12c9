"""The benchmarks run, print their tables and leave nothing behind. No time is judged here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from acctd.cgroup.layout import discover

REPO = Path(__file__).parents[2]
NUMBER = re.compile(r"\d+(\.\d+)?( \(\d+(\.\d+)?\))?\Z")


@pytest.mark.parametrize(
    ("module", "rows"),
    [
        ("lifecycle", ["ledger: sign off", "pipe: make", "0", "2"]),
        ("poll", ["idle", "busy"]),
        ("chains", ["nftables: acctd, same", "nftables: nft -j list ruleset", "iptables: ip(6)tables-legacy-save -c"]),
        ("agent", ["acctd", "psutil", "C, the agent's files", "ticks back to back", "Usage, fresh connection"]),
        ("hook", ["python3 -c pass", "acctd-hook usage", "the agent's part"]),
        ("storm", ["nftables, acctd-hook", "nftables, socket", "iptables, acctd-hook", "iptables, socket"]),
        (
            "oom",
            [
                "C program, 0 standing",
                "hold, 0 standing",
                "kill, 2 standing",
                "hold, 2 standing, ticks back to back, goal",
            ],
        ),
        ("bombs", ["pids limit 200", "no pids limit"]),
        ("sinks", ["no sink", "takes everything", "drops each connection"]),
        ("bill", ["acctd bill", "DuckDB, plain sum", "acctd bill, the year", "SQLite, plain sum"]),
    ],
)
def test_a_quick_run_prints_its_table(module, rows):
    process = subprocess.Popen(
        [sys.executable, "-m", f"bench.{module}", "--quick"],
        cwd=REPO, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err == ""
    printed = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line[:1] == "|"]
    numbers = {cells[0]: cells[1:] for cells in printed if not cells[0].startswith(("-", "step", "standing"))}
    for row in rows:
        assert row in numbers, out
        assert all(NUMBER.match(cell) for cell in numbers[row]), out
    assert _left(process.pid) == []


def _left(pid: int) -> list[str]:
    """What the benchmark of this pid has made and not removed: cgroups and namespaces bear its pid in their names."""
    cgroups = [entry for h in discover().hierarchies for entry in os.listdir(h.top.path) if f"bench-{pid}-" in entry]
    return cgroups + [entry for entry in os.listdir("/run/netns") if f"-{pid}-" in entry]
