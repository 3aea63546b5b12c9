"""What is different between the languages, as Grafana wants it: targets, variables, marks. Texts are the others'."""

# ruff: noqa: S608  # the queries of dashboards, run by whoever looks at one with the rights of its data source

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from tools.grafana import flux, influxql, promql
from tools.grafana.intents import Query
from tools.grafana.panels import Panel

JSON = dict[str, Any]

OUT_OF_MEMORY = "out-of-memory"  # the event


class Language(ABC):
    """One of them."""

    name: ClassVar[str]
    plugin: ClassVar[str]
    title: ClassVar[str]
    labels: ClassVar[dict[str, str]] = {}
    """Labels that have another name in this database."""

    def source(self) -> JSON:
        return {"type": self.plugin, "uid": "${datasource}"}

    @abstractmethod
    def text(self, query: Query) -> str:
        """The query; "" where there is none in this language."""

    @abstractmethod
    def target(self, panel: Panel, query: Query) -> JSON:
        """As a panel's target, without refId."""

    @abstractmethod
    def values(self, variable: str) -> JSON | str:
        """The query that finds a variable's values."""

    @abstractmethod
    def mark(self, scope: str) -> JSON:
        """What of an annotation is the language's: times at which memory ran out."""

    def column(self, panel: Panel, index: int, query: Query) -> str:
        """What the value of a table's query is called in its answer."""
        return query.legend

    def display(self, legend: str) -> str:
        """The name of a series where the target itself cannot say it."""
        return ""


class InfluxQL(Language):
    name, plugin, title = "influxql", "influxdb", "InfluxQL"

    def text(self, query: Query) -> str:
        return influxql.text(query)

    def target(self, panel: Panel, query: Query) -> JSON:
        if panel.kind == "table":
            return {"query": self.text(query), "rawQuery": True, "resultFormat": "table"}
        alias = influxql.alias(query.legend)
        return {"query": self.text(query), "rawQuery": True, "resultFormat": "time_series", "alias": alias}

    def values(self, variable: str) -> str:
        where = {
            "cluster": "",
            "host": 'WHERE "cluster" =~ /^${cluster:regex}$/',
            "owner": f"WHERE {influxql.WHERE['agent']}",
            "job": f'WHERE {influxql.WHERE["agent"]} AND "owner" =~ /^${{user:regex}}$/',
            "class": f"WHERE {influxql.WHERE['agent']}",
        }
        if variable == "records":
            return "SHOW RETENTION POLICIES"
        key, measurement = _where(variable)
        return f'SHOW TAG VALUES FROM "{measurement}" WITH KEY = "{key}" {where[key]}'.strip()

    def mark(self, scope: str) -> JSON:
        query = (
            f'SELECT "text", "job" FROM "acctd_event" WHERE $timeFilter AND "event" = \'{OUT_OF_MEMORY}\' AND '
            f"{influxql.WHERE[scope]}"
        )
        columns = {"textColumn": "text", "tagsColumn": "job", "textEditor": True, "fromAnnotations": True}
        return {"target": {"refId": "Anno", "query": query, "rawQuery": True, "resultFormat": "table", **columns}}


class Flux(Language):
    name, plugin, title = "flux", "influxdb", "Flux"

    def text(self, query: Query) -> str:
        return flux.text(query)

    def target(self, panel: Panel, query: Query) -> JSON:
        script = self.text(query)
        if panel.kind == "table" and query.by_columns is not None:
            script = flux.table(script, query.legend, query.by_columns)
        return {"query": script}

    def values(self, variable: str) -> str:
        where = {
            "cluster": "",
            "host": " and r.cluster =~ /^${cluster:regex}$/",
            "owner": f" and {flux.WHERE['agent']}",
            "job": f" and {flux.WHERE['agent']} and r.owner =~ /^${{user:regex}}$/",
            "class": f" and {flux.WHERE['agent']}",
        }
        if variable == "records":
            names = '|> rename(columns: {name: "_value"}) |> keep(columns: ["_value"])'
            return f"buckets() |> filter(fn: (r) => r.name !~ /^_/) {names}"
        key, measurement = _where(variable)
        return (
            'import "influxdata/influxdb/schema"\n\n'
            f'schema.tagValues(bucket: v.defaultBucket, tag: "{key}", predicate: (r) => r._measurement == '
            f'"{measurement}"{where[key]}, start: v.timeRangeStart)'
        )

    def mark(self, scope: str) -> JSON:
        lines = (
            "from(bucket: v.defaultBucket)",
            flux.RANGE,
            f'|> filter(fn: (r) => r._measurement == "acctd_event" and r._field == "text" and r.event == '
            f'"{OUT_OF_MEMORY}" and {flux.WHERE[scope]})',
            "|> group()",
            '|> keep(columns: ["_time", "_value", "job"])',
            '|> rename(columns: {_time: "time", _value: "text"})',
        )
        return {"target": {"refId": "Anno", "query": "\n  ".join(lines)}}

    def display(self, legend: str) -> str:
        return flux.name(legend)


class PromQL(Language):
    name, plugin, title = "prometheus", "prometheus", "Prometheus"
    labels = promql.LABELS

    def text(self, query: Query) -> str:
        return promql.text(query)

    def target(self, panel: Panel, query: Query) -> JSON:
        at_end = promql.instant(query)
        target = {
            "expr": self.text(query),
            "editorMode": "code",
            "instant": at_end,
            "range": not at_end,
            "format": "table" if panel.kind == "table" else "time_series",
            "legendFormat": promql.legend(query.legend),
        }
        return target | ({"interval": "1d"} if panel.daily else {})

    def values(self, variable: str) -> JSON:
        of = {
            "cluster": "acctd_agent_info, cluster",
            "host": 'acctd_agent_info{cluster=~"$cluster"}, instance',
            "user": 'acctd_job_info{cluster=~"$cluster",instance=~"$host"}, owner',
            "job": 'acctd_job_info{cluster=~"$cluster",instance=~"$host",owner=~"$user"}, jobid',
            "class": 'acctd_job_network_bytes_total{instance=~"$host"}, class',
        }
        return {"qryType": 1, "query": f"label_values({of[variable]})", "refId": "PrometheusVariableQueryEditor"}

    def mark(self, scope: str) -> JSON:
        jobs = ',jobid="$job"' if scope == "job" else ""
        return {
            "expr": f'increase(acctd_job_memory_oom_kills_total{{instance=~"$host"{jobs}}}[$__rate_interval]) > 0',
            "titleFormat": "out of memory",
            "textFormat": "job {{jobid}} on {{instance}}",
        }

    def column(self, panel: Panel, index: int, query: Query) -> str:
        several = sum(bool(self.text(each)) for each in panel.queries) > 1
        return f"Value #{chr(ord('A') + index)}" if several else "Value"


def _where(variable: str) -> tuple[str, str]:
    """The tag that holds a variable's values, and a measurement that has it on all its points."""
    key = {"user": "owner"}.get(variable, variable)
    return key, {"cluster": "acctd_agent", "host": "acctd_agent", "class": "acctd_network"}.get(key, "acctd_cpu")


LANGUAGES: tuple[Language, ...] = (InfluxQL(), Flux(), PromQL())
