"""Queries as Flux, for InfluxDB 2. Samples are in the data source's default bucket, records in that of $records.

What is added up is a float first: integers have 64 bits there.
"""

from tools.grafana.intents import Ask, Query, Records, Text

_JOBS = "r.cluster =~ /^${cluster:regex}$/ and r.host =~ /^${host:regex}$/"
WHERE = {
    "agent": _JOBS,
    "jobs": _JOBS + ' and r.owner =~ /^${user:regex}$/ and r.parent == "-"',
    "job": _JOBS + " and r.job =~ /^${job:regex}$/",
    "inside": _JOBS + " and r.parent =~ /^${job:regex}$/",
}
RANGE = "|> range(start: v.timeRangeStart, stop: v.timeRangeStop)"
_GB = 10**9


def text(query: Query) -> str:
    """One script; "" for what InfluxDB has no numbers of."""
    match query:
        case Ask():
            return _ask(query)
        case Records():
            return _records(query)
        case Text():
            return query.flux
    return ""


def name(legend: str) -> str:
    """{label} as Grafana's display names have it."""
    return legend.replace("{", "${__field.labels.").replace("}", "}")


def table(script: str, legend: str, by: tuple[str, ...]) -> str:
    """The result as one table, its value called as the legend says."""
    names = ", ".join(f'"{column}"' for column in (*by, "_value"))
    return f'{script}\n  |> group()\n  |> keep(columns: [{names}])\n  |> rename(columns: {{_value: "{legend}"}})'


def _ask(ask: Ask) -> str:
    fields = " or ".join(f'r._field == "{number.field}"' for number in ask.numbers)
    lines = [
        "from(bucket: v.defaultBucket)",
        RANGE,
        f'|> filter(fn: (r) => r._measurement == "{ask.number.measurement}" and ({fields}) and {WHERE[ask.scope]})',
    ]
    if ask.how == "total":
        lines.append("|> last()")
    else:
        lines.append("|> aggregateWindow(every: v.windowPeriod, fn: last, createEmpty: false)")
    if ask.how == "rate":
        lines.append("|> derivative(unit: 1s, nonNegative: true)")
    elif ask.how == "change":
        lines.append("|> difference(nonNegative: true)")
    if ask.how != "count":
        lines.append("|> toFloat()")
    by = [f'"{column}"' for column in ask.by]
    when = [] if ask.how == "total" else ['"_time"']
    lines.append(f"|> group(columns: [{', '.join(when + by)}])")
    lines.append("|> count()" if ask.how == "count" else "|> sum()")
    if when:
        lines += [f"|> group(columns: [{', '.join(by)}])", '|> sort(columns: ["_time"])']
    if ask.number.per_unit != 1 and ask.how != "count":
        lines.append(f"|> map(fn: (r) => ({{r with _value: r._value / {ask.number.per_unit}.0}}))")
    return "\n  ".join(lines)


def _records(ask: Records) -> str:
    if ask.direction == "all":
        field = "r._field =~ /^network_(Outgoing|Incoming)${class:regex}_bytes$/"
    elif ask.direction:
        field = f"r._field =~ /^network_{ask.direction}${{class:regex}}_bytes$/"
    else:
        field = f'r._field == "{ask.field}"'
    lines = [
        'from(bucket: "${records}")',
        RANGE,
        f'|> filter(fn: (r) => r._measurement == "acctd_record" and {field} and {WHERE["jobs"]})',
        "|> toFloat()",
    ]
    by = [f'"{column}"' for column in ask.by]
    if ask.direction == "all":
        lines.append(
            "|> map(fn: (r) => ({r with rule: strings.trimSuffix(v: strings.trimPrefix(v: r._field, "
            'prefix: "network_"), suffix: "_bytes")}))'
        )
        by.append('"rule"')
    lines.append(f"|> group(columns: [{', '.join(by)}])")
    if ask.how == "days":
        lines.append('|> aggregateWindow(every: 1d, fn: sum, createEmpty: false, timeSrc: "_start")')
    else:
        lines.append("|> sum()")
    if ask.price:
        lines.append(f"|> map(fn: (r) => ({{r with _value: r._value / {_GB}.0 * float(v: ${{{ask.price}}})}}))")
    elif ask.per_unit != 1:
        lines.append(f"|> map(fn: (r) => ({{r with _value: r._value / {ask.per_unit}.0}}))")
    head = 'import "strings"\n\n' if ask.direction == "all" else ""
    return head + "\n  ".join(lines)
