"""What InfluxQL's panels add up may be more than 64 bits hold: nanoseconds of many cores, and bytes.

Large numbers through the exporters' own encoders, asked of influxd 1.6, which adds up integers as 64-bit ones.
"""

import time
from collections.abc import Iterator

import msgspec
import pytest

from acctd.frames import Frame, RecordFrame, Sample
from acctd.metrics import CATALOGUE
from acctd.model import Limits, Record
from acctd.sinks import ExportConfig, InfluxSink
from exporters.lineprotocol import Lines
from tests.db import grafana
from tests.db.conftest import Influx1
from tests.db.grafana import JSON, View
from tests.db.test_dashboards import DAY, LABELS, choices, repeated

NS = 5 * 10**18  # of each job; two of them are more than 2**63
MUCH = 2**62
GB = 10**9
HOST = "n1.site"
GAUGES = {metric.name for metric in CATALOGUE if metric.kind == "gauge"}  # no record has them


def totals(outgoing: int, incoming: int) -> dict[str, dict[str, int]]:
    found = {metric.name: dict.fromkeys(LABELS[metric.labels], MUCH) for metric in CATALOGUE}
    found |= {"cpu_user": {"": NS}, "cpu_system": {"": NS}}
    found["network"] = {"OutgoingExternal": outgoing, "IncomingExternal": incoming}
    return found


def record(number: int, ended: float, outgoing: int, incoming: int) -> RecordFrame:
    body = Record(
        id=f"{number}.0", owner="alice", uid=1000, node=HOST, state="done", started=ended - 10, ended=ended,
        wall_ns=NS, exit_code=0, exit_signal=None, network="nat", limits=Limits(), tags={},
        totals={name: values for name, values in totals(outgoing, incoming).items() if name not in GAUGES},
    )  # fmt: skip
    return RecordFrame(number, f"{number:064x}", int(ended * 1e9), msgspec.Raw(msgspec.json.encode(body)))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Influx1, float]]:
    """influxd with two running jobs, two records of today and one of yesterday; and the time that is now there."""
    now = time.time() // DAY * DAY - DAY / 2
    frames: list[Frame] = [
        Sample(int((now - 5 - 20 * tick) * 1e9) + job, f"{job}.1", "alice", 1000, now - 3600, "nat", totals(MUCH, MUCH),
               None, {}, {"memory": MUCH, "cpus": 2.0, "pids": 100})
        for job in range(2) for tick in range(3)
    ]  # fmt: skip
    frames += [record(1, now - 60, MUCH, MUCH), record(2, now - 50, MUCH, 0), record(3, now - DAY, 0, MUCH)]
    sink = InfluxSink(name="db", url="http://127.0.0.1", version=1, bucket="acctd", records_bucket="acctd")
    lines = Lines(sink, ExportConfig(cluster="site"), HOST)
    with Influx1(tmp_path_factory.mktemp("influx")) as server:
        for item in (item for frame in frames for item in lines.encode(frame)):
            answer = server.write(item.data, "years" if item.data.startswith(b"acctd_record,") else "weeks")
            assert answer.status == 204, answer.data
        yield server, now


def ask(large: tuple[Influx1, float], name: str, title: str, ref: str = "A", since: float = 3600) -> list[JSON]:
    server, now = large
    board = next(board for board in grafana.boards("influxql") if board["uid"] == f"acctd-{name}-influxql")
    asked = next(a for a in grafana.queries(board) if a.panel["title"] == title and a.target["refId"] == ref)
    values = repeated(board, asked, next(choices(board, {})) | {"job": "0.1"})
    return server.query(grafana.influxql(board, asked, View(values, now - since, now)))


def test_that_influxd_itself_adds_up_integers_in_64_bits(large: tuple[Influx1, float]) -> None:
    """Else this file tests nothing."""
    (row,) = large[0].query('SELECT sum("wall_ns") FROM "years"."acctd_record"')
    assert row["sum"] == 3 * NS - 2**64


@pytest.mark.parametrize("ref", "ABC")
def test_times_of_records(large: tuple[Influx1, float], ref: str) -> None:
    (row,) = ask(large, "user", "Ended in the range", ref)
    (value,) = (value for key, value in row.items() if key not in ("time", "name"))
    assert value == pytest.approx(2 * NS / 10**9)


def test_times_of_records_by_user(large: tuple[Influx1, float]) -> None:
    (wall,), (user,) = (ask(large, "user", "Wall time by user", ref, 2 * DAY) for ref in "AB")
    assert (wall["owner"], wall["Wall time"], user["User time"]) == ("alice", 3 * NS / 10**9, 3 * NS / 10**9)


def test_bytes_of_records(large: tuple[Influx1, float]) -> None:
    """As JSON has them: a float of 2**63 is written with the digits that tell it from its neighbours."""
    (out,) = ask(large, "bill", "$class: bill by user", "A")
    (cost,) = ask(large, "bill", "$class: bill by user", "C")
    assert (float(out["Outgoing"]), cost["Cost out"]) == (2.0**63, pytest.approx(2**63 / GB * 0.05))
    (day,) = ask(large, "bill", "$class: outgoing by user and day")
    (price,) = ask(large, "bill", "$class: cost by day", "A")
    assert (float(day["value"]), price["outgoing"]) == (2.0**63, pytest.approx(2**63 / GB * 0.05))


def test_bytes_of_all_classes_are_added_up_by_grafana(large: tuple[Influx1, float]) -> None:
    """Day by day: one class and direction of one day is what must be within 64 bits."""
    rows = ask(large, "bill", "Bytes", since=2 * DAY)
    assert [row["sum_network_IncomingExternal_bytes"] for row in rows] == [MUCH, MUCH]
    board = next(board for board in grafana.boards("influxql") if board["uid"] == "acctd-bill-influxql")
    (panel,) = (panel for panel in board["panels"] if panel["title"] == "Bytes")
    assert panel["options"]["reduceOptions"]["calcs"] == ["sum"]


def test_running_jobs(large: tuple[Influx1, float]) -> None:
    memory = ask(large, "user", "Memory")
    assert {(row["owner"], float(row["value"])) for row in memory} == {("alice", 2.0**63)}
    cpu = {row["job"]: row["CPU time"] for row in ask(large, "user", "Jobs in the range")}
    assert cpu["0.1"] == cpu["1.1"] == 2 * NS / 10**9
    (network,) = (row for row in ask(large, "user", "Jobs in the range", "C") if row["job"] == "0.1")
    assert float(network["Network"]) == 2.0**63
