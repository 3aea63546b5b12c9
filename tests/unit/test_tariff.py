"""Tariffs from TOML: what is taken, and that each mistake is told in one sentence that names it."""

import hashlib
import os
import re
from datetime import date
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from acctd.errors import ConfigError, NotFoundError
from acctd.measures import METERS
from acctd.metrics import BILLED
from acctd.tariff import load, parse
from tests.unit.billing import at, bill, usage

TARIFFS = Path(__file__).parents[2] / "tariffs"

GOOD = """
name = "example"
currency = "USD"
[[period]]
valid_from = 2026-01-01
[[period.item]]
name = "Egress"
meter = "network"
classes = ["External"]
direction = "outgoing"
unit = "GB"
tiers = [{up_to = 100, price = 0}, {up_to = 10240.5, price = "0.09"}, {price = 0.085}]
minimum = 1.00
[[period.item]]
name = "CPU"
meter = "cpu"
unit = "core-hour"
price = 0.10
[[period.discount]]
account = "physics"
percent = 12.5
items = ["CPU"]
"""


def test_a_tariff() -> None:
    tariff = parse(GOOD.encode(), "t")
    assert (tariff.name, tariff.currency, tariff.digits, tariff.timezone) == ("example", "USD", 2, "UTC")
    assert tariff.item_names == ("Egress", "CPU")
    period = tariff.periods[0]
    egress, cpu = period.items
    assert period.valid_from == date(2026, 1, 1)
    assert [(tier.up_to, tier.price) for tier in egress.tiers] == [
        (Decimal(100), Decimal(0)),
        (Decimal("10240.5"), Decimal("0.09")),
        (None, Decimal("0.085")),
    ]
    assert egress.minimum == Decimal("1.00")
    assert [(tier.up_to, str(tier.price)) for tier in cpu.tiers] == [(None, "0.10")]
    assert period.discounts[0].percent == Decimal("12.5")


def test_a_price_is_the_decimal_that_is_written() -> None:
    tariff = parse(GOOD.replace("price = 0.10", "price = 0.100000000000000055").encode(), "t")
    assert str(tariff.periods[0].items[1].tiers[0].price) == "0.100000000000000055"


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text(GOOD)
    assert load(str(file)).digest == hashlib.sha256(GOOD.encode()).hexdigest()
    file.write_text(GOOD + "\n")
    assert load(str(file)).digest != hashlib.sha256(GOOD.encode()).hexdigest()


