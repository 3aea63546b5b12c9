"""What is on the board, in the words of Prometheus: its text format, and OpenMetrics.

The node's few numbers are a collector of prometheus_client's. The jobs' lines are written here: there may be a hundred
thousand, of which the library makes ten times the work (bench/scrape.py). Both formats have the same lines, and differ
in what is said about them. Serves nothing, and bounds nothing: board.py has done that.
https://prometheus.io/docs/instrumenting/exposition_formats/ https://prometheus.io/docs/specs/om/open_metrics_spec/
"""

import resource
from collections.abc import Collection, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector

from acctd.kernel import procs
from acctd.metrics import CATALOGUE, LIMITS, split_rule
from exporters.board import Board, Seen, Shown
from exporters.delivery import Delivery

INFO = "acctd_job_info"

AGENT: dict[str, tuple[type[CounterMetricFamily] | type[GaugeMetricFamily], str]] = {
    "ticks": (CounterMetricFamily, "times that all jobs were read"),
    "missed_ticks": (CounterMetricFamily, "ticks that were due while one was still under way"),
    "errors": (CounterMetricFamily, "things that went wrong in the agent"),
    "last_tick_seconds": (GaugeMetricFamily, "how long the newest tick took"),
    "longest_tick_seconds": (GaugeMetricFamily, "how long the longest tick took"),
    "tick_seconds": (CounterMetricFamily, "how long all ticks together took"),
    "uptime_seconds": (GaugeMetricFamily, "time since the agent's start"),
    "cpu_seconds": (CounterMetricFamily, "CPU time that the agent has used"),
    "resident_bytes": (GaugeMetricFamily, "memory of the agent"),
    "resident_peak_bytes": (GaugeMetricFamily, "highest memory of the agent"),
    "open_descriptors": (GaugeMetricFamily, "files that the agent has open"),
    "jobs": (GaugeMetricFamily, "jobs that the agent holds"),
    "spool_bytes": (GaugeMetricFamily, "size of the spool on disk"),
    "spool_lost_samples": (CounterMetricFamily, "samples that could not be written to the spool"),
}
"""What AgentSample.numbers are; one that is not here is a newer agent's and shown as a gauge."""


class Exposition:
    """Renders a board. `sinks` are those configured; of them `deliveries` are at work, which come and go meanwhile."""

    def __init__(self, board: Board, cluster: str, sinks: Collection[str], deliveries: Mapping[str, Delivery]) -> None:
        self._board, self._cluster, self._sinks, self._deliveries = board, cluster, sinks, deliveries

    def render(self, openmetrics: bool) -> bytes:
        """All of it as of now."""
        seen = self._board.seen()
        pieces = [text.encode() for text in _families(seen.jobs, self._cluster, openmetrics)]
        node = Node(seen, self._board, self._cluster, {name: self._deliveries.get(name) for name in self._sinks})
        if openmetrics:
            pieces.append(generate_openmetrics(node))  # type: ignore[no-untyped-call]  # it ends with the end mark
        else:
            pieces.append(generate_latest(node))
        return b"".join(pieces)


