"""The dashboard of the agents themselves: are they there, what do they cost, and does what they know arrive."""

# ruff: noqa: S608  # the queries of dashboards, run by whoever looks at one with the rights of its data source

from tools.grafana import flux, influxql, promql
from tools.grafana.intents import Ask, How, Text
from tools.grafana.numbers import agent
from tools.grafana.panels import (
    BYTES,
    CORES,
    COUNT,
    SECONDS,
    SHARE,
    TO_NODE,
    Board,
    Column,
    Panel,
    Row,
)


def own(legend: str, name: str, how: How = "level") -> Ask:
    """Of each agent."""
    return Ask(legend, (agent(name),), how, "agent", ("host",))


def sink(title: str, description: str, unit: str, series: tuple[tuple[str, str], ...], bars: bool = False) -> Panel:
    """Of each sink of each node; they are told to Prometheus only. `series`: a legend and an expression."""
    return Panel(
        title,
        description + " Known to Prometheus only.",
        "timeseries",
        unit,
        tuple(
            Text(f"{legend}{{sink}} {{host}}", promql=f"sum by (instance, sink) ({expression} * {promql.AGENT})")
            for legend, expression in series
        ),
        bars=bars,
        links=(TO_NODE,),
    )


def grown(name: str) -> str:
    return f'increase({name}{{instance=~"$host"}}[$__rate_interval])'