PERIOD = "\n[[period]]\nvalid_from = {}\n[[period.item]]\nname = 'CPU'\nmeter = '{}'\nunit = '{}'\nprice = 1\n"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('name = "example"', 'nam = "example"', ["nam"]),
        ('name = "example"', "name = 5", ["name", "str", "5"]),
        ('name = "example"', 'name = " "', ["name", "' '"]),
        ('name = "example"', 'name = "a\\u001b[31m"', ["name"]),
        ('currency = "USD"', "", ["currency"]),
        ('currency = "USD"', 'currency = "usd"', ["currency", "'usd'", "USD"]),
        ('currency = "USD"', 'currency = "USD"\ndigits = 9', ["digits 9", "0 to 6"]),
        ('currency = "USD"', 'currency = "USD"\ntimezone = "Mars/Olympus"', ["timezone", "Mars/Olympus"]),
        ('currency = "USD"', 'currency = "USD"\ntimezone = "../../etc/passwd"', ["timezone", "passwd"]),
        ('currency = "USD"', 'currency = "USD"\ntimezone = "Europe"', ["timezone", "'Europe'"]),
        ('currency = "USD"', 'currency = "USD"\ndigest = "x"', ["digest"]),
        ("valid_from = 2026-01-01", "valid_from = 2026-01-01T00:00:00Z", ["valid_from", "date", "2026-01-01"]),
        ("valid_from = 2026-01-01", "valid_from = 'soon'", ["valid_from", "soon"]),
        ("valid_from = 2026-01-01", "valid_from = 0001-01-01", ["valid_from", "0001-01-01", "1970"]),
        ("valid_from = 2026-01-01", "", ["valid_from", "period 1"]),
        ('unit = "GB"', 'unit = "GBit"', ["Egress", "unit 'GBit'", "network", "GiB"]),
        ('unit = "GB"', 'unit = "core-hour"', ["Egress", "unit 'core-hour'", "network"]),
        ('unit = "core-hour"', 'unit = "GB"', ["CPU", "unit 'GB'", "cpu"]),
        ('meter = "cpu"', 'meter = "gpu"', ["CPU", "meter 'gpu'", "cores"]),
        ('meter = "cpu"', 'meter = "cpu"\nclasses = ["External"]', ["CPU", "classes", "External"]),
        ('meter = "cpu"', 'meter = "cpu"\ndirection = "outgoing"', ["CPU", "direction", "outgoing"]),
        ('direction = "outgoing"', 'direction = "sideways"', ["Egress", "direction", "sideways"]),
        ('classes = ["External"]', 'classes = ["External", "External"]', ["Egress", "External", "twice"]),
        ('classes = ["External"]', 'classes = "External"', ["Egress", "classes", "External"]),
        ("up_to = 100,", "up_to = 20000,", ["Egress", "up_to 10240.5", "20000", "rise"]),
        ("up_to = 100,", "", ["Egress", "up_to"]),
        ("up_to = 100,", "up_to = 0,", ["Egress", "up_to 0"]),
        ("up_to = 100,", "upto = 100,", ["Egress", "tiers 1", "upto"]),
        ("{price = 0.085}", "{up_to = 99999, price = 0.085}", ["Egress", "last tier", "99999"]),
        ("price = 0.10", "price = -0.10", ["CPU", "price -0.10"]),
        ("price = 0.10", "price = nan", ["CPU", "price NaN"]),
        ("price = 0.10", "price = inf", ["CPU", "price Infinity"]),
        ("price = 0.10", "price = 1e999999999", ["CPU", "price"]),
        ("price = 0.10", "price = 1e-999999", ["CPU", "price", "decimals"]),
        ("price = 0.10", "price = true", ["CPU", "price", "bool", "True"]),
        ("price = 0.10", 'price = "a lot"', ["CPU", "price", "a lot"]),
        ("price = 0.10", "", ["CPU", "price or tiers"]),
        ("price = 0.10", "price = 0.10\ntiers = [{price = 1}]", ["CPU", "price or tiers"]),
        ("minimum = 1.00", "minimum = 1.005", ["Egress", "minimum 1.005", "decimals"]),
        ("minimum = 1.00", "minimum = -1", ["Egress", "minimum -1"]),
        ('name = "CPU"', 'name = "Egress"', ["Egress", "two items"]),
        ("percent = 12.5", "percent = 100.5", ["discount", "percent 100.5", "0 to 100"]),
        ("percent = 12.5", "percent = -1", ["discount", "percent -1"]),
        ("percent = 12.5", "", ["discount 1", "percent"]),
        ('account = "physics"', "", ["discount", "account or an owner"]),
        ('account = "physics"', 'account = "physics"\nowner = "alice"', ["discount", "account or an owner"]),
        ('account = "physics"', 'account = ""', ["discount", "account or an owner"]),
        ('items = ["CPU"]', 'items = ["Cpu"]', ["discount", "'Cpu'", "CPU"]),
        ("percent = 12.5", "percent = 1\n" + PERIOD.format("2025-01-01", "cpu", "hour"), ["2025-01-01", "2026-01-01"]),
        ("percent = 12.5", "percent = 1\n" + PERIOD.format("2027-01-01", "wall", "hour"), ["CPU", "'wall'", "'cpu'"]),
    ],
)
def test_a_mistake_is_told(old: str, new: str, told: list[str]) -> None:
    text = GOOD.replace('items = ["CPU"]\n', "") if "[[period]]" in new else GOOD
    assert old in text
    with pytest.raises(ConfigError) as raised:
        parse(text.replace(old, new).encode(), "site.toml")
    message = str(raised.value)
    assert message.startswith("site.toml: ")
    assert "\n" not in message
    for word in told:
        assert word in message, message


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"name = ", "no TOML"),
        (b"\xff", "UTF-8"),
        (b"", "name"),
        (b'name = "a"\ncurrency = "USD"\n', "no period"),
        (b'name = "a"\ncurrency = "USD"\n[[period]]\nvalid_from = 2026-01-01\n', "no item"),
        (b"a = " + b"[" * 100000, "no TOML"),
    ],
)
def test_a_file_that_is_none_is_told(body: bytes, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        parse(body, "t")


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"none\.toml"):
        load(str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match="directory"):
        load(str(tmp_path))


