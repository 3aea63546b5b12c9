"""Bills reckoned by hand, to the cent. Every number on the right is a person's, with the way to it written out."""

from decimal import Decimal

from acctd.bill import Selection
from acctd.model import Midnight
from tests.unit.billing import GB, HOUR, H, at, bill, shown, tariff, usage

EGRESS = """
[[period.item]]
name = "egress"
meter = "network"
classes = ["External"]
direction = "outgoing"
unit = "GB"
tiers = [{up_to = 100, price = 0}, {up_to = 10240, price = 0.09}, {price = 0.085}]
"""
WALL = """
[[period.item]]
name = "wall"
meter = "wall"
unit = "hour"
price = 0.10
"""


def test_1_tiers_and_a_job_that_crosses_a_month() -> None:
    """January: 10000 + 140 GB, and half of 300 GB = 10290 GB.

    100 GB are free. Up to 10240 GB there are 10140 GB: 10140 x 0.09 = 912.60. The last 50 GB: 50 x 0.085 = 4.25.
    February: the other 150 GB. The free 100 GB begin anew; 50 x 0.09 = 4.50. In all 912.60 + 4.25 + 4.50 = 921.35.
    """
    found = bill(
        tariff(EGRESS),
        [
            usage("1", at("2026-01-31 12:00"), 24, out=300 * GB),
            usage("2", at("2026-01-05 00:00"), 1, out=10000 * GB),
            usage("3", at("2026-01-20 00:00"), 1, out=140 * GB),
        ],
    )
    assert shown(found.lines) == [
        "alice 2026-01 egress (up to 100 GB): 100 GB x 0 = 0.00",
        "alice 2026-01 egress (100 to 10240 GB): 10140 GB x 0.09 = 912.60",
        "alice 2026-01 egress (above 10240 GB): 50 GB x 0.085 = 4.25",
        "alice 2026-02 egress (up to 100 GB): 100 GB x 0 = 0.00",
        "alice 2026-02 egress (100 to 10240 GB): 50 GB x 0.09 = 4.50",
    ]
    assert found.total == Decimal("921.35")


def test_2_a_leap_day() -> None:
    """48 hours from 28 February, noon. In 2028 they end on 1 March: 12 + 24 h in February (3.60), 12 h in March (1.20).

    In 2027 there is no 29 February: 12 h (1.20), then all of 1 March and 12 h of 2 March, 36 h (3.60).
    """
    leap = bill(tariff(WALL), [usage("1", at("2028-02-28 12:00"), 48)], group_by=("day",))
    assert shown(leap.lines) == [
        "alice 2028-02-28 2028-02 wall: 12 hour x 0.10 = 1.20",
        "alice 2028-02-29 2028-02 wall: 24 hour x 0.10 = 2.40",
        "alice 2028-03-01 2028-03 wall: 12 hour x 0.10 = 1.20",
    ]
    common = bill(tariff(WALL), [usage("1", at("2027-02-28 12:00"), 48)])
    assert shown(common.lines) == [
        "alice 2027-02 wall: 12 hour x 0.10 = 1.20",
        "alice 2027-03 wall: 36 hour x 0.10 = 3.60",
    ]
    assert leap.total == common.total == Decimal("4.80")


def test_3_clocks_put_forward_and_back() -> None:
    """Zurich, three whole days around the change. 29 March 2026 has 23 hours, 25 October has 25.

    March: 24 + 23 + 24 = 71 h, from 27 March 23:00 UTC (clocks are one hour ahead) to 30 March 22:00 UTC (two hours).
    October: 24 + 25 + 24 = 73 h.
    """
    zurich = tariff(WALL, timezone="Europe/Zurich", currency="CHF")
    march = bill(zurich, [usage("1", at("2026-03-27 23:00"), 71)], group_by=("day",))
    assert shown(march.lines) == [
        "alice 2026-03-28 2026-03 wall: 24 hour x 0.10 = 2.40",
        "alice 2026-03-29 2026-03 wall: 23 hour x 0.10 = 2.30",
        "alice 2026-03-30 2026-03 wall: 24 hour x 0.10 = 2.40",
    ]
    october = bill(zurich, [usage("1", at("2026-10-23 22:00"), 73)], group_by=("day",))
    assert shown(october.lines) == [
        "alice 2026-10-24 2026-10 wall: 24 hour x 0.10 = 2.40",
        "alice 2026-10-25 2026-10 wall: 25 hour x 0.10 = 2.50",
        "alice 2026-10-26 2026-10 wall: 24 hour x 0.10 = 2.40",
    ]


