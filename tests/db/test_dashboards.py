"""Every query of every dashboard, with variables as Grafana fills them in, asked of real databases with real points.

The points come from frames through the exporters' own encoders. InfluxQL is run by influxd 1.6, PromQL by Prometheus.
Flux is parsed and its types are checked by InfluxData's own language server, and is not run: nothing that runs it can
be installed here.
"""

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from acctd.cost import Cost
from acctd.frames import AgentSample, EventFrame, Frame, RecordFrame, Sample, encode
from acctd.metrics import CATALOGUE
from acctd.model import Limits, Record
from acctd.sinks import ExportConfig, InfluxSink, PrometheusSink
from acctd.spool import Writer
from exporters.board import Board
from exporters.delivery import Delivery, RefusedError
from exporters.lineprotocol import TO_RECORDS, Lines
from exporters.prometheus import Exposition
from exporters.scrape import Scrape
from tests.db import grafana
from tests.db.conftest import Influx1, Prometheus, until
from tests.db.grafana import ALL, JSON, Asked, View

GB = 10**9
DAY = 86400
PRICES = {"price_outgoing": "0.05", "price_incoming": "2"}
PILOT = "1.0"
ODD = "7.0[3]@sched+x:1"  # all that a job's id may have and a regular expression takes for something else
LABELS = {
    (): ("",),
    ("device",): ("8:0", "253:1"),
    ("mount",): ("/data",),
    ("class", "direction"): ("OutgoingInternal", "IncomingInternal", "OutgoingExternal", "IncomingExternal"),
}
JOBS = {  # job: host, owner, parent
    PILOT: ("n1.site", "alice", None),
    "1.1": ("n1.site", "bob", PILOT),
    "2.0": ("n2.site", "bob", None),
    ODD: ("n2.site", "carol-x", None),
}
HOSTS = ("n1.site", "n2.site")
LIMITS = {"memory": 8 * 2**30, "cpus": 2.0, "pids": 100}


def totals(age: float) -> dict[str, dict[str, int]]:
    """Of a job that has run for `age` s: CPU 0.5 s user and 0.25 s system a second, 1 MB a second under each rule."""
    found: dict[str, dict[str, int]] = {}
    for metric in CATALOGUE:
        per_second = {"cpu_user": 5 * 10**8, "cpu_system": 25 * 10**7, "network": 10**6, "memory_oom_kills": 2}
        rate = per_second.get(metric.name, 1000)
        value = int(age * rate) if metric.kind == "counter" else 2**30
        found[metric.name] = dict.fromkeys(LABELS[metric.labels], value)
    return found


def sample(job: str, at: float, began: float) -> Sample:
    _, owner, parent = JOBS[job]
    ns = int(at * 1e9) + list(JOBS).index(job)
    return Sample(ns, job, owner, 1000, began, "nat", totals(at - began), parent, {}, LIMITS)  # type: ignore[arg-type]


def record(number: int, job: str, host: str, owner: str, ended: float, age: float, at: float) -> RecordFrame:
    body = Record(
        id=job, owner=owner, uid=1000, node=host, state="done", started=ended - age, ended=ended,
        wall_ns=int(age * 1e9), exit_code=0, exit_signal=None, network="nat", limits=Limits(memory=2**30), tags={},
        totals={name: values for name, values in totals(age).items()},
    )  # fmt: skip
    return RecordFrame(number, f"{number:064x}", int(at * 1e9), msgspec.Raw(msgspec.json.encode(body)))


def agent(at: float, began: float) -> AgentSample:
    """Every second an error, a missed tick and a lost sample."""
    age = int(at - began)
    numbers = dict(Cost().published(len(JOBS)))
    numbers |= {"ticks": age, "errors": age, "missed_ticks": age, "tick_seconds": age / 10, "cpu_seconds": age / 100}
    numbers |= {"spool_bytes": 4096.0, "spool_lost_samples": float(age), "uptime_seconds": at - began}
    return AgentSample(int(at * 1e9) + 999, 10.0, "0.1.0", numbers)


