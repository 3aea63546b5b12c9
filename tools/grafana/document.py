"""One dashboard in one language as the JSON that Grafana loads: positions, variables, links, how panels look.

Grafana 10 and later. https://grafana.com/docs/grafana/latest/dashboards/build-dashboards/view-dashboard-json-model/
"""

from collections.abc import Sequence
from typing import Any

from tools.grafana.intents import Query
from tools.grafana.languages import JSON, Language
from tools.grafana.panels import LABEL_COLUMNS, Board, Link, Panel, Row

SCHEMA = 39
"""Of the JSON model; Grafana 11.0's. Later ones migrate it, and 10 knows all that is in here."""

_HEIGHT_OF_ROW, _WIDTH = 1, 24
_DASHES: tuple[list[int] | None, ...] = (None, [12, 4], [2, 6], [20, 4, 2, 4])
_LIMIT = [10, 10]
_VARIABLES = {
    "cluster": ("Cluster", "The cluster that an agent's export.cluster names."),
    "host": ("Node", "Nodes; for Prometheus the scraped addresses."),
    "user": ("User", "Owners of jobs."),
    "job": ("Job", "One job."),
    "class": ("Class", "Classes of destinations that are shown."),
    "records": ("Records in", "Retention policy or bucket that records go to."),
}
_PRICES = {
    "price_outgoing": ("Price out", "Of a GB (10^9 bytes) that jobs send."),
    "price_incoming": ("Price in", "Of a GB (10^9 bytes) that jobs get."),
}


def uid(board: str, language: Language) -> str:
    """The same for ever: links and bookmarks hold it."""
    return f"acctd-{board}-{language.name}"


def document(board: Board, boards: Sequence[Board], language: Language) -> JSON:
    """The dashboard; `boards` are all there are, which links may lead to."""
    known = {other.name: variables(other, language) for other in boards}
    return {
        "uid": uid(board.name, language),
        "title": f"{board.title} ({language.title})",
        "description": board.description,
        "tags": ["acctd", f"acctd-{language.name}"],
        "schemaVersion": SCHEMA,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "utc" if board.utc else "browser",
        "time": {"from": board.since, "to": "now"},
        "timepicker": {},
        "refresh": "1m",
        "fiscalYearStartMonth": 0,
        "annotations": {"list": _marks(board, language)},
        "links": [_navigation(language)],
        "templating": {"list": [_variable(name, language) for name in variables(board, language)]},
        "panels": _panels(board, language, known),
    }


def variables(board: Board, language: Language) -> tuple[str, ...]:
    """All of a dashboard's, in their order: those that others depend on come first."""
    records = ("records",) if language.plugin == "influxdb" and "user" in board.variables else ()
    return ("datasource", *board.variables, *records, "step")


def _variable(name: str, language: Language) -> JSON:
    if name == "datasource":
        uid_of_source = f"acctd-{language.name}"
        return {
            "type": "datasource",
            "name": name,
            "label": "Data source",
            "query": language.plugin,
            "regex": "",
            "refresh": 1,
            "hide": 0,
            "current": {"selected": False, "text": f"acctd {language.title}", "value": uid_of_source},
        }
    if name == "step" or name in _PRICES:
        label, about, text = (*_PRICES[name], "0") if name in _PRICES else (
            "Interval at least", "Two ticks of the agents (poll_interval), or more.", "20s",
        )  # fmt: skip
        value = {"selected": True, "text": text, "value": text}
        kind = {"type": "textbox", "name": name, "label": label, "description": about, "query": text, "hide": 0}
        return kind | {"current": value, "options": [value]}
    label, about = _VARIABLES[name]
    found = language.values(name)
    several = name in ("host", "user", "class")
    whole = several or name == "cluster"
    all_of_it = {"selected": True, "text": ["All"], "value": ["$__all"]} if several else {
        "selected": True, "text": "All", "value": "$__all",
    }  # fmt: skip
    variable: JSON = {
        "type": "query",
        "name": name,
        "label": label,
        "description": about,
        "datasource": language.source(),
        "query": found,
        "definition": found["query"] if isinstance(found, dict) else found,
        "refresh": 2,
        "sort": 1,
        "regex": "",
        "hide": 0,
        "multi": several,
        "includeAll": whole,
        "current": all_of_it if whole else {},
    }
    if not whole:
        del variable["current"]
    return variable | ({"allValue": ".*"} if whole else {})


