"""acctd bill as a person and a program use it: periods, forms, what users put into them, and what is refused."""

import csv
import gzip
import io
import json
import re
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from zoneinfo import ZoneInfo

import msgspec
import pytest
from click.testing import CliRunner, Result

from acctd.cli import bill, billtime, usagerecords
from acctd.cli.bill import command
from acctd.errors import AcctdError, ConfigError, NotFoundError, NotPermittedError, UsageError
from acctd.frames import RecordFrame, encode
from acctd.ledger import Ledger
from acctd.wording import clean
from tests.unit.test_sources import body, ledger, line, record

TARIFF = """
name = "unit"
currency = "EUR"
timezone = "Europe/Zurich"
[[period]]
valid_from = 2020-01-01
[[period.item]]
name = "CPU"
meter = "cpu"
unit = "core-second"
price = 0.25
[[period.item]]
name = "Egress"
meter = "network"
direction = "outgoing"
unit = "EiB"
price = 1
"""
PERIOD = ("--since", "2027-01", "--until", "2027-02")  # the records of test_sources are of 15 January 2027
EVIL = "=cmd|' /C calc'!A0\x1b[2J<script>alert(1)</script>"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A tariff, and two users' records of which one has an account that is out for mischief."""
    (tmp_path / "tariff.toml").write_text(TARIFF.replace("EiB", "PiB"))
    (tmp_path / "records").mkdir()
    made = [record(1), record(2, owner="bob"), record(3, owner="eve", tags={"account": EVIL})]
    (tmp_path / "records" / "log.jsonl").write_bytes(b"".join(map(line, made)))
    return tmp_path


def run(place: Path, *arguments: str, period: Sequence[str] = PERIOD) -> Result:
    options = ["--tariff", str(place / "tariff.toml"), *period]
    return CliRunner().invoke(command, [*options, *arguments], catch_exceptions=True)


def files(place: Path, *arguments: str) -> Result:
    return run(place, *arguments, "--from", "records", str(place / "records"))


def refused(result: Result) -> AcctdError:
    assert isinstance(result.exception, AcctdError), result.exception
    assert "\n" not in str(result.exception)
    return result.exception


@pytest.mark.parametrize(
    ("since", "until", "begin", "end"),
    [
        (None, None, "2026-11-01 00:00", "2026-12-01 00:00"),
        ("2026-09", None, "2026-09-01 00:00", "2026-12-01 00:00"),
        (None, "2026-09-15", "2026-09-01 00:00", "2026-09-15 00:00"),
        (None, "2026-09", "2026-08-01 00:00", "2026-09-01 00:00"),
        ("2026-03-29", "2026-03-30", "2026-03-29 00:00", "2026-03-30 00:00"),
        ("2026-11-05T13:00", "2026-11-05 13:00:30", "2026-11-05 13:00", "2026-11-05 13:00:30"),
        ("2026-11-05T13:00Z", "2026-11-06T00:00+00:00", "2026-11-05 14:00", "2026-11-06 01:00"),
    ],
)
def test_periods_are_in_the_tariffs_timezone(since: str | None, until: str | None, begin: str, end: str) -> None:
    zone = ZoneInfo("Europe/Zurich")
    now = datetime(2026, 11, 30, 23, 59, tzinfo=zone).timestamp()
    found = billtime.period(since, until, zone, now)
    assert [billtime.shown(each, zone) for each in found] == [begin, end]


def test_a_day_with_23_hours() -> None:
    begin, end = billtime.period("2026-03-29", "2026-03-30", ZoneInfo("Europe/Zurich"), 0.0)
    assert end - begin == 23 * 3600


@pytest.mark.parametrize(
    ("since", "until"),
    [
        ("2026-13", None),
        ("yesterday", None),
        ("2026-02-30", None),
        ("", None),
        ("2026-11", "2026-11"),
        ("٢٠٢٦-١١", None),
    ],
)
def test_periods_that_are_none(since: str, until: str | None) -> None:
    with pytest.raises(UsageError):
        billtime.period(since, until, ZoneInfo("UTC"), 1.8e9)


