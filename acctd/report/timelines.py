"""How a job went: its kept samples as plots of memory, CPU, network and disks over its time.

Chooses what is drawn, with what scale and in what words; series.py makes the numbers and plot.py draws.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import tzinfo

from acctd.integrals import cores_asked
from acctd.metrics import split_rule
from acctd.model import Record
from acctd.points import Point, last_point
from acctd.policies import Shortage
from acctd.report import series
from acctd.report.markup import Html, join
from acctd.report.page import STYLES, Column, Section, figure, table
from acctd.report.plot import Band, Level, Mark, Plot
from acctd.report.series import Counters, Levels, Rates
from acctd.report.units import (
    bytes_scale,
    counted,
    decimal,
    decimal_scale,
    duration,
    few,
    in_cores,
    plain_scale,
    size,
    stamp,
    time_scale,
)

_CLASSES = STYLES - 1
"""Classes that a plot has apart; the others are one band."""

_CACHE_STYLE = 5
_KIND_STYLES = {"anonymous": 0, "shared": 1, "kernel": 2, "swap": 3, "page cache": _CACHE_STYLE}

_HIDDEN = 0.4  # of the whole: need that is less than that is drawn once more without page cache
_FAR = 4  # times the use: a line above that is told in words alone

_LIMITS, _MARKS = 10, 20
_NEAR = 0.05  # of the width: marks nearer to each other are one

_CPU: Counters = {"user": lambda point: point.cpu_user, "system": lambda point: point.cpu_system}
_BLOCK: Counters = {"read": lambda point: point.block_read, "written": lambda point: point.block_write}


def sections(record: Record, points: Sequence[Point], zone: tzinfo) -> list[Section]:
    """A section with a plot each, of what there is to draw; none without samples."""
    inner = [point for point in points if 0 <= point.at <= record.wall_ns]
    if len(inner) < 2:
        return []
    final = last_point(record)
    made = [*_memory(record, inner, zone), _cpu(record, inner, final)]
    for direction in ("outgoing", "incoming"):
        if (drawn := _network(inner, final, direction)) is not None:
            made.append(drawn)
    if final.block_read or final.block_write:
        made.append(_block(inner, final))
    return made


def busiest(points: Sequence[Point], record: Record) -> float | None:
    """Cores in the busiest step of the plot; None without samples."""
    if len(points) < 2 or not record.wall_ns:
        return None
    return max(series.rates(points, last_point(record), _CPU).sums(), default=0.0) / 1e9


def after_start(shortage: Shortage, record: Record) -> int:
    """When memory ran out, in ns of the job's time.

    A shortage has the time of the node's clock, and the job's time begins with its command, a little after it was made:
    what would lie beyond its end happened at its end.
    """
    return max(0, min(int((shortage.time - record.started) * 1e9), record.wall_ns))


def _memory(record: Record, points: Sequence[Point], zone: tzinfo) -> list[Section]:
    length = record.wall_ns
    # The end of a job is a point too, for what it counted: of memory it is no reading, all had been given back.
    read = [point for point in points if point.at < length or record.state == "running"]
    levels = series.memory(read, length)
    if not levels.values:
        return []
    limits = series.limits(read, length)
    peak = record.totals.get("memory_peak", {}).get("")
    limit = limits[-1][2] if limits else None
    lines = [Level(f"limit {size(each)}", each, since=since, until=end) for since, end, each in limits][-_LIMITS:]
    if peak is not None and (limit is None or not 0.9 * limit < peak < 1.1 * limit):
        lines.append(Level(f"kernel's peak {size(peak)}", peak, "peak"))
    names = list(levels.values)
    columns = [Column("After"), *(Column(name, number=True) for name in names), Column("Together", number=True)]
    coarse = series.memory(read, length, series.ROWS)
    rows = []
    for number, at in enumerate(coarse.at):
        kinds = {name: values[number] for name, values in coarse.values.items()}
        rows.append([duration(at), *(size(kinds.get(name, 0)) for name in names), size(sum(kinds.values()))])
    data = table("Memory over time, the highest reading of each stretch", columns, rows)
    drawn = _memory_plot("memory", "Memory by kind", record, series.whole(levels, length), lines, zone)
    drawn = replace(drawn, description=_memory_said(record, levels.values, limit, peak))
    caption = (
        "The highest reading of each stretch of time. Anonymous, shared and kernel memory are what the job needs; page "
        "cache is given back when somebody wants the room."
    )
    if limit is not None and limit > _FAR * max(levels.sums()):
        caption += f" The limit, {size(limit)}, lies far above what is drawn."
    figures = [figure(drawn, caption, data)]
    need = series.memory(read, length, cached=False)
    if need.values and 0 < max(need.sums()) < _HIDDEN * max(levels.sums()):
        said = f"The same without page cache, {size(max(need.sums()))} at most."
        close = _memory_plot("need", "Memory without page cache", record, series.whole(need, length), lines, zone)
        figures.append(figure(replace(close, description=said), said, None))
    return [Section("memory", "Memory", join(figures))]


def _memory_plot(name: str, title: str, record: Record, levels: Levels, lines: Sequence[Level], zone: tzinfo) -> Plot:
    highest = max(levels.sums(), default=0.0)
    # A limit far above all use would press the plot flat; then words alone tell it.
    shown = [line for line in lines if line.value <= _FAR * highest]
    return Plot(
        name=f"{name}-plot",
        title=title,
        description="",
        x=time_scale(record.wall_ns),
        y=bytes_scale(1.05 * max(highest, *(line.value for line in shown), 0.0)),
        edges=levels.at,
        bands=[Band(each, values, _KIND_STYLES[each]) for each, values in levels.values.items()],
        levels=shown,
        marks=_shortage_marks(record, zone),
        x_title=_since_start(record.wall_ns),
    )


def _memory_said(record: Record, values: Mapping[str, Sequence[float]], limit: int | None, peak: int | None) -> str:
    most = [f"{name} {size(max(each))}" for name, each in values.items()]
    said = f"Memory over {duration(record.wall_ns)}. Highest readings: {', '.join(most)}."
    if limit is not None:
        said += f" The limit was {size(limit)}."
    if peak is not None:
        said += f" The kernel's own peak of all together was {size(peak)}."
    if number := len(record.shortages) + record.shortages_dropped:
        said += f" Memory ran out {counted(number, 'time')}."
    return said


def _shortage_marks(record: Record, zone: tzinfo) -> list[Mark]:
    marks: list[tuple[int, list[str]]] = []
    for shortage in record.shortages:
        at = after_start(shortage, record)
        text = f"{stamp(shortage.time, zone)}: {shortage.action}"
        if marks and at - marks[-1][0] < _NEAR * record.wall_ns:
            marks[-1][1].append(text)
        else:
            marks.append((at, [text]))
    return [
        Mark(at, "OOM" if len(texts) == 1 else f"OOM x{len(texts)}", f"Out of memory: {'; '.join(texts)}")
        for at, texts in marks[:_MARKS]
    ]


def _cpu(record: Record, points: Sequence[Point], final: Point) -> Section:
    drawn = series.rates(points, final, _CPU)
    cores = {name: [value / 1e9 for value in values] for name, values in drawn.values.items()}
    highest = max((sum(each) for each in _across(cores.values())), default=0.0)
    asked = cores_asked(record.limits, record.cpus)
    scale = plain_scale(1.05 * max(highest, asked if asked is not None and asked <= _FAR * highest else 0.0), "cores")
    mean = (final.cpu_user + final.cpu_system) / max(record.wall_ns, 1)
    said = f"CPU over {duration(record.wall_ns)}: {in_cores(mean)} on average, {few(highest)} in the busiest step."
    if asked is not None:
        said += f" Asked for: {in_cores(asked)}."
    plot = Plot(
        name="cpu-plot",
        title="CPU in cores",
        description=said,
        x=time_scale(record.wall_ns),
        y=scale,
        edges=drawn.edges,
        bands=[Band("user", cores["user"], 0), Band("system", cores["system"], 1)],
        stepped=True,
        levels=[Level(f"asked for: {few(asked)}", asked)] if asked is not None else [],
        x_title=_since_start(record.wall_ns),
    )
    data = _table(points, final, _CPU, "CPU over time, in cores", lambda value: few(value / 1e9))
    return Section("cpu", "CPU", figure(plot, said, data))


def _network(points: Sequence[Point], final: Point, direction: str) -> Section | None:
    used = {rule: number for rule, number in final.network.items() if split_rule(rule)[1] == direction and number}
    if not used:
        return None
    first = sorted(used, key=lambda rule: (-used[rule], rule))
    named = first if len(first) <= _CLASSES + 1 else first[:_CLASSES]
    counters = {split_rule(rule)[0]: _of_rule(rule) for rule in named}
    if rest := [rule for rule in first if rule not in named]:
        counters[f"{len(rest)} other classes"] = lambda point: sum(point.network.get(rule, 0) for rule in rest)
    most = ", ".join(f"{split_rule(rule)[0]} {decimal(used[rule], 'B')}" for rule in named)
    title = f"Network, {direction}"
    said = f"{direction.capitalize()} bytes per second by class. In all: {most}."
    return _per_second(f"network-{direction}", title, said, points, final, counters, stacked=True)


def _of_rule(rule: str) -> Callable[[Point], int]:
    return lambda point: point.network.get(rule, 0)


def _block(points: Sequence[Point], final: Point) -> Section:
    said = (
        f"Bytes per second from and to disks. In all: {decimal(final.block_read, 'B')} read in "
        f"{counted(final.block_reads, 'operation')}, {decimal(final.block_write, 'B')} written in "
        f"{counted(final.block_writes, 'operation')}."
    )
    return _per_second("disks", "Disks", said, points, final, _BLOCK, stacked=False)


def _per_second(
    name: str, title: str, said: str, points: Sequence[Point], final: Point, counters: Counters, *, stacked: bool
) -> Section:
    drawn = series.rates(points, final, counters)
    highest = max(drawn.sums() if stacked else (max(each) for each in _across(drawn.values.values())), default=0.0)
    said += f" The busiest step had {decimal(highest, 'B/s')}."
    plot = Plot(
        name=f"{name}-plot",
        title=f"{title}, bytes per second",
        description=said,
        x=time_scale(final.at),
        y=decimal_scale(1.02 * highest, "B/s"),
        edges=drawn.edges,
        bands=[Band(each, values, number) for number, (each, values) in enumerate(drawn.values.items())],
        stacked=stacked,
        stepped=True,
        x_title=_since_start(final.at),
    )
    data = _table(points, final, counters, f"{title} over time, per second", lambda value: decimal(value, "B"))
    return Section(name, title, figure(plot, said, data))


def _table(
    points: Sequence[Point], final: Point, counters: Counters, caption: str, shown: Callable[[float], str]
) -> Html:
    coarse: Rates = series.rates(points, final, counters, series.ROWS)
    columns = [Column("From, after"), *(Column(name, number=True) for name in coarse.values)]
    rows = [
        [duration(at), *map(shown, values)]
        for at, values in zip(coarse.edges, _across(coarse.values.values()), strict=False)
    ]
    return table(caption, columns, rows)


def _across(values: Iterable[Sequence[float]]) -> list[tuple[float, ...]]:
    """What all of them have at each place."""
    return list(zip(*values, strict=True))


def _since_start(length: int) -> str:
    return f"{time_scale(length).unit} since the start"