def choices(board: JSON, several: dict[str, list[str]]) -> Iterator[dict[str, str | list[str]]]:
    """All of everything; then two values of what takes some, and one where there is no more."""
    for chosen in ({}, several):
        values: dict[str, str | list[str]] = {"step": "20s", "records": "years", "job": PILOT, **PRICES}
        for name, variable in grafana.variables(board).items():
            if variable.get("includeAll"):
                values[name] = chosen.get(name, [ALL] if variable["multi"] else ALL)
        yield values


def repeated(board: JSON, asked: Asked, values: dict[str, str | list[str]]) -> dict[str, str | list[str]]:
    """A row that is repeated for each class has one class at a time."""
    rows = [panel for panel in board["panels"] if panel["type"] == "row"]
    above = [row for row in rows if row["gridPos"]["y"] < asked.panel.get("gridPos", {"y": -1})["y"]]
    return values | {"class": "External"} if above and above[-1].get("repeat") == "class" else values


# -- InfluxQL


@pytest.fixture(scope="module")
def influx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Influx1, float]]:
    """influxd with an hour of four jobs on two nodes, and a week of records; and the time that is now there."""
    now = time.time() // DAY * DAY - DAY / 2  # noon, so that all of the hour is of one day
    sink = InfluxSink(name="db", url="http://127.0.0.1", version=1, bucket="acctd", records_bucket="acctd")
    nodes = {host: Lines(sink, ExportConfig(cluster="site"), host) for host in HOSTS}
    frames: list[tuple[str, Frame]] = []
    for tick in range(360):
        at = now - 3600 + 10 * tick
        frames += [(JOBS[job][0], sample(job, at, now - 3600)) for job in JOBS]
        frames += [(host, agent(at, now - 3600)) for host in HOSTS]
    for day in range(1, 5):  # short ones: none of them was ever sampled
        ended = now // DAY * DAY - day * DAY + 3600
        frames.append(("n1.site", record(day, f"{100 + day}.0", "n1.site", "alice", ended, 1000, ended + 1)))
        frames.append(("n2.site", record(day, f"{200 + day}.0", "n2.site", "bob", ended, 500, ended + 1)))
    frames.append(("n1.site", record(9, PILOT, "n1.site", "alice", now - 5, 3500, now - 4)))
    for number, name in enumerate(("out-of-memory", "finished")):
        frames.append(("n1.site", EventFrame(number, now - 60, name, 'it "was"', PILOT, 1000, "alice")))
    frames.append(("n1.site", EventFrame(3, now - 50, "trouble", "something", None, None, None)))
    places: dict[str, list[bytes]] = {}
    for host, frame in frames:
        for item in nodes[host].encode(frame):
            places.setdefault(item.to, []).append(item.data)
    with Influx1(tmp_path_factory.mktemp("influx")) as server:
        for to, lines in places.items():
            for start in range(0, len(lines), 10000):
                answer = server.write(
                    b"\n".join(lines[start : start + 10000]), "years" if to == TO_RECORDS else "weeks"
                )
                assert answer.status == 204, answer.data
        yield server, now


NO_VALUES = {
    *("time", "name", "cluster", "host", "owner", "job", "parent", "scheduler", "class", "direction", "device"),
    "mount",
}
SOME = {"cluster": "site", "host": list(HOSTS), "user": ["alice", "bob"], "class": ["Internal", "External"]}


@pytest.mark.parametrize("board", grafana.boards("influxql"), ids=lambda board: board["uid"])
def test_influxql(board: JSON, influx: tuple[Influx1, float]) -> None:
    server, now = influx
    since = now - (7 * DAY if board["uid"] == "acctd-bill-influxql" else 3600)
    asked_of = list(grafana.queries(board))
    empty = []
    for values in choices(board, SOME):
        for asked in asked_of:
            text = grafana.influxql(board, asked, View(repeated(board, asked, values), since, now))
            assert "$" not in text.replace("$/", ""), text
            rows = server.query(text)
            if not any(value is not None for row in rows for key, value in row.items() if key not in NO_VALUES):
                empty.append(f"{asked.panel['title']}: {text}")
    assert not empty
    assert len(asked_of) >= 9


