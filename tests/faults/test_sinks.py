"""200,000 points through every fault of a database, of its disk and of the network, and past four kills.

`acctd export` as it is run on a node, a real influxd on a disk of its own, and lab/faultydb.py between them. In the
agent's place is lab/series.py, which fills the spool through the agent's own code with samples that are known by their
numbers: 500 jobs for minutes would give as many points. A file of JSON lines is a second sink, which knows no trouble.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from acctd.sinks import ExportConfig, InfluxSink
from acctd.spool import segments
from exporters import positions
from exporters.delivery import quarantine
from exporters.lineprotocol import Lines
from exporters.positions import State
from lab import series
from lab.faultydb import LOAD, FaultyDatabase
from lab.smalldisk import SmallDisk
from tests.db.conftest import Influx1

COUNT = 25_000
POINTS = COUNT * series.POINTS
PATIENCE = 120.0  # s for what takes some
ACCTD = Path(sys.executable).parent / "acctd"

CONFIG = """
state_dir = "{directory}/state"
runtime_dir = "{directory}/run"
[export]
spool_dir = "{directory}/spool"
positions_dir = "{directory}/positions"
spool_max = "64M"
[influxdb.site]
url = "{url}"
version = 1
database = "acctd"
batch = 1000
timeout = 2
[json.file]
path = "{directory}/lines.jsonl"
streams = ["records", "events", "samples"]
"""


class Process:
    """A program that may be killed and started again; what it said is in `log`."""

    def __init__(self, argv: list[str], log: Path) -> None:
        self.argv, self.log = argv, log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *self.argv], stdout=log, stderr=log)

    def kill(self) -> None:
        """-9, and it must have been alive."""
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(PATIENCE)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with SmallDisk(tmp_path / "disk", "256m") as made:
        yield made


@pytest.fixture
def influx(disk: SmallDisk) -> Iterator[Influx1]:
    with Influx1(disk.path / "influx") as server:
        yield server


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE:.0f} s: {what}"
        time.sleep(0.02)


def state(directory: Path, sink: str = "site") -> State:
    return positions.load(directory / "positions", sink) or State(identity="")


def spooled(directory: Path) -> int:
    """Number of the newest segment's first sample: how far the stand-in agent is, about."""
    found = segments(directory / "spool" / "samples")
    return found[-1].first if found else 0


def lines_of(numbers: Iterator[int], url: str) -> Counter[str]:
    """The points of these samples, as the sink writes them."""
    sink = InfluxSink(name="site", url=url, version=1, bucket="acctd", records_bucket="acctd")
    encoder = Lines(sink, ExportConfig(), os.uname().nodename)
    return Counter(item.data.decode() for number in numbers for item in encoder.encode(series.sample(number)))