def test_the_table_can_be_checked_by_hand(place: Path) -> None:
    text = files(place).stdout
    assert "period    from 2027-01-01 00:00 until 2027-02-01 00:00, Europe/Zurich" in text
    assert "3 of the files below" in text
    assert re.search(r"^ada +2027-01  CPU +1  core-second +0\.25 +0\.25$", text, re.MULTILINE)
    assert re.search(r"^total +EUR +3072\.75$", text, re.MULTILINE)
    assert "\x1b" not in text


def test_json_has_all_and_no_float(place: Path) -> None:
    document = json.loads(files(place, "--format", "json", "--group-by", "user, class").stdout, parse_float=pytest.fail)
    assert document["source"]["records"] == 3
    assert re.fullmatch("[0-9a-f]{32}", document["source"]["digest"])
    assert re.fullmatch("[0-9a-f]{64}", document["tariff"]["sha256"])
    assert document["period"]["since"] == "2027-01-01T00:00:00+01:00"
    lines = document["lines"]
    assert {(each["group"]["user"], each["group"]["class"]) for each in lines} == {
        (user, cls) for user in ("ada", "bob", "eve") for cls in ("", "External")
    }
    for each in lines:
        assert Decimal(each["amount"]) == round(Decimal(each["quantity"]) * Decimal(each["price"]), 2)
    assert Decimal(document["total"]) == sum(Decimal(each["amount"]) for each in lines)
    assert EVIL in document["payers"]


def test_csv_is_strict_and_no_formula(place: Path) -> None:
    text = files(place, "--format", "csv").stdout
    rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    assert len(rows) == 6
    assert sum(Decimal(row["amount"]) for row in rows) == Decimal("3072.75")
    assert {row["payer"] for row in rows} == {"ada", "bob", f"'{clean(EVIL)}"}
    assert not any(value.lstrip()[:1] in "=+-@" for row in rows for value in row.values() if value)
    assert {row["tariff"] for row in rows} == {"unit"}


def test_html_is_one_page_in_which_nothing_runs(place: Path) -> None:
    done = files(place, "--format", "html", "--output", str(place / "bill.html"))
    assert done.stdout == ""
    page = (place / "bill.html").read_text()
    assert "3072.75" in page and "&lt;script&gt;" in page
    assert "<script" not in page and "\x1b" not in page
    assert not re.search(r"(src|href)=\"(?!#|data:)", page)


def test_asked_again_it_is_the_same_to_the_byte(place: Path) -> None:
    for form in ("table", "csv", "json", "html"):
        first, again = (files(place, "--format", form).stdout for _ in range(2))
        assert first == again
    before = files(place, "--format", "json").stdout
    made = (place / "records" / "log.jsonl").read_bytes().splitlines(keepends=True)
    (place / "records" / "log.jsonl").write_bytes(b"".join(made[::-1]))
    assert files(place, "--format", "json").stdout == before


def test_what_is_selected_is_shown_and_named(place: Path) -> None:
    found = json.loads(files(place, "--format", "json", "--user", "bob").stdout)
    assert (found["payers"], found["selection"]) == (["bob"], {"user": "bob"})
    assert json.loads(files(place, "--format", "json", "--job", "3.0").stdout)["payers"] == [EVIL]
    found = json.loads(files(place, "--format", "json", "--tag", f"Account={EVIL}").stdout)
    assert found["payers"] == [EVIL]
    nothing = files(place, "--user", "nobody").stdout
    assert "nothing to pay: 0.00 EUR" in nothing and "payers" not in nothing


def test_the_month_is_one_column_also_where_lines_are_grouped_by_it(place: Path) -> None:
    table, rows = (files(place, "--group-by", "user,month", "--format", form).stdout for form in ("table", "csv"))
    (head,) = [line for line in table.splitlines() if line.startswith("PAYER")]
    assert head.split()[:4] == ["PAYER", "USER", "MONTH", "ITEM"]
    titles, *cells = csv.reader(io.StringIO(rows, newline=""))
    assert len(set(titles)) == len(titles) and titles[:3] == ["payer", "user", "month"]
    assert {row[2] for row in cells} == {"2027-01"} and len(cells) == 6


@pytest.mark.parametrize("name", ["\x00=1", "\u200b=1", "\ufeff+1", "＝1", "＋1", "－1", "＠1", "\t=1", " =1"])
def test_no_name_is_a_formula_in_whatever_script(place: Path, name: str) -> None:
    (place / "records" / "log.jsonl").write_bytes(line(record(1, owner=name)))
    rows = list(csv.DictReader(io.StringIO(files(place, "--format", "csv").stdout, newline="")))
    assert {row["payer"].lstrip("?")[0] in "'=+@" for row in rows} == {True}
    assert not any(row["payer"].lstrip()[0] in "=+-@＝＋－＠\u200b\ufeff\0" for row in rows)


