"""Bills: usages are added up by payer, slice of time and item, and priced. Pure arithmetic, no I/O. Floor 3.

TYPES FIRST: the arithmetic follows in the next commits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal

import msgspec

from acctd.pricing import Line
from acctd.tariff import Tariff
from acctd.usage import Usage

__all__ = ["GROUPS", "Bill", "Line", "Selection", "Tally"]

GROUPS = ("user", "account", "job", "node", "class", "day", "month")
"""What lines may be grouped by. account is the payer; class is "" for what is no network."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which jobs' lines are shown; None is all. What they cost depends on the whole months of who pays for them."""

    job: str | None = None
    user: str | None = None
    account: str | None = None  # the payer
    tags: Mapping[str, str] = field(default_factory=dict)  # all of them; keys in any case


class Bill(msgspec.Struct, frozen=True, kw_only=True):
    """A bill, and what its header says; where the records are from is known to who read them."""

    tariff: str  # its name
    digest: str  # SHA-256 of its file
    currency: str
    digits: int
    timezone: str
    since: float | None  # s since the epoch; None: from the first record
    until: float
    group_by: tuple[str, ...]
    lines: tuple[Line, ...]  # sorted
    total: Decimal  # the sum of the lines
    records: int  # that have something in the lines
    payers: tuple[str, ...]  # of the lines, sorted
    living: tuple[str, ...]  # ids of the jobs that are billed so far, sorted
    notes: tuple[str, ...]  # what could not be priced, and what to know; one sentence each


class Tally:
    """Adds usages up. One for each process that reads; merge() brings them together. May be pickled.

    All records of the period must be added whatever the selection, because tiers and minimums are of whole payer-months;
    and those back to `needed_from`. Each once: who reads tells duplicates. Order does not matter.
    """

    needed_from: float
    """s since the epoch: records that ended before need not be added. The start of since's month; -inf without since."""

    def __init__(
        self,
        tariff: Tariff,
        since: float | None,
        until: float,
        *,
        select: Selection | None = None,
        group_by: tuple[str, ...] = (),
    ) -> None:
        """Raises UsageError for a group that is none, or a period that ends before it begins."""
        raise NotImplementedError

    def add(self, usage: Usage, *, living: bool = False) -> None:
        """A job's record, or its account so far. A family (it has a parent) is left out: it is in its parent's."""
        raise NotImplementedError

    def add_sum(self, usage: Usage, *, jobs: int, living: bool = False) -> None:
        """A sum that a database made, as a Usage: of `jobs` records of one payer, owner and group, without families.

        All of them must lie whole in one slice (see slices()); `started` is any instant in it, wall_ns and totals are
        sums, without stacked devices. `id` and `node` matter only where they are grouped by.
        """
        raise NotImplementedError

    def slices(self, begin: float, end: float) -> list[tuple[float, float]]:
        """The slices of time between two instants, s since the epoch: a job that lies in one needs no spreading."""
        raise NotImplementedError

    def merge(self, other: "Tally") -> None:
        """Take in what another tally of the same tariff, period, selection and groups has. Raises ValueError else."""
        raise NotImplementedError

    def bill(self) -> Bill:
        """The bill over all that was added. The tally may go on."""
        raise NotImplementedError
