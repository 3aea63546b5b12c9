"""The dashboards of a job, a user and a node; see bills.py and agents.py for the other two."""

# ruff: noqa: S608  # the queries of dashboards, run by whoever looks at one with the rights of its data source

from acctd import metrics as m
from tools.grafana import flux, influxql
from tools.grafana.intents import Ask, How, Query, Records, Scope, Text
from tools.grafana.numbers import Number, limit, of
from tools.grafana.panels import (
    BYTES,
    BYTES_PER_SECOND,
    CORES,
    COUNT,
    SECONDS,
    SHARE,
    TO_BILL,
    TO_BILL_OF_CLASS,
    TO_JOB,
    TO_NODE,
    TO_USER,
    Board,
    Column,
    Link,
    Panel,
    Row,
)

CPU = (of(m.CPU_USER), of(m.CPU_SYSTEM))
NETWORK = (of(m.NETWORK_BYTES),)
KINDS = (
    ("heap", m.MEMORY_ANON),
    ("shared", m.MEMORY_SHMEM),
    ("page cache", m.MEMORY_FILE),
    ("kernel", m.MEMORY_KERNEL),
    ("swap", m.MEMORY_SWAP),
)


def one(legend: str, number: Number, how: How = "level", by: tuple[str, ...] = ()) -> Ask:
    """Of the chosen job."""
    return Ask(legend, (number,), how, "job", by)


def memory(scope: Scope) -> tuple[Query, ...]:
    """Each kind apart."""
    return tuple(Ask(kind, (of(metric),), "level", scope) for kind, metric in KINDS)


def traffic(scope: Scope, links: tuple[Link, ...] = (TO_BILL_OF_CLASS,)) -> Panel:
    return Panel(
        "Network",
        "Bytes a second by class and direction, IP headers included; what comes in is below the axis.",
        "timeseries",
        BYTES_PER_SECOND,
        (Ask("{direction} {class}", NETWORK, "rate", scope, ("class", "direction")),),
        below="^incoming",
        links=links,
    )


def disks(scope: Scope) -> Panel:
    return Panel(
        "Block devices",
        "Bytes a second by device; what is read is below the axis. What lies on another device is counted there only.",
        "timeseries",
        BYTES_PER_SECOND,
        (
            Ask("written to {device}", (of(m.BLOCK_WRITE_BYTES),), "rate", scope, ("device",)),
            Ask("read from {device}", (of(m.BLOCK_READ_BYTES),), "rate", scope, ("device",)),
        ),
        below="^read",
    )


def jobs_table(title: str, description: str, scope: Scope) -> Panel:
    by = ("job", "host", "owner")
    return Panel(
        title,
        description,
        "table",
        COUNT,
        (
            Ask("CPU time", CPU, "total", scope, by),
            Ask("Memory", (of(m.MEMORY_RESIDENT_PEAK),), "total", scope, by),
            Ask("Network", NETWORK, "total", scope, by),
        ),
        columns=(Column("CPU time", SECONDS), Column("Memory", BYTES), Column("Network", BYTES)),
        labels=by,
        width=24,
        height=10,
    )