AGENT = Board(
    "agent",
    "acctd: agent health",
    "The agents: whether each is there, what it costs, what waits in its spool, and how its sinks do.",
    ("cluster", "host"),
    rows=(
        Row(
            "Agents",
            (
                Panel(
                    "Agents",
                    "Each agent's newest numbers. Time is when it was last heard of.",
                    "table",
                    COUNT,
                    (
                        Text(
                            "Up for",
                            'SELECT last("uptime_seconds") AS "Up for", "jobs" AS "Jobs", "resident_bytes" AS "Memory" '
                            f'FROM "acctd_agent" WHERE $timeFilter AND {influxql.WHERE["agent"]} '
                            'GROUP BY "cluster", "host"',
                            "\n  ".join(
                                (
                                    "from(bucket: v.defaultBucket)",
                                    flux.RANGE,
                                    '|> filter(fn: (r) => r._measurement == "acctd_agent" and (r._field == '
                                    '"uptime_seconds" or r._field == "jobs" or r._field == "resident_bytes") and '
                                    f"{flux.WHERE['agent']})",
                                    "|> last()",
                                    "|> group()",
                                    '|> pivot(rowKey: ["_time", "cluster", "host"], columnKey: ["_field"], '
                                    'valueColumn: "_value")',
                                    '|> keep(columns: ["_time", "cluster", "host", "uptime_seconds", "jobs", '
                                    '"resident_bytes"])',
                                    '|> rename(columns: {uptime_seconds: "Up for", jobs: "Jobs", resident_bytes: '
                                    '"Memory"})',
                                )
                            ),
                        ),
                        Text(
                            "Up for",
                            promql=f'acctd_agent_uptime_seconds{{instance=~"$host"}} * {promql.AGENT}',
                            instant=True,
                        ),
                        Text("Jobs", promql=f'acctd_agent_jobs{{instance=~"$host"}} * {promql.AGENT}', instant=True),
                        Text(
                            "Memory",
                            promql=f'acctd_agent_resident_bytes{{instance=~"$host"}} * {promql.AGENT}',
                            instant=True,
                        ),
                    ),
                    columns=(Column("Up for", SECONDS), Column("Jobs", COUNT), Column("Memory", BYTES)),
                    labels=("cluster", "host"),
                    when=True,
                    width=24,
                ),
                Panel(
                    "Is it there",
                    "1: the agent was heard of within three ticks. 0: it was not, or what it leaves is not read. Known "
                    "to Prometheus only.",
                    "timeseries",
                    COUNT,
                    (Text("{host}", promql='acctd_up{instance=~"$host"}'),),
                    links=(TO_NODE,),
                ),
                Panel(
                    "Silent for",
                    "Time since the agent's newest sample; some more than a tick is usual. Known to Prometheus only.",
                    "timeseries",
                    SECONDS,
                    (
                        Text(
                            "{host}",
                            promql='time() - acctd_agent_sample_timestamp_seconds{instance=~"$host"} * '
                            f"{promql.AGENT}",
                        ),
                    ),
                    links=(TO_NODE,),
                ),
                Panel(
                    "Tick",
                    "How long the newest tick took, and the longest one since the agent's start.",
                    "timeseries",
                    SECONDS,
                    (own("newest {host}", "last_tick_seconds"), own("longest {host}", "longest_tick_seconds")),
                    links=(TO_NODE,),
                ),
                Panel(
                    "Share of time in ticks",
                    "At 100 % the agent does nothing but read jobs, and ticks are missed.",
                    "timeseries",
                    SHARE,
                    (own("{host}", "tick_seconds", "rate"),),
                    links=(TO_NODE,),
                ),
                Panel(
                    "Missed ticks",
                    "Ticks that were due while one was still under way, in each interval.",
                    "timeseries",
                    COUNT,
                    (own("{host}", "missed_ticks", "change"),),
                    bars=True,
                    links=(TO_NODE,),
                ),
                Panel(
                    "Errors",
                    "Things that went wrong in the agent, in each interval; the events below and the log say what.",
                    "timeseries",
                    COUNT,
                    (own("{host}", "errors", "change"),),
                    bars=True,
                    links=(TO_NODE,),
                ),
                Panel(
                    "CPU",
                    "Cores that the agent itself uses.",
                    "timeseries",
                    CORES,
                    (own("{host}", "cpu_seconds", "rate"),),
                    links=(TO_NODE,),
                ),
                Panel(
                    "Memory",
                    "Of the agent itself.",
                    "timeseries",
                    BYTES,
                    (own("now {host}", "resident_bytes"), own("highest {host}", "resident_peak_bytes")),
                    links=(TO_NODE,),
                ),
                Panel(
                    "Open files",
                    "Descriptors that the agent has open; it keeps some for each job.",
                    "timeseries",
                    COUNT,
                    (own("{host}", "open_descriptors"),),
                    links=(TO_NODE,),
                ),
                Panel(
                    "Jobs",
                    "Jobs that the agent holds, those inside others among them.",
                    "timeseries",
                    COUNT,
                    (own("{host}", "jobs"),),
                    links=(TO_NODE,),
                ),
            ),
        ),
        Row(
            "Spool and sinks",
            (
                Panel(
                    "Spool",
                    "What waits on the node's disk. It grows while a sink takes nothing, up to export.spool_max.",
                    "timeseries",
                    BYTES,
                    (own("{host}", "spool_bytes"),),
                    links=(TO_NODE,),
                ),
                Panel(
                    "Lost samples",
                    "Samples that the node's disk did not take, in each interval.",
                    "timeseries",
                    COUNT,
                    (own("{host}", "spool_lost_samples", "change"),),
                    bars=True,
                    links=(TO_NODE,),
                ),
                sink(
                    "Backlog",
                    "What of the spool a sink has still to get.",
                    BYTES,
                    (("", 'acctd_sink_backlog_bytes{instance=~"$host"}'),),
                ),
                sink(
                    "Sinks that take points",
                    "1 while the sink takes points, 0 while it does not.",
                    COUNT,
                    (("", 'acctd_sink_up{instance=~"$host"}'),),
                ),
                sink(
                    "Sent",
                    "Points that the sink accepted, a second.",
                    "suffix: points/s",
                    (("", 'rate(acctd_sink_sent_total{instance=~"$host"}[$__rate_interval])'),),
                ),
                sink(
                    "Sent once more",
                    "Requests that went wrong and were made again, in each interval.",
                    COUNT,
                    (("", grown("acctd_sink_failures_total")),),
                    bars=True,
                ),
                sink(
                    "Lost to a sink",
                    "In each interval: points that it will never take and that are in quarantine; lines that went from "
                    "a full spool before they were sent; lines that were none.",
                    COUNT,
                    (
                        ("quarantined ", grown("acctd_sink_quarantined_total")),
                        ("dropped ", grown("acctd_sink_dropped_total")),
                        ("unreadable ", grown("acctd_sink_unreadable_total")),
                    ),
                    bars=True,
                ),
                Panel(
                    "The exporter's memory",
                    "Of acctd export. Known to Prometheus only.",
                    "timeseries",
                    BYTES,
                    (Text("{host}", promql='acctd_export_resident_bytes{instance=~"$host"}'),),
                    links=(TO_NODE,),
                ),
                Panel(
                    "Events of the agent",
                    "What agents told of themselves: troubles, ledgers, restarts.",
                    "table",
                    COUNT,
                    (
                        Text(
                            "events",
                            f'SELECT "event", "text", "host" FROM "acctd_event" WHERE $timeFilter AND '
                            f"{influxql.WHERE['agent']} AND \"job\" = '-' ORDER BY time DESC LIMIT 200",
                            "\n  ".join(
                                (
                                    "from(bucket: v.defaultBucket)",
                                    flux.RANGE,
                                    '|> filter(fn: (r) => r._measurement == "acctd_event" and r._field == "text" and '
                                    f'{flux.WHERE["agent"]} and r.job == "-")',
                                    "|> group()",
                                    '|> keep(columns: ["_time", "event", "_value", "host"])',
                                    '|> rename(columns: {_value: "text"})',
                                    '|> sort(columns: ["_time"], desc: true)',
                                    "|> limit(n: 200)",
                                )
                            ),
                        ),
                    ),
                    labels=("event", "text", "host"),
                    when=True,
                    width=24,
                ),
            ),
        ),
    ),
)
