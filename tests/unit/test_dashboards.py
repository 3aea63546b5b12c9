"""The dashboards as Grafana gets them: what the generator makes, of Grafana's own types, and nothing leads nowhere."""

import importlib
import json
import re
import time
import types
import warnings
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from urllib.parse import parse_qsl, urlsplit

import pytest

from acctd.frames import AgentSample, Sample
from acctd.metrics import CATALOGUE, LIMITS
from exporters.board import Board
from exporters.delivery import Delivery
from exporters.lineprotocol import record_field
from exporters.prometheus import AGENT, Exposition
from tools.grafana.__main__ import BOARDS, files

with warnings.catch_warnings():
    # It advises the newer of the two forms that Grafana takes, which Grafana 10 and 11 do not know.
    warnings.simplefilter("ignore", DeprecationWarning)
    from grafana_foundation_sdk.cog import plugins
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models import dashboard, prometheus, units

HERE = Path(__file__).parents[2] / "dashboards"
FILES = files()
DOCUMENTS = {name: json.loads(text) for name, text in FILES.items()}
UIDS = {document["uid"]: document for document in DOCUMENTS.values()}
LANGUAGES = ("influxql", "flux", "prometheus")
TAGS = {"cluster", "host", "owner", "scheduler", "job", "parent", "event", "class", "direction", "device", "mount"}

every = pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS.keys())
of_influx = pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS.values() if "prometheus" not in d["uid"]], ids=lambda d: d["uid"]
)


def panels(document):
    return [panel for panel in document["panels"] if panel["type"] != "row"]


def queries(document):
    for panel in panels(document):
        for target in panel["targets"]:
            yield target.get("query") or target["expr"]
    for mark in document["annotations"]["list"]:
        if not mark.get("builtIn"):
            yield mark["expr"] if "expr" in mark else mark["target"]["query"]


def declared(document):
    return {variable["name"] for variable in document["templating"]["list"]}


def test_the_files_are_what_the_generator_makes():
    found = {str(path.relative_to(HERE)): path.read_text() for path in HERE.glob("*/*.json")}
    assert found.keys() == FILES.keys()
    stale = [name for name in FILES if found[name] != FILES[name]]
    assert not stale, "run python -m tools.grafana"
    assert len(FILES) == len(BOARDS) * len(LANGUAGES) == 15


# -- Grafana's schema, as its own Python types state it


def lost(given, kept, at=""):
    """What of a document those types do not have, or have otherwise."""
    if isinstance(given, dict):
        if not isinstance(kept, dict):
            return [at]
        missing = [f"{at}.{key}" for key in given if key not in kept]
        return missing + [each for key in given if key in kept for each in lost(given[key], kept[key], f"{at}.{key}")]
    if isinstance(given, list):
        if not isinstance(kept, list) or len(given) != len(kept):
            return [at]
        return [each for a, b in zip(given, kept, strict=True) for each in lost(a, b, f"{at}[]")]
    return [] if given == kept else [f"{at}: {given!r} is {kept!r}"]


def ill_typed(value, hint, at=""):
    """Where a value is not of the type that its model declares."""
    origin = get_origin(hint)
    if hint in (Any, object) or getattr(hint, "_is_protocol", False):
        return []
    if origin in (Union, types.UnionType):
        tries = [ill_typed(value, each, at) for each in get_args(hint)]
        return [] if [] in tries else max(tries, key=len)
    if origin is Literal:
        return [] if value in get_args(hint) else [f"{at}: {value!r}"]
    if origin is list:
        if not isinstance(value, list):
            return [f"{at}: {value!r}"]
        return [each for one in value for each in ill_typed(one, get_args(hint)[0], f"{at}[]")]
    if origin is dict:
        if not isinstance(value, dict):
            return [f"{at}: {value!r}"]
        return [each for key, one in value.items() for each in ill_typed(one, get_args(hint)[1], f"{at}.{key}")]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [] if value in [*hint, *(each.value for each in hint)] else [f"{at}: {value!r}"]
    if hint is float:
        return [] if isinstance(value, int | float) and not isinstance(value, bool) else [f"{at}: {value!r}"]
    if hint is int and isinstance(value, bool):
        return [f"{at}: {value!r}"]
    if isinstance(value, dict) and hasattr(hint, "from_json"):  # some lists are left as they were
        made = hint.from_json(value)
        return lost(value, json.loads(json.dumps(made, cls=JSONEncoder)), at) + models(made, at)
    if not isinstance(value, hint):
        return [f"{at}: {value!r} is no {hint}"]
    return models(value, at)


