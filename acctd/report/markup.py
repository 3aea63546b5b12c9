"""HTML and SVG as nested calls, so that nothing can be forgotten to be escaped: a plain string is text, always.

Knows no report. HTML: https://html.spec.whatwg.org/multipage/syntax.html
"""

import html
from collections.abc import Iterable

from acctd.wording import clean

_VOID = frozenset({"meta", "link"})


class Html(str):
    """Markup. Only tag() and join() make it of what others wrote."""

    __slots__ = ()


Child = str | None | Iterable["Child"]
"""Markup, or text that is escaped; None is nothing."""


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Html:
    """One element. `class_` is class, `aria_label` is aria-label; True has no value, None and False are left out."""
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Child) -> Html:
    """One after the other."""
    return Html("".join(_escaped(child) for child in children))


def _escaped(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, str):
        # Control characters and those that turn the direction of writing would show other text than there is.
        return html.escape(clean(child))
    return join(*child)


def _attribute(key: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-") if key not in _CAMEL else _CAMEL[key]
    if value is True:
        return f" {name}"
    text = value if isinstance(value, Html) else html.escape(clean(str(value)))
    return f' {name}="{text}"'


# SVG has names in mixed case, which are lower case nowhere.
_CAMEL = {
    "view_box": "viewBox",
    "preserve_aspect_ratio": "preserveAspectRatio",
    "pattern_units": "patternUnits",
}