def test_each_good_point_is_there_once_and_each_bad_one_in_quarantine(tmp_path: Path, influx: Influx1, disk: SmallDisk):
    events = COUNT // series.EVENT_EVERY
    config = tmp_path / "acctd.toml"
    with (
        FaultyDatabase(("127.0.0.1", influx.port), series.NAMED.encode()) as proxy,
        contextlib.ExitStack() as stack,
    ):
        config.write_text(CONFIG.format(directory=tmp_path, url=proxy.url))
        config.chmod(0o644)
        agent = Process([sys.executable, "-m", "lab.series", str(config), str(COUNT), "0.03"], tmp_path / "agent.log")
        export = Process([str(ACCTD), "export", "--config", str(config)], tmp_path / "export.log")
        assert influx.write("\n".join(lines_of(iter([0]), proxy.url)).encode()).status == 204
        disk.fill()
        for each in (agent, export):
            stack.callback(each.end)
            each.start()

        def sent() -> int:
            return state(tmp_path).counts.sent

        def until_room() -> None:
            """influxd 1.6 repeats an error of its disk until it is restarted."""
            until(lambda: "no space left" in (state(tmp_path).trouble or ""), "the database says that its disk is full")
            stood, asked = sent(), sum(proxy.done.values())
            until(lambda: sum(proxy.done.values()) > asked, "it is asked again")
            assert sent() == stood
            influx.kill()
            disk.free()
            influx.start()
            until(lambda: sent() > stood, "points are accepted after the full disk")

        # The database's disk is full from the first new series on: it answers 400, as if the points were at fault.
        until_room()
        proxy.add(LOAD)

        # The agent dies between two faults, and once more while the database is dead, too.
        until(lambda: spooled(tmp_path) > COUNT // 10, "the agent has left some")
        agent.kill()
        agent.start()
        until(lambda: sent() > 5_000, "points are accepted")
        influx.kill()
        away = proxy.done["away"]
        until(lambda: proxy.done["away"] >= away + 2, "nobody answers")
        until(lambda: spooled(tmp_path) > COUNT // 3, "the agent has left more")
        agent.kill()
        influx.start()
        agent.start()

        # The exporter dies while the answer to what was stored drips in, and when one never comes.
        until(lambda: proxy.done["drip"] > 0, "the script comes to its slow answer")
        export.kill()
        export.start()
        until(lambda: not proxy.left, "the script is gone through")
        proxy.add(["reset_after_store"])
        until(lambda: not proxy.left, "an answer is lost")
        export.kill()
        export.start()
        until(lambda: sent() > 80_000, "points are accepted after the kill")

        # It is full once more, as it is being written to.
        disk.fill()
        until_room()
        proxy.add(["busy", "pass", "hang", "pass", "later", "pass", "reset_in_request", "pass", "cut_answer"])

        def done() -> bool:
            found = [state(tmp_path, sink).positions for sink in ("site", "file")]
            return all(at and (at["samples"].number, at["events"].number) == (COUNT, events) for at in found)

        until(done, "both sinks have read everything")
        export.end()
        assert agent.process is not None
        assert agent.process.wait(PATIENCE) == 0, agent.log.read_text()
        assert not proxy.left
        print(f"\nsteps: {dict(proxy.done)}")

    wanted = series.sums(COUNT)
    counts = state(tmp_path).counts
    print(f"counts: {counts}")

    # In the database: each good point, once, and nothing else.
    (cpu,) = influx.query('SELECT count("user_ns") AS n, sum("user_ns") AS total FROM acctd_cpu')
    assert (cpu["n"], cpu["total"]) == (wanted.samples, wanted.user)
    for measurement, field, points in (
        ("acctd_memory", "file_bytes", 1),
        ("acctd_blkio", "write_bytes", 1),
        ("acctd_pids", "tasks", 1),
        ("acctd_pressure", "cpu_stall_us", 1),
        ("acctd_network", "packets", 2),
        ("acctd_limit", "cpus", 1),
    ):
        (found,) = influx.query(f'SELECT count("{field}") AS n FROM {measurement}')  # noqa: S608
        assert found["n"] == points * wanted.samples, measurement
    (found,) = influx.query('SELECT count("number") AS n, sum("number") AS total FROM acctd_event')
    assert (found["n"], found["total"]) == (events, sum(range(events)))
    assert influx.query(f"SELECT * FROM acctd_cpu WHERE job = '{series.NAMED}'") == []  # noqa: S608

    # In quarantine: each bad point, once, and nothing else, with words.
    entries = [json.loads(line) for line in quarantine(tmp_path / "positions", "site").read_text().splitlines()]
    bad = (number for number in range(COUNT) if not series.job(number).startswith("job-"))
    assert Counter(entry["point"] for entry in entries) == lines_of(bad, proxy.url)
    words = " ".join({entry["words"] for entry in entries})
    assert "it is marked" in words
    assert "max key length exceeded" in words

    # And so it was counted.
    assert (counts.sent, counts.quarantined) == (
        series.POINTS * wanted.samples + events,
        series.POINTS * wanted.bad,
    )
    assert (counts.dropped, counts.unreadable) == ({}, 0)
    assert counts.sent + counts.quarantined - events == POINTS

    # The other sink had every line once, in order, and knew nothing of all this.
    numbers: dict[str, list[int]] = {"sample": [], "event": []}
    with open(tmp_path / "lines.jsonl", "rb") as lines:
        for line in lines:
            frame = json.loads(line)
            number = frame["number"] if frame["kind"] == "event" else (frame["time"] - series.BEGAN) // series.STEP
            numbers[frame["kind"]].append(number)
    assert numbers == {"sample": list(range(COUNT)), "event": list(range(events))}
    assert state(tmp_path, "file").counts.failures == 0
