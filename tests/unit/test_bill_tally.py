"""What a bill says beside its sums: groups, selections, living jobs, families, notes; and sums made elsewhere."""

import pickle
from decimal import Decimal

import pytest

from acctd.bill import GROUPS, Selection, Tally
from acctd.errors import UsageError
from acctd.usage import Usage
from tests.unit.billing import GB, HOUR, at, bill, shown, tariff, usage

ITEMS = """
[[period.item]]
name = "cpu"
meter = "cpu"
unit = "core-hour"
price = 0.50
[[period.item]]
name = "net"
meter = "network"
unit = "GB"
price = 0.10
"""
NOON = at("2026-01-05 12:00")
NET = {"OutgoingInternal": 10 * GB, "OutgoingExternal": 20 * GB, "IncomingExternal": 30 * GB}


def two() -> list[Usage]:
    return [
        usage("1", NOON, 1, owner="alice", account="physics", node="n1", cpu_user=2 * HOUR, network=NET),
        usage("2", NOON, 24, owner="bob", account="physics", node="n2", cpu_user=4 * HOUR, network=NET),
    ]


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        ((), ["physics 2026-01 cpu: 6 core-hour x 0.50 = 3.00", "physics 2026-01 net: 120 GB x 0.10 = 12.00"]),
        (
            ("user",),
            [
                "physics alice 2026-01 cpu: 2 core-hour x 0.50 = 1.00",
                "physics alice 2026-01 net: 60 GB x 0.10 = 6.00",
                "physics bob 2026-01 cpu: 4 core-hour x 0.50 = 2.00",
                "physics bob 2026-01 net: 60 GB x 0.10 = 6.00",
            ],
        ),
        (
            ("class",),
            [
                "physics  2026-01 cpu: 6 core-hour x 0.50 = 3.00",
                "physics External 2026-01 net: 100 GB x 0.10 = 10.00",
                "physics Internal 2026-01 net: 20 GB x 0.10 = 2.00",
            ],
        ),
        (
            ("day", "node"),
            [
                "physics 2026-01-05 n1 2026-01 cpu: 2 core-hour x 0.50 = 1.00",
                "physics 2026-01-05 n1 2026-01 net: 60 GB x 0.10 = 6.00",
                "physics 2026-01-05 n2 2026-01 cpu: 2 core-hour x 0.50 = 1.00",
                "physics 2026-01-05 n2 2026-01 net: 30 GB x 0.10 = 3.00",
                "physics 2026-01-06 n2 2026-01 cpu: 2 core-hour x 0.50 = 1.00",
                "physics 2026-01-06 n2 2026-01 net: 30 GB x 0.10 = 3.00",
            ],
        ),
    ],
)
def test_groups(words: tuple[str, ...], lines: list[str]) -> None:
    found = bill(tariff(ITEMS), two(), group_by=words)
    assert shown(found.lines) == lines
    assert found.total == Decimal("15.00")
    assert (found.records, found.payers, found.group_by) == (2, ("physics",), words)


def test_all_groups_at_once() -> None:
    found = bill(tariff(ITEMS + "minimum = 20.00\n"), two(), group_by=GROUPS)
    assert found.lines[0].group == ("alice", "physics", "1", "n1", "", "2026-01-05", "2026-01")
    assert found.lines[-1].group == ("", "physics", "", "", "", "", "2026-01")
    assert (found.lines[-1].tier, found.lines[-1].amount) == ("minimum", Decimal("8.00"))
    assert found.total == Decimal("23.00")


def test_a_parallel_job_comes_together_under_its_id() -> None:
    parts = [usage("7", NOON, 1, node=node, cpu_user=HOUR) for node in ("n1", "n2", "n3")]
    assert shown(bill(tariff(ITEMS), parts, select=Selection(job="7")).lines) == [
        "alice 2026-01 cpu: 3 core-hour x 0.50 = 1.50"
    ]


@pytest.mark.parametrize(
    ("select", "amount", "records"),
    [
        (Selection(job="1"), "7.00", 1),
        (Selection(user="bob"), "8.00", 1),
        (Selection(account="physics"), "15.00", 2),
        (Selection(account="biology"), "1.00", 1),
        (Selection(tags={"ACCOUNT": "physics"}), "15.00", 2),
        (Selection(user="bob", tags={"account": "biology"}), "0.00", 0),
        (Selection(job="none"), "0.00", 0),
    ],
)
def test_selections(select: Selection, amount: str, records: int) -> None:
    third = usage("3", NOON, 1, owner="carol", account="biology", cpu_user=2 * HOUR, network={})
    found = bill(tariff(ITEMS), [*two(), third], select=select)
    assert (str(found.total), found.records) == (amount, records)


