"""Plots of one line, as tall as a character: what they are drawn of, and whether a terminal can show them.

Pure functions on plain numbers; knows nothing of jobs and prints nothing. Times are ns of one clock, in order.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise

_BLOCKS = "▁▂▃▄▅▆▇█"  # U+2581 to U+2588
_EIGHTHS = " ▏▎▍▌▋▊▉"  # nothing, then U+258F to U+2589

_NO_BLOCKS = ("", "dumb", "unknown", "linux")
"""Values of TERM. The Linux console's fonts have no more than 512 characters, and not these."""

Points = Sequence[tuple[int, int]]
"""Times and values."""


def usable(encoding: str | None, environ: Mapping[str, str]) -> bool:
    """Whether a terminal can show blocks: by the encoding of its stream, and TERM."""
    return (encoding or "").lower().replace("-", "") == "utf8" and environ.get("TERM", "") not in _NO_BLOCKS


def coloured(environ: Mapping[str, str]) -> bool:
    """Whether a terminal is to be sent colours: https://no-color.org, and TERM."""
    return not environ.get("NO_COLOR") and environ.get("TERM", "") not in ("", "dumb", "unknown")


def highest(points: Points, width: int) -> list[float | None]:
    """The highest value in each of `width` equal parts of the time from the first point to the last.

    A part without a point has what was seen last. Nothing for no points.
    """
    if not points:
        return []
    times = [time for time, _ in points]
    found: list[float | None] = []
    for since, until in _parts(times, width):
        first, last = bisect_left(times, since), bisect_right(times, until)
        found.append(max(value for _, value in points[min(first, last - 1) : last]))
    return found


def growth(points: Points, width: int) -> list[float | None]:
    """By how much a total grew per second, on average in each of `width` equal parts of the time between its points.

    Between two points it is taken to have grown evenly. Nothing for fewer than two points.
    """
    times = [time for time, _ in points]
    if len(points) < 2 or times[0] == times[-1]:
        return []
    return [
        (_at(points, times, until) - _at(points, times, since)) * 1e9 / (until - since)
        for since, until in _parts(times, width)
    ]


def steps(points: Points) -> list[float]:
    """By how much a total grew per second between each point and the next."""
    return [
        (later - earlier) * 1e9 / (until - since)
        for (since, earlier), (until, later) in pairwise(points)
        if until > since
    ]


def draw(values: Sequence[float | None], top: float = 0) -> str:
    """One character a value. The full height is `top`, or the highest value if that is more.

    Only nothing is drawn as nothing is: what is above 0 has at least the second height. What is unknown is left blank.
    """
    full = max([top, *(value for value in values if value is not None)])
    line = ""
    for value in values:
        if value is None:
            line += " "
        elif value <= 0:
            line += _BLOCKS[0]
        else:
            line += _BLOCKS[max(1, min(7, round(value / full * 7)))]
    return line


def bar(part: float, width: int) -> str:
    """`part` of `width` characters filled from the left, to an eighth of a character; `part` is cut to 0 to 1."""
    whole, rest = divmod(round(max(0.0, min(1.0, part)) * width * 8), 8)
    return ("█" * whole + (_EIGHTHS[rest] if rest else "")).ljust(width)


def _parts(times: Sequence[int], width: int) -> list[tuple[int, int]]:
    """Equal parts of the time between the first and the last, at most `width`, and none shorter than 1 ns."""
    length = times[-1] - times[0]
    number = max(1, min(width, length))
    # Not by floats: those round times of the epoch to a quarter of a microsecond.
    return list(pairwise(times[0] + length * n // number for n in range(number + 1)))


def _at(points: Points, times: Sequence[int], time: int) -> float:
    """A total at a time between its points."""
    index = min(bisect_right(times, time), len(points) - 1)
    (since, earlier), (until, later) = points[index - 1], points[index]
    return later if until == since else earlier + (later - earlier) * (time - since) / (until - since)
