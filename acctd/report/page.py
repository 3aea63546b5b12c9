"""The frame of a report: one file that asks nobody for anything, and the pieces that sections are made of.

No script, no font, no picture from elsewhere; the policy in its head forbids them even if text of a job's got through.
CSP: https://www.w3.org/TR/CSP3/ ; landmarks and tables after https://www.w3.org/WAI/tutorials/
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from acctd import __version__
from acctd.report import plot
from acctd.report.markup import Child, Html, join, tag

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

STYLES = 6
"""Colours and patterns that there are."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page with a heading, which the list at its top leads to."""

    name: str  # unique on the page
    title: str
    body: Child


@dataclass(frozen=True, slots=True)
class Column:
    """Of a table. Numbers stand at the right; `whole` cells are never broken; `spare` ones go on narrow screens."""

    title: str
    number: bool = False
    whole: bool = False
    spare: bool = False

    @property
    def kind(self) -> str | None:
        """As classes of the sheet."""
        return " ".join(name for name in ("number", "whole", "spare") if getattr(self, name)) or None


def page(title: str, lead: str, sections: Sequence[Section], footer: Child) -> Html:
    """The whole file."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=Html(POLICY)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"{title} - acctd report"),
        # Else a browser asks the server that the file may lie on for one.
        tag("link", rel="icon", href="data:,"),
        tag("style", Html(_style())),
    )
    contents = tag("ul", [tag("li", tag("a", section.title, href=f"#{section.name}")) for section in sections])
    body = tag(
        "body",
        tag("a", "Skip to the report", class_="skip", href="#report"),
        tag("header", tag("h1", title), tag("p", lead, class_="lead"), tag("nav", contents, aria_label="Sections")),
        plot.patterns(STYLES),
        tag("main", [_section(section) for section in sections], id="report", tabindex="-1"),
        tag("footer", tag("p", footer), tag("p", f"Made by acctd {__version__}.")),
    )
    return Html(f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n")


def table(
    caption: str,
    columns: Sequence[Column],
    rows: Sequence[Sequence[Child]],
    *,
    foot: Sequence[Sequence[Child]] = (),
) -> Html:
    """A table, whose first column names each row. Wider ones can be scrolled, by keyboard too.

    Columns in which there is nothing are left out.
    """
    lines = [*rows, *foot]
    used = [n for n in range(len(columns)) if not n or not lines or any(row[n] not in (None, "") for row in lines)]
    columns = [columns[n] for n in used]
    rows, foot = ([[row[n] for n in used] for row in part] for part in (rows, foot))
    heads = [tag("th", column.title, scope="col", class_=column.kind) for column in columns]
    made = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", heads)),
        tag("tbody", [_row(columns, row) for row in rows]),
        tag("tfoot", [_row(columns, row) for row in foot]) if foot else None,
    )
    return tag("div", made, class_="scroll", role="region", tabindex="0", aria_label=caption)


def facts(pairs: Sequence[tuple[str, Child]]) -> Html:
    """Names and values; those without a value are left out."""
    return tag("dl", [join(tag("dt", name), tag("dd", value)) for name, value in pairs if value])


def figure(drawn: plot.Plot, caption: Child, data: Html | None) -> Html:
    """A plot, what it shows in words, and the numbers behind it, unless they stand beside another plot."""
    return tag(
        "figure",
        tag("figcaption", caption),
        plot.draw(drawn),
        None if data is None else tag("details", tag("summary", f"{drawn.title} as a table"), data),
    )


def bar(share: float) -> Html:
    """A share of 1 as a bar, beside which it must also stand as a number."""
    return tag(
        "svg",
        tag("rect", x="0", y="0", width="100%", height="100%", class_="all"),
        tag("rect", x="0", y="0", width=f"{100 * min(max(share, 0.0), 1.0):.3g}%", height="100%", class_="part"),
        class_="bar",
        aria_hidden="true",
    )


def _section(section: Section) -> Html:
    heading = f"{section.name}-heading"
    return tag("section", tag("h2", section.title, id=heading), section.body, id=section.name, aria_labelledby=heading)


def _row(columns: Sequence[Column], row: Sequence[Child]) -> Html:
    cells = []
    for number, (column, cell) in enumerate(zip(columns, row, strict=True)):
        if number:
            cells.append(tag("td", cell, class_=column.kind))
        else:
            cells.append(tag("th", cell, scope="row", class_=column.kind))
    return tag("tr", cells)


@cache
def _style() -> str:
    return Path(__file__).with_name("style.css").read_text()
