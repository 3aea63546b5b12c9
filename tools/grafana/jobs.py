"""The dashboard of one job."""

# ruff: noqa: S608  # the queries of dashboards, run by whoever looks at one with the rights of its data source

from acctd import metrics as m
from tools.grafana import flux, influxql
from tools.grafana.intents import Text
from tools.grafana.numbers import limit, of
from tools.grafana.panels import (
    BYTES,
    BYTES_PER_SECOND,
    CORES,
    COUNT,
    SECONDS,
    SHARE,
    Board,
    Column,
    Panel,
    Row,
)
from tools.grafana.parts import NETWORK, disks, jobs_table, memory, one, traffic

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
