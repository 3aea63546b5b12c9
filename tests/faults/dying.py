"""A process that ends itself by SIGKILL before or after the n-th call of a function of its own, named by its path.

As a program it is acctd that dies so: `python -m tests.faults.dying MODULE:NAME before|after NUMBER ARGUMENTS...`
"""

import functools
import importlib
import inspect
import os
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple


class Death(NamedTuple):
    """Where to die."""

    point: str  # module:name, or module:class.name
    when: str  # "before" or "after"
    number: int = 1  # of the call


def arm(death: Death, trigger: Path | None = None) -> None:
    """Replace the function by one that dies. With a trigger, calls count only once that file is there."""
    module, _, path = death.point.partition(":")
    *outer, name = path.split(".")
    owner = functools.reduce(getattr, outer, importlib.import_module(module))
    original, calls = getattr(owner, name), 0

    def counts() -> bool:
        nonlocal calls
        if trigger is not None and not trigger.exists():
            return False
        calls += 1
        return calls == death.number

    def dying(*arguments: Any, **options: Any) -> Any:
        due = counts()
        if due and death.when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **options)
        if due and death.when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    async def dying_later(*arguments: Any, **options: Any) -> Any:
        due = counts()
        if due and death.when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = await original(*arguments, **options)
        if due and death.when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying_later if inspect.iscoroutinefunction(original) else dying)


def main() -> None:
    """Run acctd with one point armed."""
    point, when, number = sys.argv[1:4]
    arm(Death(point, when, int(number)))
    from acctd.cli.main import main as acctd

    acctd(sys.argv[4:])


if __name__ == "__main__":
    main()