def test_a_selected_line_is_what_the_payers_month_makes_it() -> None:
    """Of 150 GB 100 are free; the job has a third of all."""
    priced = tariff(
        '[[period.item]]\nname = "net"\nmeter = "network"\nunit = "GB"\nminimum = 9.00\n'
        "tiers = [{up_to = 100, price = 0}, {price = 0.10}]\n"
    )
    usages = [usage("1", NOON, 1, out=50 * GB), usage("2", NOON, 1, out=100 * GB)]
    assert shown(bill(priced, usages, select=Selection(job="1")).lines) == [
        "alice 2026-01 net (up to 100 GB): 33.333333333 GB x 0 = 0.00",
        "alice 2026-01 net (above 100 GB): 16.666666667 GB x 0.10 = 1.67",
    ]
    assert bill(priced, usages).total == bill(priced, usages, select=Selection(account="alice")).total == Decimal(9)


def test_living_jobs_are_billed_so_far_and_marked() -> None:
    done, alive = two()
    found = bill(tariff(ITEMS), [done], living=[alive], group_by=("job",))
    assert found.total == Decimal("15.00")
    assert found.living == ("2",)
    assert [line.living for line in found.lines] == [False, False, True, True]
    assert found.notes == ("1 job is still running and billed so far",)
    assert {line.living for line in bill(tariff(ITEMS), [done], living=[alive]).lines} == {True}
    by_class = bill(tariff(ITEMS), [done], living=[alive], group_by=("class", "job"))
    assert [line.living for line in by_class.lines] == [line.group[1] == "2" for line in by_class.lines]


def test_stacked_devices_are_left_out_of_block_io() -> None:
    priced = tariff('[[period.item]]\nname = "disk"\nmeter = "block_read"\nunit = "GB"\nprice = 1\n')
    counted = {"8:0": 3 * GB, "253:0": 3 * GB}
    assert bill(priced, [usage("1", NOON, 1, block_read=counted)]).total == Decimal(6)
    assert bill(priced, [usage("1", NOON, 1, block_read=counted, stacked=("253:0",))]).total == Decimal(3)
    crossing = usage("1", at("2026-01-31 12:00"), 24, block_read=counted, stacked=("253:0",))
    assert [str(line.amount) for line in bill(priced, [crossing]).lines] == ["1.50", "1.50"]


def test_a_rule_of_a_sites_own_has_a_class_and_no_direction() -> None:
    rules = {"Storage": 10 * GB, "OutgoingExternal": 5 * GB}
    for narrow, amount in (("", "1.50"), ('direction = "outgoing"', "0.50"), ('classes = ["Storage"]', "1.00")):
        priced = tariff(f'[[period.item]]\nname = "net"\nmeter = "network"\nunit = "GB"\nprice = 0.10\n{narrow}\n')
        assert str(bill(priced, [usage("1", NOON, 1, network=rules)]).total) == amount


def test_a_job_counts_where_it_began() -> None:
    priced = tariff('[[period.item]]\nname = "jobs"\nmeter = "jobs"\nunit = "job"\nprice = 0.05\n')
    crossing = [usage("1", at("2026-01-31 12:00"), 24), usage("2", NOON, 1)]
    assert shown(bill(priced, crossing).lines) == ["alice 2026-01 jobs: 2 job x 0.05 = 0.10"]
    assert bill(priced, crossing, since=at("2026-02-01 00:00")).lines == ()


def test_what_cannot_be_priced_is_told() -> None:
    priced = tariff(
        """
        [[period]]
        valid_from = 2026-01-01
        [[period.item]]
        name = "cores"
        meter = "cores"
        unit = "core-hour"
        price = 1
        [[period.item]]
        name = "net"
        meter = "network"
        unit = "GB"
        price = 1
        """
    )
    found = bill(
        priced,
        [
            usage("1", at("2025-12-31 12:00"), 24, cpu_reserved=0, out=GB),
            usage("2", at("2025-12-01 12:00"), 1, out=GB),
            usage("3", NOON, 1, cpu_reserved=HOUR, out=GB),
            usage("4", NOON, 1, cpu_reserved=HOUR),
            usage("5", NOON, 1, out=0),
        ],
    )
    assert shown(found.lines) == [
        "alice 2026-01 cores: 2 core-hour x 1 = 2.00",
        "alice 2026-01 net: 1.5 GB x 1 = 1.50",
    ]
    assert found.notes == (
        "2 records are of a time before 2026-01-01, from when on the tariff has prices; not billed",
        "item 'cores': 1 record is without it (no cores were asked for, or the agent was an older one); "
        "nothing is billed there",
        "item 'net': 1 record is without it (no network was counted); nothing is billed there",
    )