def test_3b_a_month_begins_at_the_tariffs_midnight() -> None:
    """March ends in Zurich at 22:00 UTC: of two hours from 21:00 UTC one is in March, one in April."""
    zurich = tariff(WALL, timezone="Europe/Zurich", currency="CHF")
    assert shown(bill(zurich, [usage("1", at("2026-03-31 21:00"), 2)]).lines) == [
        "alice 2026-03 wall: 1 hour x 0.10 = 0.10",
        "alice 2026-04 wall: 1 hour x 0.10 = 0.10",
    ]


def test_4_a_tariff_that_changes_in_mid_job() -> None:
    """One core, busy for 48 h, 24 h on each side of 15 April, when the core-hour goes up from 0.10 to 0.20.

    The first 30 core-hours of a month are free. 24 are used before: nothing is owed. 6 are left after, so that
    24 - 6 = 18 core-hours cost 18 x 0.20 = 3.60.
    """
    item = '[[period.item]]\nname = "cpu"\nmeter = "cpu"\nunit = "core-hour"\n'
    april = tariff(
        f"""
        [[period]]
        valid_from = 2026-01-01
        {item}
        tiers = [{{up_to = 30, price = 0}}, {{price = 0.10}}]
        [[period]]
        valid_from = 2026-04-15
        {item}
        tiers = [{{up_to = 30, price = 0}}, {{price = 0.20}}]
        """
    )
    found = bill(april, [usage("1", at("2026-04-14 00:00"), 48, cpu_user=40 * HOUR, cpu_system=8 * HOUR)])
    assert shown(found.lines) == [
        "alice 2026-04 cpu (up to 30 core-hour): 24 core-hour x 0 = 0.00",
        "alice 2026-04 cpu (up to 30 core-hour): 6 core-hour x 0 = 0.00",
        "alice 2026-04 cpu (above 30 core-hour): 18 core-hour x 0.20 = 3.60",
    ]
    assert [line.valid_from for line in found.lines] == ["2026-01-01", "2026-04-15", "2026-04-15"]
    assert found.total == Decimal("3.60")


def test_5_a_job_of_0_bytes() -> None:
    """It ran for half an hour: 0.5 x 0.10 = 0.05. It sent nothing: no line, and so no minimum of 1.00 either.

    Another one ended in the instant in which it began: it used nothing at all.
    """
    priced = tariff(WALL + EGRESS + "minimum = 1.00\n")
    found = bill(priced, [usage("1", at("2026-01-05 00:00"), 0.5, out=0), usage("2", at("2026-01-05 00:00"), 0, out=0)])
    assert shown(found.lines) == ["alice 2026-01 wall: 0.5 hour x 0.10 = 0.05"]
    assert found.total == Decimal("0.05")


def test_6_above_2_to_the_53_bytes() -> None:
    """2^53 + 1 = 9007199254740993, which a double cannot tell from 2^53. At 1 a byte, that is the price.

    And 2^63 - 1 bytes are 9223372036.854775807 GB; x 0.085 is 783986623.132655943595, so 783986623.13.
    """
    byte = tariff('[[period.item]]\nname = "bytes"\nmeter = "network"\nunit = "byte"\nprice = 1\n')
    assert bill(byte, [usage("1", at("2026-01-05 00:00"), 1, out=2**53 + 1)]).total == Decimal("9007199254740993.00")
    two = bill(byte, [usage(job, at("2026-01-05 00:00"), 1, out=2**53 + 1) for job in "12"], group_by=("job",))
    assert [line.amount for line in two.lines] == [Decimal("9007199254740993.00")] * 2
    gigabyte = tariff('[[period.item]]\nname = "egress"\nmeter = "network"\nunit = "GB"\nprice = 0.085\n')
    assert shown(bill(gigabyte, [usage("1", at("2026-01-05 00:00"), 1, out=9223372036854775807)]).lines) == [
        "alice 2026-01 egress: 9223372036.854775807 GB x 0.085 = 783986623.13"
    ]


def test_7_a_discount_and_a_minimum() -> None:
    """physics has 10 % off, and whoever sends anything owes 5.00 for the month.

    physics sends 50 GB: 50 x 0.09 = 4.50; 10 % of it is 0.45; 4.50 - 0.45 = 4.05 lacks 0.95 to 5.00.
    biology sends 100 GB: 100 x 0.09 = 9.00, no discount, and more than the minimum.
    Alice, who pays herself, has 5 % off as an owner; with 100 GB she owes 9.00 - 0.45 = 8.55.
    When she works for physics only the larger counts: not 15 %.
    """
    priced = tariff(
        """
        [[period.item]]
        name = "egress"
        meter = "network"
        unit = "GB"
        price = 0.09
        minimum = 5.00
        [[period.discount]]
        account = "physics"
        percent = 10
        [[period.discount]]
        owner = "alice"
        percent = 5
        items = ["egress"]
        """
    )
    found = bill(
        priced,
        [
            usage("1", at("2026-01-05 00:00"), 1, owner="alice", account="physics", out=50 * GB),
            usage("2", at("2026-01-05 00:00"), 1, owner="bob", account="biology", out=100 * GB),
            usage("3", at("2026-01-05 00:00"), 1, owner="alice", out=100 * GB),
        ],
    )
    assert shown(found.lines) == [
        "alice 2026-01 egress: 100 GB x 0.09 = 9.00",
        "alice 2026-01 egress (discount 5 %): 9 USD x -0.05 = -0.45",
        "biology 2026-01 egress: 100 GB x 0.09 = 9.00",
        "physics 2026-01 egress: 50 GB x 0.09 = 4.50",
        "physics 2026-01 egress (discount 10 %): 4.5 USD x -0.10 = -0.45",
        "physics 2026-01 egress (minimum): 1 month x 0.95 = 0.95",
    ]
    assert found.total == Decimal("22.55")


