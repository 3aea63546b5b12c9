"""What runs in which guest: the files of tests/vm/inside that each cgroup layout gets, and their tests by name.

The division spreads what is independent of the layout (the two netfilter back ends) over the guests.
"""

import ast
from pathlib import Path

INSIDE = Path(__file__).with_name("inside")

LANES: dict[str, tuple[str, ...]] = {
    "systemd": ("inside_hardened.py", "inside_systemd.py", "inside_rebooted.py"),
    "v2": (
        "inside_v2.py",
        "inside_any.py",
        "inside_nat.py",
        "inside_limits.py",
        "inside_soft.py",
        "inside_killing.py",
        "inside_isolation.py",
        "inside_oom.py",
    ),
    "joined": ("inside_any.py", "inside_nat.py", "inside_soft.py", "inside_killing.py", "inside_oom.py"),
    "single": ("inside_any.py",),
    "divided": ("inside_any.py", "inside_nfs.py"),
    "numa": ("inside_cpus.py",),
}
"""The longest first: several run at a time."""

BACKENDS = {"v2": "nftables", "joined": "iptables"}
"""Which back end inside_nat.py takes where: one emulated run of either is enough."""

AFTER_A_REBOOT = {"inside_rebooted.py"}
"""What runs in a guest that is booted anew, with the same results directory; elsewhere one boot runs them all."""


def boots(layout: str) -> list[tuple[str, ...]]:
    """The files of each boot of a layout's guest."""
    files = LANES[layout]
    again = [(file,) for file in files if file in AFTER_A_REBOOT]
    return [tuple(file for file in files if file not in AFTER_A_REBOOT), *again]


def names(layout: str) -> list[str]:
    """The tests of a layout as its guest reports them; found in the source, since here they cannot be imported."""
    found = []
    for file in LANES[layout]:
        for node in ast.parse((INSIDE / file).read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found.append(node.name)
    return found
