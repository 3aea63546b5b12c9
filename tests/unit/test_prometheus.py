"""The text that is served, read by prometheus_client's parsers: all that is on the board is in it, nothing twice."""

import os
import socket
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from acctd.cost import Cost
from acctd.exporting import Exporter
from acctd.frames import STREAMS, AgentSample, EventFrame, Sample, encode
from acctd.metrics import BY_NAME, CATALOGUE, LIMITS, split_rule
from acctd.sinks import ExportConfig, InfluxSink, JsonSink, PrometheusSink
from acctd.spool import Writer
from exporters.board import LABELS_MOST, Board
from exporters.delivery import Delivery, UnavailableError
from exporters.prometheus import AGENT, Exposition

REPO = Path(__file__).parents[2]
LABELS = {(): ("",), ("device",): ("8:0", "8:16"), ("mount",): ("/data", '/my "own"\\040\n'),
          ("class", "direction"): ("OutgoingInternal", "IncomingInternal", "Loopback")}  # fmt: skip


def sample(job, totals, **other):
    first = {"owner": "alice", "uid": 1000, "started": 1.0, "network": "nat"}
    return Sample(time=time.time_ns(), job=job, totals=totals, **{**first, **other})


def exposition(*frames, sinks=("db",), deliveries=None, cluster="site"):
    made = Board(grace=300)
    for frame in frames:
        made.take(frame)
    return Exposition(made, cluster, () if deliveries is None else sinks, {} if deliveries is None else deliveries)


def parsed(text, parse):
    """{(name, labels): value}; fails where one is there twice."""
    found = [
        ((each.name, frozenset(each.labels.items())), each.value)
        for family in parse(text.decode())
        for each in family.samples
    ]
    assert [key for key, times in Counter(key for key, _ in found).items() if times > 1] == []
    return dict(found)


def both(made):
    """What both formats say, which must be the same but for what the process itself has used meanwhile."""
    text, openmetrics = parsed(made.render(False), parse_text), parsed(made.render(True), parse_openmetrics)
    own = {key for key in text if key[0] in ("acctd_export_cpu_seconds_total", "acctd_export_resident_bytes")}
    assert {key: text[key] for key in text.keys() - own} == {key: openmetrics[key] for key in openmetrics.keys() - own}
    assert text.keys() == openmetrics.keys()
    return text


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def key(name, **labels):
    return name, frozenset((label.rstrip("_"), value) for label, value in labels.items())


def everything(job):
    """A value of each metric under each label, all of them different."""
    totals = {}
    for number, metric in enumerate(CATALOGUE):
        labels = enumerate(LABELS[metric.labels])
        totals[metric.name] = {label: 10**12 + 1000 * number + 10 * at + len(job) for at, label in labels}
    return sample(job, totals)


def wanted(frame):
    """What must be found of a sample, by the declarations."""
    found = {}
    for name, values in frame.totals.items():
        metric = BY_NAME[name]
        for label, value in values.items():
            outer = split_rule(label) if metric.labels == ("class", "direction") else (label,)[: len(metric.labels)]
            labels = {"jobid": frame.job, **dict(zip(metric.labels, outer, strict=True))}
            found[metric.prometheus, frozenset(labels.items())] = value / metric.per_base_unit
    return found


def test_every_declared_metric_is_there_once_a_job_and_equals_the_frame():
    frames = [everything("1.0"), everything("12.0")]
    seen = both(exposition(*frames))
    expected = {**wanted(frames[0]), **wanted(frames[1])}
    assert len(expected) == 2 * sum(len(LABELS[metric.labels]) for metric in CATALOGUE)
    ours = {k: v for k, v in seen.items() if k[0] in {metric.prometheus for metric in CATALOGUE}}
    assert ours == expected