def _marks(board: Board, language: Language) -> list[JSON]:
    own: JSON = {
        "builtIn": 1,
        "datasource": {"type": "grafana", "uid": "-- Grafana --"},
        "enable": True,
        "hide": True,
        "iconColor": "rgba(0, 211, 255, 1)",
        "name": "Annotations & Alerts",
        "type": "dashboard",
    }
    if not board.shortages:
        return [own]
    scope = "job" if "job" in board.variables else "agent"
    look = {"datasource": language.source(), "enable": True, "iconColor": "red", "name": "Out of memory"}
    return [own, look | language.mark(scope)]


def _navigation(language: Language) -> JSON:
    return {
        "title": "acctd",
        "type": "dashboards",
        "icon": "external link",
        "tooltip": "The other dashboards, with the same choice and time",
        "tags": [f"acctd-{language.name}"],
        "asDropdown": False,
        "targetBlank": False,
        "includeVars": True,
        "keepTime": True,
        "url": "",
    }


def _panels(board: Board, language: Language, known: dict[str, tuple[str, ...]]) -> list[JSON]:
    found: list[JSON] = []
    top = 0
    for row in board.rows:
        shown = [panel for panel in row.panels if any(map(language.text, panel.queries))]
        found.append(_row(row, len(found) + 1, top))
        top += _HEIGHT_OF_ROW
        left, tallest = 0, 0
        for panel in shown:
            if left + panel.width > _WIDTH:
                left, top, tallest = 0, top + tallest, 0
            made = _panel(panel, language, variables(board, language), known)
            grid = {"x": left, "y": top, "w": panel.width, "h": panel.height}
            found.append({"id": len(found) + 1, **made, "gridPos": grid})
            left, tallest = left + panel.width, max(tallest, panel.height)
        top += tallest
    return found


def _row(row: Row, number: int, top: int) -> JSON:
    grid = {"x": 0, "y": top, "w": _WIDTH, "h": _HEIGHT_OF_ROW}
    made: JSON = {
        "id": number, "type": "row", "title": row.title, "collapsed": False, "panels": [], "gridPos": grid,
    }  # fmt: skip
    return made | ({"repeat": row.repeat} if row.repeat else {})


def _panel(panel: Panel, language: Language, own: tuple[str, ...], known: dict[str, tuple[str, ...]]) -> JSON:
    queries = [query for query in panel.queries if language.text(query)]
    targets = [
        {"refId": chr(ord("A") + index), "datasource": language.source(), **language.target(panel, query)}
        for index, query in enumerate(queries)
    ]
    links = [_link(link, panel, language, own, known) for link in panel.links]
    look = {"timeseries": _timeseries, "stat": _stat, "table": _table}[panel.kind]
    options, defaults, overrides, transformations = look(panel, language, queries)
    if panel.kind == "table":
        overrides += [
            _by("byName", column.name, [("links", [_link(column.link, panel, language, own, known)])])
            for label in panel.labels
            if (column := LABEL_COLUMNS[label]).link is not None
        ]
    elif any("rule" in query.legend for query in queries) and not language.display(""):
        # A column's name is all that says which rule it is.
        rename = {"regex": ".*network_(.*)_bytes.*", "renamePattern": "$1"}
        transformations.append({"id": "renameByRegex", "options": rename})
    config = {"unit": panel.unit, **defaults} | ({"links": links} if links else {})
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": language.source(),
        "interval": "1d" if panel.daily else "$step",
        "targets": targets,
        "fieldConfig": {"defaults": config, "overrides": overrides},
        "options": options,
        "transformations": transformations,
    }


Look = tuple[JSON, JSON, list[JSON], list[JSON]]
"""Options, defaults of fields, overrides of fields, transformations."""


