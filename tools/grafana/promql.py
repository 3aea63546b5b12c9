"""Queries as PromQL. Whose job it is stands on acctd_job_info alone, so every job's number is joined with that."""

from tools.grafana.intents import Ask, Flow, Query, Text

LABELS = {"host": "instance", "job": "jobid"}
"""Prometheus' own words: `job` is what it calls a group of targets, and `instance` is host:port of one."""

_INFO = {
    "jobs": 'acctd_job_info{cluster=~"$cluster",instance=~"$host",owner=~"$user",parent="-"}',
    "job": 'acctd_job_info{cluster=~"$cluster",instance=~"$host",jobid="$job"}',
    "inside": 'acctd_job_info{cluster=~"$cluster",instance=~"$host",parent="$job"}',
}
_OF = {
    "jobs": '{instance=~"$host"}',
    "job": '{instance=~"$host",jobid="$job"}',
    "inside": '{instance=~"$host"}',
    "agent": '{instance=~"$host"}',
}
AGENT = 'on (job, instance) group_left (cluster) acctd_agent_info{cluster=~"$cluster"}'
_GB = 10**9
_WEEK = "7d"


def text(query: Query) -> str:
    """One expression; "" for what Prometheus has no numbers of."""
    match query:
        case Ask():
            return _ask(query)
        case Flow():
            return _flow(query)
        case Text():
            return query.promql
    return ""


def legend(words: str) -> str:
    """{label} as Grafana has it for Prometheus."""
    for name, own in LABELS.items():
        words = words.replace(f"{{{name}}}", f"{{{own}}}")
    return words.replace("{", "{{").replace("}", "}}")


def by(names: tuple[str, ...]) -> str:
    """The labels of a sum."""
    return f" by ({', '.join(LABELS.get(name, name) for name in names)})" if names else ""


def instant(query: Query) -> bool:
    """Whether it is asked at the end of the range only."""
    return (
        (isinstance(query, Ask) and query.how == "total")
        or (isinstance(query, Flow) and query.how == "sum")
        or (isinstance(query, Text) and query.instant)
    )


def _ask(ask: Ask) -> str:
    if ask.how == "count":
        return f"count{by(ask.by)} ({_INFO[ask.scope]})"
    shape = {
        "level": "{}",
        "rate": "rate({}[$__rate_interval])",
        "change": "increase({}[$__rate_interval])",
        "total": "last_over_time({}[$__range])",
    }[ask.how]
    each = [shape.format(number.prometheus + _OF[ask.scope]) for number in ask.numbers]
    values = each[0] if len(each) == 1 else f"({' + '.join(each)})"
    if ask.scope == "agent":
        return f"sum{by(ask.by)} ({values} * {AGENT})"
    info = _INFO[ask.scope]
    if ask.how == "total":
        info = _one(f"last_over_time({info}[$__range])")
    return f"sum{by(ask.by)} ({values} * {_join(info)})"


def _one(info: str) -> str:
    """An id may have been another owner's before: within a range there can be two, and a join takes one."""
    return f"topk by (job, instance, jobid) (1, group by (job, instance, jobid, owner) ({info}))"


def _join(info: str) -> str:
    return f"on (job, instance, jobid) group_left (owner) {info}"


def _flow(ask: Flow) -> str:
    """What there was at the end less what there was at the beginning, looked for in the week before; 0 if not found."""
    direction = f',direction="{ask.direction.lower()}"' if ask.direction != "all" else ""
    bytes_of = f'acctd_job_network_bytes_total{{instance=~"$host",class=~"$class"{direction}}}'
    # A bar stands at the beginning of its day, so a day's end lies ahead of it.
    window, end, start = ("1d", " offset -1d", "") if ask.how == "days" else ("$__range", "", " offset $__range")
    after = f"last_over_time({bytes_of}[{window}]{end})"
    before = f"(last_over_time({bytes_of}[{_WEEK}]{start}) or {after} * 0)"
    info = _one(f"last_over_time({_INFO['jobs']}[{window}]{end})")
    price = f" / {_GB} * $" + ask.price if ask.price else ""
    return f"sum{by(ask.by)} (({after} - {before}) * {_join(info)}){price}"