def models(value, at=""):
    """The same for all that a model holds; a plugin's options and fields are models of their own."""
    if isinstance(value, Enum) or not type(value).__module__.startswith("grafana_foundation_sdk.models"):
        return []
    hints = get_type_hints(type(value), vars(importlib.import_module(type(value).__module__)))
    found = []
    for name, one in vars(value).items():
        hint = hints[name]
        found += ill_typed(one, hint, f"{at}.{name}")
        if hint in (Any, object) or object in get_args(hint):
            found += models(one, f"{at}.{name}")
    return found


@every
def test_grafana_s_types_take_it(document):
    plugins.register_default_plugins()
    loaded = dashboard.Dashboard.from_json(json.loads(json.dumps(document)))
    assert lost(document, json.loads(json.dumps(loaded, cls=JSONEncoder))) == []
    assert models(loaded) == []
    for panel in loaded.panels:
        if isinstance(panel, dashboard.Panel):  # else it would be checked for nothing
            assert type(panel.options).__module__.endswith(f".{panel.type_val}")
    for panel in panels(document):
        for target in panel["targets"]:
            if panel["datasource"]["type"] == "prometheus":
                query = prometheus.Dataquery.from_json(dict(target))
                assert lost(target, json.loads(json.dumps(query, cls=JSONEncoder))) == []
            else:  # InfluxDB's queries have no published schema: what its editor writes
                known = {"refId", "datasource", "query", "rawQuery", "resultFormat", "alias"}
                assert target.keys() <= known


@pytest.mark.parametrize(
    ("where", "wrong"),
    [
        ((), {"tagz": []}),
        ((), {"editable": "yes"}),
        (("panels", 6), {"descriptoin": "x"}),
        (("panels", 6, "gridPos"), {"w": "12"}),
        (("panels", 6, "options", "legend"), {"displayMode": "chart"}),
        (("panels", 6, "fieldConfig", "defaults", "custom"), {"drawStyle": "lines"}),
        (("panels", 6, "fieldConfig", "defaults"), {"units": "s"}),
        (("templating", "list", 1), {"type": "querry"}),
    ],
)
def test_the_check_of_types_sees_faults(where, wrong):
    plugins.register_default_plugins()
    document = json.loads(FILES["influxql/job.json"])
    assert document["panels"][6]["type"] == "timeseries"
    place = document
    for step in where:
        place = place[step]
    place.update(wrong)
    loaded = dashboard.Dashboard.from_json(document)
    assert lost(document, json.loads(json.dumps(loaded, cls=JSONEncoder))) + models(loaded)


# -- What people see


def test_uids_are_stable_and_titles_apart():
    assert {document["uid"] for document in DOCUMENTS.values()} == {
        f"acctd-{board}-{language}" for board in ("job", "user", "bill", "node", "agent") for language in LANGUAGES
    }
    assert len({document["title"] for document in DOCUMENTS.values()}) == 15
    assert all(len(uid) <= 40 for uid in UIDS)


