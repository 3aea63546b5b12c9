"""The dashboards of users and of nodes."""

from acctd import metrics as m
from tools.grafana import flux, influxql
from tools.grafana.intents import Ask, Records, Text
from tools.grafana.numbers import of
from tools.grafana.panels import (
    BYTES,
    BYTES_PER_SECOND,
    CORES,
    COUNT,
    SECONDS,
    TO_BILL,
    TO_JOB,
    TO_NODE,
    TO_USER,
    Board,
    Column,
    Panel,
    Row,
)
from tools.grafana.parts import CPU, NETWORK, disks, jobs_table, memory, traffic

USER = Board(
    "user",
    "acctd: user",
    "What users use now, and what their jobs have used. Jobs inside others are counted in those.",
    ("cluster", "host", "user"),
    rows=(
        Row(
            "Now",
            (
                Panel(
                    "Jobs",
                    "Top-level jobs of each user. Prometheus shows a job that has ended for a few minutes more.",
                    "timeseries",
                    COUNT,
                    (Ask("{owner}", CPU[:1], "count", by=("owner",)),),
                    stacked=True,
                    links=(TO_USER, TO_BILL),
                ),
                Panel(
                    "CPU",
                    "Cores in use by each user.",
                    "timeseries",
                    CORES,
                    (Ask("{owner}", CPU, "rate", by=("owner",)),),
                    stacked=True,
                    links=(TO_USER, TO_BILL),
                ),
                Panel(
                    "Memory",
                    "Heap and shared memory of each user's jobs, page cache not counted.",
                    "timeseries",
                    BYTES,
                    (Ask("{owner}", (of(m.MEMORY_RESIDENT),), "level", by=("owner",)),),
                    stacked=True,
                    links=(TO_USER, TO_BILL),
                ),
                traffic("jobs"),
                Panel(
                    "Network by user",
                    "Bytes a second of each user, all classes, both directions.",
                    "timeseries",
                    BYTES_PER_SECOND,
                    (Ask("{owner}", NETWORK, "rate", by=("owner",)),),
                    stacked=True,
                    links=(TO_USER, TO_BILL),
                ),
                disks("jobs"),
            ),
        ),
        Row(
            "Jobs",
            (
                jobs_table(
                    "Jobs in the range",
                    "Totals of each top-level job since its start, as of its newest sample; memory is the highest "
                    "sample of heap and shared memory.",
                    "jobs",
                ),
                Panel(
                    "Ended in the range",
                    "Sums over the records of jobs that ended in the range: from each job's first to last process.",
                    "stat",
                    SECONDS,
                    (
                        Records("wall time", "sum", "wall_ns", 10**9),
                        Records("user time", "sum", "cpu_user_ns", 10**9),
                        Records("kernel time", "sum", "cpu_system_ns", 10**9),
                    ),
                    width=24,
                    height=5,
                ),
                Panel(
                    "Wall time by user",
                    "Of jobs that ended in the range, from their records.",
                    "table",
                    SECONDS,
                    (
                        Records("Wall time", "sum", "wall_ns", 10**9, by=("owner",)),
                        Records("User time", "sum", "cpu_user_ns", 10**9, by=("owner",)),
                    ),
                    columns=(Column("Wall time", SECONDS), Column("User time", SECONDS)),
                    labels=("owner",),
                ),
                Panel(
                    "Records",
                    "The newest 100 records of the range.",
                    "table",
                    COUNT,
                    (
                        Text(
                            "records",
                            'SELECT "job", "host", "owner", "state", "exit_code" AS "Exit", "wall_ns" / 1000000000 AS '
                            f'"Wall time" {influxql.RECORD} ORDER BY time DESC LIMIT 100',
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
                                    'state: r.state, Exit: r.exit_code, "Wall time": float(v: r.wall_ns) / '
                                    "1000000000.0}))",
                                )
                            ),
                        ),
                    ),
                    columns=(Column("Exit", COUNT), Column("Wall time", SECONDS)),
                    labels=("job", "host", "owner", "state"),
                    when=True,
                ),
            ),
        ),
    ),
)

NODE = Board(
    "node",
    "acctd: node",
    "What the jobs of the chosen nodes use. Jobs inside others are counted in those.",
    ("cluster", "host", "user"),
    rows=(
        Row(
            "Jobs of the nodes",
            (
                Panel(
                    "Jobs",
                    "Top-level jobs on each node.",
                    "timeseries",
                    COUNT,
                    (Ask("{host}", CPU[:1], "count", by=("host",)),),
                    links=(TO_NODE,),
                ),
                Panel(
                    "CPU",
                    "Cores that jobs use on each node.",
                    "timeseries",
                    CORES,
                    (Ask("{host}", CPU, "rate", by=("host",)),),
                    links=(TO_NODE,),
                ),
                Panel(
                    "Memory by kind",
                    "Of all jobs on all chosen nodes, one kind on the other.",
                    "timeseries",
                    BYTES,
                    memory("jobs"),
                    stacked=True,
                ),
                Panel(
                    "Memory by node",
                    "Heap and shared memory of the jobs on each node.",
                    "timeseries",
                    BYTES,
                    (Ask("{host}", (of(m.MEMORY_RESIDENT),), "level", by=("host",)),),
                    links=(TO_NODE,),
                ),
                traffic("jobs"),
                Panel(
                    "Network by node",
                    "Bytes a second of the jobs on each node, all classes; what comes in is below the axis.",
                    "timeseries",
                    BYTES_PER_SECOND,
                    (Ask("{direction} {host}", NETWORK, "rate", by=("host", "direction")),),
                    below="^incoming",
                    links=(TO_NODE,),
                ),
                disks("jobs"),
                Panel(
                    "Memory ran out",
                    "Processes that the kernel killed for want of memory, by node, in each interval.",
                    "timeseries",
                    COUNT,
                    (Ask("{host}", (of(m.MEMORY_OOM_KILLS),), "change", by=("host",)),),
                    bars=True,
                    links=(TO_NODE,),
                ),
                Panel(
                    "CPU by job",
                    "Cores in use by each job; choose one node to read it.",
                    "timeseries",
                    CORES,
                    (Ask("{job}", CPU, "rate", by=("job", "host", "owner")),),
                    stacked=True,
                    links=(TO_JOB, TO_USER),
                ),
                Panel(
                    "Memory by job",
                    "Heap and shared memory of each job; choose one node to read it.",
                    "timeseries",
                    BYTES,
                    (Ask("{job}", (of(m.MEMORY_RESIDENT),), "level", by=("job", "host", "owner")),),
                    stacked=True,
                    links=(TO_JOB, TO_USER),
                ),
                jobs_table(
                    "Jobs in the range",
                    "Totals of each top-level job since its start, as of its newest sample; memory is the highest "
                    "sample of heap and shared memory.",
                    "jobs",
                ),
            ),
        ),
    ),
    shortages=True,
)