def test_names_are_as_prometheus_wants_them():
    names = [metric.prometheus for metric in CATALOGUE] + [limit.prometheus for limit in LIMITS.values()]
    assert len(set(names)) == len(names)
    for metric in CATALOGUE:
        assert metric.prometheus.endswith("_total") == (metric.kind == "counter")
        assert not set(metric.help) & {"\\", "\n"}, "it would have to be escaped"


def test_types_and_units():
    families = {family.name: family for family in parse_openmetrics(exposition(everything("1")).render(True).decode())}
    assert families["acctd_job_cpu_user_seconds"].type == "counter"
    assert families["acctd_job_cpu_user_seconds"].unit == "seconds"
    assert families["acctd_job_memory_peak_bytes"].type == "gauge"
    assert families["acctd_job_pids"].unit == ""
    assert families["acctd_job_pids"].documentation == BY_NAME["pids"].help


def test_whose_job_it_is_stands_on_one_series():
    tags = {"account": 'a"b\\c\nd', "scheduler": "htcondor"}
    seen = both(exposition(sample("1.0", {"pids": {"": 3}}, tags=tags, parent="pilot.0")))
    info = key(
        "acctd_job_info", jobid="1.0", owner="alice", account='a"b\\c\nd', scheduler="htcondor", parent="pilot.0",
        network="nat", cluster="site",
    )  # fmt: skip
    assert seen[info] == 1
    assert seen[key("acctd_job_pids", jobid="1.0")] == 3
    assert all(name == "acctd_job_info" or "owner" not in dict(labels) for name, labels in seen)


def test_limits():
    limits = {"memory": 2**63 - 1, "memory_soft": 5, "swap": 0, "cpus": 1.5, "pids": 9}
    seen = both(exposition(sample("1.0", {}, limits=limits), sample("2.0", {})))
    assert {name: seen[key(LIMITS[name].prometheus, jobid="1.0")] for name in LIMITS} == limits
    assert not any(dict(labels).get("jobid") == "2.0" for name, labels in seen if "limit" in name)


def test_small_times_are_not_rounded_away():
    seen = both(exposition(sample("1.0", {"cpu_user": {"": 1}, "nfs_time": {"/data": 7}, "io_stall": {"": 2**53 + 2}})))
    assert seen[key("acctd_job_cpu_user_seconds_total", jobid="1.0")] == 1e-9
    assert seen[key("acctd_job_nfs_time_seconds_total", jobid="1.0", mount="/data")] == 0.007
    assert seen[key("acctd_job_io_stall_seconds_total", jobid="1.0")] == (2**53 + 2) / 10**6


def test_the_agent():
    numbers = {**Cost().published(3), "spool_bytes": 5.0, "spool_lost_samples": 6.0}
    assert numbers.keys() == AGENT.keys(), "what the agent publishes has a name and a kind here"
    at = time.time_ns()
    seen = both(exposition(AgentSample(at, 10.0, "0.1", {**numbers, "new_thing": 7.0})))
    assert seen[key("acctd_up")] == 1
    assert seen[key("acctd_agent_info", version="0.1", cluster="site")] == 1
    assert seen[key("acctd_agent_sample_timestamp_seconds")] == at / 10**9
    assert seen[key("acctd_agent_interval_seconds")] == 10
    assert seen[key("acctd_agent_new_thing")] == 7
    assert seen[key("acctd_agent_jobs")] == 3
    assert seen[key("acctd_agent_spool_lost_samples_total")] == 6
    for name, value in numbers.items():
        found = [seen[k] for k in (key(f"acctd_agent_{name}"), key(f"acctd_agent_{name}_total")) if k in seen]
        assert found == [value]


def test_an_agent_that_is_gone():
    seen = both(exposition(AgentSample(1, 10.0, "0.1", {"ticks": 1.0})))
    assert seen[key("acctd_up")] == 0
    assert seen[key("acctd_agent_sample_timestamp_seconds")] == 1e-9
    assert both(exposition())[key("acctd_up")] == 0