def test_meters_have_all_that_is_billed_and_units_are_exact() -> None:
    """What is declared as billed and no meter has: discards, and times of NFS, which are no use of anything."""
    priced = {metric for meter in METERS.values() for metric in meter.metrics}
    assert priced <= set(BILLED)
    assert {m.name for m in set(BILLED) - priced} == {"block_discard", "nfs_time", "nfs_server_time"}
    assert METERS["memory"].units["GiB-hour"] == 3774873600
    assert METERS["memory"].units["GB-hour"] == 3515625000
    assert METERS["memory"].units["MB-second"] == Fraction(15625, 16)
    assert METERS["cpu"].units["core-hour"] == METERS["wall"].units["hour"] == 3600 * 10**9
    assert METERS["network"].units["TiB"] == 2**40
    assert METERS["block_reads"].units["million operations"] == 10**6
    assert METERS["jobs"].units["1000 jobs"] == 1000


@pytest.mark.parametrize("path", sorted(TARIFFS.glob("*.toml")), ids=lambda path: path.name)
def test_a_shipped_tariff_is_one(path: Path) -> None:
    assert load(str(path)).name == path.stem


def test_amazons_egress_dollar_for_dollar() -> None:
    """200 TiB in a month: 10240 - 100 GB x 0.09 = 912.60; 40960 x 0.085 = 3481.60; 102400 x 0.07 = 7168.00;

    204800 - 153600 = 51200 x 0.05 = 2560.00. In all 14122.20. Beside it an m5.large for a day: 24 x 0.096 = 2.304.
    """
    tariff = load(str(TARIFFS / "amazon-ec2.toml"))
    egress = bill(tariff, [usage("1", at("2026-01-05 00:00"), 24, out=204800 * 2**30)])
    assert [str(line.amount) for line in egress.lines] == ["0.00", "912.60", "3481.60", "7168.00", "2560.00"]
    assert str(egress.total) == "14122.20"
    m5 = usage(
        *("1", at("2026-01-05 00:00"), 24),
        cpu_reserved=2 * 86400 * 10**9,
        memory_reserved_time=8 * 2**20 * 86400,
    )
    assert [(line.item, str(line.amount)) for line in bill(tariff, [m5]).lines] == [
        ("vCPU", "1.58"),
        ("Memory", "0.72"),
    ]


@pytest.mark.parametrize("zone", ["localtime", "posixrules", "Factory", "right/UTC", "posix/Europe/Zurich"])
def test_a_zone_is_the_same_on_every_host(zone: str) -> None:
    with pytest.raises(ConfigError, match="timezone"):
        parse(GOOD.replace("[[period]]", f'timezone = "{zone}"\n[[period]]', 1).encode(), "t")


@pytest.mark.parametrize(
    "number", ['"1_5"', '"١.٥"', '" 1"', '"-0"', '"1e3"', "-0.0", "1e999999999999999999999", "nan"]
)
def test_prices_are_ordinary_numbers(number: str) -> None:
    with pytest.raises(ConfigError, match="price"):
        parse(re.sub(r"price = [\d.]+", f"price = {number}", GOOD, count=1).encode(), "t")


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load(str(file)).name == parse(GOOD.encode(), "t").name


def test_only_a_regular_file_of_reasonable_size_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/zero"):
        with pytest.raises(ConfigError, match="no regular file"):
            load(path)
    (tmp_path / "large").write_bytes(b"#" * (2 << 20))
    with pytest.raises(ConfigError, match="more than"):
        load(str(tmp_path / "large"))
