"""Kept samples as what a plot can draw: as many values as there are columns of the screen, and none lost that matters.

Of memory the highest reading of a column stands for it, so that no peak is smoothed away; of a counter the mean over
the column, so that the area is the total. Pure arithmetic on plain data.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from acctd.points import Point

COLUMNS = 400
"""Values that a plot has at most; on a page of ordinary width one is two pixels wide."""

ROWS = 24
"""Of the table beside a plot."""

CACHE = "page cache"

KINDS: dict[str, Callable[[Point], int]] = {
    "anonymous": lambda point: point.memory_anon,
    "shared": lambda point: point.memory_shmem,
    "kernel": lambda point: point.memory_kernel,
    "swap": lambda point: point.memory_swap,
    CACHE: lambda point: point.memory_file,
}
"""What is stacked, from below: what the job needs first, what the kernel can give back by itself last."""

Counters = Mapping[str, Callable[[Point], int]]
"""Name -> where a point has it."""


@dataclass(frozen=True, slots=True)
class Levels:
    """Gauges: a value at each of `at`."""

    at: Sequence[int]  # ns
    values: Mapping[str, Sequence[float]]

    def sums(self) -> list[float]:
        """All kinds together, each time."""
        return [sum(values) for values in zip(*self.values.values(), strict=True)]


@dataclass(frozen=True, slots=True)
class Rates:
    """Counters: growth per second between each two of `edges`."""

    edges: Sequence[int]  # ns
    values: Mapping[str, Sequence[float]]

    def sums(self) -> list[float]:
        """All together, in each step."""
        return [sum(values) for values in zip(*self.values.values(), strict=True)]


def memory(points: Sequence[Point], length: int, columns: int = COLUMNS, *, cached: bool = True) -> Levels:
    """The kinds of memory over time, those left out that there was nothing of, and page cache unless `cached`."""
    kinds = {name: kind for name, kind in KINDS.items() if cached or name != CACHE}

    def total(point: Point) -> int:
        return sum(kind(point) for kind in kinds.values())

    best: dict[int, Point] = {}
    for point in points:
        column = _column(point.at, length, columns)
        if column not in best or total(point) > total(best[column]):
            best[column] = point
    kept = [best[column] for column in sorted(best)]
    values = {name: [float(kind(point)) for point in kept] for name, kind in kinds.items()}
    return Levels([min(point.at, length) for point in kept], {name: each for name, each in values.items() if any(each)})


def whole(levels: Levels, length: int) -> Levels:
    """The same from the job's start, when it had no memory yet, to its end, up to which the last reading stands.

    Where older readings were dropped, nothing is made up for them.
    """
    if not levels.at:
        return levels
    at, first = [*levels.at, length], levels.at[0]
    values = {name: [*each, each[-1]] for name, each in levels.values.items()}
    if 0 < first <= 2 * max(later - earlier for earlier, later in pairwise(at)):
        at = [0, *at]
        values = {name: [0.0, *each] for name, each in values.items()}
    return Levels(at, values)


def limits(points: Sequence[Point], length: int) -> list[tuple[int, int, int]]:
    """The memory limits that there were: since when, until when, bytes. None where the job had none."""
    found: list[tuple[int, int, int]] = []
    before: int | None = None
    for number, point in enumerate(points):
        at = min(point.at, length) if number else 0
        if point.memory_limit != before:
            if before is not None:
                found[-1] = (found[-1][0], at, before)
            if point.memory_limit is not None:
                found.append((at, length, point.memory_limit))
            before = point.memory_limit
    return found


def rates(points: Sequence[Point], final: Point, counters: Counters, columns: int = COLUMNS) -> Rates:
    """Growth per second of counters. `final` is the job's end, or what it stands at now.

    The job began at zero and ended as its record says, so that the areas are the totals of the bill.
    """
    length = final.at
    last = {_column(point.at, length, columns): point for point in points if 0 < point.at < length}
    # The last column ends with the job: a moment more or less would be a rate of its own that says nothing.
    last.pop(columns - 1, None)
    kept = [*(last[column] for column in sorted(last)), final]
    edges = [0, *(point.at for point in kept)]
    values = {}
    for name, counter in counters.items():
        at = [0, *(counter(point) for point in kept)]
        values[name] = [
            max(later - earlier, 0) * 1e9 / (end - begin) if end > begin else 0.0
            for (earlier, later), (begin, end) in zip(pairwise(at), pairwise(edges), strict=True)
        ]
    return Rates(edges, values)


def _column(ns: int, length: int, columns: int) -> int:
    return min(ns * columns // max(length, 1), columns - 1)
