"""`acctd bill --from influxdb://...` and a real influxd: the ledger's bill to the last digit, however it is made."""

import hashlib
import json
import random
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from acctd.cli.bill import command
from acctd.frames import RecordFrame
from acctd.frames import encode as encode_frame
from acctd.ledger import FILE, Ledger
from acctd.meter import State
from acctd.model import Limits, Midnight, Record
from acctd.sinks import ExportConfig, InfluxSink
from exporters.lineprotocol import TO_RECORDS, Lines
from tests.db.conftest import Influx1, VictoriaMetrics

DAY = 86400
NOVEMBER = datetime(2026, 11, 1, tzinfo=UTC).timestamp()
TARIFF = """
name = "db"
currency = "EUR"
timezone = "Europe/Zurich"
[[period]]
valid_from = 2026-01-01
[[period.item]]
name = "CPU"
meter = "cpu"
unit = "core-hour"
tiers = [ {up_to = 10, price = 0}, {up_to = 1000, price = 0.05}, {price = 0.03} ]
[[period.item]]
name = "Egress"
meter = "network"
classes = ["External"]
direction = "outgoing"
unit = "GB"
price = 0.09
minimum = 5.00
[[period.item]]
name = "Disk"
meter = "block_read"
unit = "GiB"
price = 0.013
[[period.item]]
name = "Files"
meter = "nfs_write"
unit = "GB"
price = 0.007
[[period.item]]
name = "Wall"
meter = "wall"
unit = "hour"
price = 0.0001
[[period]]
valid_from = 2026-11-16
[[period.item]]
name = "CPU"
meter = "cpu"
unit = "core-hour"
price = 0.04
[[period.item]]
name = "Jobs"
meter = "jobs"
unit = "job"
price = 0.01
[[period.discount]]
owner = "ada"
percent = 10
"""