@every
def test_panels_have_ids_of_their_own_and_do_not_overlap(document):
    ids = [panel["id"] for panel in document["panels"]]
    assert len(set(ids)) == len(ids)
    taken = set()
    for panel in document["panels"]:
        grid = panel["gridPos"]
        assert grid["x"] + grid["w"] <= 24
        cells = {
            (x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


@every
def test_every_panel_says_what_it_is_and_in_which_unit(document):
    known = {value for value in vars(units).values() if isinstance(value, str)}
    for panel in panels(document):
        assert panel["title"] and panel["description"].endswith(".")
        found = [panel["fieldConfig"]["defaults"]["unit"]]
        overrides = panel["fieldConfig"]["overrides"]
        found += [one["value"] for each in overrides for one in each["properties"] if one["id"] == "unit"]
        for unit in found:
            assert unit in known or unit == "string" or unit.startswith("suffix:"), (panel["title"], unit)
        assert panel["targets"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    assert document["description"]


@every
def test_variables_that_are_used_are_declared_and_those_before(document):
    names = declared(document)
    grafana_s = {"__url_time_range", "__interval", "__rate_interval", "__range", "timeFilter", "__data", "__field"}
    text = json.dumps([document["panels"], document["annotations"]])
    used = set(re.findall(r"\$\{?(\w+)", text)) - grafana_s
    # What InfluxQL's aliases and Prometheus' marks put in for labels.
    used = {name for name in used if not name.startswith("tag_") and name not in ("col", "1")}
    assert used <= names, used - names
    assert {"datasource", "cluster", "host"} <= names
    seen = {"datasource"}
    for variable in document["templating"]["list"]:
        query = json.dumps([variable.get("query"), variable.get("datasource")])
        needs = set(re.findall(r"\$\{?(\w+)", query)) - grafana_s
        assert needs <= seen, f"{variable['name']} is before what it depends on"
        assert variable["label"]
        seen.add(variable["name"])
    sources = {json.dumps(each) for each in find(document["panels"], "datasource")}
    assert sources == {json.dumps({"type": sources_of(document), "uid": "${datasource}"})}


def sources_of(document):
    return "prometheus" if "prometheus" in document["uid"] else "influxdb"


def find(value, key):
    """All values of a key, at any depth."""
    if isinstance(value, dict):
        for name, one in value.items():
            if name == key:
                yield one
            yield from find(one, key)
    elif isinstance(value, list):
        for one in value:
            yield from find(one, key)


@every
def test_links_lead_to_dashboards_and_take_the_choice_along(document):
    language = document["uid"].rpartition("-")[2]
    links = [link for group in find(document["panels"], "links") for link in group]
    links += [
        link
        for each in find(document["panels"], "properties")
        for one in each
        if one["id"] == "links"
        for link in one["value"]
    ]
    for link in links:
        parts = urlsplit(link["url"])
        target = UIDS[parts.path.removeprefix("/d/")]
        assert target["uid"].endswith(language)
        sets = {name.removeprefix("var-"): value for name, value in parse_qsl(parts.query) if name.startswith("var-")}
        passed = set(re.findall(r"\$\{(\w+):queryparam\}", parts.query))
        assert not sets.keys() & passed, "a variable would be there twice"
        assert passed <= declared(document)
        assert sets.keys() | passed <= declared(target)
        assert declared(document) & declared(target) <= sets.keys() | passed
        assert sets, f"{link['url']} takes nothing of what was clicked on"
        assert "${__url_time_range}" in parts.query
    if "agent" not in document["uid"] and "job" not in document["uid"]:
        assert links
    (navigation,) = document["links"]
    assert navigation["includeVars"] and navigation["keepTime"]
    assert set(navigation["tags"]) <= set(document["tags"])


def test_one_comes_from_every_dashboard_to_those_of_job_user_node_and_bill():
    for language in LANGUAGES:
        ways = {
            board: set(re.findall(rf"/d/acctd-(\w+)-{language}", FILES[f"{language}/{board}.json"]))
            for board in ("job", "user", "bill", "node", "agent")
        }
        assert ways["job"] >= {"user", "node"}
        assert ways["user"] >= {"job", "node", "bill"}
        assert ways["node"] >= {"job", "user", "bill"}
        assert ways["bill"] >= {"user"}
        assert ways["agent"] >= {"node"}


@every
def test_links_of_tables_name_columns_that_are_there(document):
    for panel in panels(document):
        text = json.dumps(panel)
        fields = set(re.findall(r"\$\{__data\.fields\.(\w+)", text))
        if panel["type"] != "table":
            assert not fields
            labels = set(re.findall(r"\$\{__field\.labels\.(\w+):", text))
            queried = " ".join(target.get("query") or target["expr"] for target in panel["targets"])
            assert all(label in queried for label in labels)
            continue
        organize = next(each for each in panel["transformations"] if each["id"] == "organize")
        assert fields <= set(organize["options"]["renameByName"].values())


@every
def test_nothing_is_told_by_colour_alone(document):
    for panel in panels(document):
        config = panel["fieldConfig"]
        if panel["type"] == "timeseries":
            assert panel["options"]["legend"]["displayMode"] == "table" and panel["options"]["legend"]["showLegend"]
            assert panel["options"]["tooltip"]["mode"] == "multi"
            custom = config["defaults"]["custom"]
            styles = {
                each["matcher"]["options"]: {one["id"]: one["value"] for one in each["properties"]}
                for each in config["overrides"]
                if each["matcher"]["id"] == "byFrameRefID"
            }
            dashes = [json.dumps(styles.get(t["refId"], {}).get("custom.lineStyle")) for t in panel["targets"]]
            apart = custom["stacking"]["mode"] != "none" or custom["drawStyle"] == "bars"
            limits = [d for t, d in zip(panel["targets"], dashes, strict=True) if "limit" in json.dumps(t.get("alias"))]
            assert "null" not in limits
            assert apart or len(set(dashes)) == len(dashes), panel["title"]
        elif panel["type"] == "stat":
            assert panel["options"]["textMode"] == "value_and_name"
            assert panel["options"]["colorMode"] == "none"
        assert "thresholds" not in config["defaults"]


# -- What is named is written by somebody


class Nowhere:
    identity, streams, batch = "x", ("samples",), 1


def published(tmp_path):
    """All names and labels that /metrics can have: those of a node on which there is everything."""
    board = Board(grace=300)
    totals = {
        metric.name: dict.fromkeys({0: [""], 1: ["x"], 2: ["OutgoingX"]}[len(metric.labels)], 1) for metric in CATALOGUE
    }
    now = time.time_ns()
    limits = dict.fromkeys(LIMITS, 1)
    board.take(Sample(now, "1", "a", 1, 1.0, "nat", totals, "p", {}, limits))
    board.take(AgentSample(now, 10.0, "1", dict.fromkeys(AGENT, 1.0)))
    delivery = Delivery("x", Nowhere(), tmp_path, tmp_path)
    delivery.numbers().counts.dropped["samples"] = 1
    delivery.numbers().accepted = 1.0
    text = Exposition(board, "c", ("x",), {"x": delivery}).render(False).decode()
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if match := re.match(r"(\w+)(?:\{(.*)\})? ", line):
            found.setdefault(match[1], set()).update(re.findall(r'(\w+)="', match[2] or ""))
    return found


def test_prometheus_names_and_labels_are_published(tmp_path):
    known = published(tmp_path)
    seen = set()
    for name, document in DOCUMENTS.items():
        if not name.startswith("prometheus/"):
            continue
        asked = [*queries(document)]
        asked += [v["query"]["query"] for v in document["templating"]["list"] if v["type"] == "query"]
        for text in asked:
            for metric, matchers in re.findall(r"\b(acctd_\w+)(?:\{([^}]*)\})?", text):
                assert metric in known, metric
                labels = set(re.findall(r"(\w+)(?:=~|=)", matchers))
                assert labels <= known[metric] | {"instance"}, (metric, labels)
                seen.add(metric)
    assert len(seen) > 50


@of_influx
def test_influx_names_are_written(document):
    fields: dict[str, set[str]] = {"acctd_agent": set(AGENT), "acctd_event": {"text", "number"}}
    for metric in CATALOGUE:
        fields.setdefault(metric.measurement, set()).add(metric.field)
    fields["acctd_limit"] = {"memory_bytes", "memory_soft_bytes", "swap_bytes", "cpus", "pids"}
    fields["acctd_record"] = {record_field(metric) for metric in CATALOGUE} | {"state", "exit_code", "wall_ns"}
    for text in queries(document):
        flux = text.lstrip().startswith(("from(", "import"))
        measured = re.findall(r'r\._measurement == "(\w+)"' if flux else r'"(acctd_\w+)"', text)
        assert measured
        (measurement,) = set(measured)
        if flux:
            used = set(re.findall(r'r\._field == "(\w+)"', text))
            if measurement == "acctd_record":
                used |= (
                    set(re.findall(r"r\.(\w+)", text)) - TAGS - {"_measurement", "_field", "_time", "_value", "rule"}
                )
        else:
            selected = re.sub(r'AS "[^"]*"', "", text.replace("${class:raw}", "X"))
            named = re.findall(r'"(\w+)"', selected)
            used = {name for name in named if not name.startswith(("acctd_", "network_")) and name not in {"v"} | TAGS}
        assert used <= fields[measurement], used - fields[measurement]


def test_sums_over_jobs_take_top_level_jobs_only():
    for name, document in DOCUMENTS.items():
        board = name.split("/")[1]
        for text in queries(document):
            if board not in ("user.json", "node.json", "bill.json") or "acctd_event" in text:
                continue
            if "oom_kills" in text and "increase" in text and "> 0" in text:
                continue  # a mark at a time, no sum
            assert re.search(r"parent\"? ={1,2} ['\"]-['\"]|parent=\"-\"", text), (name, text)


def test_counters_are_shown_as_rates_or_as_totals():
    """Nowhere is a counter's level drawn over time."""
    counters = {metric.prometheus for metric in CATALOGUE if metric.kind == "counter"}
    fields = {(metric.measurement, metric.field) for metric in CATALOGUE if metric.kind == "counter"}
    looked = 0
    for document in DOCUMENTS.values():
        for panel in panels(document):
            for target in panel["targets"]:
                text = target.get("query") or target["expr"]
                if panel["type"] != "timeseries":
                    continue
                for counter in counters:
                    for match in re.finditer(rf"(\w+)\({counter}\b", text):
                        looked += 1
                        assert match[1] in ("rate", "increase", "last_over_time")
                    assert counter not in text or "(" + counter in text
                for measurement, field in fields:
                    if f'"{measurement}"' in text and f'last("{field}")' in text and "count(" not in text:
                        looked += 1
                        assert (
                            f'non_negative_derivative(last("{field}")' in text or f'difference(last("{field}")' in text
                        )
    assert looked > 30


# -- Provisioning


def test_provisioning_names_the_data_sources_that_dashboards_begin_with():
    sources = (HERE / "provisioning/datasources/acctd.yaml").read_text()
    given = set(re.findall(r"^\s+uid: (\S+)$", sources, re.MULTILINE))
    assert given == {
        variable["current"]["value"]
        for document in DOCUMENTS.values()
        for variable in document["templating"]["list"]
        if variable["name"] == "datasource"
    }
    providers = (HERE / "provisioning/dashboards/acctd.yaml").read_text()
    paths = re.findall(r"^\s+path: (\S+)$", providers, re.MULTILINE)
    assert {Path(path).name for path in paths} == set(LANGUAGES)
    assert not re.search(r"(password|token): (?!\$)", sources), "a secret stands in it"


def test_the_page_names_every_dashboard_panel_and_variable():
    page = " ".join((HERE.parent / "docs" / "dashboards.md").read_text().split())
    for document in DOCUMENTS.values():
        for name in declared(document):
            assert f"`{name}`" in page, name
    titles = {panel["title"].removeprefix("$class: ") for d in DOCUMENTS.values() for panel in panels(d)}
    missing = [title for title in sorted(titles) if title.lower() not in page.lower()]
    assert not missing