@pytest.mark.parametrize("form", ["table", "csv", "json", "html"])
def test_no_form_has_what_acts_on_a_terminal(place: Path, form: str) -> None:
    name = "a\x1b[31m\x9b2J\x7f\u202eb\u0085\u2028\U000e0041z"
    (place / "records" / "log.jsonl").write_bytes(line(record(1, owner=name)))
    text = files(place, "--format", form).stdout
    assert [char for char in text.replace("\r\n", "\n") if not char.isprintable() and char != "\n"] == []
    if form == "json":
        assert json.loads(text)["payers"] == [name]


def test_a_packed_file_that_is_not_whole_is_told_in_the_exit_code(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "records" / "old.gz").write_bytes(gzip.compress(line(record(9)))[:-3])
    said: list[str] = []
    monkeypatch.setattr("acctd.cli.bill.say", said.append)
    done = files(place, "--format", "json")
    error = refused(done)
    assert error.exit_code == 70 and "1 packed file could not" in str(error)
    assert [("behind line 1 of it" in sentence) for sentence in said] == [True]
    document = json.loads(done.stdout)
    assert document["source"]["records"] == 4 and document["source"]["torn"] == 1
    assert any("is packed and not whole" in note for note in document["notes"])


def test_what_was_archived_is_billed_with_what_came_after_or_not_at_all(place: Path) -> None:
    (place / "state").mkdir()
    (place / "archive").mkdir()
    path = ledger(place / "state" / "ledger.sqlite", [record(1), record(2), record(3, owner="eve")])
    config = place / "acctd.toml"
    config.write_text(f'state_dir = "{place}/state"\nruntime_dir = "{place}/run"\n')

    def billed(*arguments: str) -> Result:
        return run(place, "--config", str(config), *arguments)

    before = json.loads(billed("--format", "json").stdout)
    with Ledger(path) as book, gzip.open(place / "archive" / "a.jsonl.gz", "wb") as packed:
        for number, digest, text in book.records_after(0, 2):
            packed.write(encode(RecordFrame(number, digest, 1, msgspec.Raw(text))) + b"\n")
        book.take_out(2)
    error = refused(billed())
    assert error.exit_code == 70 and "records up to 2" in str(error) and "--from records DIR" in str(error)
    done = billed("--format", "json", "--from", "ledger", "--from", "records", str(place / "archive"))
    after = json.loads(done.stdout)
    assert after["lines"] == before["lines"] and after["total"] == before["total"]
    assert after["source"]["digest"] == before["source"]["digest"]
    assert after["source"]["kind"] == "ledger and records"
    text = billed("--from", "ledger", "--from", "records", str(place / "archive")).stdout
    assert f"3 of the ledger and the files below {place}/state/ledger.sqlite, {place}/archive, 1 node" in text
    assert billed("--from", "ledger", "--since", "2027-03", "--until", "2027-04").exit_code == 0


def test_broken_lines_are_named_counted_and_told_in_the_exit_code(place: Path) -> None:
    with open(place / "records" / "log.jsonl", "ab") as stream:
        stream.write(b"{]\n")
    done = files(place, "--format", "json")
    error = refused(done)
    assert error.exit_code == 70 and "1 line could not be read" in str(error)
    document = json.loads(done.stdout)
    assert document["source"]["broken"] == 1 and len(document["lines"]) == 6
    assert any("could not be read" in note for note in document["notes"])