def test_a_bill_asks_for_the_records_it_needs() -> None:
    since = at("2026-03-10 12:00")
    tally = Tally(tariff(ITEMS), since, since + 86400)
    assert tally.needed_from == at("2026-03-01 00:00")
    assert Tally(tariff(ITEMS), None, since).needed_from == float("-inf")
    for other in (usage("1", at("2026-02-27 00:00"), 48, cpu_user=HOUR), usage("2", since + 86400, 1, cpu_user=HOUR)):
        tally.add(other)
    assert tally.bill().records == 0
    assert tally.bill().lines == ()


@pytest.mark.parametrize(
    ("group_by", "since", "told"),
    [(("usr",), None, "group 'usr' is none"), (("day", "day"), None, "twice"), ((), 5e9, "not before until")],
)
def test_a_bill_of_nonsense_is_refused(group_by: tuple[str, ...], since: float | None, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Tally(tariff(ITEMS), since, 2e9, group_by=group_by)


def test_a_record_of_no_time_is_refused() -> None:
    with pytest.raises(UsageError, match="in no calendar"):
        Tally(tariff(ITEMS), None, 2e9).add(usage("1", -1e18, 1, cpu_user=1))


@pytest.mark.parametrize("select", [None, Selection(user="bob"), Selection(job="2"), Selection(job="2.1")])
@pytest.mark.parametrize("group_by", [(), ("class", "day", "job")])
def test_tallies_of_several_processes_come_together(select: Selection | None, group_by: tuple[str, ...]) -> None:
    family = usage("2.1", NOON, 1, owner="bob", parent="2", cpu_user=HOUR, network=NET)
    usages = [*two(), family, usage("4", NOON, 30 * 24, owner="bob", cpu_user=HOUR)]
    whole, *halves = (Tally(tariff(ITEMS), None, 4e9, select=select, group_by=group_by) for _ in range(3))
    for place, one in enumerate(usages):
        whole.add(one, living=place == 3)
        halves[place % 2].add(one, living=place == 3)
    first, second = (pickle.loads(pickle.dumps(tally)) for tally in halves)  # noqa: S301  # our own
    first.merge(second)
    assert first.bill() == whole.bill()


def test_tallies_of_different_bills_do_not() -> None:
    priced = tariff(ITEMS)
    for other in (
        Tally(tariff(ITEMS + "minimum = 1\n"), None, 4e9),
        Tally(priced, 1e9, 4e9),
        Tally(priced, None, 3e9),
        Tally(priced, None, 4e9, group_by=("job",)),
        Tally(priced, None, 4e9, select=Selection(user="bob")),
    ):
        with pytest.raises(ValueError, match="other bills"):
            Tally(priced, None, 4e9).merge(other)


def test_sums_that_a_database_made() -> None:
    """A thousand equal records and their sum; one that crosses a slice is added by itself."""
    priced = tariff(ITEMS + '[[period.item]]\nname = "jobs"\nmeter = "jobs"\nunit = "job"\nprice = 0.01\n')
    one = usage("1", NOON, 1, cpu_user=HOUR, network=NET)
    single, summed = Tally(priced, None, 4e9), Tally(priced, None, 4e9)
    for _ in range(1000):
        single.add(one)
    total = usage("", NOON, 1000, cpu_user=1000 * HOUR, network={rule: 1000 * n for rule, n in NET.items()})
    summed.add_sum(total, jobs=1000)
    for tally in (single, summed):
        tally.add(usage("2", at("2026-01-31 12:00"), 24, cpu_user=HOUR, network=NET))
    assert summed.bill() == single.bill()
    assert summed.slices(NOON, at("2026-02-05 00:00")) == [
        (at("2026-01-01 00:00"), at("2026-02-01 00:00")),
        (at("2026-02-01 00:00"), at("2026-03-01 00:00")),
    ]


def test_currencies_without_cents_and_with_three_digits() -> None:
    for digits, amount in ((0, "1"), (3, "1.235")):
        priced = tariff(
            '[[period.item]]\nname = "net"\nmeter = "network"\nunit = "GB"\nprice = 1\n', currency="XXX", digits=digits
        )
        assert str(bill(priced, [usage("1", NOON, 1, out=1234567890)]).total) == amount
