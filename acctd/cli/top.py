"""`acctd top`: what jobs use now, refreshed; a full screen on a terminal, plain tables anywhere else.

Rates are the difference of two readings. This module asks and sorts; the terminal is screen.py's.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import click

from acctd import client
from acctd.cli import spark
from acctd.cli.asking import agent_options, all_now, connect, no_color_option, readable
from acctd.cli.output import emit
from acctd.cli.rates import Amounts, Clocked, Rates, amounts
from acctd.cli.table import Column, duration, plain, short, tree
from acctd.client import Job
from acctd.errors import UnavailableError
from acctd.kernel import procs

if TYPE_CHECKING:
    from rich.text import Text

    from acctd.cli.screen import Screen

_BAR = 8
_SORTS = ("cpu", "memory", "network", "io", "id")
_KEYS = {"c": "cpu", "m": "memory", "n": "network", "i": "io", "j": "id"}
_HELP = "c cpu  m memory  n network  i io  j job  r reverse  q quit"

COLUMNS = (
    Column("JOB", right=False, style="bold"),
    Column("OWNER", spare=3, right=False),
    Column("PROCS", spare=4),
    Column("CPU%"),
    Column("", spare=5, right=False, style="green"),
    Column("MEMORY"),
    Column("", spare=6, right=False, style="cyan"),
    Column("IN/s"),
    Column("OUT/s"),
    Column("IO/s", spare=1),
    Column("WALL", spare=2),
)


@dataclass(frozen=True, slots=True)
class Line:
    """One job as of one refresh."""

    job: Job
    used: Amounts
    rates: Rates


@dataclass(slots=True)
class Order:
    """How the table is sorted: the most first, ids from a to z; `reverse` turns that round."""

    by: str = "cpu"
    reverse: bool = False

    def sorted(self, lines: Sequence[Line]) -> list[tuple[int, Line]]:
        """The lines with their depth, families below their jobs."""
        by_id = {line.job.id: line for line in lines}

        def key(job: Job) -> tuple[float, str]:
            return -_weight(by_id[job.id], self.by), job.id

        return [(depth, by_id[job.id]) for depth, job in tree((line.job for line in lines), key, reverse=self.reverse)]


@dataclass
class Board:
    """What is on show: the last refresh, or why there was none."""

    order: Order
    lines: list[Line] = field(default_factory=list)
    trouble: str | None = None
    blocks: bool = False  # whether bars are drawn of blocks, or in ASCII
    _clocked: Clocked = field(default_factory=Clocked)

    def take(self, jobs: Sequence[Job], now: float) -> None:
        """A new refresh; `now` in seconds of a clock that is never set."""
        used = [(job, amounts(job, _lies_on_others)) for job in jobs]
        rates = self._clocked.rates(used, now)
        self.lines = [Line(job, spent, rates[job.id]) for job, spent in used]
        self.trouble = None

    def rows(self) -> list[list[str]]:
        """The table's cells in order."""
        return [row(depth, line, blocks=self.blocks) for depth, line in self.order.sorted(self.lines)]

    def heading(self) -> str:
        """The node in one line. Families are in their jobs' numbers already."""
        known = {line.job.id for line in self.lines}
        tops = [line for line in self.lines if line.job.parent not in known]
        cores = sum(line.rates.cpu or 0 for line in tops)
        memory = sum(line.used.memory or 0 for line in tops)
        received, sent, io = (
            short(sum(getattr(line.rates, name) or 0 for line in tops)) for name in ("received", "sent", "io")
        )
        return (
            f"{len(self.lines)} jobs  {cores:.1f} of {os.cpu_count()} cores  {short(memory)} of {short(_host_memory())}"
            f"  in {received}/s  out {sent}/s  io {io}/s  by {self.order.by}"
        )