class Store:
    """A target that takes what it is told to take."""

    identity, streams, batch = "store", ("events",), 10

    def __init__(self):
        self.takes = True

    def encode(self, frame):
        return [("", frame.text.encode())]

    def send(self, to, data):
        if not self.takes:
            raise UnavailableError("it is full")

    def state(self):
        return {}

    def resume(self, state):
        pass

    def close(self):
        pass


def test_the_sinks(tmp_path):
    spool, positions = tmp_path / "spool", tmp_path / "positions"
    (spool / "events").mkdir(parents=True)
    positions.mkdir()
    writer = Writer(spool / "events")
    writer.append([encode(EventFrame(number, 1.0, "started", "x")) for number in range(5)] + [b"none"])
    delivery = Delivery("db", Store(), spool, positions)
    made = exposition(deliveries={"db": delivery})
    before = both(made)
    assert before[key("acctd_sink_backlog_bytes", sink="db")] > 0
    assert before[key("acctd_sink_accepted_timestamp_seconds", sink="db")] == 0
    delivery.run(until_empty=True)
    delivery.numbers().counts.dropped["samples"] = 9
    seen = both(made)
    assert {name: value for (name, labels), value in seen.items() if name.startswith("acctd_sink_")} == {
        "acctd_sink_sent_total": 5,
        "acctd_sink_requests_total": delivery.numbers().counts.requests,
        "acctd_sink_failures_total": 0,
        "acctd_sink_quarantined_total": 1,
        "acctd_sink_unreadable_total": 1,
        "acctd_sink_dropped_total": 9,
        "acctd_sink_backlog_bytes": 0,
        "acctd_sink_up": 1,
        "acctd_sink_accepted_timestamp_seconds": pytest.approx(delivery.numbers().accepted),
    }
    assert seen[key("acctd_sink_dropped_total", sink="db", stream="samples")] == 9
    delivery.numbers().trouble = "down"
    assert both(made)[key("acctd_sink_up", sink="db")] == 0


def test_a_sink_that_could_not_be_begun_is_down_and_its_counters_are_not_set_back(tmp_path):
    deliveries = {}
    made = exposition(sinks=("db", "none"), deliveries=deliveries)
    down = {("acctd_sink_up", 0), ("acctd_sink_accepted_timestamp_seconds", 0)}
    assert {(name, value) for (name, labels), value in both(made).items() if ("sink", "none") in labels} == down
    deliveries["db"] = Delivery("db", Store(), tmp_path, tmp_path)
    seen = both(made)
    assert seen[key("acctd_sink_up", sink="db")] == 1
    assert {(name, value) for (name, labels), value in seen.items() if ("sink", "none") in labels} == down


def test_every_configured_sink_is_shown(tmp_path):
    """By the exporter itself: one has no token, one a position that is damaged."""
    spool, positions, address = tmp_path / "spool", tmp_path / "positions", str(tmp_path / "metrics.sock")
    for stream in STREAMS:
        (spool / stream).mkdir(parents=True)
    Writer(spool / "events").append([encode(EventFrame(1, 1.0, "started", "x"))])
    positions.mkdir()
    (positions / "damaged.json").write_text("{broken")
    tokenless = InfluxSink(
        name="tokenless", url="http://127.0.0.1:9", version=2, bucket="b", records_bucket="b", org="o",
        token_file=str(tmp_path / "no_such"),
    )  # fmt: skip
    config = ExportConfig(
        spool_dir=spool,
        positions_dir=positions,
        influxdb=(tokenless,),
        json=tuple(JsonSink(name=name, path=tmp_path / f"{name}.jsonl") for name in ("damaged", "well")),
        prometheus=PrometheusSink(address=address, grace=0),
    )
    with Exporter(config, "node1", {}) as exporter:
        exporter.start()
        until(lambda: exporter.trouble("tokenless") and exporter.trouble("damaged") and exporter.sent() == 1)
        until(lambda: os.path.exists(address))
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(address)
            connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            with connection.makefile("rb") as answer:
                text = answer.read().partition(b"\r\n\r\n")[2]
    seen = parsed(text, parse_text)
    for name, up in {"tokenless": 0, "damaged": 0, "well": 1}.items():
        assert seen[key("acctd_sink_up", sink=name)] == up
        assert (seen[key("acctd_sink_accepted_timestamp_seconds", sink=name)] > 0) == bool(up)


