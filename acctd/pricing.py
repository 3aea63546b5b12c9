"""What one payer owes for one month: quantities to lines, exactly. Pure arithmetic, no I/O. Floor 3.

TYPES FIRST: the arithmetic follows in the next commits.
"""

from decimal import Decimal

import msgspec


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a bill. quantity x price = amount, rounded half-even to the currency's digits (see docs/audit.md)."""

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