class Node(Collector):
    """The numbers that are not a job's: the agent's, the sinks', this process'."""

    def __init__(self, seen: Seen, board: Board, cluster: str, deliveries: Mapping[str, Delivery | None]) -> None:
        """None: the sink could not be begun, or not yet."""
        self._seen, self._board, self._cluster, self._deliveries = seen, board, cluster, deliveries

    def collect(self) -> Iterator[Family]:
        """Prometheus wants the time of a thing that happened, not how long ago that is: time() - it tells that."""
        yield from self._agent()
        yield from self._sinks()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        cpu = usage.ru_utime + usage.ru_stime
        yield CounterMetricFamily("acctd_export_cpu_seconds", "CPU time that acctd export has used", cpu)
        yield GaugeMetricFamily("acctd_export_resident_bytes", "memory of acctd export", procs.resident())
        yield CounterMetricFamily(
            "acctd_export_errors", "jobs' frames, values and labels that could not be shown here", self._seen.errors
        )

    def _agent(self) -> Iterator[Family]:
        agent = self._seen.agent
        yield GaugeMetricFamily("acctd_up", "1 if the agent was heard of within three ticks, else 0", self._seen.up)
        if agent is None:
            return
        info = GaugeMetricFamily("acctd_agent_info", "which agent it is", labels=("version", "cluster"))
        info.add_metric((agent.version, self._cluster), 1)
        yield info
        yield GaugeMetricFamily(
            "acctd_agent_sample_timestamp_seconds", "when the agent made its newest sample", agent.time / 10**9
        )
        yield GaugeMetricFamily("acctd_agent_interval_seconds", "time from one tick to the next", agent.interval)
        for name, value in agent.numbers.items():
            family, what = AGENT.get(name, (GaugeMetricFamily, "not known to this version of acctd export"))
            yield family(f"acctd_agent_{name}", what, value)

    def _sinks(self) -> Iterator[Family]:
        sink = ("sink",)
        sent = CounterMetricFamily("acctd_sink_sent", "points that the sink has accepted", labels=sink)
        requests = CounterMetricFamily("acctd_sink_requests", "requests that the sink has accepted", labels=sink)
        failures = CounterMetricFamily("acctd_sink_failures", "requests that were made again", labels=sink)
        quarantined = CounterMetricFamily("acctd_sink_quarantined", "points set aside for good", labels=sink)
        unreadable = CounterMetricFamily("acctd_sink_unreadable", "lines of the spool that are none", labels=sink)
        dropped = CounterMetricFamily(
            "acctd_sink_dropped", "lines that went from a full spool before they were sent", labels=("sink", "stream")
        )
        backlog = GaugeMetricFamily("acctd_sink_backlog_bytes", "what of the spool is still to be sent", labels=sink)
        up = GaugeMetricFamily("acctd_sink_up", "1 if the sink takes points, 0 while it does not", labels=sink)
        accepted = GaugeMetricFamily(
            "acctd_sink_accepted_timestamp_seconds", "when the sink last accepted a request, 0 for never", labels=sink
        )
        for name, delivery in self._deliveries.items():
            if delivery is None:
                up.add_metric((name,), 0)
                accepted.add_metric((name,), 0)
                continue  # what it has counted is not known; zeros would be counters that were set back
            state = delivery.numbers()
            counts = state.counts
            sent.add_metric((name,), counts.sent)
            requests.add_metric((name,), counts.requests)
            failures.add_metric((name,), counts.failures)
            quarantined.add_metric((name,), counts.quarantined)
            unreadable.add_metric((name,), counts.unreadable)
            for stream, lines in dict(counts.dropped).items():
                dropped.add_metric((name, stream), lines)
            up.add_metric((name,), state.trouble is None)
            accepted.add_metric((name,), state.accepted or 0)  # or there were nothing to compare with: no alert
            try:
                backlog.add_metric((name,), delivery.backlog())
            except OSError:
                self._board.leave_out()
        yield from (sent, requests, failures, quarantined, unreadable, dropped, backlog, up, accepted)


def _families(jobs: Sequence[Shown], cluster: str, openmetrics: bool) -> Iterator[str]:
    """The lines of all jobs, family by family as both formats want it; those without lines are left out."""
    opened = [f'{{jobid="{job.job}"' for job in jobs]  # a job's id holds nothing that would have to be escaped
    own = [f"{mine}}}" for mine in opened]
    rests = {metric.labels: _Rests(metric.labels) for metric in CATALOGUE}
    for metric in CATALOGUE:
        name, per, rest = metric.prometheus, metric.per_base_unit, rests[metric.labels]
        totals = [job.totals.get(metric.name) for job in jobs]
        if metric.labels:
            values = [
                (f"{mine}{rest[label]}", value)
                for mine, each in zip(opened, totals, strict=True)
                if each
                for label, value in each.items()
            ]
        else:
            values = [(mine, each[""]) for mine, each in zip(own, totals, strict=True) if each]
        if per == 1:
            lines = [f"{name}{labels} {value}\n" for labels, value in values]
        else:
            lines = [f"{name}{labels} {value / per}\n" for labels, value in values]
        yield _family(name, metric.kind, metric.help, lines, openmetrics)
    for limit in LIMITS.values():
        name = limit.prometheus
        lines = [
            f"{name}{mine} {job.limits[limit.name]}\n"
            for job, mine in zip(jobs, own, strict=True)
            if limit.name in job.limits
        ]
        yield _family(name, "gauge", limit.help, lines, openmetrics)
    where = _escaped(cluster)
    lines = [
        f'{INFO}{{jobid="{job.job}",owner="{_escaped(job.owner)}",account="{_escaped(job.account)}",'
        f'scheduler="{_escaped(job.scheduler)}",parent="{_escaped(job.parent)}",network="{_escaped(job.network)}",'
        f'cluster="{where}"}} 1\n'
        for job in jobs
    ]
    yield _family(
        INFO, "gauge", "whose job it is; a parent's numbers include those of the jobs in it", lines, openmetrics
    )


def _family(name: str, kind: str, what: str, lines: Sequence[str], openmetrics: bool) -> str:
    """Lines, and what is said about them. OpenMetrics names a counter without its `_total`, and its unit."""
    if not lines:
        return ""
    said = name.removesuffix("_total") if openmetrics else name
    head = f"# HELP {said} {what}\n# TYPE {said} {'counter' if kind == 'counter' else 'gauge'}\n"
    if openmetrics and said.endswith(("_bytes", "_seconds")):
        head += f"# UNIT {said} {said.rpartition('_')[2]}\n"
    return head + "".join(lines)


class _Rests(dict[str, str]):
    """What is written after the id of whichever job, by the label of a total: jobs have most of them in common."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def __missing__(self, label: str) -> str:
        values = split_rule(label) if len(self._names) > 1 else (label,)
        pairs = [f',{name}="{_escaped(value)}"' for name, value in zip(self._names, values, strict=True)]
        text = self[label] = "".join(pairs) + "}"
        return text


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