def test_a_spool_that_cannot_be_looked_at_costs_one_number(tmp_path):
    class Blind(Delivery):
        def backlog(self):
            raise PermissionError

    made = exposition(sample("1.0", {"pids": {"": 1}}), deliveries={"db": Blind("db", Store(), tmp_path, tmp_path)})
    first, then = (parsed(made.render(False), parse_text) for _ in range(2))
    assert key("acctd_sink_backlog_bytes", sink="db") not in first
    assert first[key("acctd_job_pids", jobid="1.0")] == 1
    assert (first[key("acctd_export_errors_total")], then[key("acctd_export_errors_total")]) == (0, 1)


def test_a_bad_job_fails_nothing():
    bad = [
        sample("1.0", {"pids": {"": -5}, "cpu_user": {"": 10**400}, "block_read": {"8\0": 1, "8:0": 2, "": 3}}),
        sample('2"\n', {"pids": {"": 1}}),
        sample("3.0", {"pids": {"": 1}}, owner="\ud800"),
    ]
    seen = both(exposition(*bad, sample("4.0", {"pids": {"": 4}})))
    assert seen[key("acctd_job_pids", jobid="4.0")] == 4
    assert seen[key("acctd_export_errors_total")] == 5
    assert {dict(labels).get("jobid") for _, labels in seen} == {None, "1.0", "4.0"}


def test_a_job_has_at_most_so_many_series_as_the_page_says():
    labels = {(): [""], **{(kind,): [f"{kind}{n}" for n in range(500)] for kind in ("device", "mount")}}
    labels["class", "direction"] = [f"Outgoing{n}" for n in range(500)]
    totals = {metric.name: dict.fromkeys(labels[metric.labels], 1) for metric in CATALOGUE}
    limits = dict.fromkeys(LIMITS, 1)
    seen = both(exposition(sample("1.0", totals, limits=limits)))
    own = [labels for _, labels in seen if ("jobid", "1.0") in labels]
    by_kind = [LABELS_MOST[metric.labels[0]] + 1 if metric.labels else 1 for metric in CATALOGUE]
    assert len(own) == sum(by_kind) + len(LIMITS) + 1
    page = " ".join((REPO / "docs" / "prometheus.md").read_text().split())
    assert f"**It never has more than {len(own)}**" in page
    assert seen[key("acctd_job_nfs_read_bytes_total", jobid="1.0", mount="other")] == 500 - LABELS_MOST["mount"]


_TEXT = st.text(max_size=6)
_JOBS = st.from_regex(r"[a-c0-9][a-c0-9._\[\]+-]{0,3}", fullmatch=True)


@given(
    st.lists(
        st.builds(
            sample,
            _JOBS | _TEXT,
            st.dictionaries(
                st.sampled_from([*BY_NAME]),
                st.dictionaries(_TEXT | st.sampled_from(["OutgoingA", "IncomingA"]), st.integers(), max_size=4),
                max_size=4,
            ),
            owner=_TEXT,
            tags=st.dictionaries(st.sampled_from(["account", "scheduler", "x"]), _TEXT),
            parent=st.none() | _TEXT,
            limits=st.dictionaries(st.sampled_from([*LIMITS]), st.integers() | st.floats()),
        ),
        max_size=5,
    ),
    _TEXT.filter(lambda text: not any("\ud800" <= character <= "\udfff" or character < " " for character in text)),
)
def test_whatever_is_in_frames_both_parsers_read_it_and_no_series_is_there_twice(frames, cluster):
    both(exposition(*frames, cluster=cluster))
