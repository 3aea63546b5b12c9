"""The dashboard of the network bill: bytes by class, direction, user and day (UTC), and what they cost.

In InfluxDB it is made of records: exact, each job once, on the day it ended. Prometheus has no records; there it is
made of counters, on the day the bytes flowed, and lacks what happened while nobody scraped.
"""

from tools.grafana import flux, influxql
from tools.grafana.intents import Flow, Records, Text
from tools.grafana.panels import COUNT, GIGABYTES, SECONDS, TO_USER, Board, Column, Panel, Row
from tools.grafana.parts import traffic

_FROM = "InfluxDB: of jobs that ended in the time, from their records. Prometheus: what flowed in the time."

BILL = Board(
    "bill",
    "acctd: network bill",
    "Bytes by class, direction, user and day, and what they cost at the chosen prices per GB (10^9 bytes). " + _FROM,
    ("cluster", "host", "user", "class", "price_outgoing", "price_incoming"),
    since="now-7d",
    utc=True,
    rows=(
        Row(
            "All chosen classes",
            (
                Panel(
                    "Bytes",
                    "In the whole range, by class and direction. " + _FROM,
                    "stat",
                    GIGABYTES,
                    (
                        Records("{rule}", "sum", direction="all"),
                        Flow("{direction} {class}", "sum", "all", ("class", "direction")),
                    ),
                    width=24,
                    height=5,
                    calc="sum",  # InfluxQL answers day by day
                ),
                Panel(
                    "Bytes a day",
                    "By class and direction; a bar stands at the beginning of its day. " + _FROM,
                    "timeseries",
                    GIGABYTES,
                    (
                        Records("{rule}", "days", direction="all"),
                        Flow("{direction} {class}", "days", "all", ("class", "direction")),
                    ),
                    bars=True,
                    stacked=True,
                    daily=True,
                ),
                traffic("jobs", ()),
            ),
        ),
        Row(
            "Class $class",
            (
                Panel(
                    "$class: outgoing by user and day",
                    "Bytes that users' jobs sent to this class, a bar a day. " + _FROM,
                    "timeseries",
                    GIGABYTES,
                    (
                        Records("{owner}", "days", direction="Outgoing", by=("owner",)),
                        Flow("{owner}", "days", "Outgoing", ("owner",)),
                    ),
                    bars=True,
                    stacked=True,
                    daily=True,
                    links=(TO_USER,),
                ),
                Panel(
                    "$class: incoming by user and day",
                    "Bytes that users' jobs got from this class, a bar a day. " + _FROM,
                    "timeseries",
                    GIGABYTES,
                    (
                        Records("{owner}", "days", direction="Incoming", by=("owner",)),
                        Flow("{owner}", "days", "Incoming", ("owner",)),
                    ),
                    bars=True,
                    stacked=True,
                    daily=True,
                    links=(TO_USER,),
                ),
                Panel(
                    "$class: cost by day",
                    "Outgoing and incoming bytes a day at $price_outgoing and $price_incoming a GB. " + _FROM,
                    "timeseries",
                    COUNT,
                    (
                        Records("outgoing", "days", direction="Outgoing", price="price_outgoing"),
                        Records("incoming", "days", direction="Incoming", price="price_incoming"),
                        Flow("outgoing", "days", "Outgoing", price="price_outgoing"),
                        Flow("incoming", "days", "Incoming", price="price_incoming"),
                    ),
                    bars=True,
                    stacked=True,
                    daily=True,
                ),
                Panel(
                    "$class: bill by user",
                    "Bytes in the range and what they cost at $price_outgoing and $price_incoming a GB. " + _FROM,
                    "table",
                    COUNT,
                    (
                        Records("Outgoing", "sum", direction="Outgoing", by=("owner",)),
                        Records("Incoming", "sum", direction="Incoming", by=("owner",)),
                        Records("Cost out", "sum", direction="Outgoing", by=("owner",), price="price_outgoing"),
                        Records("Cost in", "sum", direction="Incoming", by=("owner",), price="price_incoming"),
                        Flow("Outgoing", "sum", "Outgoing", ("owner",)),
                        Flow("Incoming", "sum", "Incoming", ("owner",)),
                        Flow("Cost out", "sum", "Outgoing", ("owner",), "price_outgoing"),
                        Flow("Cost in", "sum", "Incoming", ("owner",), "price_incoming"),
                    ),
                    columns=(
                        Column("Outgoing", GIGABYTES),
                        Column("Incoming", GIGABYTES),
                        Column("Cost out", COUNT),
                        Column("Cost in", COUNT),
                    ),
                    labels=("owner",),
                ),
                Panel(
                    "$class: billed jobs",
                    "The newest 100 jobs that ended in the range, with their bytes of this class, from their records.",
                    "table",
                    COUNT,
                    (
                        Text(
                            "jobs",
                            'SELECT "job", "host", "owner", "network_Outgoing${class:raw}_bytes" AS "Outgoing", '
                            '"network_Incoming${class:raw}_bytes" AS "Incoming", "wall_ns" / 1000000000 AS "Wall time" '
                            f"{influxql.RECORD} ORDER BY time DESC LIMIT 100",
                            "\n  ".join(
                                (
                                    'from(bucket: "${records}")',
                                    flux.RANGE,
                                    f'|> filter(fn: (r) => r._measurement == "acctd_record" and {flux.WHERE["jobs"]})',
                                    '|> pivot(rowKey: ["_time"], columnKey: ["_field"], valueColumn: "_value")',
                                    "|> group()",
                                    '|> sort(columns: ["_time"], desc: true)',
                                    "|> limit(n: 100)",
                                    "|> map(fn: (r) => ({_time: r._time, job: r.job, host: r.host, owner: r.owner, "
                                    'Outgoing: r["network_Outgoing${class:raw}_bytes"], '
                                    'Incoming: r["network_Incoming${class:raw}_bytes"], "Wall time": '
                                    "float(v: r.wall_ns) / 1000000000.0}))",
                                )
                            ),
                        ),
                    ),
                    columns=(
                        Column("Outgoing", GIGABYTES),
                        Column("Incoming", GIGABYTES),
                        Column("Wall time", SECONDS),
                    ),
                    labels=("job", "host", "owner"),
                    when=True,
                    width=24,
                ),
            ),
            repeat="class",
        ),
    ),
)
