"""Tables of jobs: short numbers, children below their parents, and columns that fit the width there is.

Pure functions on plain data; prints nothing. Where the output is no terminal, nothing is cut: the reader is a program.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from acctd.client import Job

_CUT_TO = 12
"""Characters that the first column keeps, however narrow the terminal: an id should be known by them."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column. In a terminal that is too narrow for all, the one with the highest `spare` goes first; 0 stays."""

    title: str
    spare: int = 0
    right: bool = True
    style: str = ""


def short(number: float | None) -> str:
    """A size in at most five characters, powers of 1024: 1023, 1.5K, 15K, 1023M. Nothing for None."""
    if number is None:
        return ""
    if number < 1024:
        return str(int(number))
    value = float(number)
    for unit in "KMGTPE":
        value /= 1024
        if value < 1023.5 or unit == "E":
            break
    return f"{value:.1f}{unit}" if value < 9.95 else f"{value:.0f}{unit}"


def duration(ns: int | None) -> str:
    """A time in at most six characters: 9.8s, 59m59s, 23h59m, 364d23h. Nothing for None."""
    if ns is None:
        return ""
    if ns < 60 * 10**9:
        tenths = ns // 10**8
        return f"{tenths // 10}.{tenths % 10}s"
    minutes, seconds = divmod(ns // 10**9, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def clean(text: str) -> str:
    """Text that somebody else chose, harmless to a terminal: no control characters, on one line."""
    return "".join(char if char.isprintable() else "?" for char in text)


def tree(jobs: Iterable[Job], key: Callable[[Job], Any], *, reverse: bool = False) -> list[tuple[int, Job]]:
    """The jobs with their depth, each below its parent, siblings in the order of `key`.

    A job whose parent is not among them stands at the top.
    """
    known = {job.id: job for job in jobs}
    children: dict[str | None, list[Job]] = {}
    for job in known.values():
        parent = job.parent if job.parent in known else None
        children.setdefault(parent, []).append(job)
    found: list[tuple[int, Job]] = []
    waiting = [(0, job) for job in sorted(children.get(None, []), key=key, reverse=not reverse)]
    while waiting:
        depth, job = waiting.pop()
        found.append((depth, job))
        waiting += [(depth + 1, child) for child in sorted(children.get(job.id, []), key=key, reverse=not reverse)]
    return found


def plain(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[str]:
    """The table as lines, as wide as it takes."""
    return ["".join(parts).rstrip() for parts in fit(columns, rows, None)[1]]


def fit(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None
) -> tuple[list[Column], list[list[str]]]:
    """The columns that are shown, and per line (the titles first) their cells, padded, so that joined they fit `width`.

    Narrowness costs in this order: the gaps, the end of the first column, columns that can be spared.
    """
    kept = list(range(len(columns)))
    lines = [[column.title for column in columns], *rows]
    widths = [max(len(line[i]) for line in lines) for i in kept]
    gap = 2
    if width is not None:
        if _needed(widths, kept, gap) > width:
            gap = 1
        least = min(widths[0], _CUT_TO)
        while _needed(widths, kept, gap) - widths[0] + least > width:
            most = max(kept, key=lambda i: columns[i].spare)
            if columns[most].spare == 0:
                break
            kept.remove(most)
        widths[0] = min(widths[0], max(least, widths[0] - (_needed(widths, kept, gap) - width)))
    shown = []
    for line in lines:
        cells = []
        for i in kept:
            text = line[i] if len(line[i]) <= widths[i] else f"{line[i][: widths[i] - 1]}~"
            padded = text.rjust(widths[i]) if columns[i].right else text.ljust(widths[i])
            cells.append(padded if i == kept[0] else " " * gap + padded)
        shown.append(cells)
    return [columns[i] for i in kept], shown


def _needed(widths: Sequence[int], kept: Sequence[int], gap: int) -> int:
    return sum(widths[i] for i in kept) + gap * (len(kept) - 1)