JOB = Board(
    "job",
    "acctd: job",
    "One job: what it has used, and what it uses now. Marks show when its memory ran out.",
    ("cluster", "host", "user", "job"),
    shortages=True,
    rows=(
        Row(
            "So far",
            (
                Panel(
                    "CPU time",
                    "Seconds of CPU since the job's start, in user mode and in the kernel.",
                    "stat",
                    SECONDS,
                    (one("user", of(m.CPU_USER), "total"), one("kernel", of(m.CPU_SYSTEM), "total")),
                    width=6,
                    height=5,
                ),
                Panel(
                    "Memory, highest",
                    "used: the highest sample of heap and shared memory, which is what is billed. charged: the "
                    "kernel's own peak, page cache included.",
                    "stat",
                    BYTES,
                    (
                        one("used", of(m.MEMORY_RESIDENT_PEAK), "total"),
                        one("charged", of(m.MEMORY_PEAK), "total"),
                    ),
                    width=6,
                    height=5,
                ),
                Panel(
                    "Network",
                    "Bytes since the job's start by class and direction.",
                    "stat",
                    BYTES,
                    (one("{direction} {class}", NETWORK[0], "total", ("class", "direction")),),
                    width=6,
                    height=5,
                ),
                Panel(
                    "Memory ran out",
                    "limit: how often the job hit its memory limit. killed: processes that the kernel killed for it.",
                    "stat",
                    COUNT,
                    (
                        one("limit", of(m.MEMORY_FAILCNT), "total"),
                        one("killed", of(m.MEMORY_OOM_KILLS), "total"),
                    ),
                    width=6,
                    height=5,
                ),
            ),
        ),
        Row(
            "Over time",
            (
                Panel(
                    "Memory",
                    "By kind, one on the other. Page cache is given back when memory is short. The dashed line is the "
                    "job's limit.",
                    "timeseries",
                    BYTES,
                    (*memory("job"), one("limit", limit("memory"))),
                    stacked=True,
                    limits=("limit",),
                ),
                Panel(
                    "CPU",
                    "Cores in use, user mode and kernel one on the other. The dashed line is the job's limit.",
                    "timeseries",
                    CORES,
                    (
                        one("user", of(m.CPU_USER), "rate"),
                        one("kernel", of(m.CPU_SYSTEM), "rate"),
                        one("limit", limit("cpus")),
                    ),
                    stacked=True,
                    limits=("limit",),
                ),
                traffic("job"),
                disks("job"),
                Panel(
                    "NFS",
                    "Bytes a second by mount point; what is read is below the axis.",
                    "timeseries",
                    BYTES_PER_SECOND,
                    (
                        one("written to {mount}", of(m.NFS_WRITE_BYTES), "rate", ("mount",)),
                        one("read from {mount}", of(m.NFS_READ_BYTES), "rate", ("mount",)),
                    ),
                    below="^read",
                ),
                Panel(
                    "Waiting",
                    "Share of the time in which some task of the job waited for a CPU, for I/O, for memory; throttled "
                    "is the time, summed over cores, in which its CPU limit stopped it.",
                    "timeseries",
                    SHARE,
                    (
                        one("CPU", of(m.CPU_STALL), "rate"),
                        one("I/O", of(m.IO_STALL), "rate"),
                        one("memory", of(m.MEMORY_STALL), "rate"),
                        one("throttled", of(m.CPU_THROTTLED), "rate"),
                    ),
                ),
                Panel(
                    "Processes",
                    "Processes and threads. The dashed line is the job's limit.",
                    "timeseries",
                    COUNT,
                    (one("tasks", of(m.PIDS)), one("limit", limit("pids"))),
                    limits=("limit",),
                ),
                Panel(
                    "Disk operations",
                    "Reads and writes a second on all block devices.",
                    "timeseries",
                    "iops",
                    (one("writes", of(m.BLOCK_WRITES), "rate"), one("reads", of(m.BLOCK_READS), "rate")),
                    below="^read",
                ),
            ),
        ),
        Row(
            "Account",
            (
                Panel(
                    "Whose it is",
                    "The job's owner, its node, and the job that it is inside of. Links lead to them.",
                    "table",
                    COUNT,
                    (
                        Text(
                            "Tasks",
                            f'SELECT last("peak") AS "Tasks" FROM "acctd_pids" WHERE $timeFilter AND '
                            f'{influxql.WHERE["job"]} GROUP BY "job", "host", "owner", "scheduler", "parent"',
                            flux.table(
                                f"from(bucket: v.defaultBucket)\n  {flux.RANGE}\n  |> filter(fn: (r) => "
                                f'r._measurement == "acctd_pids" and r._field == "peak" and {flux.WHERE["job"]})\n'
                                "  |> last()",
                                "Tasks",
                                ("job", "host", "owner", "scheduler", "parent"),
                            ),
                            "max by (instance, jobid, owner, scheduler, parent) (last_over_time(acctd_job_info{"
                            'cluster=~"$cluster",instance=~"$host",jobid="$job"}[$__range]) * on (job, instance, '
                            "jobid) group_left () last_over_time(acctd_job_pids_peak[$__range]))",
                            instant=True,
                        ),
                    ),
                    columns=(Column("Tasks", COUNT),),
                    labels=("job", "host", "owner", "scheduler", "parent"),
                    height=6,
                ),
                Panel(
                    "Record",
                    "The job's final account, once it has ended: what it is billed by.",
                    "table",
                    COUNT,
                    (
                        Text(
                            "record",
                            'SELECT "host", "owner", "state", "exit_code" AS "Exit", "wall_ns" / 1000000000 AS "Wall '
                            'time", "cpu_user_ns" / 1000000000 AS "User time", "memory_resident_peak_bytes" AS '
                            f'"Memory" FROM "${{records}}"."acctd_record" WHERE $timeFilter AND '
                            f"{influxql.WHERE['job']}",
                            "\n  ".join(
                                (
                                    'from(bucket: "${records}")',
                                    flux.RANGE,
                                    f'|> filter(fn: (r) => r._measurement == "acctd_record" and {flux.WHERE["job"]})',
                                    '|> pivot(rowKey: ["_time"], columnKey: ["_field"], valueColumn: "_value")',
                                    "|> group()",
                                    '|> keep(columns: ["_time", "host", "owner", "state", "exit_code", "wall_ns", '
                                    '"cpu_user_ns", "memory_resident_peak_bytes"])',
                                    "|> map(fn: (r) => ({_time: r._time, host: r.host, owner: r.owner, state: r.state, "
                                    'Exit: r.exit_code, "Wall time": float(v: r.wall_ns) / 1000000000.0, "User time": '
                                    "float(v: r.cpu_user_ns) / 1000000000.0, Memory: r.memory_resident_peak_bytes}))",
                                )
                            ),
                        ),
                    ),
                    columns=(
                        Column("Exit", COUNT),
                        Column("Wall time", SECONDS),
                        Column("User time", SECONDS),
                        Column("Memory", BYTES),
                    ),
                    labels=("host", "owner", "state"),
                    when=True,
                    height=6,
                ),
                jobs_table(
                    "Jobs inside it",
                    "Families that the job has started as jobs; its own numbers include them.",
                    "inside",
                ),
                Panel(
                    "Events",
                    "What happened to the job, in the agent's words.",
                    "table",
                    COUNT,
                    (
                        Text(
                            "events",
                            f'SELECT "event", "text", "host" FROM "acctd_event" WHERE $timeFilter AND '
                            f"{influxql.WHERE['job']} ORDER BY time DESC LIMIT 200",
                            "\n  ".join(
                                (
                                    "from(bucket: v.defaultBucket)",
                                    flux.RANGE,
                                    '|> filter(fn: (r) => r._measurement == "acctd_event" and r._field == "text" and '
                                    f"{flux.WHERE['job']})",
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
