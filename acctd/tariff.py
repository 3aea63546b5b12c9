"""A tariff: what the site asks for what is used, from a TOML file. Read and checked whole; nothing is billed here.

Prices are decimals as written, never binary fractions. The tariff is known by the SHA-256 of its file's bytes. Floor 3.
"""

import hashlib
import os
import re
import stat
import tomllib
from collections.abc import Iterable
from datetime import date
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from acctd.errors import ConfigError, NotFoundError, NotPermittedError
from acctd.measures import METERS, Meter

_CURRENCY = re.compile(r"[A-Z]{3}\Z")
_STEP = re.compile(r"\.?(\w+)|\[(\d+)\]")
_WORDS = (
    *(("`", ""), ("Object contains", "there is an"), ("Object missing", "lacks the"), ("field", "key")),
    *(("Expected", "expected"), ("Invalid", "invalid"), (" | null", ""), ("RFC3339 encoded ", ""), ("array", "list")),
)
"""msgspec's words, and how a reader of TOML knows them."""
_NUMBER = re.compile(r"\d{1,40}(\.\d{1,40})?\Z", re.ASCII)
_NUMBERS = ("price", "up_to", "minimum", "percent")
_NO_ZONES = ("localtime", "posixrules", "Factory")
"""Files beside the zones, which are another zone on another host, or none."""

_BYTES_MAX = 1 << 20
_NAME_MAX = 100
_PLACES = 18
"""Decimal places of a price at most; as many digits may stand before the point."""


