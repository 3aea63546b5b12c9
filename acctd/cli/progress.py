"""How far long work is, in one line on a terminal's standard error; nothing where nobody looks at one.

rich draws it, and is loaded only then. Not where standard error is no terminal, nor where NO_COLOR or TERM=dumb says
that control sequences are not wanted.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Advance = Callable[[int, int], None]
"""What was done since the last call: things, and bytes."""


def nothing(things: int, size: int) -> None:
    """Of work that nobody watches."""


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], Advance]]:
    """Gives what is to be called once it is known how much there is: things, or bytes; 0 where that is not known."""
    if sys.stderr is None or not sys.stderr.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb":
        yield lambda _things, _size: nothing
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    shown: dict[str, Any] = {"console": Console(file=sys.stderr), "transient": True, "auto_refresh": False}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    counted = TextColumn("{task.fields[things]:,} records")
    # Drawn by whoever tells of progress: a thread of its own could hold a lock when processes are forked.
    with Progress(*columns, counted, TimeRemainingColumn(), **shown) as bar:

        def begin(things: int, size: int) -> Advance:
            task = bar.add_task(what, total=things or size or None, things=0)
            done = 0

            def advance(more: int, read: int) -> None:
                nonlocal done
                done += more
                bar.update(task, advance=more if things else read, things=done)
                bar.refresh()

            return advance

        yield begin
