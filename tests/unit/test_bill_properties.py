"""What holds of every bill: parts sum to the whole, order and readers change nothing, splitting next to nothing."""

from decimal import Decimal
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from acctd.bill import Bill, Tally
from acctd.model import Midnight
from acctd.tariff import Tariff
from acctd.usage import Usage
from tests.unit.billing import HOUR, at, bill, tariff, usage

ITEMS = """
[[period.item]]
name = "cpu"
meter = "cpu"
unit = "core-hour"
tiers = [{{up_to = 7.5, price = 0}}, {{up_to = 33.333, price = {0}}}, {{price = 0.017}}]
[[period.item]]
name = "wall"
meter = "wall"
unit = "hour"
price = {0}
[[period.item]]
name = "egress"
meter = "network"
direction = "outgoing"
unit = "GB"
tiers = [{{up_to = 0.3, price = 0}}, {{up_to = 1.1, price = 0.5}}, {{price = {0}}}]
{1}
[[period.discount]]
account = "a"
percent = 12.5
[[period.discount]]
owner = "y"
percent = 33
items = ["wall"]
"""


def priced(*, minimum: str = "") -> Tariff:
    """Two periods, the second from within a month; a timezone whose clocks change in it."""
    first, second = ITEMS.format("0.113", minimum), ITEMS.format("0.229", minimum)
    return tariff(
        f"[[period]]\nvalid_from = 2026-01-01\n{first}\n[[period]]\nvalid_from = 2026-03-20\n{second}",
        timezone="Europe/Zurich",
    )


PLAIN, LEAST = priced(), priced(minimum="minimum = 4.75")
BEGIN, END = int(at("2026-02-20 00:00")), int(at("2026-04-10 00:00"))
INSTANTS = st.integers(BEGIN, END)
COUNTS = st.integers(0, 3 * 10**9)


@st.composite
def records(draw: st.DrawFn) -> list[Usage]:
    """Some jobs of a few payers around the end of March, with a reading at some midnight each."""
    found = []
    for number in range(draw(st.integers(1, 7))):
        wall, cpu, out, into = draw(st.integers(0, 400)), draw(st.integers(0, 9 * HOUR)), draw(COUNTS), draw(COUNTS)
        seen = Midnight(
            draw(st.integers(0, 400)) * HOUR,
            {"cpu_user": {"": draw(st.integers(0, cpu))}, "network": {"OutgoingA": out}},
        )
        found.append(
            usage(
                f"j{number}",
                draw(INSTANTS),
                wall,
                owner=draw(st.sampled_from("xyz")),
                account=draw(st.sampled_from(["", "a", "b"])),
                node=draw(st.sampled_from("nm")),
                midnights=(seen,),
                cpu_user=cpu,
                network={"OutgoingA": out, "OutgoingB": into, "IncomingA": into},
            )
        )
    return found


def sums(found: Bill) -> dict[tuple[str, ...], tuple[Decimal, Decimal]]:
    """Quantity and amount of each of the payers' lines, whatever the groups."""
    result: dict[tuple[str, ...], tuple[Decimal, Decimal]] = {}
    for line in found.lines:
        key = (line.payer, line.month, line.valid_from, line.item, line.tier, str(line.price))
        quantity, amount = result.get(key, (Decimal(0), Decimal(0)))
        result[key] = (quantity + line.quantity, amount + line.amount)
    return result


@given(records(), st.lists(st.sampled_from(["user", "job", "node", "class", "day", "month"]), unique=True, min_size=1))
@settings(deadline=None)
def test_parts_sum_to_the_whole(usages: list[Usage], words: list[str]) -> None:
    """Line by line, quantities to the last digit and amounts to the cent."""
    whole, parts = bill(LEAST, usages), bill(LEAST, usages, group_by=tuple(words))
    assert sums(parts) == sums(whole)
    assert parts.total == whole.total == sum(line.amount for line in whole.lines)


@given(records(), st.none() | INSTANTS)
@settings(deadline=None)
def test_whole_lines_are_quantity_times_price(usages: list[Usage], since: int | None) -> None:
    for line in bill(LEAST, usages, since=since).lines:
        assert line.amount == (line.quantity * line.price).quantize(Decimal("0.01"))  # half-even, the default


@given(records(), st.randoms(use_true_random=False), st.lists(st.sampled_from(["user", "job", "day"]), unique=True))
@settings(deadline=None)
def test_order_and_readers_do_not_matter(usages: list[Usage], random: Random, words: list[str]) -> None:
    whole = bill(LEAST, usages, since=BEGIN, group_by=tuple(words))
    shuffled = random.sample(usages, len(usages))
    assert bill(LEAST, shuffled, since=BEGIN, group_by=tuple(words)) == whole
    tallies = [Tally(LEAST, BEGIN, 4102444800, group_by=tuple(words)) for _ in range(3)]
    for one in shuffled:
        random.choice(tallies).add(one)
    tallies[2].merge(tallies[0])
    tallies[2].merge(tallies[1])
    assert tallies[2].bill() == whole


@given(records(), st.lists(INSTANTS, min_size=1, max_size=4, unique=True))
@settings(deadline=None)
def test_splitting_a_period_changes_only_the_rounding(usages: list[Usage], cuts: list[int]) -> None:
    """Quantities add up but for their ninth decimal; amounts but for half a cent for each line that was rounded.

    A discount is rounded as well, and what it is taken off was rounded before: so a whole cent.
    """
    edges = [None, *sorted(cuts)]
    pieces = [
        bill(PLAIN, usages, since=since, until=until)
        for since, until in zip(edges, [*sorted(cuts), END * 2], strict=True)
    ]
    whole = bill(PLAIN, usages, until=END * 2)
    rounded = len(whole.lines) + sum(len(piece.lines) for piece in pieces)
    assert abs(sum(piece.total for piece in pieces) - whole.total) <= Decimal("0.01") * rounded

    def used(*bills: Bill) -> dict[tuple[str, str, str], Decimal]:
        result: dict[tuple[str, str, str], Decimal] = {}
        for line in (line for one in bills for line in one.lines if line.unit != "USD"):
            key = (line.payer, line.item, line.tier)
            result[key] = result.get(key, Decimal(0)) + line.quantity
        return result

    before, after = used(whole), used(*pieces)
    assert before.keys() == after.keys()
    assert all(abs(before[key] - after[key]) <= rounded * Decimal("1e-9") for key in before)


@given(records(), INSTANTS)
@settings(deadline=None)
def test_splitting_owes_a_minimum_once(usages: list[Usage], cut: int) -> None:
    """What was billed of a minimum in the first part is taken off in the second."""
    first, second, whole = bill(LEAST, usages, until=cut), bill(LEAST, usages, since=cut), bill(LEAST, usages)
    # The second part reckons anew what the first owed, in lines that it does not show: no more than the first has.
    rounded = 2 * len(first.lines) + len(second.lines) + len(whole.lines)
    assert abs(first.total + second.total - whole.total) <= Decimal("0.01") * rounded
    months = {(line.payer, line.month) for line in whole.lines if line.item == "egress"}
    for payer, month in months:
        lines = [x for x in whole.lines if (x.payer, x.month, x.item) == (payer, month, "egress")]
        assert sum(line.amount for line in lines) >= Decimal("4.75")
