"""The terminal: coloured tables, and a full screen that is redrawn, takes keys, and is given back as it was found.

Loads rich, so it is imported only where there is a terminal. Knows nothing of jobs. Colours follow NO_COLOR and TERM,
which rich looks after. Control sequences: termios(3), signal(7), rich.live.
"""

import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn, Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from acctd.cli.table import Column, fit

_HEADING = "bold underline"


def show_once(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """One table to standard output, which is a terminal."""
    console = Console(highlight=False)
    console.print(Group(*styled(columns, rows, console.width)), crop=True)


def styled(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[Text]:
    """The table's lines in colour, cut to the width."""
    kept, lines = fit(columns, rows, width)
    shown = []
    for number, cells in enumerate(lines):
        line = Text(no_wrap=True, overflow="crop")
        for column, cell in zip(kept, cells, strict=True):
            line.append(cell, _HEADING if number == 0 else column.style)
        shown.append(line)
    return shown


class Screen:
    """The whole terminal as long as the context lasts. Keys come one by one, if standard input is the terminal too."""

    def __init__(self) -> None:
        self.console = Console(highlight=False)
        self._live: Live | None = None
        self._keys = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None
        self._modes: list[object] | None = None
        self._lines: Sequence[Text] = ()

    def __enter__(self) -> Self:
        # A signal that has a handler writes its number here, which ends a wait: wakeup fd of signal(3).
        self._wake, self._wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, _leave),
            signal.SIGWINCH: signal.signal(signal.SIGWINCH, _note),
            signal.SIGTSTP: signal.signal(signal.SIGTSTP, _note),
        }
        self._waked = signal.set_wakeup_fd(self._wakes, warn_on_full_buffer=False)
        self._take()
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()
        signal.set_wakeup_fd(self._waked)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._wake)
        os.close(self._wakes)

    @property
    def height(self) -> int:
        """Lines that can be shown."""
        return self.console.size.height

    def show(self, lines: Sequence[Text]) -> None:
        """Put these lines in the place of the last ones."""
        self._lines = lines
        if self._live is not None:
            self._live.update(Group(*lines), refresh=True)

    def wait(self, seconds: float) -> str | None:
        """The next key; "" when the terminal was given back or has another size; None when the time is over.

        Raises EOFError where the terminal is gone.
        """
        watched = [self._wake] if self._keys is None else [self._wake, self._keys]
        ready, _, _ = select.select(watched, [], [], seconds)
        if self._wake in ready:
            numbers = os.read(self._wake, 1024)
            if signal.SIGTSTP in numbers:
                self._pause()
            return ""
        if not ready:
            return None
        assert self._keys is not None  # noqa: S101  # for the type checker: it was ready
        if not (key := os.read(self._keys, 1)):
            raise EOFError
        return key.decode("ascii", "replace")

    def _pause(self) -> None:
        """What ^Z means: the terminal goes back to the shell until we are continued."""
        self._give_back()
        os.kill(os.getpid(), signal.SIGSTOP)
        self._take()
        self.show(self._lines)

    def _take(self) -> None:
        if self._keys is not None:
            self._modes = termios.tcgetattr(self._keys)
            tty.setcbreak(self._keys)
        self._live = Live(
            console=self.console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self._live.start()

    def _give_back(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._keys is not None and self._modes is not None:
            termios.tcsetattr(self._keys, termios.TCSADRAIN, self._modes)  # type: ignore[arg-type]  # as it gave them


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _note(_number: int, _frame: FrameType | None) -> None:
    """Nothing to do here: the number has gone into the pipe, and wait() sees to it."""