def record(number: int, rng: random.Random, node: str = "node1", scale: int = 1) -> Record:
    started = NOVEMBER + rng.uniform(-5 * DAY, 34 * DAY)
    wall = rng.choice((30, 3600, DAY, 9 * DAY)) * rng.randint(1, 10**9) + 1
    devices = rng.choice((("8:0",), ("8:0", "8:16", "253:0"), ()))
    totals: State = {
        "cpu_user": {"": rng.randrange(10**13) * scale},
        "cpu_system": {"": rng.randrange(10**12)},
        "network": {
            "OutgoingExternal": rng.randrange(10**11), "IncomingExternal": rng.randrange(10**11),
            "OutgoingInternal": rng.randrange(10**11),
        },
        "network_packets": {"OutgoingExternal": rng.randrange(10**9)},
        "memory_peak": {"": 5},
    }  # fmt: skip
    if devices:
        totals["block_read"] = {device: rng.randrange(10**10) for device in devices}
    if number % 3 == 0:
        totals["nfs_write"] = {f"/mnt/{name} ä\\": rng.randrange(10**10) for name in "ab"[: number % 2 + 1]}
    middle = [ns for day in range(40) if 0 < (ns := round((NOVEMBER + (day - 5) * DAY - started) * 1e9) + 10**9) < wall]
    midnights = tuple(
        Midnight(ns, {name: {k: v * ns // wall // 2 for k, v in labels.items()} for name, labels in totals.items()})
        for ns in middle
    )
    tags = rng.choice(({}, {"Account": "physics"}, {"account": "chem = 1, 2"}, {"account": "ada", "x": "=1\n'"}))
    return Record(
        id=f"{number}.0", owner=rng.choice(("ada", "bob o'neil", "eve")), uid=1000, node=node, state="done",
        started=started, ended=started + wall / 1e9, wall_ns=wall, exit_code=0, exit_signal=None, network="nat",
        limits=Limits(), tags=dict(tags), totals=totals, stacked=("253:0",) if "253:0" in devices else (),
        midnights=midnights, parent="1.0" if number % 17 == 16 else None,
    )  # fmt: skip


class Site:
    """The same records in a ledger, in a file and in a database."""

    def __init__(self, directory: Path, database: Influx1, *, job_tag: bool = True) -> None:
        self.directory, self.database = directory, database
        self.config, self.tariff = directory / "acctd.toml", directory / "tariff.toml"
        self.tariff.write_text(TARIFF)
        self.config.write_text(f'state_dir = "{directory}/state"\nruntime_dir = "{directory}/run"\n')
        with Ledger(directory / "state" / FILE):
            pass
        (directory / "records").mkdir()
        sink = InfluxSink(
            name="db", url=database.url, version=1, bucket="acctd", records_bucket="acctd", job_tag=job_tag
        )
        self._sink, self._lines, self._number, self._digest = sink, {}, 0, ""
        self.url = f"influxdb://127.0.0.1:{database.port}?db=acctd&rp=years"

    def add(self, records: list[Record]) -> None:
        rows, points = [], []
        with open(self.directory / "records" / "log.jsonl", "ab") as lines:
            for each in records:
                body = msgspec.json.encode(each)
                self._number += 1
                self._digest = hashlib.sha256(self._digest.encode() + body).hexdigest()
                end = each.started + each.wall_ns / 1e9
                rows.append((self._number, self._number, each.id, each.owner, end, body, self._digest))
                frame = RecordFrame(self._number, self._digest, 1, msgspec.Raw(body))
                lines.write(encode_frame(frame) + b"\n")
                encoder = self._lines.setdefault(each.node, Lines(self._sink, ExportConfig(), each.node))
                points += [item.data for item in encoder.encode(frame) if item.to == TO_RECORDS]
        with sqlite3.connect(self.directory / "state" / FILE) as db:
            db.executemany(
                "INSERT INTO record (number, seq, id, owner, ended, body, digest) VALUES (?, ?, ?, ?, ?, ?, ?)", rows
            )
        answer = self.database.write(b"\n".join(points), "years")
        assert answer.status == 204, answer.data

    def bill(self, *arguments: str) -> dict[str, Any]:
        argv = ["--config", str(self.config), "--tariff", str(self.tariff), "--format", "json", *arguments]
        done = CliRunner().invoke(command, argv, catch_exceptions=False)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def three(self, *arguments: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return (
            self.bill(*arguments),
            self.bill(*arguments, "--from", "records", str(self.directory / "records")),
            self.bill(*arguments, "--from", self.url),
        )


@pytest.fixture
def site(influx1: Influx1, tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path, influx1)
    rng = random.Random(6)
    made.add([record(number, rng, rng.choice(("node1", "node2"))) for number in range(300)])
    yield made


@pytest.mark.parametrize(
    "arguments",
    [
        ("--since", "2026-11", "--until", "2026-12"),
        ("--since", "2026-11", "--until", "2026-12", "--group-by", "user,account,class"),
        ("--since", "2026-11-10T13:30:07.5", "--until", "2026-11-20", "--group-by", "day"),
        ("--since", "2026-10", "--until", "2027-01", "--group-by", "node,month"),
        ("--since", "2026-11", "--until", "2026-12", "--group-by", "job"),
        ("--since", "2026-11", "--until", "2026-12", "--user", "bob o'neil"),
        ("--since", "2026-11", "--until", "2026-12", "--account", "chem = 1, 2"),
        ("--since", "2026-11", "--until", "2026-12", "--job", "3.0"),
        ("--since", "2026-11", "--until", "2026-12", "--tag", "account=physics"),
    ],
)
def test_the_same_bill_from_ledger_files_and_database(site: Site, arguments: tuple[str, ...]) -> None:
    ledger, files, database = site.three(*arguments)
    assert ledger["lines"], "there is something to compare"
    assert files["lines"] == ledger["lines"]
    assert database["lines"] == ledger["lines"]
    assert database["total"] == files["total"] == ledger["total"]
    assert database["records"] == ledger["records"]
    assert files["source"]["digest"] == ledger["source"]["digest"]
    assert database["source"]["nodes"] == ledger["source"]["nodes"] == 2
    assert database["notes"] == files["notes"] == ledger["notes"]


def test_what_records_are_without_is_told_the_same(influx1: Influx1, tmp_path: Path) -> None:
    site, rng = Site(tmp_path, influx1), random.Random(11)
    whole = replace(record(3, rng), started=NOVEMBER + DAY, wall_ns=10**12, owner="ada", tags={}, midnights=())
    networks: list[dict[str, int]] = [{"OutgoingExternal": 7}, {"IncomingInternal": 9}, {}]
    site.add(
        [
            replace(whole, id=f"{number}", totals={"cpu_user": {"": 5}, **({"network": each} if each else {})})
            for number, each in enumerate([*networks, *networks])
        ]
    )
    ledger, files, database = site.three("--since", "2026-11", "--until", "2026-12", "--group-by", "user")
    assert any("'Egress': 2 records" in note for note in ledger["notes"])
    assert database["notes"] == files["notes"] == ledger["notes"]
    assert database["lines"] == ledger["lines"]


def test_a_family_that_is_asked_for_is_in_the_database_too(site: Site) -> None:
    ledger, files, database = site.three("--since", "2026-10", "--until", "2027-01", "--job", "16.0")
    assert ledger["lines"] and any("inside job 1.0" in note for note in ledger["notes"])
    assert database["lines"] == files["lines"] == ledger["lines"]
    assert database["notes"] == ledger["notes"]


def test_sums_that_go_round_in_the_database(influx1: Influx1, tmp_path: Path) -> None:
    site, rng = Site(tmp_path, influx1), random.Random(7)
    site.add([record(number, rng, scale=10**5) for number in range(100)])
    ledger, files, database = site.three("--since", "2026-11", "--until", "2026-12")
    assert database["lines"] == files["lines"] == ledger["lines"]


def test_the_job_as_a_field(influx1: Influx1, tmp_path: Path) -> None:
    site, rng = Site(tmp_path, influx1, job_tag=False), random.Random(8)
    site.add([record(number, rng) for number in range(100)])
    for arguments in (("--group-by", "user"), ("--group-by", "job"), ("--job", "3.0")):
        ledger, _, database = site.three("--since", "2026-11", "--until", "2026-12", *arguments)
        assert database["lines"] == ledger["lines"]


def test_a_long_job_has_more_midnights_than_a_string_holds(influx1: Influx1, tmp_path: Path) -> None:
    site, rng = Site(tmp_path, influx1), random.Random(9)
    one = record(3, rng)
    wall = 300 * DAY * 10**9
    midnights = tuple(
        Midnight(
            day * DAY * 10**9, {name: {k: v * day // 400 for k, v in of.items()} for name, of in one.totals.items()}
        )
        for day in range(1, 300)
    )
    assert len(msgspec.json.encode(midnights)) > 65535
    site.add([replace(one, started=NOVEMBER - 200 * DAY, wall_ns=wall, midnights=midnights)])
    ledger, _, database = site.three("--since", "2026-11", "--until", "2026-12", "--group-by", "day")
    assert len(ledger["lines"]) > 60
    assert database["lines"] == ledger["lines"]


def test_what_is_no_influxdb_says_so(victoria: VictoriaMetrics, tmp_path: Path) -> None:
    tariff = tmp_path / "tariff.toml"
    tariff.write_text(TARIFF)
    argv = ["--tariff", str(tariff), "--from", f"influxdb://127.0.0.1:{victoria.port}?db=acctd"]
    error = CliRunner().invoke(command, argv).exception
    assert "InfluxQL" in str(error) and "records DIR" in str(error)


def test_a_database_that_has_nothing_says_so(influx1: Influx1, tmp_path: Path) -> None:
    tariff = tmp_path / "tariff.toml"
    tariff.write_text(TARIFF)
    for name, words in (("acctd", "no acctd_record"), ("nothing", "database not found")):
        argv = ["--tariff", str(tariff), "--from", f"influxdb://127.0.0.1:{influx1.port}?db={name}&rp=years"]
        assert words in str(CliRunner().invoke(command, argv).exception)


def test_a_user_and_a_password(tmp_path: Path) -> None:
    with Influx1(tmp_path / "influx1", http="auth-enabled = true", user=("admin", "secret")) as server:
        tariff, word = tmp_path / "tariff.toml", tmp_path / "word"
        tariff.write_text(TARIFF)
        word.write_text("wrong\n")
        url = f"influxdb://127.0.0.1:{server.port}?db=acctd&rp=years&user=admin&password_file={word}"
        argv = ["--tariff", str(tariff), "--from", url]
        refused = str(CliRunner().invoke(command, argv).exception)
        assert "401" in refused and "wrong" not in refused
        word.write_text("secret\n")
        assert "no acctd_record" in str(CliRunner().invoke(command, argv).exception)