class Tier(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A price, and up to how much used in the month it holds; the tier before it says from where."""

    price: Decimal  # of one unit, in the currency
    up_to: Decimal | None = None  # in the item's unit, counted from the month's beginning; None: without end


class Item(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One thing that is billed. Items do not know of each other: two that count the same bytes bill them twice."""

    name: str
    meter: str  # of measures.METERS
    unit: str
    price: Decimal | None = None  # as in the file; `tiers` has it too
    tiers: tuple[Tier, ...] = ()  # rising, the last one open: never empty in a Tariff
    classes: tuple[str, ...] = ()  # of a network meter; none: all
    direction: Literal["outgoing", "incoming"] | None = None  # of a network meter; None: both
    minimum: Decimal = Decimal(0)  # what a payer owes at least for a month in which it used any

    @property
    def measure(self) -> Meter:
        """What its quantity is made of."""
        return METERS[self.meter]

    @property
    def per_unit(self) -> Fraction:
        """How many of the meter's own units (ns, KiB*s, bytes, operations) one unit is."""
        return self.measure.units[self.unit]


class Discount(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is taken off the lines of the jobs that an account pays, or that belong to an owner."""

    percent: Decimal  # 0 to 100
    account: str | None = None  # the payer
    owner: str | None = None  # one of both is given
    items: tuple[str, ...] = ()  # none: all


class Period(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The prices from one day on, until the next period's."""

    valid_from: date  # from the start of that day in the tariff's timezone
    items: tuple[Item, ...] = msgspec.field(name="item", default=())
    discounts: tuple[Discount, ...] = msgspec.field(name="discount", default=())

    def item(self, name: str) -> Item | None:
        """The item of that name, where this period has it."""
        return next((item for item in self.items if item.name == name), None)


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str
    currency: str
    digits: int = 2
    timezone: str = "UTC"
    periods: tuple[Period, ...] = msgspec.field(name="period", default=())


class Tariff(msgspec.Struct, frozen=True, kw_only=True):
    """A whole tariff, checked."""

    name: str
    currency: str  # ISO 4217, three letters
    digits: int  # of the currency's minor unit: 2 for cents
    timezone: str  # of the IANA database; months and days begin there
    periods: tuple[Period, ...]  # at least one, rising
    digest: str  # SHA-256 of the file's bytes, hexadecimal

    @property
    def zone(self) -> ZoneInfo:
        """The timezone."""
        return ZoneInfo(self.timezone)

    @property
    def item_names(self) -> tuple[str, ...]:
        """Of all periods, in the order in which the file has them. A name is one item throughout."""
        return tuple(dict.fromkeys(item.name for period in self.periods for item in period.items))


def load(path: str) -> Tariff:
    """The tariff in a file. Raises ConfigError for the first mistake in it, NotFoundError, NotPermittedError."""
    try:
        # A pipe that nobody writes into must not be waited for, and a device may have no end.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise ConfigError(f"tariff {path!r} is no regular file; name a TOML file")
            body = stream.read(_BYTES_MAX + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"tariff {path!r} does not exist; name a file that does") from None
    except IsADirectoryError:
        raise ConfigError(f"tariff {path!r} is a directory; name a TOML file") from None
    except PermissionError:
        raise NotPermittedError(f"tariff {path!r} may not be read by this user; change its mode") from None
    if len(body) > _BYTES_MAX:
        raise ConfigError(f"tariff {path!r} has more than {_BYTES_MAX} bytes; name a TOML file with prices")
    return parse(body, path)


def parse(body: bytes, name: str) -> Tariff:
    """The tariff in a file's bytes; `name` is what mistakes are told with. Raises ConfigError."""
    try:
        data = tomllib.loads(body.decode("utf-8-sig"), parse_float=_decimal)
    except UnicodeDecodeError as e:
        raise ConfigError(f"{name}: byte {e.start} is no UTF-8; save the file as UTF-8") from None
    except (ValueError, ArithmeticError, RecursionError) as e:  # an integer may be too long, a table too deep
        raise ConfigError(f"{name}: this is no TOML: {e}; see tariffs/example.toml") from None
    try:
        _check_numbers("", data)
        file = msgspec.convert(data, type=_File)
    except msgspec.ValidationError as e:
        raise ConfigError(f"{name}: {_sentence(e, data)}") from None
    except _MistakeError as e:
        raise ConfigError(f"{name}: {e}; see tariffs/example.toml") from None
    try:
        periods = _checked(file)
    except _MistakeError as e:
        raise ConfigError(f"{name}: {e}") from None
    return Tariff(
        name=file.name,
        currency=file.currency,
        digits=file.digits,
        timezone=file.timezone,
        periods=periods,
        digest=hashlib.sha256(body).hexdigest(),
    )


class _MistakeError(Exception):
    """One sentence on what is wrong, without the file's name."""


def _decimal(text: str) -> Decimal:
    """A TOML float as it is written; one beyond what decimals hold becomes NaN, which is refused by its name later."""
    try:
        return Decimal(text)
    except ArithmeticError:
        return Decimal("NaN")


def _check_numbers(key: str, value: Any) -> None:
    """A price may be written as text, but only as digits and a point: Decimal takes any script's digits, and `_`."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_numbers(name, inner)
    elif isinstance(value, list):
        for inner in value:
            _check_numbers(key, inner)
    elif key in _NUMBERS and isinstance(value, str) and not _NUMBER.match(value) and not _decimal(value).is_nan():
        raise _MistakeError(f"{key} {value[:40]!r} is no number; write it like 0.09")


def _sentence(error: msgspec.ValidationError, data: Any) -> str:
    """msgspec's words with the place as a reader of the file finds it, and the value."""
    reason, _, path = str(error).partition(" - at `$")
    where, value = [], data
    for key, index in _STEP.findall(path.rstrip("`")):
        try:
            value = value[key] if key else value[int(index)]
        except (KeyError, IndexError, TypeError):
            break
        if key:
            where.append(key)
        else:
            name = value.get("name") if isinstance(value, dict) else None
            where[-1] += f" {int(index) + 1}" + (f" ({name!r})" if isinstance(name, str) else "")
    for old, new in _WORDS:
        reason = reason.replace(old, new)
    place = f"{', '.join(where)}: " if where else ""
    shown = "" if isinstance(value, dict | list) or repr(value) in reason else f", {str(value)[:40]!r}"
    return f"{place}{reason}{shown}; see tariffs/example.toml"


def _checked(file: _File) -> tuple[Period, ...]:
    _name("name", file.name)
    if not _CURRENCY.match(file.currency):
        raise _MistakeError(f"currency {file.currency!r} is none; write three capital letters, like USD")
    if not 0 <= file.digits <= 6:
        raise _MistakeError(f"digits {file.digits} is out of range; it takes 0 to 6")
    try:
        known = file.timezone not in _NO_ZONES and not file.timezone.startswith(("right/", "posix/"))
        ZoneInfo(file.timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        known = False
    if not known:
        raise _MistakeError(f"timezone {file.timezone[:40]!r} is not known; write it like UTC or Europe/Zurich")
    if not file.periods:
        raise _MistakeError("there is no period; write [[period]] with valid_from and items")
    for before, after in pairwise(file.periods):
        if after.valid_from <= before.valid_from:
            raise _MistakeError(
                f"valid_from {after.valid_from} comes after {before.valid_from}; put periods in their order"
            )
    periods = tuple(_period(f"period {n} ({p.valid_from})", p, file.digits) for n, p in enumerate(file.periods, 1))
    meters: dict[str, str] = {}
    for item in (item for period in periods for item in period.items):
        if meters.setdefault(item.name, item.meter) != item.meter:
            raise _MistakeError(
                f"item {item.name!r} has meter {item.meter!r} and in an earlier period {meters[item.name]!r}; "
                "give it another name"
            )
    return periods


def _period(where: str, period: Period, digits: int) -> Period:
    if not 1970 <= period.valid_from.year <= 9000:
        raise _MistakeError(f"{where}: valid_from is out of range; it takes the years 1970 to 9000")
    if not period.items:
        raise _MistakeError(f"{where} has no item; write [[period.item]]")
    names = [item.name for item in period.items]
    for name in names:
        _name(f"{where}: the name of an item", name)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise _MistakeError(f"{where} has two items {twice!r}; give one another name")
    for discount in period.discounts:
        _check_discount(f"{where}, discount", discount, names)
    items = tuple(_item(f"{where}, item {item.name!r}", item, digits) for item in period.items)
    return msgspec.structs.replace(period, items=items)


def _item(where: str, item: Item, digits: int) -> Item:
    meter = METERS.get(item.meter)
    if meter is None:
        raise _MistakeError(f"{where}: meter {item.meter!r} is none; it is one of {', '.join(METERS)}")
    if item.unit not in meter.units:
        known = ", ".join(meter.units)
        raise _MistakeError(f"{where}: unit {item.unit!r} does not fit meter {item.meter}; it is one of {known}")
    for key, value in (("classes", ", ".join(item.classes)), ("direction", item.direction)):
        if value and not meter.network:
            raise _MistakeError(f"{where}: {key} {value} is for network meters, not {item.meter}; leave it out")
    if twice := next((name for name in item.classes if item.classes.count(name) > 1), None):
        raise _MistakeError(f"{where}: class {twice!r} is there twice; leave one out")
    _money(f"{where}: minimum", item.minimum, digits)
    if (item.price is None) == (not item.tiers):
        raise _MistakeError(f"{where}: give either a price or tiers")
    if item.price is not None:
        _money(f"{where}: price", item.price)
        return msgspec.structs.replace(item, tiers=(Tier(item.price),))
    _check_tiers(where, item.tiers)
    return item


def _check_tiers(where: str, tiers: tuple[Tier, ...]) -> None:
    last = Decimal(0)
    for tier in tiers[:-1]:
        if tier.up_to is None:
            raise _MistakeError(f"{where}: a tier without up_to is not the last; give it one")
        _money(f"{where}: up_to", tier.up_to)
        if tier.up_to <= last:
            raise _MistakeError(f"{where}: up_to {tier.up_to} comes after {last}; tiers must rise")
        last = tier.up_to
    if tiers[-1].up_to is not None:
        raise _MistakeError(f"{where}: the last tier ends at {tiers[-1].up_to}; leave its up_to out")
    for tier in tiers:
        _money(f"{where}: price", tier.price)


def _check_discount(where: str, discount: Discount, names: Iterable[str]) -> None:
    if not discount.percent.is_finite() or not 0 <= discount.percent <= 100:
        raise _MistakeError(f"{where}: percent {discount.percent} is out of range; it takes 0 to 100")
    _money(f"{where}: percent", discount.percent)
    if bool(discount.account) == bool(discount.owner):
        raise _MistakeError(f"{where}: give either an account or an owner")
    if unknown := next((name for name in discount.items if name not in names), None):
        raise _MistakeError(f"{where}: there is no item {unknown!r} in this period; it has {', '.join(names)}")


def _money(where: str, value: Decimal, places: int = _PLACES) -> None:
    """An ordinary number: finite, not negative, and short enough to be reckoned with exactly."""
    if not value.is_finite() or value.is_signed() or value.adjusted() >= _PLACES:
        raise _MistakeError(f"{where} {str(value)[:40]} is out of range; it takes 0 to 10^{_PLACES}")
    exponent = value.as_tuple().exponent
    if isinstance(exponent, int) and exponent < -places:
        raise _MistakeError(f"{where} {str(value)[:40]} has too many decimals; it takes {places}")


def _name(where: str, value: str) -> None:
    if not value.strip() or not value.isprintable() or len(value) > _NAME_MAX:
        raise _MistakeError(f"{where} {value[:40]!r} is not usable; it takes 1 to {_NAME_MAX} printable characters")
