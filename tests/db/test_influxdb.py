"""From frames in a spool to rows in real databases, and back by query: every declared metric, to the last digit."""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from acctd.frames import AgentSample, EventFrame, Frame, RecordFrame, Sample, encode
from acctd.metrics import CATALOGUE, split_rule
from acctd.model import INT64_MAX, Limits, Record
from acctd.sinks import ExportConfig, InfluxSink
from acctd.spool import Writer
from exporters.delivery import Delivery, UnavailableError, quarantine
from exporters.influxdb import InfluxTarget
from exporters.lineprotocol import record_field, string, tag_value
from tests.db.conftest import Influx1, VictoriaMetrics

NOW = time.time_ns() // 10**6 * 10**6
EXACT = 2**53  # the last integer up to which floats have them all
LABELS = {
    "acctd_blkio": ("8:0", "253:0"),
    "acctd_nfs": ("/home", "/data set,a=b"),
    "acctd_network": ("OutgoingInternal", "IncomingExternal"),
}
STREAMS = {Sample: "samples", AgentSample: "samples", EventFrame: "events", RecordFrame: "records"}


class Way:
    """Spool, positions and delivery of one sink."""

    def __init__(self, directory: Path, sink: InfluxSink) -> None:
        self.spool, self.positions, self.sink = directory / "spool", directory / "positions", sink
        self.positions.mkdir(parents=True)
        for stream in ("samples", "events", "records"):
            (self.spool / stream).mkdir(parents=True)

    def leave(self, frames: Sequence[Frame]) -> None:
        """Put frames into the spool, as the agent does."""
        for stream in ("samples", "events", "records"):
            if lines := [encode(frame) for frame in frames if STREAMS[type(frame)] == stream]:
                writer = Writer(self.spool / stream)
                writer.append(lines)
                writer.close()

    def deliver(self, *, anew: bool = False) -> Delivery:
        """Until all is read; `anew` from the beginning, as after a position was lost."""
        if anew:
            (self.positions / f"{self.sink.name}.json").unlink()
        target = InfluxTarget(self.sink, ExportConfig(cluster="test", scheduler="slurm"), "node1", {})
        delivery = Delivery(self.sink.name, target, self.spool, self.positions)
        delivery.run(until_empty=True)
        assert delivery.numbers().trouble is None
        return delivery

    def quarantined(self) -> list[dict[str, Any]]:
        path = quarantine(self.positions, self.sink.name)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def v1(server: Influx1, **other) -> InfluxSink:
    values = {"retention_policy": "weeks", "records_retention_policy": "years", "batch": 100}
    return InfluxSink(
        name="v1", url=server.url, version=1, bucket="acctd", records_bucket="acctd", **{**values, **other}
    )


def v2(server: VictoriaMetrics, **other) -> InfluxSink:
    values = {"name": "v2", "url": server.url, "version": 2, "org": "o", "bucket": "weeks", "records_bucket": "years"}
    return InfluxSink(**{**values, "batch": 100, **other})


def sample(number: int = 0, totals: dict[str, dict[str, int]] | None = None, **other) -> Sample:
    values = {"job": "12.0", "owner": "ada", "uid": 1000, "started": 1.7e9, "network": "nat", "time": NOW + number}
    return Sample(**{**values, "totals": totals or {"cpu_user": {"": number}}, **other})


def everything(base: int) -> dict[str, dict[str, int]]:
    """Every metric with values of its own, labelled ones twice."""
    return {
        metric.name: {label: base + 10 * at + n for n, label in enumerate(LABELS.get(metric.measurement, ("",)))}
        for at, metric in enumerate(CATALOGUE)
    }


def series(totals: dict[str, dict[str, int]]) -> Iterator[tuple[str, str, dict[str, str], int]]:
    """Measurement, field, tags and value of each number."""
    for metric in CATALOGUE:
        for label, value in totals.get(metric.name, {}).items():
            values = split_rule(label) if len(metric.labels) == 2 else (label,)
            yield metric.measurement, metric.field, dict(zip(metric.labels, values, strict=False)), value