@click.command("top")
@click.option("--sort", "by", type=click.Choice(_SORTS), default="cpu", show_default=True, help="What comes first.")
@click.option(
    "--interval",
    metavar="SECONDS",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    help="Time between two refreshes.",
)
@click.option(
    "-n", "--count", metavar="COUNT", type=click.IntRange(min=1), help="Refreshes. [default: no end; 1 in a pipe]"
)
@no_color_option
@agent_options
def command(by: str, interval: float, count: int | None, socket_path: str | None, config_path: str | None) -> None:
    """Show what jobs use now, refreshed.

    Root sees every job, another user own ones. CPU% is 100 for one core, and its bar is full at the job's limit, else
    at all cores of the host; the bar of MEMORY likewise. IN/s, OUT/s and IO/s are bytes per second received, sent, and
    read from and written to disks, since the last refresh. A family inside a job stands below it, indented; the
    job's numbers include the family's.

    On a terminal the keys c, m, n, i and j sort by CPU, memory, network, I/O and job id, r reverses, q and ^C leave.
    In a pipe it waits one interval, so that there are rates, prints one plain table and ends; with -n as many, an
    empty line between two.
    """
    board = Board(Order(by))

    def refresh() -> None:
        with connect(socket_path, config_path) as agent:
            jobs = [client.job(answer) for answer in all_now(agent)]
        board.take([job for job in jobs if readable(job)], time.monotonic())

    refresh()
    if sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        from acctd.cli.screen import Screen  # rich, which takes its time to load

        board.blocks = spark.usable(sys.stdout.encoding, os.environ)
        with Screen() as screen:
            try:
                _full_screen(screen, board, refresh, interval, count)
            except (KeyboardInterrupt, EOFError):
                return
    else:
        _plain_tables(board, refresh, interval, count or 1)


def row(depth: int, line: Line, *, blocks: bool = False) -> list[str]:
    """One job's cells."""
    job, used, rates = line.job, line.used, line.rates
    cores = job.limits.get("cpus") or os.cpu_count()
    memory = job.limits.get("memory") or _host_memory()
    return [
        "  " * depth + job.id,
        job.owner,
        str(len(job.pids)),
        "" if rates.cpu is None else f"{rates.cpu * 100:.0f}",
        bar(rates.cpu, cores, blocks=blocks),
        short(used.memory),
        bar(used.memory, memory, blocks=blocks),
        short(rates.received),
        short(rates.sent),
        short(rates.io),
        duration(job.wall_ns),
    ]


def bar(value: float | None, full: float | str | None, *, blocks: bool = False) -> str:
    """[|||   ]: how much of `full` it is, in ASCII, for every terminal there is; in blocks to an eighth of a character.

    Nothing where either is unknown.
    """
    if value is None or not isinstance(full, float | int) or full <= 0:
        return ""
    inside = _BAR - 2
    if blocks:
        return f"[{spark.bar(value / full, inside)}]"
    filled = min(inside, round(value / full * inside))
    return f"[{'|' * filled}{' ' * (inside - filled)}]"


def _plain_tables(board: Board, refresh: Callable[[], None], interval: float, count: int) -> None:
    for number in range(count):
        time.sleep(interval)
        refresh()
        if number:
            emit("")
        for text in plain(COLUMNS, board.rows()):
            emit(text)


def _full_screen(
    screen: "Screen", board: Board, refresh: Callable[[], None], interval: float, count: int | None
) -> None:
    shown = 0
    while True:
        shown += 1
        screen.show(_frame(screen, board))
        due = time.monotonic() + interval
        while (left := due - time.monotonic()) > 0 and (key := screen.wait(left)) is not None:
            if key == "q":
                return
            if key == "r":
                board.order.reverse = not board.order.reverse
            elif key in _KEYS:
                board.order = Order(_KEYS[key])
            screen.show(_frame(screen, board))
        if shown == count:
            return
        try:
            refresh()
        except UnavailableError as e:
            # It may be restarting, and jobs go on meanwhile: what was read last stays, and we ask again.
            board.trouble = str(e)


def _frame(screen: "Screen", board: Board) -> "list[Text]":
    from rich.text import Text

    from acctd.cli.screen import styled

    table = styled(COLUMNS, board.rows(), screen.console.width)
    room = max(1, screen.height - 4)
    hidden = len(table) - 1 - room
    lines = [Text(board.heading(), "bold", no_wrap=True, overflow="crop")]
    lines.append(Text(board.trouble or "", "red", no_wrap=True, overflow="crop"))
    lines += table[: room + 1]
    lines += [Text() for _ in range(-hidden)]
    below = f"{hidden} more below; " if hidden > 0 else ""
    lines.append(Text(below + _HELP, "dim", no_wrap=True, overflow="crop"))
    return lines


def _weight(line: Line, by: str) -> float:
    rates = line.rates
    if by == "id":
        return 0.0
    if by == "memory":
        return float(line.used.memory or 0)
    if by == "network":
        return (rates.received or 0) + (rates.sent or 0)
    return (rates.io if by == "io" else rates.cpu) or 0.0


_lies_on_others = cache(procs.lies_on_others)


@cache
def _host_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
