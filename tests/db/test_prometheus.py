"""From a spool to a real Prometheus that scrapes it: every declared metric comes back by query, equal to the frame."""

import re
import subprocess
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from acctd.cost import Cost
from acctd.frames import AgentSample, Frame, RecordFrame, Sample, encode
from acctd.metrics import CATALOGUE, LIMITS, split_rule
from acctd.model import Limits, Record
from acctd.sinks import PrometheusSink
from acctd.spool import Writer
from exporters.board import Board
from exporters.follow import Follower
from exporters.prometheus import Exposition
from exporters.scrape import Scrape
from tests.db.conftest import Prometheus, until

REPO = Path(__file__).parents[2]
LABELS = {
    (): ("",),
    ("device",): ("8:0", "253:1"),
    ("mount",): ("/data", '/my "own"\\040\n\u20ac'),
    ("class", "direction"): ("OutgoingInternal", "IncomingInternal", "OutgoingExternal"),
}


class Node:
    """A spool, and what `acctd export` makes of it for Prometheus."""

    def __init__(self, directory: Path) -> None:
        for name in ("samples", "records"):
            (directory / name).mkdir(parents=True)
        self._writers = {name: Writer(directory / name) for name in ("samples", "records")}
        self.board = Board(grace=300, scheduler="slurm")
        self.exposition = Exposition(self.board, "site", ("never",), {})
        self._follower = Follower(self.board, directory)
        sink = PrometheusSink(address=("127.0.0.1", 0), grace=300)
        self._scrape = Scrape(sink, self.exposition.render)

    def __enter__(self) -> "Node":
        self.url = self._scrape.start()
        self.target = self.url.removeprefix("http://").removesuffix("/metrics")
        self._follower.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._follower.close()
        self._scrape.close()

    def leave(self, *frames: Frame) -> None:
        for frame in frames:
            stream = "records" if isinstance(frame, RecordFrame) else "samples"
            self._writers[stream].append([encode(frame)])


@pytest.fixture
def node(tmp_path: Path, prometheus: Prometheus) -> Iterator[Node]:
    with Node(tmp_path / "spool") as made:
        prometheus.scrape([made.target])
        yield made


def sample(job: str, totals: dict[str, dict[str, int]], **other: Any) -> Sample:
    first = {"owner": "alice", "uid": 1000, "started": 1.0, "network": "nat"}
    return Sample(time=time.time_ns(), job=job, totals=totals, **{**first, **other})


def everything(kinds: tuple[str, ...], seed: int) -> dict[str, dict[str, int]]:
    """A value of each metric under each label, all of them different."""
    return {
        metric.name: {label: 10**12 * seed + 1000 * at + n for n, label in enumerate(LABELS[metric.labels])}
        for at, metric in enumerate(CATALOGUE)
        if metric.kind in kinds
    }