def record(totals: dict[str, dict[str, int]], job: str = "12.0") -> Record:
    return Record(
        id=job,
        owner="ada",
        uid=1000,
        node="node1",
        state="done",
        started=NOW / 1e9 - 60,
        ended=NOW / 1e9 + 1,
        wall_ns=61 * 10**9 + 1,
        exit_code=None,
        exit_signal=9,
        network="nat",
        limits=Limits(memory=2**30, cpus=1.5),
        tags={"Account": "physics", "comment": 'a "quoted" \\ line\nand another'},
        totals=totals,
        notes=("All was well.",),
    )


def counters(totals: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    gauges = {metric.name for metric in CATALOGUE if metric.kind == "gauge"}
    return {name: values for name, values in totals.items() if name not in gauges}


def frames(base: int) -> list[Frame]:
    """One of each kind, with all that can be in it."""
    body = msgspec.Raw(msgspec.json.encode(record(counters(everything(base + 1000)))))
    limits = {"memory": 2**30, "memory_soft": 2**29, "swap": 0, "cpus": 1.5, "pids": 10}
    return [
        sample(0, everything(base), limits=limits, tags={"Account": "physics"}),
        AgentSample(NOW, 10.0, "1", {"ticks": 3, "tick_seconds": 0.0625}),
        EventFrame(7, NOW / 1e9, "oom", 'Out of memory: "python"', job="12.0", uid=1000, owner="ada"),
        RecordFrame(9, "digest", NOW + 10**9, body),
    ]


def rows(server: Influx1, measurement: str, policy: str = "weeks") -> list[dict[str, Any]]:
    found = server.query(f'SELECT * FROM "acctd"."{policy}"."{measurement}"')  # noqa: S608
    return sorted(found, key=lambda row: (row["time"], str(row)))


def content(server: Influx1) -> dict[str, list[dict[str, Any]]]:
    """All that is there."""
    names = [row["name"] for row in server.query("SHOW MEASUREMENTS")]
    assert names
    return {f"{policy} {name}": rows(server, name, policy) for name in names for policy in ("weeks", "years")}


def test_every_metric_in_influxdb_1(influx1: Influx1, tmp_path: Path) -> None:
    base = INT64_MAX - 10_000  # far above 2^53: a float would lose the last digits
    way = Way(tmp_path, v1(influx1))
    way.leave(frames(base))
    delivery = way.deliver()
    counts = delivery.numbers().counts
    assert (counts.quarantined, counts.unreadable, counts.failures) == (0, 0, 0)

    job = {"cluster": "test", "host": "node1", "owner": "ada", "parent": "-", "scheduler": "slurm", "job": "12.0"}
    for when, totals in ((NOW, everything(base)), (NOW + 10**9, counters(everything(base + 1000)))):
        expected = list(series(totals))
        assert {metric.name for metric in CATALOGUE if metric.kind != "gauge" or when == NOW} == set(totals)
        for measurement, field, tags, value in expected:
            where = " AND ".join(f"\"{name}\" = '{text}'" for name, text in {**job, **tags}.items())
            found = influx1.query(f'SELECT "{field}" FROM "{measurement}" WHERE time = {when} AND {where}')  # noqa: S608
            assert [row[field] for row in found] == [value], (measurement, field, tags)

    (limit,) = rows(influx1, "acctd_limit")
    assert limit == {
        "name": "acctd_limit",
        "time": NOW,
        **job,
        "memory_bytes": 2**30,
        "memory_soft_bytes": 2**29,
        "swap_bytes": 0,
        "cpus": 1.5,
        "pids": 10,
    }
    (event,) = rows(influx1, "acctd_event")
    assert (event["event"], event["text"], event["number"]) == ("oom", 'Out of memory: "python"', 7)
    assert event["time"] % 1000 == 7 and abs(event["time"] - NOW) < 1000
    (agent,) = rows(influx1, "acctd_agent")
    assert {**agent, "name": ""} == {
        "name": "", "time": NOW, "cluster": "test", "host": "node1", "ticks": 3, "tick_seconds": 0.0625
    }  # fmt: skip


def test_a_record_in_a_policy_of_its_own(influx1: Influx1, tmp_path: Path) -> None:
    base = 2**60
    way = Way(tmp_path, v1(influx1))
    way.leave(frames(base))
    way.deliver()
    assert rows(influx1, "acctd_record", "weeks") == []
    assert rows(influx1, "acctd_cpu", "years") == []
    (point,) = rows(influx1, "acctd_record", "years")
    for metric in CATALOGUE:
        totals = counters(everything(base + 1000)).get(metric.name, {})
        if metric.measurement == "acctd_network":
            for rule, value in totals.items():
                assert point[record_field(metric, rule)] == value
        elif totals:
            assert point[record_field(metric)] == sum(totals.values())
    text = '{"Account":"physics","comment":"a \\"quoted\\" \\\\ line\\nand another"}'
    assert json.loads(point["tags"]) == json.loads(text)
    assert {name: point[name] for name in ("state", "exit_signal", "wall_ns", "uid", "network_mode", "account")} == {
        "state": "done",
        "exit_signal": 9,
        "wall_ns": 61 * 10**9 + 1,
        "uid": 1000,
        "network_mode": "nat",
        "account": "physics",
    }
    assert point["limit_memory_bytes"] == 2**30 and point["limit_cpus"] == 1.5 and point["notes"] == "All was well."
    assert "exit_code" not in point


def test_every_metric_in_victoriametrics(victoria: VictoriaMetrics, tmp_path: Path) -> None:
    base = EXACT - 10_000
    way = Way(tmp_path, v2(victoria))
    way.leave(frames(base))
    counts = way.deliver().numbers().counts
    assert (counts.quarantined, counts.unreadable, counts.failures) == (0, 0, 0)
    assert refused_by(victoria) == 0

    job = {"cluster": "test", "host": "node1", "owner": "ada", "parent": "-", "scheduler": "slurm", "job": "12.0"}
    stored: dict[tuple[str, frozenset], dict[int, float]] = {}
    for one in victoria.export('{__name__=~"acctd_.*"}'):
        name = one["metric"].pop("__name__")
        at = name, frozenset(one["metric"].items())
        assert at not in stored
        stored[at] = dict(zip(one["timestamps"], one["values"], strict=True))
    for when, totals in ((NOW, everything(base)), (NOW + 10**9, counters(everything(base + 1000)))):
        for measurement, field, tags, value in series(totals):
            found = stored[f"{measurement}_{field}", frozenset({**job, **tags}.items())]
            assert found[when // 10**6] == value, (measurement, field, tags)
    for metric in CATALOGUE:
        totals = counters(everything(base + 1000)).get(metric.name, {})
        if totals and metric.measurement not in LABELS:
            key = f"acctd_record_{record_field(metric)}", frozenset({**job, "payer": "physics"}.items())
            assert list(stored[key].values()) == [totals[""]]
    node = frozenset({"cluster": "test", "host": "node1"}.items())
    assert stored["acctd_agent_tick_seconds", node] == {NOW // 10**6: 0.0625}
    assert stored["acctd_limit_cpus", frozenset(job.items())] == {NOW // 10**6: 1.5}
    # It has no strings: of one there is a series of zeros.
    assert [list(stored[name, tags].values()) for name, tags in stored if name.endswith("_state")] == [[0]]


def test_victoriametrics_stores_floats(victoria: VictoriaMetrics, tmp_path: Path) -> None:
    """Above 2^53 the last digits are gone: numbers are floats there, and decimals of as many digits on disk."""
    way = Way(tmp_path, v2(victoria))
    values = (EXACT - 1, EXACT, EXACT + 1, 2**62 + 1, INT64_MAX)
    way.leave([sample(0, {"cpu_user": {"": value}}, job=str(n)) for n, value in enumerate(values)])
    way.deliver()
    found = {int(one["metric"]["job"]): one["values"] for one in victoria.export("acctd_cpu_user_ns")}
    assert [found[n] for n in (0, 1, 2)] == [[EXACT - 1], [EXACT], [EXACT]]
    for n, value in enumerate(values):
        assert abs(found[n][0] - value) <= value / 10**15


def refused_by(server: VictoriaMetrics) -> int:
    """Lines that it dropped without a word."""
    text = server.get("/metrics").data.decode()
    return sum(
        int(line.split()[-1]) for line in text.splitlines() if line.startswith('vm_rows_invalid_total{type="influx')
    )


def test_sending_all_again_changes_nothing(influx1: Influx1, victoria: VictoriaMetrics, tmp_path: Path) -> None:
    left = [*frames(1000), *(sample(n * 10**9, job=str(n % 7)) for n in range(1, 500))]
    first, second = Way(tmp_path / "1", v1(influx1)), Way(tmp_path / "2", v2(victoria))
    for way in (first, second):
        way.leave(left)
        way.deliver()
    before, exported = content(influx1), everything_in(victoria)
    assert len(before["weeks acctd_cpu"]) == 499 + 2
    for way in (first, second):
        assert way.deliver(anew=True).numbers().counts.sent > 500
    assert content(influx1) == before
    assert everything_in(victoria) == exported


def everything_in(server: VictoriaMetrics) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for one in server.export('{__name__=~".*"}'):
        assert len(one["timestamps"]) == len(set(one["timestamps"]))
        key = json.dumps(one["metric"], sort_keys=True)
        found.setdefault(key, []).extend(zip(one["timestamps"], one["values"], strict=True))
    return found


def test_the_job_as_a_field(influx1: Influx1, tmp_path: Path) -> None:
    way = Way(tmp_path, v1(influx1, job_tag=False))
    way.leave([sample(n, job=f"{n}.0") for n in range(300)])
    way.deliver()
    found = rows(influx1, "acctd_cpu")
    assert [(row["job"], row["user_ns"]) for row in found] == [(f"{n}.0", n) for n in range(300)]
    assert {row["tagKey"] for row in influx1.query('SHOW TAG KEYS FROM "acctd_cpu"')} == {
        "cluster", "host", "owner", "parent", "scheduler"
    }  # fmt: skip
    assert len(influx1.query('SHOW SERIES FROM "acctd_cpu"')) == 1
    assert [row["user_ns"] for row in influx1.query("SELECT user_ns FROM acctd_cpu WHERE job = '7.0'")] == [7]


def test_what_is_too_old_goes_to_quarantine_and_nothing_else(influx1: Influx1, tmp_path: Path) -> None:
    influx1.query('CREATE RETENTION POLICY "hour" ON "acctd" DURATION 1h REPLICATION 1', post=True)
    way = Way(tmp_path, v1(influx1, retention_policy="hour"))
    old = {3, 4, 77, 150, 199}
    way.leave([sample(n - (10**14 if n in old else 0), {"cpu_user": {"": n}}) for n in range(200)])
    counts = way.deliver().numbers().counts
    assert [row["user_ns"] for row in rows(influx1, "acctd_cpu", "hour")] == [n for n in range(200) if n not in old]
    assert counts.quarantined == len(old) and counts.sent == 200 - len(old)
    assert {int(entry["point"].split("user_ns=")[1].split("i ")[0]) for entry in way.quarantined()} == old
    assert all("beyond retention policy" in entry["words"] for entry in way.quarantined())


def test_a_whole_outage_too_old_costs_one_request_a_batch(influx1: Influx1, tmp_path: Path) -> None:
    influx1.query('CREATE RETENTION POLICY "hour" ON "acctd" DURATION 1h REPLICATION 1', post=True)
    way = Way(tmp_path, v1(influx1, retention_policy="hour"))
    way.leave([sample(n - 10**14) for n in range(500)])
    before = requests_of(influx1)
    counts = way.deliver().numbers().counts
    assert counts.quarantined == 500
    assert requests_of(influx1) - before <= 500 // (100 // 8) + 1


def requests_of(server: Influx1) -> int:
    found = server.query("SHOW STATS FOR 'httpd'")
    return sum(int(row["writeReq"]) for row in found)


def test_a_field_of_another_type(influx1: Influx1, tmp_path: Path) -> None:
    """Somebody has written this field as a float: what has it is refused, and what has not is stored."""
    assert influx1.write(b"acctd_cpu,job=x system_ns=1.5 %d" % NOW).status == 204
    way = Way(tmp_path, v1(influx1))
    way.leave([sample(n, {"cpu_system" if n % 10 == 0 else "cpu_user": {"": n}}) for n in range(60)])
    way.deliver()
    assert [row["user_ns"] for row in influx1.query("SELECT user_ns FROM acctd_cpu")] == [
        n for n in range(60) if n % 10
    ]
    assert Counter(entry["to"] for entry in way.quarantined()) == {"samples": 6}
    assert all("field type conflict" in entry["words"] for entry in way.quarantined())


def test_a_database_that_takes_no_new_series_is_waited_for(tmp_path: Path) -> None:
    """The points are good, and will be taken once the limit is raised or a retention policy has removed some."""
    with Influx1(tmp_path / "influx1", data="max-values-per-tag = 10") as server:
        target = InfluxTarget(v1(server), ExportConfig(), "node1", {})
        points = [item.data for n in range(20) for item in target.encode(sample(n, job=str(n)))]
        target.send("samples", points[:12])
        with pytest.raises(UnavailableError, match="max-values-per-tag limit exceeded"):
            target.send("samples", points)
        assert len(rows(server, "acctd_cpu")) == 12
        target.close()


def test_a_password_that_is_changed(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("wrong")
    with Influx1(tmp_path / "influx1", http="auth-enabled = true", user=("ada", "first")) as server:
        sink = v1(server, user="ada", password_file=str(secret))
        target = InfluxTarget(sink, ExportConfig(), "node1", {})
        points = [item.data for item in target.encode(sample())]
        with pytest.raises(UnavailableError, match=r"401: authorization failed; see that the token or password"):
            target.send("samples", points)
        secret.write_text("first")
        target.send("samples", points)
        server.query("SET PASSWORD FOR ada = 'second'", post=True)
        server.user = ("ada", "second")
        secret.write_text("second\n")
        with pytest.raises(UnavailableError, match="401"):
            target.send("samples", points)
        target.send("samples", points)
        assert len(rows(server, "acctd_cpu")) == 1
        target.close()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Influx1, VictoriaMetrics]]:
    directory = tmp_path_factory.mktemp("both")
    with Influx1(directory / "influx1") as one, VictoriaMetrics(directory / "victoria") as other:
        yield one, other


TEXTS = st.lists(
    st.text(st.one_of(st.sampled_from('\\,= "\n\t%\r-'), st.characters(exclude_categories=["Cs"])), max_size=20),
    min_size=1,
    max_size=30,
    unique=True,
)
COUNT = iter(range(10**9))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS)
@example(["\\", "a\\", "\\\\", "a\\,b", "a\\ b", "a\\=b", '"', "=", ",", " ", "a\nb", "DOMAIN\\ada", "\\n", "'"])
def test_any_text_is_read_back(both: tuple[Influx1, VictoriaMetrics], texts: list[str]) -> None:
    """As it was, but for what the format cannot carry, which is percent signs then: in both servers the same."""
    influx1, victoria = both
    name = f"m{next(COUNT)}"
    lines = [f"{name},t={tag_value(text)},n={n} s={string(text)},v={n}i {NOW}".encode() for n, text in enumerate(texts)]
    assert influx1.write(b"\n".join(lines)).status == 204
    found = {int(row["n"]): (row["t"], row["s"], row["v"]) for row in rows(influx1, name)}
    assert found == {n: (carried(text) or "-", plain(text), n) for n, text in enumerate(texts)}

    # It stores no strings, but must not stumble over them.
    before = refused_by(victoria)
    assert victoria.write(b"\n".join(lines)).status == 204
    stored = {int(one["metric"]["n"]): one for one in victoria.export(f"{name}_v")}
    assert {n: (one["metric"]["t"], one["values"]) for n, one in stored.items()} == {
        n: (carried(text) or "-", [n]) for n, text in enumerate(texts)
    }
    assert refused_by(victoria) == before


def plain(text: str) -> str:
    return "".join(f"%{ord(c):02X}" if ord(c) < 32 or c == "\x7f" else c for c in text)


def carried(text: str) -> str:
    """What stays of a tag: backslashes before one of `\\,= ` and at the end are written out."""
    text = plain(text)
    return "".join(
        "%5C" if c == "\\" and (at + 1 == len(text) or text[at + 1] in "\\,= ") else c for at, c in enumerate(text)
    )
