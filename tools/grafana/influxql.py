"""Queries as InfluxQL, for InfluxDB 1 and for whoever speaks it.

Sums over jobs are made of subqueries with fill(none): influxd 1.6 answers those with any other fill in pieces. What is
added up is a float first: integers have 64 bits there, and beyond them a sum is negative and nobody told.
"""

# ruff: noqa: S608  # the queries of dashboards, run by whoever looks at one with the rights of its data source

from tools.grafana.intents import Ask, Query, Records, Text

_JOBS = '"cluster" =~ /^${cluster:regex}$/ AND "host" =~ /^${host:regex}$/'
WHERE = {
    "agent": _JOBS,
    "jobs": _JOBS + ' AND "owner" =~ /^${user:regex}$/ AND "parent" = \'-\'',
    "job": _JOBS + ' AND "job" =~ /^${job:regex}$/',
    "inside": _JOBS + ' AND "parent" =~ /^${job:regex}$/',
}
RECORD = f'FROM "${{records}}"."acctd_record" WHERE $timeFilter AND {WHERE["jobs"]}'
_GB = 10**9


def text(query: Query) -> str:
    """One statement; "" for what InfluxDB has no numbers of."""
    match query:
        case Ask():
            return _ask(query)
        case Records():
            return _records(query)
        case Text():
            return query.influxql
    return ""


def alias(legend: str) -> str:
    """{label} as Grafana's InfluxQL has it; a rule is a column's name there."""
    return legend.replace("{rule}", "$col").replace("{", "$tag_").replace("}", "")


def _ask(ask: Ask) -> str:
    by = "".join(f', "{name}"' for name in ask.by)
    where = f'FROM "{ask.number.measurement}" WHERE $timeFilter AND {WHERE[ask.scope]}'
    scale = f" / {ask.number.per_unit}" if ask.number.per_unit != 1 and ask.how != "count" else ""
    shape = {
        "level": 'last("{}"::float)',
        "rate": 'non_negative_derivative(last("{}"), 1s)',  # a float, of a difference of integers, which is exact
        "change": 'non_negative_difference(last("{}"::float))',
        "total": 'last("{}"::float)',
        "count": 'last("{}")',
    }[ask.how]
    values = " + ".join(shape.format(number.field) for number in ask.numbers)
    outer = "count" if ask.how == "count" else "sum"
    # Within one host and job no two series may be taken for one.
    inner = [name for name in ("host", "job", *ask.number.labels) if name not in ask.by]
    inner_by = ", ".join(f'"{name}"' for name in (inner if ask.number.of_job else ["host"] * ("host" not in ask.by)))
    tags = ", ".join(part for part in (inner_by, by.removeprefix(", ")) if part)
    if ask.how == "total":
        inner_query = f'SELECT {values} AS "v" {where} GROUP BY {tags}'
        outer_by = f" GROUP BY {by.removeprefix(', ')}" if by else ""
        return f'SELECT {outer}("v"){scale} AS "{_column(ask.legend)}" FROM ({inner_query}){outer_by}'
    inner_query = f'SELECT {values} AS "v" {where} GROUP BY time($__interval), {tags} fill(none)'
    return (
        f'SELECT {outer}("v"){scale} AS "{_column(ask.legend)}" FROM ({inner_query}) WHERE $timeFilter '
        f"GROUP BY time($__interval){by} fill(none)"
    )


def _records(ask: Records) -> str:
    # Columns that are not named cannot be made floats. A day of one class is within 64 bits; more, Grafana adds up.
    days = ask.how == "days" or ask.direction == "all"
    groups = ["time(1d)"] * days + [f'"{name}"' for name in ask.by]
    tail = f" GROUP BY {', '.join(groups)}" if groups else ""
    tail += " fill(none)" if days else ""
    if ask.direction == "all":
        return f"SELECT sum(/^network_(Outgoing|Incoming)${{class:regex}}_bytes$/) {RECORD}{tail}"
    field = f"network_{ask.direction}${{class:raw}}_bytes" if ask.direction else ask.field
    scale = f" / {_GB} * ${{{ask.price}}}" if ask.price else f" / {ask.per_unit}" if ask.per_unit != 1 else ""
    return f'SELECT sum("{field}"::float){scale} AS "{_column(ask.legend)}" {RECORD}{tail}'


def _column(legend: str) -> str:
    """A legend without labels names the column, which is what a table shows."""
    return legend.partition("{")[0].strip() or "value"