@pytest.mark.parametrize("board", grafana.boards("influxql"), ids=lambda board: board["uid"])
def test_influxql_variables(board: JSON, influx: tuple[Influx1, float]) -> None:
    """Each has values, and what is chosen before it narrows them."""
    server, now = influx
    wanted = {
        "cluster": {"site"},
        "host": {"n2.site"},
        "user": {"bob", "carol-x"},
        "job": {"2.0", "200.0"},
        "class": {"Internal", "External"},
        "records": {"weeks", "years"},
    }
    values: dict[str, str | list[str]] = {"cluster": "site", "host": ["n2.site"], "user": ["bob"]}
    for name, variable in grafana.variables(board).items():
        if variable["type"] != "query":
            continue
        text = grafana.replace(board, variable["query"], View(values, now - 3600, now), str)
        found = {row["name"] if name == "records" else row["value"] for row in server.query(text)}
        if name == "records":
            found = {row["name"] for row in _names(server, text)}
        if name == "host":
            assert found == set(HOSTS)
        elif name == "job":
            assert "2.0" in found and ODD not in found and PILOT not in found
        else:
            assert found == wanted[name], text


def _names(server: Influx1, text: str) -> list[dict[str, Any]]:
    """The column `name` itself, which Influx1.query() has for a series' name otherwise."""
    series = json.loads(server.get("/query", q=text, db=server.database).data)["results"][0]["series"][0]
    return [dict(zip(series["columns"], values, strict=True)) for values in series["values"]]