def stored(prometheus: Prometheus, job: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """All series of a job, as the database has them."""
    found = {}
    for row in prometheus.query(f'{{jobid="{job}"}}'):
        labels = {name: value for name, value in row["metric"].items() if name not in ("__name__", "instance", "job")}
        found[row["metric"]["__name__"], frozenset(labels.items())] = float(row["value"][1])
    return found


def wanted(job: str, totals: dict[str, dict[str, int]]) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The same, of what a frame holds."""
    found = {}
    for metric in CATALOGUE:
        for label, value in totals.get(metric.name, {}).items():
            values = split_rule(label) if metric.labels == ("class", "direction") else (label,)[: len(metric.labels)]
            labels = {"jobid": job, **dict(zip(metric.labels, values, strict=True))}
            found[metric.prometheus, frozenset(labels.items())] = value / metric.per_base_unit
    return found


def one(job: str, name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return name, frozenset({"jobid": job, **labels}.items())


def test_every_declared_metric_of_a_living_job_and_of_one_that_has_ended(node: Node, prometheus: Prometheus) -> None:
    living = everything(("counter", "gauge", "peak"), 1)
    assert len(living) == len(CATALOGUE)
    limits = {"memory": 2**40, "memory_soft": 2**39, "swap": 0, "cpus": 1.5, "pids": 100}
    tags = {"account": 'phys "x"\n', "scheduler": "htcondor"}
    node.leave(sample("1.0", living, limits=limits, tags=tags, parent="pilot.0"))
    ended = everything(("counter", "peak"), 2)
    record = Record(
        id="2.0", owner="bob", uid=1, node="n", state="done", started=1.0, ended=2.0, wall_ns=1, exit_code=0,
        exit_signal=None, network="host", limits=Limits(cpus=0.5), tags={}, totals=ended,
    )  # fmt: skip
    node.leave(RecordFrame(1, "d", time.time_ns(), msgspec.Raw(msgspec.json.encode(record))))
    until(lambda: stored(prometheus, "1.0") and stored(prometheus, "2.0"))
    info = one(
        "1.0", "acctd_job_info", owner="alice", account='phys "x"\n', scheduler="htcondor", parent="pilot.0",
        network="nat", cluster="site",
    )  # fmt: skip
    assert stored(prometheus, "1.0") == {
        **wanted("1.0", living),
        **{one("1.0", LIMITS[name].prometheus): value for name, value in limits.items()},
        info: 1.0,
    }
    info = one(
        "2.0", "acctd_job_info", owner="bob", account="-", scheduler="slurm", parent="-", network="host", cluster="site"
    )
    assert stored(prometheus, "2.0") == {**wanted("2.0", ended), one("2.0", "acctd_job_limit_cpus"): 0.5, info: 1.0}
    assert prometheus.query("up")[0]["value"][1] == "1"


def test_the_agent_and_a_question_as_dashboards_ask_it(node: Node, prometheus: Prometheus) -> None:
    numbers = {**Cost().published(2), "spool_bytes": 4096.0}
    node.leave(
        sample("1.0", {"cpu_user": {"": 10**9}}, tags={"account": "phys"}),
        sample("2.0", {"cpu_user": {"": 2 * 10**9}}, tags={"account": "phys"}),
        sample("2.1", {"cpu_user": {"": 10**9}}, tags={"account": "phys"}, parent="2.0"),
        AgentSample(time.time_ns(), 10.0, "0.1", numbers),
    )
    until(lambda: prometheus.query("acctd_up == 1"))
    for name, value in numbers.items():
        rows = prometheus.query(f'{{__name__=~"acctd_agent_{name}(_total)?"}}')
        assert [float(row["value"][1]) for row in rows] == [value], name
    (row,) = prometheus.query(
        "sum by (account) (acctd_job_cpu_user_seconds_total * on (instance, jobid) group_left (account) "
        'acctd_job_info{parent="-"})'
    )
    assert (row["metric"], row["value"][1]) == ({"account": "phys"}, "3"), "a parent's numbers include its payloads'"


def test_a_bad_job_fails_no_scrape(node: Node, prometheus: Prometheus) -> None:
    odd = "".join(chr(number) for number in range(1, 200)) + "\u2028\ufeff\U0010ffff"
    bad = [
        sample("1.0", {"pids": {"": -5}, "cpu_user": {"": 2**64 - 1}, "nfs_read": {odd: 1}}, tags={"account": odd}),
        sample('2"\n', {"pids": {"": 1}}),
        sample("3.0", {"nfs_read": {"\0": 1, "/" + "x" * 5000: 2}}, tags={"account": "y" * 4096}),
        sample("4.0", {metric.name: {f"{n}": 1 for n in range(2000)} for metric in CATALOGUE}),
    ]
    node.leave(*bad, sample("5.0", {"pids": {"": 5}}))
    until(lambda: stored(prometheus, "5.0"))
    assert stored(prometheus, "5.0")[one("5.0", "acctd_job_pids")] == 5
    assert stored(prometheus, "1.0")[one("1.0", "acctd_job_nfs_read_bytes_total", mount=odd)] == 1
    assert stored(prometheus, "3.0")[one("3.0", "acctd_job_nfs_read_bytes_total", mount="other")] == 2
    assert 300 < len(stored(prometheus, "4.0")) < 800
    assert prometheus.query("up")[0]["value"][1] == "1"
    assert float(prometheus.query("acctd_export_errors_total")[0]["value"][1]) >= 4


def test_promtool_finds_nothing_to_say(node: Node) -> None:
    node.board.take(sample("1.0", everything(("counter", "gauge", "peak"), 1), limits=dict.fromkeys(LIMITS, 1)))
    node.board.take(AgentSample(time.time_ns(), 10.0, "0.1", Cost().published(1)))
    text = node.exposition.render(False)
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def yaml(page: str, begin: str) -> list[str]:
    """What a page's examples have from a line that begins so, at any depth, to the end of what belongs to it."""
    found = []
    for block in re.findall(r"^```yaml\n(.*?)^```", (REPO / "docs" / page).read_text(), re.MULTILINE | re.DOTALL):
        for match in re.finditer(rf"^( *){begin}.*\n(?:\1 .*\n|\n)*", block, re.MULTILINE):
            found.append(textwrap.dedent(match[0]))
    return found


@pytest.mark.parametrize(
    ("page", "begin", "check", "count"),
    [
        ("prometheus.md", "scrape_configs:", "config", 2),
        ("prometheus.md", "groups:", "rules", 1),
        ("opentelemetry.md", "scrape_configs:", "config", 1),
    ],
)
def test_promtool_reads_what_the_pages_show(tmp_path: Path, page: str, begin: str, check: str, count: int) -> None:
    parts = yaml(page, begin)
    assert len(parts) == count
    for part in parts:
        (tmp_path / "a.yml").write_text(part)
        argv = ["promtool", "check", check, str(tmp_path / "a.yml")]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_questions_of_the_page_have_answers(node: Node, prometheus: Prometheus) -> None:
    text = (REPO / "docs" / "prometheus.md").read_text().partition("## Questions")[2].partition("```yaml")[0]
    questions = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert len(questions) == 3

    def asked() -> bool:
        # Time goes on, or there is no rate.
        totals = {
            "cpu_user": {"": time.monotonic_ns()},
            "network": {"OutgoingExternal": time.monotonic_ns()},
            "memory_resident": {"": 95},
        }
        node.leave(sample("1.0", totals, limits={"memory": 100}, tags={"account": "phys"}))
        return all(prometheus.query(question) for question in questions)

    until(asked)
    (row,) = prometheus.query(questions[1])
    assert row["metric"] == {"owner": "alice", "class": "External"}


def test_a_sink_that_was_never_accepted_raises_the_alarm(node: Node, prometheus: Prometheus) -> None:
    """As the page's rule asks: of a sink with a wrong token there is no time at which it was last accepted."""
    (rules,) = yaml("prometheus.md", "groups:")
    found = re.search(r"alert: AcctdSinkStuck\n +expr: (.*)\n", rules)
    assert found
    until(lambda: prometheus.query(found[1]))
    (row,) = prometheus.query(found[1])
    assert row["metric"]["sink"] == "never"