def test_8_a_midnight_checkpoint() -> None:
    """A day from 31 January, 18:00. At 00:01:00, 21660 s after its start, it had sent 90 GB; in all 100 GB.

    At midnight 21600 s had passed: 90000000000 x 21600 / 21660 = 89750692520.7..., so 89750692520 bytes are January's,
    and 100000000000 - 89750692520 = 10249307480 are February's. At 0.09: 8.0775... = 8.08, and 0.9224... = 0.92.
    Without the checkpoint it would have been 25 and 75 GB.
    """
    priced = tariff('[[period.item]]\nname = "egress"\nmeter = "network"\nunit = "GB"\nprice = 0.09\n')
    seen = Midnight(21660 * 10**9, {"network": {"OutgoingExternal": 90 * GB}})
    found = bill(priced, [usage("1", at("2026-01-31 18:00"), 24, out=100 * GB, midnights=(seen,))])
    assert shown(found.lines) == [
        "alice 2026-01 egress: 89.75069252 GB x 0.09 = 8.08",
        "alice 2026-02 egress: 10.24930748 GB x 0.09 = 0.92",
    ]
    assert shown(bill(priced, [usage("1", at("2026-01-31 18:00"), 24, out=100 * GB)]).lines) == [
        "alice 2026-01 egress: 25 GB x 0.09 = 2.25",
        "alice 2026-02 egress: 75 GB x 0.09 = 6.75",
    ]


def test_9_a_family_inside_a_pilot() -> None:
    """The pilot's 10 h and 8 core-hours have those of its payload in them: 10 x 0.10 + 8 x 0.05 = 1.00 + 0.40 = 1.40.

    The payload by itself, 4 h and 6 core-hours, would be 0.40 + 0.30; that is shown if it is asked for, and said so.
    """
    cpu = '[[period.item]]\nname = "cpu"\nmeter = "cpu"\nunit = "core-hour"\nprice = 0.05\n'
    pilot = usage("p", at("2026-01-05 00:00"), 10, owner="grid", cpu_user=8 * HOUR)
    payload = usage("p.1", at("2026-01-05 02:00"), 4, owner="alice", parent="p", cpu_user=6 * HOUR)
    found = bill(tariff(WALL + cpu), [payload, pilot])
    assert shown(found.lines) == [
        "grid 2026-01 wall: 10 hour x 0.10 = 1.00",
        "grid 2026-01 cpu: 8 core-hour x 0.05 = 0.40",
    ]
    assert found.notes == ("1 record is of jobs inside other jobs, which are billed with all that these used",)
    alone = bill(tariff(WALL + cpu), [payload, pilot], select=Selection(job="p.1"))
    assert shown(alone.lines) == [
        "alice 2026-01 wall: 4 hour x 0.10 = 0.40",
        "alice 2026-01 cpu: 6 core-hour x 0.05 = 0.30",
    ]
    assert alone.notes[0].startswith("job p.1 on n1 is inside job p, which is billed with all that p.1 used")


def test_10_an_account_of_two_owners_with_a_free_allowance() -> None:
    """Alice 60 GB, Bob 90 GB: 150 GB, of which 100 are free and 50 cost 50 x 0.09 = 4.50. Shares are 60 and 90 of 150.

    Alice: 40 free, 20 x 0.09 = 1.80. Bob: 60 free, 30 x 0.09 = 2.70. Bob alone would have had his 90 for nothing.
    Bob has 20 % off as an owner: of his share of 4.50, which is 2.70, that is 0.54.
    """
    usages = [
        usage("1", at("2026-01-05 00:00"), 1, owner="alice", account="physics", out=60 * GB),
        usage("2", at("2026-01-06 00:00"), 1, owner="bob", account="physics", out=90 * GB),
    ]
    priced = tariff(EGRESS + '[[period.discount]]\nowner = "bob"\npercent = 20\n')
    assert shown(bill(priced, usages, group_by=("user",)).lines) == [
        "physics alice 2026-01 egress (up to 100 GB): 40 GB x 0 = 0.00",
        "physics alice 2026-01 egress (100 to 10240 GB): 20 GB x 0.09 = 1.80",
        "physics bob 2026-01 egress (up to 100 GB): 60 GB x 0 = 0.00",
        "physics bob 2026-01 egress (100 to 10240 GB): 30 GB x 0.09 = 2.70",
        "physics bob 2026-01 egress (discount 20 %): 2.7 USD x -0.20 = -0.54",
    ]
    assert shown(bill(priced, usages, select=Selection(user="alice")).lines) == [
        "physics 2026-01 egress (up to 100 GB): 40 GB x 0 = 0.00",
        "physics 2026-01 egress (100 to 10240 GB): 20 GB x 0.09 = 1.80",
    ]


