"""A bill as sections of a report: its lines as they can be checked by hand, and which items cost most.

Formats only: quantities, prices and amounts are printed as they were computed, digit for digit.
"""

from collections.abc import Mapping
from decimal import Decimal

from acctd.bill import Bill
from acctd.report.markup import Html, join, tag
from acctd.report.page import Column, bar, facts, table

_LINES = 400
"""Of a bill on a page; the whole bill is for `acctd bill`."""


def bill_section(bill: Bill, looked: str) -> Html:
    """The bill, its header first. `looked` says which records it rests on."""
    several = len(bill.payers) > 1
    columns = [
        Column("Item"),
        *([Column("Payer")] if several else []),
        *([Column(" / ".join(bill.group_by).capitalize())] if bill.group_by else []),
        Column("Month", whole=True),
        Column("Prices of", whole=True),
        Column("Tier"),
        Column("Quantity", number=True),
        Column("Unit"),
        Column(f"Price, {bill.currency}", number=True),
        Column(f"Amount, {bill.currency}", number=True),
    ]
    rows = [
        [
            f"{line.item} (so far)" if line.living else line.item,
            *([line.payer] if several else []),
            *([" / ".join(line.group)] if bill.group_by else []),
            line.month,
            line.valid_from,
            line.tier,
            plain(line.quantity),
            line.unit,
            plain(line.price),
            money(line.amount, bill.digits),
        ]
        for line in bill.lines[:_LINES]
    ]
    foot = [["Total", *[""] * (len(columns) - 2), money(bill.total, bill.digits)]]
    notes = list(bill.notes)
    if len(bill.lines) > _LINES:
        notes.append(f"{len(bill.lines) - _LINES:,} more lines are in the total; acctd bill lists them all.")
    if bill.living:
        notes.append("Jobs that have not ended are billed so far.")
    header = facts(
        [
            ("Tariff", bill.tariff),
            ("SHA-256 of its file", tag("span", bill.digest, class_="long")),
            ("Months begin in", bill.timezone),
            ("Who pays", ", ".join(bill.payers[:20]) + (" and others" if len(bill.payers) > 20 else "")),
            ("Rests on", looked),
        ]
    )
    lines = table("Quantity times price is the amount", columns, rows, foot=foot) if rows else tag("p", "Nothing.")
    return join(header, lines, [tag("p", tag("strong", "Note: "), f"{note.removesuffix('.')}.") for note in notes])


def top_items(bill: Bill) -> Html:
    """What cost most: the sums of items, the dearest first."""
    sums = by_item(bill)
    most = max(sums.values(), default=Decimal(0))
    rows = [
        [item, money(amount, bill.digits), bar(float(amount / most)) if most > 0 else None]
        for item, amount in sorted(sums.items(), key=lambda each: (-each[1], each[0]))[:20]
    ]
    columns = [
        Column("Item"),
        Column(f"Amount, {bill.currency}", number=True),
        Column("Against the dearest", spare=True),
    ]
    return table("What cost most, discounts and minimums taken in", columns, rows)


def by_item(bill: Bill) -> Mapping[str, Decimal]:
    """The sum of each item's lines."""
    sums: dict[str, Decimal] = {}
    for line in bill.lines:
        sums[line.item] = sums.get(line.item, Decimal(0)) + line.amount
    return sums


def plain(number: Decimal) -> str:
    """Without an exponent, with thousands apart; no digit is lost."""
    return f"{number:,f}"


def money(amount: Decimal, digits: int) -> str:
    """An amount with the currency's digits. It has no others."""
    return f"{amount:,.{digits}f}"
