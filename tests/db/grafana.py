"""What Grafana does to a query before it sends it: variables in their formats, intervals and the time filter. Pure.

After grafana/grafana: the InfluxDB data source's macros, the Prometheus one's interpolateQueryExpr and
getRateIntervalScopedVariable, and templateSrv's `regex` and `raw` formats.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

JSON = dict[str, Any]
ALL = "$__all"
DASHBOARDS = Path(__file__).parents[2] / "dashboards"

_VARIABLE = re.compile(r"\$\{(\w+)(?::(\w+))?\}|\$(\w+)|\[\[(\w+)\]\]")


class View(NamedTuple):
    """What somebody has chosen at the top: values by variable, and the time in s since the epoch."""

    values: Mapping[str, str | list[str]]
    since: float
    until: float
    scrape: int = 15  # s between two scrapes, as the data source says

    @property
    def range(self) -> int:
        return round(self.until - self.since)


class Asked(NamedTuple):
    """One query of a dashboard."""

    board: str
    panel: JSON
    target: JSON


def boards(language: str) -> list[JSON]:
    """All dashboards of a language."""
    return [json.loads(path.read_text()) for path in sorted((DASHBOARDS / language).glob("*.json"))]


def queries(board: JSON) -> Iterator[Asked]:
    """Of all panels and annotations."""
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield Asked(board["uid"], panel, target)
    for mark in board["annotations"]["list"]:
        if not mark.get("builtIn"):
            target = mark.get("target") or {"refId": "Anno", "expr": mark["expr"], "range": True}
            yield Asked(board["uid"], {"title": mark["name"], "type": "annotation", "interval": "$step"}, target)


def variables(board: JSON) -> dict[str, JSON]:
    return {each["name"]: each for each in board["templating"]["list"]}


def interval(board: JSON, panel: JSON, target: JSON, view: View) -> int:
    """$__interval in s: the range over 1000 points, the panel's or query's least if that is more."""
    least = target.get("interval") or replace(board, panel["interval"], view, str)
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    return max(view.range // 1000, int(least[:-1]) * units[least[-1]])


def influxql(board: JSON, asked: Asked, view: View) -> str:
    text = asked.target["query"].replace("$timeFilter", time_filter(view))
    text = text.replace("$__interval", f"{interval(board, asked.panel, asked.target, view)}s")
    return replace(board, text, view, _plain)


def time_filter(view: View) -> str:
    return f"time >= {round(view.since * 1000)}ms and time <= {round(view.until * 1000)}ms"


def flux(board: JSON, asked: Asked, view: View) -> str:
    return flux_text(board, asked.target["query"], interval(board, asked.panel, asked.target, view), view)


def flux_text(board: JSON, text: str, step: int, view: View) -> str:
    """Constants stand for the times: it is parsed, not run."""
    text = text.replace("v.timeRangeStart", "2026-03-01T00:00:00Z").replace("v.timeRangeStop", "2026-03-02T00:00:00Z")
    text = text.replace("v.windowPeriod", f"{step}s").replace("v.defaultBucket", '"bucket"')
    return replace(board, text, view, _plain)


def promql(board: JSON, asked: Asked, view: View) -> tuple[str, int]:
    """The expression, and its step in s."""
    step = interval(board, asked.panel, asked.target, view)
    return promql_text(board, asked.target["expr"], step, view), step


def promql_text(board: JSON, text: str, step: int, view: View) -> str:
    rate = max(step + view.scrape, 4 * view.scrape)
    for name, seconds in (("$__rate_interval", rate), ("$__interval", step), ("$__range", view.range)):
        text = text.replace(name, f"{seconds}s")
    return replace(board, text, view, _of_prometheus)


def replace(board: JSON, text: str, view: View, plain: Any) -> str:
    """Every variable in its format. Raises KeyError for one that the dashboard does not declare."""
    declared = variables(board)

    def value(match: re.Match[str]) -> str:
        name, form = match[1] or match[3] or match[4], match[2]
        variable, chosen = declared[name], view.values[name]
        if chosen in (ALL, [ALL]):
            return str(variable["allValue"])  # as it is, whatever the format
        if form == "regex":
            return _one_or_many([_regex(each) for each in _list(chosen)])
        if form == "raw":
            assert isinstance(chosen, str), f"{name} is a list, which raw makes {{a,b}} of"
            return chosen
        assert form is None, form
        return str(plain(chosen) if plain is not _of_prometheus else plain(chosen, variable))

    return _VARIABLE.sub(value, text)


def _list(chosen: str | list[str]) -> list[str]:
    return [chosen] if isinstance(chosen, str) else chosen


def _regex(text: str) -> str:
    return re.sub(r"[\\^$*+?.()|\[\]{}/]", r"\\\g<0>", text)


def _one_or_many(values: list[str]) -> str:
    return values[0] if len(values) == 1 else f"({'|'.join(values)})"


def _plain(chosen: str | list[str]) -> str:
    assert isinstance(chosen, str), "a list without a format"
    return chosen


def _of_prometheus(chosen: str | list[str], variable: JSON) -> str:
    if not variable.get("multi") and not variable.get("includeAll"):
        assert isinstance(chosen, str)
        return chosen.replace("\\", "\\\\").replace("'", "\\\\'")
    return _one_or_many([_special(each) for each in _list(chosen)])


def _special(text: str) -> str:
    text = text.replace("\\", "\\\\\\\\")
    return re.sub(r"[$^*{}\[\]'+?.()|]", r"\\\\\g<0>", text)