def test_the_ledger_is_billed_without_an_agent(place: Path) -> None:
    (place / "state").mkdir()
    ledger(place / "state" / "ledger.sqlite", [record(1), record(2, owner="bob"), record(3, owner="eve")])
    config = place / "acctd.toml"
    config.write_text(
        f'state_dir = "{place}/state"\nruntime_dir = "{place}/run"\n[bill]\ntariff = "{place}/tariff.toml"\n'
    )
    done = CliRunner().invoke(command, ["--config", str(config), *PERIOD])
    assert done.exit_code == 0, done.exception
    assert f"3 of the ledger {place}/state/ledger.sqlite" in done.stdout
    assert re.search(r"^first +1 [0-9a-f]{64}$", done.stdout, re.MULTILINE)
    assert re.search(r"^last +3 [0-9a-f]{64}$", done.stdout, re.MULTILINE)
    as_files = files(place, "--format", "json").stdout
    as_ledger = CliRunner().invoke(command, ["--config", str(config), *PERIOD, "--format", "json"]).stdout
    one, other = (json.loads(text) for text in (as_files, as_ledger))
    assert [(each["payer"], each["amount"]) for each in one["lines"] if each["payer"] in ("ada", "bob")] == [
        (each["payer"], each["amount"]) for each in other["lines"] if each["payer"] in ("ada", "bob")
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--from", "records"), "name at least one"),
        (("here",), "--from records before"),
        (("--from", "ledger:x"), "is none"),
        (("--from", "records:x"), "is none"),
        (("--from", "ledger", "--from", "records"), "name at least one"),
        (("--from", "ledger", "--from", "influxdb://x?db=a"), "take one source"),
        (("--from", "influxdb://x?db=a", "--from", "influxdb://y?db=a"), "take one source"),
        (("--from", "influxdb://x?db=a", "--from", "records", "."), "take one source"),
        (("--from", "mysql://x"), "none of a database"),
        (("--from", "influxdb://x"), "database is missing"),
        (("--from", "influxdb://me:secret@x?db=a"), "user or password"),
        (("--group-by", "colour"), "'colour'"),
        (("--group-by", "user,user"), "twice"),
        (("--tag", "account"), "account=physics"),
        (("--tag", "a=1", "--tag", "A=2"), "two values"),
        (("--since", "soon"), "'soon'"),
        (("--job", ""), "--job is empty"),
        (("--user", ""), "--user is empty"),
        (("--account", ""), "--account is empty"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(place: Path, arguments: tuple[str, ...], words: str) -> None:
    error = refused(run(place, *arguments))
    assert words in str(error) and "secret" not in str(error)
    assert error.exit_code == 64


def test_a_tariff_that_is_not_there_or_is_wrong(place: Path) -> None:
    (place / "tariff.toml").write_text("name = 1\n")
    assert isinstance(refused(files(place)), ConfigError)
    (place / "tariff.toml").unlink()
    assert isinstance(refused(files(place)), NotFoundError)
    (place / "acctd.toml").write_text(f'[bill]\ntariff = "{place}/nothing.toml"\n')
    words = str(refused(CliRunner().invoke(command, ["--config", str(place / "acctd.toml")])))
    assert "tariffs/example.toml" in words and f"{place}/nothing.toml" in words


def test_who_may_not_read_the_configuration_is_told_whose_prices_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def load(_path: str | None, _environ: object) -> None:
        raise NotPermittedError("the configuration X cannot be read")

    monkeypatch.setattr(bill, "say", said.append)
    monkeypatch.setattr(bill.configuration, "load", load)
    config = bill.load_config(None)
    assert said == [
        f"acctd: the configuration X cannot be read; without --tariff the prices are those of {config.tariff}"
    ]


def test_usage_records_take_times_as_bills_do() -> None:
    for text, wanted in (
        ("2026-11", 1793491200.0),
        ("2026-11-01", 1793491200.0),
        ("2026-11-01T01:00+01:00", 1793491200.0),
    ):
        assert billtime.instant("since", text, ZoneInfo("UTC")) == wanted
    argv = ["ur", "nowhere", "--since", "2026-13"]
    assert "--since '2026-13' is no time" in str(CliRunner().invoke(usagerecords.command, argv).exception)
    argv = ["ur", "nowhere", "--since", "2026-12", "--config", "nowhere.toml"]
    assert "nowhere.toml" in str(CliRunner().invoke(usagerecords.command, argv).exception), "the time was taken"


def test_where_nothing_can_be_written_nothing_is_read(place: Path) -> None:
    (place / "records" / "log.jsonl").unlink()
    assert "--output" in str(refused(files(place, "--output", str(place / "no" / "bill"))))


def test_a_record_as_run_writes_it(place: Path) -> None:
    (place / "records" / "log.jsonl").unlink()
    (place / "records" / "one.json").write_bytes(body(record(1)))
    assert json.loads(files(place, "--format", "json").stdout)["payers"] == ["ada"]