def test_what_influxql_panels_say(influx: tuple[Influx1, float]) -> None:
    """Numbers, not only rows: pilots once, days and prices right, limits as set."""
    server, now = influx
    boards = {board["uid"].split("-")[1]: board for board in grafana.boards("influxql")}

    def ask(name: str, title: str, ref: str = "A", since: float = 3600, **chosen: str | list[str]) -> list[JSON]:
        board = boards[name]
        values = next(choices(board, {})) | chosen
        asked = next(a for a in grafana.queries(board) if a.panel["title"] == title and a.target["refId"] == ref)
        return server.query(grafana.influxql(board, asked, View(repeated(board, asked, values), now - since, now)))

    def steady(rows: list[JSON], key: str) -> Any:
        """Of the middle of the range."""
        return sorted(row[key] for row in rows)[len(rows) // 2]

    # Three top-level jobs; the fourth is in the first, whose numbers have it already.
    users = {row["owner"]: row for row in ask("user", "CPU")}
    assert set(users) == {"alice", "bob", "carol-x"}
    assert {name: steady([r for r in ask("user", "CPU") if r["owner"] == name], "value") for name in users} == {
        name: pytest.approx(0.75) for name in users
    }
    assert {row["host"]: row["value"] for row in ask("node", "Jobs")} == {"n1.site": 1, "n2.site": 2}
    assert steady(ask("job", "CPU", "C"), "limit") == 2.0
    assert steady(ask("job", "Memory", "F"), "limit") == 8 * 2**30
    assert steady(ask("job", "CPU", "A", job=ODD), "user") == pytest.approx(0.5)
    assert [row["text"] for row in ask("job", "Out of memory", "Anno")] == ['it "was"']
    assert {row["event"] for row in ask("job", "Events")} == {"out-of-memory", "finished"}
    inside = ask("job", "Jobs inside it")
    assert [(row["job"], row["owner"]) for row in inside] == [("1.1", "bob")]
    # 1 MB a second and rule: 1000 s of alice and 500 s of bob each day, and 3500 s of alice today.
    week = 7 * DAY
    rows = ask("bill", "Bytes a day", since=week)
    assert {row["sum_network_OutgoingExternal_bytes"] for row in rows} == {1500 * 10**6, 3500 * 10**6}
    assert len(rows) == 5
    days = {(row["time"] // (DAY * GB), row["owner"]): row["value"] for row in
            ask("bill", "$class: outgoing by user and day", since=week)}  # fmt: skip
    today = int((now - 5) // DAY)
    assert days[today, "alice"] == 3500 * 10**6
    noon = int(now // DAY) - 2
    assert (days[noon, "alice"], days[noon, "bob"]) == (1000 * 10**6, 500 * 10**6)
    cost = {row["owner"]: row["Cost out"] for row in ask("bill", "$class: bill by user", "C", since=week)}
    assert cost == {"alice": pytest.approx(7.5 * 0.05), "bob": pytest.approx(2 * 0.05)}
    cost = {row["owner"]: row["Cost in"] for row in ask("bill", "$class: bill by user", "D", since=week)}
    assert cost == {"alice": pytest.approx(7.5 * 2), "bob": pytest.approx(2 * 2)}
    assert steady(ask("agent", "Share of time in ticks"), "value") == pytest.approx(0.1)
    assert {row["value"] for row in ask("agent", "Errors")} == {20}


# -- PromQL


class Store:
    """A target that takes every point but one."""

    identity, streams, batch = "store", ("samples",), 10

    def encode(self, frame: Frame) -> list[Any]:
        from exporters.delivery import Item

        return [Item("x", encode(frame))]

    def send(self, to: str, data: Any) -> None:
        if bad := {index: "bad" for index, point in enumerate(data) if b'"bad"' in point}:
            raise RefusedError("bad", bad)

    def state(self) -> dict[str, Any]:
        return {}

    def resume(self, state: Any) -> None:
        pass

    def close(self) -> None:
        pass


class Live:
    """Two nodes that are scraped: their boards get new frames until stop()."""

    def __init__(self, directory: Path) -> None:
        self.began = time.time() - 100
        self.boards = {host: Board(grace=300) for host in HOSTS}
        self.delivery = self._delivery(directory)
        self._scrapes = {}
        for host, board in self.boards.items():
            exposition = Exposition(board, "site", ("db",), {"db": self.delivery})
            self._scrapes[host] = Scrape(PrometheusSink(address=("127.0.0.1", 0), grace=300), exposition.render)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Live":
        urls = {host: scrape.start() for host, scrape in self._scrapes.items()}
        self.targets = {host: url.removeprefix("http://").removesuffix("/metrics") for host, url in urls.items()}
        self._run_once()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for scrape in self._scrapes.values():
            scrape.close()

    def short(self) -> None:
        """A job that begins and ends between two ticks."""
        now = time.time()
        self.boards["n1.site"].take(record(1, "9.0", "n1.site", "dave", now, 2.0, now))

    def _run(self) -> None:
        while not self._stop.wait(0.2):
            self._run_once()
            # What a sink's own thread counts while it is in trouble.
            counts = self.delivery.numbers().counts
            counts.failures += 1
            counts.quarantined += 1
            counts.unreadable += 1
            counts.sent += 10
            counts.dropped["samples"] = counts.dropped.get("samples", 0) + 1

    def _run_once(self) -> None:
        now = time.time()
        for job, (host, _, _) in JOBS.items():
            self.boards[host].take(sample(job, now, self.began))
        for board in self.boards.values():
            board.take(agent(now, self.began))

    @staticmethod
    def _delivery(directory: Path) -> Delivery:
        spool, positions = directory / "spool", directory / "positions"
        (spool / "samples").mkdir(parents=True)
        positions.mkdir()
        Writer(spool / "samples").append([encode(sample(PILOT, time.time(), time.time() - 5))] * 3)
        delivery = Delivery("db", Store(), spool, positions)
        delivery.run(until_empty=True)
        return delivery


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prometheus, Live, float]]:
    """Prometheus after some ten scrapes of two nodes, and the time of the last one."""
    directory = tmp_path_factory.mktemp("prometheus")
    with Live(directory) as live, Prometheus(directory / "db", list(live.targets.values())) as server:
        many = 'min(count_over_time(acctd_job_info{jobid!="9.0"}[1m])) >= %d'
        until(lambda: server.query(many % 4))
        live.short()
        until(lambda: server.query(many % 12))
        until(lambda: server.query('count_over_time(acctd_job_info{jobid="9.0"}[1m]) >= 2'))
        yield server, live, time.time()


def ask_prometheus(server: Prometheus, text: str, target: JSON, step: int, view: View) -> list[JSON]:
    if target.get("instant"):
        return server.query(text, view.until)
    start, end = view.since // step * step, view.until // step * step
    answer = json.loads(
        server.get("/api/v1/query_range", query=text, start=repr(start), end=repr(end), step=str(step)).data
    )
    assert answer["status"] == "success", (text, answer)
    found: list[JSON] = answer["data"]["result"]
    return found


def seen(
    scraped: tuple[Prometheus, Live, float], board: JSON, asked: Asked, values: Any, seconds: int = 60
) -> list[JSON]:
    server, _, now = scraped
    view = View(repeated(board, asked, values), now - seconds, now, scrape=1)
    text, step = grafana.promql(board, asked, view)
    assert "$" not in text, text
    return ask_prometheus(server, text, asked.target, step, view)


@pytest.mark.parametrize("board", grafana.boards("prometheus"), ids=lambda board: board["uid"])
def test_promql(board: JSON, scraped: tuple[Prometheus, Live, float]) -> None:
    _, live, _ = scraped
    some = SOME | {"host": list(live.targets.values())}
    asked_of = list(grafana.queries(board))
    empty = []
    for values in choices(board, some):
        for asked in asked_of:
            values["step"] = "1s"
            rows = seen(scraped, board, asked, values)
            numbers = [row.get("values") or [row["value"]] for row in rows]
            if not any(value != "NaN" for points in numbers for _, value in points):
                empty.append(f"{asked.panel['title']}: {asked.target['expr']}")
    assert not empty
    assert len(asked_of) >= 9


@pytest.mark.parametrize("board", grafana.boards("prometheus"), ids=lambda board: board["uid"])
def test_promql_variables(board: JSON, scraped: tuple[Prometheus, Live, float]) -> None:
    server, live, now = scraped
    values: dict[str, str | list[str]] = {"cluster": "site", "host": [live.targets["n2.site"]], "user": ["carol-x"]}
    wanted = {
        "cluster": {"site"},
        "host": set(live.targets.values()),
        "user": {"bob", "carol-x"},
        "job": {ODD},
        "class": {"Internal", "External"},
    }
    for name, variable in grafana.variables(board).items():
        if variable["type"] == "query":
            query = variable["query"]["query"]
            assert query.startswith("label_values(") and query.endswith(")")
            selector, _, label = query[len("label_values(") : -1].rpartition(", ")
            text = grafana.promql_text(board, selector, 1, View(values, now - 60, now))
            rows = json.loads(server.get(f"/api/v1/label/{label}/values", **{"match[]": text}).data)["data"]
            assert set(rows) == wanted[name]


def test_what_promql_panels_say(scraped: tuple[Prometheus, Live, float]) -> None:
    _, live, now = scraped
    boards = {board["uid"].split("-")[1]: board for board in grafana.boards("prometheus")}

    def ask(name: str, title: str, ref: str = "A", seconds: int = 60, **chosen: str | list[str]) -> list[JSON]:
        board = boards[name]
        values = next(choices(board, {})) | {"step": "1s"} | chosen
        asked = next(a for a in grafana.queries(board) if a.panel["title"] == title and a.target["refId"] == ref)
        return seen(scraped, board, asked, values, seconds)

    def last(rows: list[JSON], *labels: str) -> dict[Any, float]:
        by = {tuple(row["metric"].get(label) for label in labels): row for row in rows}
        assert len(by) == len(rows)
        return {key: float((row.get("values") or [row["value"]])[-1][1]) for key, row in by.items()}

    first, second = live.targets["n1.site"], live.targets["n2.site"]
    cores = {row["metric"]["owner"]: [float(value) for _, value in row["values"]] for row in ask("user", "CPU")}
    assert cores.keys() >= {"alice", "bob", "carol-x"}
    for owner in ("alice", "bob"):  # a rendering may be a second old, which is a scrape here
        assert sum(cores[owner]) / len(cores[owner]) == pytest.approx(0.75, rel=0.2)
    assert last(ask("node", "Jobs"), "instance") == {(first,): 2, (second,): 2}  # one of them has just ended
    assert last(ask("job", "CPU", "C", job=ODD)) == {(): 2.0}
    assert list(last(ask("job", "Jobs inside it"), "jobid", "owner")) == [("1.1", "bob")]
    # The bill: a job that began long before the first scrape counts with all it has, and so does one of two seconds.
    today = last(ask("bill", "$class: outgoing by user and day", seconds=7 * DAY), "owner")
    assert today["dave",] == 2 * 10**6
    assert today["alice",] == pytest.approx((now - live.began) * 10**6, rel=0.05)
    cost = last(ask("bill", "$class: bill by user", "D", seconds=7 * DAY), "owner")
    assert cost["dave",] == pytest.approx(0.002 * 2)
    # Within the range only: of what was there when it began, only what came after.
    recent = last(ask("bill", "$class: bill by user", "A", seconds=5), "owner")
    assert 10**6 < recent["alice",] < 10 * 10**6
    assert last(ask("agent", "Sinks that take points"), "instance", "sink") == {(first, "db"): 1, (second, "db"): 1}


# -- Flux

CHECKER = """
const flux = require(process.argv[1]);
const scripts = JSON.parse(require("fs").readFileSync(0));
const good = (script) => { try { return new flux.Flux(script).is_valid() } catch (error) { return false } };
console.log(JSON.stringify(scripts.map(good)));
"""


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], list[bool]]:
    """InfluxData's parser and type checker of Flux, from npm."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not here, by which the checker of Flux is installed")
    directory = tmp_path_factory.mktemp("flux")
    package = "@influxdata/flux-lsp-node"
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(directory)]
    done = subprocess.run([*install, f"{package}@0.8.40"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr

    def check(scripts: list[str]) -> list[bool]:
        node = ["node", "-e", CHECKER, str(directory / "node_modules" / package)]
        done = subprocess.run(node, input=json.dumps(scripts), capture_output=True, text=True, timeout=300, check=True)
        found: list[bool] = json.loads(done.stdout)
        return found

    return check


def test_flux_is_parsed_and_typed(valid: Callable[[list[str]], list[bool]]) -> None:
    """Not run. That the checker sees what is wrong is seen first."""
    good = 'from(bucket: "b") |> range(start: -1h) |> aggregateWindow(every: 20s, fn: last)'
    bad = [good.replace("fn: last", "fn: 3"), good.replace("aggregateWindow", "agregateWindow"), good + " |>"]
    assert valid([good, *bad]) == [True, False, False, False]
    scripts = {}
    for board in grafana.boards("flux"):
        for values in choices(board, SOME):
            for asked in grafana.queries(board):
                view = View(repeated(board, asked, values), 0, 3600)
                scripts[grafana.flux(board, asked, view)] = asked.panel["title"]
            for name, variable in grafana.variables(board).items():
                if variable["type"] == "query":
                    scripts[grafana.flux_text(board, variable["query"], 20, View(values, 0, 3600))] = name
    verdicts = valid(list(scripts))
    assert [script for script, fine in zip(scripts, verdicts, strict=True) if not fine] == []
    assert len(scripts) > 150