def test_11_three_who_share_a_dollar() -> None:
    """10 GB at 0.10 are 1.00. Three users have a third each, the last one a byte more.

    Rounded sums: 3.333333333 GB are 0.33, 6.666666666 GB are 0.67, 10 GB are 1.00. The differences: 0.33, 0.34, 0.33.
    """
    priced = tariff('[[period.item]]\nname = "egress"\nmeter = "network"\nunit = "GB"\nprice = 0.10\n')
    usages = [
        usage(name, at("2026-01-05 00:00"), 1, owner=name, account="physics", out=size)
        for name, size in (("a", 3333333333), ("b", 3333333333), ("c", 3333333334))
    ]
    found = bill(priced, usages, group_by=("user",))
    assert shown(found.lines) == [
        "physics a 2026-01 egress: 3.333333333 GB x 0.10 = 0.33",
        "physics b 2026-01 egress: 3.333333333 GB x 0.10 = 0.34",
        "physics c 2026-01 egress: 3.333333334 GB x 0.10 = 0.33",
    ]
    assert found.total == bill(priced, usages).total == Decimal("1.00")


def test_12_a_bill_that_begins_inside_a_month() -> None:
    """120 GB before 16 January and 30 GB after. 100 are free; the first half owes 20 x 0.09 = 1.80, short 3.20 of 5.00.

    The second half goes on where the first came to: 30 x 0.09 = 2.70, no free GB any more. With both 4.50 are owed,
    short 0.50, of which 3.20 were billed before: 0.50 - 3.20 = -2.70. The month is 5.00 either way.
    """
    priced = tariff(EGRESS + "minimum = 5.00\n")
    usages = [
        usage("1", at("2026-01-05 00:00"), 1, out=120 * GB),
        usage("2", at("2026-01-20 00:00"), 1, out=30 * GB),
    ]
    half = at("2026-01-16 00:00")
    first, second = bill(priced, usages, until=half), bill(priced, usages, since=half)
    assert shown(first.lines) == [
        "alice 2026-01 egress (up to 100 GB): 100 GB x 0 = 0.00",
        "alice 2026-01 egress (100 to 10240 GB): 20 GB x 0.09 = 1.80",
        "alice 2026-01 egress (minimum): 1 month x 3.20 = 3.20",
    ]
    assert shown(second.lines) == [
        "alice 2026-01 egress (100 to 10240 GB): 30 GB x 0.09 = 2.70",
        "alice 2026-01 egress (minimum): 1 month x -2.70 = -2.70",
    ]
    assert first.total + second.total == bill(priced, usages).total == Decimal("5.00")


def test_13_rounding_is_half_to_even() -> None:
    """0.5 h at 0.05 are 0.025, so 0.02; 1.5 h are 0.075, so 0.08; 0.1 h at 0.05 are 0.005, so 0.00."""
    priced = tariff('[[period.item]]\nname = "wall"\nmeter = "wall"\nunit = "hour"\nprice = 0.05\n')
    for hours, amount in ((0.5, "0.02"), (1.5, "0.08"), (0.1, "0.00")):
        assert bill(priced, [usage("1", at("2026-01-05 00:00"), hours)]).total == Decimal(amount)


def test_14_memory_by_time() -> None:
    """4 GiB for 6 h: 4194304 KiB x 21600 s = 90596966400 KiB*s, 24 GiB-hours; x 0.004 = 0.096, so 0.10.

    The same in GB-hours: 4294967296 bytes x 6 h = 25.769803776 GB-hours; x 0.004 = 0.103..., so 0.10.
    """
    for unit, quantity in (("GiB-hour", "24"), ("GB-hour", "25.769803776")):
        item = f'[[period.item]]\nname = "memory"\nmeter = "memory"\nunit = "{unit}"\nprice = 0.004\n'
        used = usage("1", at("2026-01-05 00:00"), 6, memory_resident_time=4194304 * 6 * H)
        assert shown(bill(tariff(item), [used]).lines) == [f"alice 2026-01 memory: {quantity} {unit} x 0.004 = 0.10"]