def _timeseries(panel: Panel, language: Language, queries: list[Query]) -> Look:
    calcs = ["sum"] if panel.bars else ["lastNotNull", "mean", "max"]
    options: JSON = {
        "legend": {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": calcs},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    stacking = {"mode": "normal" if panel.stacked else "none", "group": "A"}
    custom: JSON = {
        "drawStyle": "bars" if panel.bars else "line",
        "lineWidth": 1,
        "fillOpacity": 70 if panel.bars else 30 if panel.stacked else 8,
        "showPoints": "auto",
        "spanNulls": False,
        "stacking": stacking,
    }
    defaults: JSON = {"custom": custom, "color": {"mode": "palette-classic"}}
    if not panel.below:
        defaults["min"] = 0
    overrides = _names(language, queries)
    plain = [query for query in queries if query.legend not in panel.limits]
    for index, query in enumerate(queries):
        ref = chr(ord("A") + index)
        if query.legend in panel.limits:
            line = {"fill": "dash", "dash": _LIMIT}
            apart = {"mode": "none", "group": "limit"}
            kept = [("custom.lineStyle", line), ("custom.lineWidth", 2), ("custom.fillOpacity", 0)]
            overrides.append(_by("byFrameRefID", ref, [*kept, ("custom.stacking", apart)]))
        elif not panel.bars and not panel.stacked and len(plain) > 1 and (dash := _DASHES[index % len(_DASHES)]):
            overrides.append(_by("byFrameRefID", ref, [("custom.lineStyle", {"fill": "dash", "dash": dash})]))
    if panel.below:
        overrides.append(_by("byRegexp", panel.below, [("custom.transform", "negative-Y")]))
    return options, defaults, overrides, []


def _stat(panel: Panel, language: Language, queries: list[Query]) -> Look:
    options: JSON = {
        "graphMode": "none",
        "colorMode": "none",
        "justifyMode": "auto",
        "textMode": "value_and_name",
        "wideLayout": True,
        "showPercentChange": False,
        "percentChangeColorMode": "standard",
        "orientation": "auto",
        "reduceOptions": {"calcs": [panel.calc], "fields": "", "values": False},
    }
    return options, {"color": {"mode": "palette-classic"}}, _names(language, queries), []


def _table(panel: Panel, language: Language, queries: list[Query]) -> Look:
    options: JSON = {"showHeader": True, "frameIndex": 0, "cellHeight": "sm"}
    if not panel.when and panel.columns:
        options["sortBy"] = [{"displayName": panel.columns[0].name, "desc": True}]
    renamed = {language.labels.get(label, label): LABEL_COLUMNS[label].name for label in panel.labels}
    renamed |= {language.column(panel, index, query): query.legend for index, query in enumerate(queries)}
    renamed = {old: new for old, new in renamed.items() if old != new}
    hidden = {}
    if not panel.when or language.name == "prometheus":
        hidden["Time"] = True
    if language.name == "prometheus":
        hidden["job"] = True  # the scrape's, see promql.LABELS
    else:
        renamed |= {"_time": "Time", "time": "Time"} if panel.when else {}
    transformations = [{"id": "merge", "options": {}}] if len(queries) > 1 else []
    order = {"excludeByName": hidden, "indexByName": {}, "renameByName": renamed}
    overrides = [_by("byName", column.name, [("unit", column.unit)]) for column in panel.columns]
    custom = {"align": "auto", "inspect": False, "filterable": True}
    return options, {"custom": custom}, overrides, [*transformations, {"id": "organize", "options": order}]


def _names(language: Language, queries: list[Query]) -> list[JSON]:
    """Of series, where a target cannot name them itself."""
    return [
        _by("byFrameRefID", chr(ord("A") + index), [("displayName", name)])
        for index, query in enumerate(queries)
        if (name := language.display(query.legend))
    ]


def _by(matcher: str, options: str, properties: Sequence[tuple[str, Any]]) -> JSON:
    return {
        "matcher": {"id": matcher, "options": options},
        "properties": [{"id": name, "value": value} for name, value in properties],
    }


def _link(
    link: Link, panel: Panel, language: Language, own: tuple[str, ...], known: dict[str, tuple[str, ...]]
) -> JSON:
    """What was clicked on, and all else that both dashboards have, goes along."""
    sets = {}
    for variable, label in link.sets:
        if panel.kind == "table":
            if label in panel.labels:
                sets[variable] = f"${{__data.fields.{LABEL_COLUMNS[label].name}:percentencode}}"
        elif any(label in getattr(query, "by", ()) or f"{{{label}}}" in query.legend for query in panel.queries):
            sets[variable] = f"${{__field.labels.{language.labels.get(label, label)}:percentencode}}"
    parts = []
    for variable in known[link.to]:
        if variable in sets:
            parts.append(f"var-{variable}={sets[variable]}")
        elif variable in own:
            parts.append(f"${{{variable}:queryparam}}")
    parts.append("${__url_time_range}")
    return {
        "title": f"Show the {link.to}",
        "url": f"/d/{uid(link.to, language)}?{'&'.join(parts)}",
        "targetBlank": False,
        # The schema has one type for all links; what follows means something to a dashboard's own only.
        "type": "link",
        "icon": "",
        "tooltip": "",
        "tags": [],
        "asDropdown": False,
        "includeVars": False,
        "keepTime": False,
    }
