"""How a job went, in a line each for memory, cores, network and disks: the least, the most, the last, and a plot.

Pure functions on kept points. The words come first, so that a reader who hears the line has it all before the plot.
"""

from collections.abc import Callable, Sequence
from functools import cache

from acctd import points
from acctd.cli.spark import draw, growth, highest, steps
from acctd.cli.table import duration, short
from acctd.client import Job
from acctd.kernel import procs
from acctd.meter import keyed
from acctd.points import Point

_LEAST_WIDTH, _MOST_WIDTH = 8, 60
"""Characters of a plot. Below the least it says nothing, above the most nothing more."""

_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"

_TOTALS: tuple[tuple[str, Callable[[Point], int], Callable[[float], str]], ...] = (
    ("cores", lambda point: point.cpu_user + point.cpu_system, lambda rate: f"{rate / 1e9:.2f}"),
    ("received/s", lambda point: _way(point, "Incoming"), short),
    ("sent/s", lambda point: _way(point, "Outgoing"), short),
    ("read/s", lambda point: point.block_read, short),
    ("written/s", lambda point: point.block_write, short),
)
"""Label, what grows, and how its growth per second is said."""


def now(job: Job) -> Point:
    """How a living job stands."""
    devices = {device for name in ("block_read", "block_write") for device in job.totals.get(name, ())}
    stacked = {device for device in devices if _lies_on_others(device)}
    return points.point(job.wall_ns, keyed(job.totals), None, stacked)


def plots(kept: Sequence[Point], last: Point | None, width: int, *, colour: bool) -> str:
    """The lines, at most so wide. `last` is how a living job stands; None for one that has ended.

    What was never used has no line. "" where there are fewer than two points, or none but the last.
    """
    if not kept:
        return ""
    all_points = [*kept, last] if last is not None and last.at > kept[-1].at else list(kept)
    if len(all_points) < 2:
        return ""
    # The end of a job is a point too: of what is no counter it uses nothing any more.
    alive = all_points if last is not None else all_points[:-1]
    word = "now" if last is not None else "last"
    lines = []
    room = min(_MOST_WIDTH, width - len(_words("", "", "", "", word)) - 2)
    memory = [(point.at, _memory(point)) for point in alive]
    found = [value for _, value in memory]
    if any(found):
        words = _words("memory", short(min(found)), short(max(found)), short(found[-1]), word)
        whole = [(0, 0), *memory, (all_points[-1].at, found[-1])]
        lines.append((words, draw(highest(whole, room))))
    for label, total, said in _TOTALS:
        series = [(0, 0), *((point.at, total(point)) for point in all_points)]
        if series[-1][1]:
            rates = steps(series)
            words = _words(label, said(min(rates)), said(max(rates)), said(rates[-1]), word)
            lines.append((words, draw(growth(series, room))))
    if room < _LEAST_WIDTH:
        lines = [(words, "") for words, _ in lines]
    on, off = (_GREEN, _PLAIN) if colour else ("", "")
    shown = [f"{words}  {on}{plot}{off}" if plot else words for words, plot in lines]
    return "\n".join([f"  in the course of {duration(all_points[-1].at)}", *shown]) if shown else ""


def _words(label: str, least: str, most: str, last: str, word: str) -> str:
    return f"    {label:<10}  min {least:>5}  max {most:>5}  {word} {last:>5}"


def _memory(point: Point) -> int:
    """What is resident, as in ps and top: the page cache is no need of the job's."""
    return point.memory_anon + point.memory_shmem


def _way(point: Point, prefix: str) -> int:
    return sum(value for rule, value in point.network.items() if rule.startswith(prefix))


_lies_on_others = cache(procs.lies_on_others)
