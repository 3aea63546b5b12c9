"""The plotting room: a plot as SVG that needs no script, stays readable at any width, and says in words what it shows.

Axes and areas stretch with the page, text does not: it stands at percentages of an SVG without a viewBox, around one
that has one. Knows nothing of jobs: it gets numbers, and what they are called. SVG 2: https://www.w3.org/TR/SVG2/
"""

from collections.abc import Sequence
from dataclasses import dataclass

from acctd.report.markup import Child, Html, join, tag
from acctd.report.units import Scale

WIDTH = HEIGHT = 1000
"""Of the drawing in its own units; paths have whole ones. A column of the screen has two or so of them."""

_LABEL_FROM = 0.09
"""Of the height: a thinner band has its name in the key alone."""


@dataclass(frozen=True, slots=True)
class Band:
    """One layer of a stack, or one line."""

    name: str
    values: Sequence[float]
    style: int  # which of the sheet's colours and patterns


@dataclass(frozen=True, slots=True)
class Level:
    """A line right across, or from one x to another: a limit, a reservation, a peak."""

    name: str
    value: float
    kind: str = "limit"  # limit or peak
    since: float = 0.0
    until: float | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at a moment."""

    x: float
    label: str  # a character or two on the plot
    text: str  # what it was


@dataclass(frozen=True, slots=True)
class Plot:
    """What is drawn. `edges`: where on the x axis each value is; of a `stepped` one where it begins, and the end."""

    name: str  # unique on the page: letters, digits, -
    title: str
    description: str  # what it shows, for those who do not see it
    x: Scale
    y: Scale
    edges: Sequence[float]
    bands: Sequence[Band]
    stacked: bool = True
    stepped: bool = False
    levels: Sequence[Level] = ()
    marks: Sequence[Mark] = ()
    x_title: str = ""


def draw(plot: Plot) -> Html:
    """The plot, and its key."""
    name = plot.name
    title, description = f"{name}-title", f"{name}-desc"
    return join(
        tag(
            "svg",
            tag("title", plot.title, id=title),
            tag("desc", plot.description, id=description),
            _grid(plot),
            tag(
                "svg",
                _shapes(plot),
                class_="drawing",
                view_box=f"0 0 {WIDTH} {HEIGHT}",
                preserve_aspect_ratio="none",
                width="100%",
                height="100%",
            ),
            _names(plot),
            _marks(plot),
            _levels(plot),
            class_="plot",
            role="img",
            aria_labelledby=title,
            aria_describedby=description,
        ),
        _key(plot),
    )


def patterns(styles: int) -> Html:
    """What the shapes of a page are filled with, once a page: a colour each, and lines or dots beside the colour."""
    made = []
    for style in range(styles):
        drawn: Child = None
        if style % 4 == 1:
            drawn = tag("path", class_="hatch", d="M0 0H12M0 22H12")
        elif style % 4 == 2:
            drawn = tag("path", class_="hatch", d="M0 0V44")
        elif style % 4 == 3:
            drawn = tag("path", class_="hatch", d="M0 0H12M0 0V44")
        made.append(
            tag(
                "pattern",
                tag("rect", width=12, height=44, class_=f"c{style}"),
                drawn,
                id=f"p{style}",
                width=12,
                height=44,
                pattern_units="userSpaceOnUse",
            )
        )
    return tag("svg", tag("defs", made), class_="patterns", aria_hidden="true", focusable="false")


def _grid(plot: Plot) -> Html:
    lines, texts = [], []
    for value, text in plot.y.ticks:
        at = f"{100 - 100 * value / plot.y.top:.4g}%"
        lines.append(tag("line", x1="0", x2="100%", y1=at, y2=at))
        texts.append(tag("text", text, x=-8, y=at, dy="0.35em", text_anchor="end"))
    for number, (value, text) in enumerate(plot.x.ticks):
        at = f"{100 * value / plot.x.top:.4g}%"
        lines.append(tag("line", x1=at, x2=at, y1="100%", y2="100%", class_="tick"))
        lines.append(tag("line", x1=at, x2=at, y1="0", y2="100%", class_="faint"))
        texts.append(
            tag("text", text, x=at, y="100%", dy="1.5em", text_anchor="middle", class_="odd" if number % 2 else None)
        )
    return join(
        tag("g", lines, class_="grid"),
        tag(
            "g",
            texts,
            tag("text", plot.y.unit, x=-44, y=-16, class_="unit"),
            tag("text", plot.x_title, x="100%", y="100%", dy="2.9em", text_anchor="end", class_="unit"),
            class_="axis",
        ),
    )


def _shapes(plot: Plot) -> Html:
    shapes = []
    if plot.stacked:
        below: list[float] = [0.0] * len(_longest(plot))
        tops = []
        for band in plot.bands:
            top = [low + value for low, value in zip(below, band.values, strict=True)]
            tops.append((band, below, top))
            below = top
        for band, low, high in tops:
            d = f"{_path(plot, high)}{_back(plot, low)}z"
            shapes.append(tag("path", d=Html(d), fill=f"url(#p{band.style})"))
            shapes.append(tag("path", d=Html(_path(plot, high)), class_=f"edge e{band.style}"))
    else:
        for band in plot.bands:
            shapes.append(tag("path", d=Html(_path(plot, band.values)), class_=f"edge line e{band.style}"))
    return join(shapes)


def _points(plot: Plot, values: Sequence[float]) -> list[tuple[int, int]]:
    """In whole units of the drawing, those left out that change nothing."""
    points: list[tuple[int, int]] = []
    for number, value in enumerate(values):
        y = round(HEIGHT * (1 - min(value / plot.y.top, 1.0)))
        ends = plot.edges[number : number + 2] if plot.stepped else plot.edges[number : number + 1]
        for edge in ends:
            point = round(WIDTH * edge / plot.x.top), y
            if len(points) > 1 and points[-1][1] == points[-2][1] == y:
                points[-1] = point
            elif not points or points[-1] != point:
                points.append(point)
    return points


def _path(plot: Plot, values: Sequence[float]) -> str:
    return _written(_points(plot, values), "M")


def _back(plot: Plot, values: Sequence[float]) -> str:
    return _written(_points(plot, values)[::-1], "L")


def _written(points: Sequence[tuple[int, int]], first: str) -> str:
    """SVG path data, steps as relative ones, which are short."""
    if not points:
        return ""
    x, y = points[0]
    parts = [f"{first}{x} {y}"]
    for now_x, now_y in points[1:]:
        if now_y == y:
            parts.append(f"h{now_x - x}")
        elif now_x == x:
            parts.append(f"v{now_y - y}")
        else:
            parts.append(f"l{now_x - x} {now_y - y}")
        x, y = now_x, now_y
    return "".join(parts)


def _longest(plot: Plot) -> Sequence[float]:
    return max((band.values for band in plot.bands), key=len, default=())


def _names(plot: Plot) -> Html:
    """The name of each band where it is thickest, if it is thick enough there."""
    if not plot.stacked:
        return join()
    below = [0.0] * len(_longest(plot))
    names = []
    for band in plot.bands:
        values = band.values
        inner = [n for n in range(len(values)) if _is_clear(plot, _middle(plot, n) / plot.x.top)]
        if inner:
            at = max(inner, key=lambda n: values[n])
            if values[at] >= _LABEL_FROM * plot.y.top:
                x = f"{100 * _middle(plot, at) / plot.x.top:.4g}%"
                y = f"{100 - 100 * (below[at] + values[at] / 2) / plot.y.top:.4g}%"
                names.append(
                    tag("text", band.name, x=x, y=y, dy="0.35em", text_anchor="middle", class_=f"e{band.style}")
                )
        below = [low + value for low, value in zip(below, values, strict=True)]
    return tag("g", names, class_="names")


def _is_clear(plot: Plot, x: float) -> bool:
    """Whether a name may stand there: not at the very edges, where half of it is cut off, and not on a mark."""
    return 0.1 < x < 0.9 and all(abs(x - mark.x / plot.x.top) > 0.1 for mark in plot.marks)


def _middle(plot: Plot, number: int) -> float:
    return (plot.edges[number] + plot.edges[number + 1]) / 2 if plot.stepped else plot.edges[number]


def _levels(plot: Plot) -> Html:
    drawn = []
    for level in plot.levels:
        if level.value > plot.y.top:
            continue
        at = f"{100 - 100 * level.value / plot.y.top:.4g}%"
        until = plot.x.top if level.until is None else level.until
        begin, end = (f"{100 * min(x / plot.x.top, 1.0):.4g}%" for x in (level.since, until))
        drawn.append(tag("line", x1=begin, x2=end, y1=at, y2=at, class_=level.kind))
        high = level.kind == "peak"
        drawn.append(
            tag(
                "text",
                level.name,
                x=begin if high else end,
                dx=6 if high else -6,
                y=at,
                dy="-0.4em",
                text_anchor="start" if high else "end",
                class_=level.kind,
            )
        )
    return tag("g", drawn, class_="levels") if drawn else join()


def _marks(plot: Plot) -> Html:
    drawn = []
    for mark in plot.marks:
        at = f"{100 * min(max(mark.x / plot.x.top, 0.0), 1.0):.4g}%"
        drawn.append(
            tag(
                "g",
                tag("title", mark.text),
                tag("line", x1=at, x2=at, y1="0", y2="100%"),
                tag("text", mark.label, x=at, y="0", dy="-0.3em", text_anchor="middle"),
                class_="mark",
            )
        )
    return join(drawn)


def _key(plot: Plot) -> Html:
    """Which colour and pattern is what, in the order that the stack has from above."""
    items = []
    for band in reversed(plot.bands) if plot.stacked else plot.bands:
        if plot.stacked:
            sample = tag("rect", width=36, height=132, fill=f"url(#p{band.style})", class_=f"e{band.style}")
        else:
            sample = tag("path", d="M0 66H36", class_=f"edge line e{band.style}")
        swatch = tag(
            "svg", sample, class_="swatch", view_box="0 0 36 132", preserve_aspect_ratio="none", aria_hidden="true"
        )
        items.append(tag("li", swatch, " ", band.name))
    return tag("ul", items, class_="key", role="list") if len(items) > 1 else join()
