"""What one payer owes for one month: quantities become lines of a bill. Pure arithmetic, no I/O. Floor 3.

1. Tiers: quantities are integers; each tier takes what lies between its ends, counted from the month's beginning. A new
   period of the tariff has prices of its own and goes on where the one before had come to.
2. A line: its quantity in the price's unit is rounded half-even to 9 decimals, and quantity x price half-even to the
   currency's digits. Rounded once: the bill is the sum of its lines.
3. Shares: each group has of each tier in proportion to what it used. Groups come in sorted order; the sums of the
   first, the first two, ... are rounded as in 2, and a group's line is the difference of two. So lines of groups add up
   to the payer's line to the last digit, and the order in which records were read changes nothing.
4. A discount is taken off the sum of an item's lines, or of the share in it that the jobs concerned used; it is rounded
   once, as a line of its own. Of two that concern a job the larger counts.
5. A minimum is what is missing after discounts, as a line of its own; where the bill begins inside the month, less what
   was missing before, which an earlier bill had. With several periods in a month the largest one counts.
"""

from collections.abc import Iterable, Iterator, Sequence
from decimal import Context, Decimal, Inexact
from fractions import Fraction
from typing import NamedTuple

import msgspec

from acctd.slices import Part
from acctd.tariff import Discount, Item, Period, Tariff, Tier

QUANTITY_PLACES = 9
MINIMUM = "minimum"
_PERCENT = Decimal("0.01")
_exact = Context(prec=100, traps=[Inexact])
"""Numbers here have 60 digits at most; the default context would round the longest of them to 28, and say nothing."""


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a bill. quantity x price = amount, rounded half-even to the currency's digits.

    Of a share of a line (see 3. above) the amount may differ from that by one of the last digit.
    """

    payer: str  # the account, else the owner
    group: tuple[str, ...]  # values of the bill's group_by; "" where a line is of no one value (a minimum is of no job)
    month: str  # 2026-03, in the tariff's timezone
    valid_from: str  # 2026-01-01: the tariff's period whose prices these are
    item: str
    tier: str  # "" where there is one only; "up to 100 GB", "above 100 GB", "discount 10 %", "minimum"
    quantity: Decimal  # 9 decimals at most; of a discount what it is taken from, in the currency
    unit: str  # of a discount the currency; of a minimum "month"
    price: Decimal  # of one unit; of a discount -0.1 for 10 %
    amount: Decimal  # in the currency
    living: bool = False  # jobs that have not ended are in it, as far as they have come


class Row(NamedTuple):
    """What some jobs of a payer used in a stretch of a month."""

    owner: str  # "" for one whom no discount names
    group: tuple[str, ...] | None  # None: not shown, and counted all the same
    counts: Sequence[int]  # by item, as in Tariff.item_names, in the meters' own units
    living: bool


class _Share(NamedTuple):
    """What a group has of a line: units of 10^-9, units of the currency's last digit."""

    quantity: int
    amount: int


def price_month(
    tariff: Tariff, payer: str, parts: Sequence[tuple[Part, list[Row]]], *, least: tuple[str, ...] | None
) -> Iterator[Line]:
    """The lines of a payer for one month, sorted by item, period and tier; within one by group.

    `parts` are the month's, in their order. `least`: what minimums have for a group, None to leave them out.
    """
    stretches = [_Stretch(tariff, payer, part, rows) for part, rows in parts if part.period >= 0]
    for column, name in enumerate(tariff.item_names):
        used, owed, before, minimum, missing = 0, 0, 0, 0, 0
        last: _Stretch | None = None
        for stretch in stretches:
            item = stretch.period.item(name)
            if item is None or not (quantity := stretch.quantity(column)):
                continue
            amount, lines = stretch.price(column, item, used)
            used, owed, last = used + quantity, owed + amount, stretch
            minimum = max(minimum, int(item.minimum.scaleb(tariff.digits, _exact)))
            missing = max(0, minimum - owed)
            if stretch.part.counted:
                yield from lines
            else:
                before = missing
        if last is not None and least is not None and missing != before:
            difference = _money(missing - before, tariff.digits)
            yield Line(
                payer=payer,
                group=least,
                month=last.part.month,
                valid_from=str(last.period.valid_from),
                item=name,
                tier=MINIMUM,
                quantity=Decimal(1),
                unit="month",
                price=difference,
                amount=difference,
                living=last.living(column),
            )


class _Stretch:
    """A stretch of a month with the same prices."""

    def __init__(self, tariff: Tariff, payer: str, part: Part, rows: list[Row]) -> None:
        self.part = part
        self.period = tariff.periods[part.period]
        self._tariff, self._payer = tariff, payer
        self._known: dict[tuple[str, str], Decimal] = {}
        # Those that are not shown come last, so that what is shown is rounded as if there was nothing else.
        self._rows = sorted(rows, key=lambda row: (row.group is None, row.group or (), row.owner))

    def quantity(self, column: int) -> int:
        """What was used of an item, in its meter's unit."""
        return sum(row.counts[column] for row in self._rows)

    def living(self, column: int) -> bool:
        """Whether living jobs used some of it."""
        return any(row.living and row.counts[column] for row in self._rows)

    def price(self, column: int, item: Item, used: int) -> tuple[int, list[Line]]:
        """What is owed for an item after `used` of it in the month (in the currency's last digit), and its lines."""
        owed, lines = 0, []
        groups, weights, living = self._groups(column)
        whole = sum(weights)
        for tier, label, quantity in _tiers(item, used, whole):
            shares, last = _split(quantity / item.per_unit, weights, whole, tier.price, self._tariff.digits)
            owed += last
            lines += self._lines(groups, shares, living, item=item.name, tier=label, unit=item.unit, price=tier.price)
        base = Fraction(owed, 10**self._tariff.digits)
        for percent in self._percents(column, item.name) if base else ():
            groups, weights, living = self._groups(column, percent, item.name)
            price = _exact.multiply(-percent, _PERCENT)
            shares, last = _split(base, weights, whole, price, self._tariff.digits)
            owed += last
            label, unit = f"discount {percent:f} %", self._tariff.currency
            lines += self._lines(groups, shares, living, item=item.name, tier=label, unit=unit, price=price)
        return owed, lines

    def _groups(
        self, column: int, percent: Decimal | None = None, item: str = ""
    ) -> tuple[list[tuple[str, ...] | None], list[int], list[bool]]:
        """The groups in their order, what each used, and whether it lives; where asked, of those with a discount."""
        groups: list[tuple[str, ...] | None] = []
        weights: list[int] = []
        living: list[bool] = []
        for row in self._rows:
            count = row.counts[column]
            if not count or (percent is not None and self._percent(row, item) != percent):
                continue
            if groups and groups[-1] == row.group:
                weights[-1] += count
                living[-1] |= row.living
            else:
                groups.append(row.group)
                weights.append(count)
                living.append(row.living)
        return groups, weights, living

    def _percents(self, column: int, item: str) -> list[Decimal]:
        """The discounts that some of those who used an item have on it."""
        if not self.period.discounts:
            return []
        return sorted({p for row in self._rows if row.counts[column] and (p := self._percent(row, item))})

    def _percent(self, row: Row, item: str) -> Decimal:
        if (found := self._known.get((row.owner, item))) is None:
            found = self._known[row.owner, item] = _largest_discount(self.period, self._payer, row.owner, item)
        return found

    def _lines(
        self,
        groups: list[tuple[str, ...] | None],
        shares: list[_Share],
        living: list[bool],
        *,
        item: str,
        tier: str,
        unit: str,
        price: Decimal,
    ) -> list[Line]:
        valid_from = str(self.period.valid_from)
        return [
            Line(
                payer=self._payer,
                group=group,
                month=self.part.month,
                valid_from=valid_from,
                item=item,
                tier=tier,
                quantity=_stripped(share.quantity),
                unit=unit,
                price=price,
                amount=_money(share.amount, self._tariff.digits),
                living=lives,
            )
            for group, share, lives in zip(groups, shares, living, strict=True)
            if group is not None
        ]


def total(lines: Iterable[Line], digits: int) -> Decimal:
    """The sum of some lines' amounts, with all the currency's digits."""
    return _money(sum(int(line.amount.scaleb(digits, _exact)) for line in lines), digits)


def _largest_discount(period: Period, payer: str, owner: str, item: str) -> Decimal:
    """The percents that are taken off an item of a job; 0 where no discount is for it."""

    def concerns(discount: Discount) -> bool:
        return (discount.account == payer or discount.owner == owner) and (not discount.items or item in discount.items)

    return max((d.percent for d in period.discounts if concerns(d)), default=Decimal(0))


def _tiers(item: Item, used: int, more: int) -> Iterator[tuple[Tier, str, Fraction]]:
    """The tiers that `more` falls into after `used`, in the meter's unit: tier, what it is called, and how much."""
    place, end = Fraction(used), Fraction(used + more)
    for tier in item.tiers:
        high = end if tier.up_to is None else min(end, Fraction(tier.up_to) * item.per_unit)
        if place < high:
            yield tier, _label(item, tier), high - place
            place = high


def _label(item: Item, tier: Tier) -> str:
    ends = [f"{t.up_to:f}" for t in item.tiers if t.up_to is not None]
    if not ends:
        return ""
    place = item.tiers.index(tier)
    if place == 0:
        return f"up to {ends[0]} {item.unit}"
    if place == len(ends):
        return f"above {ends[-1]} {item.unit}"
    return f"{ends[place - 1]} to {ends[place]} {item.unit}"


def _split(total: Fraction, weights: list[int], whole: int, price: Decimal, digits: int) -> tuple[list[_Share], int]:
    """Shares of a line in proportion to weights, by cumulative rounding; and the amount of all of them together."""
    numerator, denominator = total.numerator * 10**QUANTITY_PLACES, total.denominator * whole
    cost = Fraction(price) * Fraction(10**digits, 10**QUANTITY_PLACES)
    shares, reached, quantity, amount = [], 0, 0, 0
    for weight in weights:
        reached += weight
        now = _half_even(numerator * reached, denominator)
        worth = _half_even(now * cost.numerator, cost.denominator)
        shares.append(_Share(now - quantity, worth - amount))
        quantity, amount = now, worth
    return shares, amount


def _half_even(numerator: int, denominator: int) -> int:
    """The nearest integer to a fraction, the even one of two. The denominator is positive."""
    quotient, rest = divmod(numerator, denominator)
    twice = 2 * rest
    return quotient + (twice > denominator or (twice == denominator and quotient % 2 == 1))


def _money(amount: int, digits: int) -> Decimal:
    """An amount in the currency's last digit as one in the currency, with all its digits."""
    return Decimal(amount).scaleb(-digits, _exact)


def _stripped(quantity: int) -> Decimal:
    """A quantity in 10^-9, without zeros at its end."""
    places = QUANTITY_PLACES
    while places and quantity % 10 == 0:
        quantity //= 10
        places -= 1
    return Decimal(quantity).scaleb(-places, _exact)
