import pytest

from acctd.cli import ps, top
from acctd.cli.rates import Amounts, Clocked, Rates, amounts
from acctd.cli.table import Column, clean, duration, fit, plain, short, tree
from acctd.cli.top import Board, Line, Order, bar
from acctd.client import Job

GB = 1 << 30


def job(name="j", **changes):
    fields = {
        "id": name, "owner": "ada", "uid": 1000, "phase": "running", "network": "nat", "started": 1.0, "wall_ns": 5,
    }  # fmt: skip
    return Job(**(fields | changes))


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, ""), (0, "0"), (1023, "1023"), (1024, "1.0K"), (1536, "1.5K"), (10138, "9.9K"), (10190, "10K"),
     (1023 << 10, "1023K"), ((1 << 20) - 1, "1.0M"), (3 << 29, "1.5G"), (1 << 50, "1.0P"), (1 << 63, "8.0E"),
     (0.7, "0")],
)  # fmt: skip
def test_short_sizes(number, text):
    assert short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (0, "0.0s"), (0.99, "0.9s"), (59.99, "59.9s"), (60, "1m00s"), (3599, "59m59s"), (3600, "1h00m"),
     (86399, "23h59m"), (86400, "1d00h"), (364.99 * 86400, "364d23h")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(None if seconds is None else int(seconds * 10**9)) == text


def test_what_others_wrote_cannot_reach_the_terminal():
    assert clean("ab\x1b[2Jc\nd\x9be\u202e é") == "ab?[2Jc?d?e? é"


def test_children_stand_below_their_parents_and_siblings_are_sorted():
    jobs = [
        job("b"),
        job("b2", parent="b"),
        job("b1", parent="b"),
        job("a"),
        job("b11", parent="b1"),
        job("o", parent="x"),
    ]
    by_id = [(depth, each.id) for depth, each in tree(jobs, key=lambda each: each.id)]
    assert by_id == [(0, "a"), (0, "b"), (1, "b1"), (2, "b11"), (1, "b2"), (0, "o")]
    backwards = [each.id for _, each in tree(jobs, key=lambda each: each.id, reverse=True)]
    assert backwards == ["o", "b", "b2", "b1", "b11", "a"]


COLUMNS = (Column("NAME", right=False), Column("SIZE"), Column("WHY", spare=1, right=False))
ROWS = [["a-rather-long-name", "1", "because"], ["b", "22", ""]]


def test_a_pipe_gets_everything():
    assert plain(COLUMNS, ROWS) == [
        "NAME                SIZE  WHY",
        "a-rather-long-name     1  because",
        "b                     22",
    ]


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (33, ["NAME                SIZE  WHY    ", "a-rather-long-name     1  because"]),
        (32, ["NAME               SIZE WHY    ", "a-rather-long-name    1 because"]),
        (27, ["NAME           SIZE WHY    ", "a-rather-long~    1 because"]),
        (24, ["NAME               SIZE", "a-rather-long-name    1"]),
        (17, ["NAME         SIZE", "a-rather-lo~    1"]),
        (5, ["NAME         SIZE", "a-rather-lo~    1"]),
    ],
)
def test_a_narrow_terminal_costs_gaps_then_the_names_end_then_columns(width, lines):
    shown = ["".join(cells) for cells in fit(COLUMNS, ROWS, width)[1]]
    assert shown[:2] == lines


def test_every_width_from_forty_on_is_kept():
    rows = [ps.row(0, job("12345[3].server.example.org", totals=TOTALS, network="parent", wall_ns=10**16))]
    for width in range(40, 200):
        assert all(len("".join(cells)) <= width for cells in fit(ps.COLUMNS, rows, width)[1])
    line = Line(job("12345[3].server.example.org", totals=TOTALS), amounts(job(), lambda _: False), Rates(1, 2, 3, 4))
    for width in range(40, 200):
        assert all(len("".join(cells)) <= width for cells in fit(top.COLUMNS, [top.row(0, line)], width)[1])


TOTALS = {
    "cpu_user": {"": 4 * 10**9},
    "cpu_system": {"": 10**9},
    "memory_resident": {"": 3 * GB},
    "network": {"OutgoingInternal": 10, "OutgoingExternal": 5, "IncomingExternal": 7},
    "block_read": {"8:0": 100, "7:0": 40},
    "block_write": {"8:0": 1000},
}


def test_amounts_come_from_totals_and_stacked_devices_count_once():
    assert amounts(job(totals=TOTALS), lambda device: device == "7:0") == Amounts(5 * 10**9, 3 * GB, 7, 15, 1100)


def test_what_is_not_counted_is_unknown_and_blank():
    assert amounts(job(), lambda _: False) == Amounts(None, None, None, None, None)
    assert amounts(job(totals={"network": {}, "block_read": {}}), lambda _: False) == Amounts(None, None, 0, 0, 0)
    cells = dict(zip((column.title for column in ps.COLUMNS), ps.row(1, job("f", pids=[4, 5])), strict=True))
    assert (cells["JOB"], cells["PROCS"], cells["CPU"], cells["MEMORY"], cells["IN"], cells["OUT"]) == (
        *("  f", "2"),
        *("", "", "", ""),
    )


def used(cpu=0, received=0, sent=0, io=0):
    return Amounts(cpu, 0, received, sent, io)


def test_rates_are_the_difference_of_two_readings():
    clock = Clocked()
    assert clock.rates([(job("a"), used())], 100.0) == {"a": Rates()}
    found = clock.rates([(job("a"), used(10**9, 100, 200, 300)), (job("b"), used(5))], 102.0)
    assert found == {"a": Rates(0.5, 50.0, 100.0, 150.0), "b": Rates()}


def test_an_id_used_again_is_another_job():
    clock = Clocked()
    clock.rates([(job("a", started=1.0), used(5 * 10**9))], 1.0)
    assert clock.rates([(job("a", started=2.0), used(10**9))], 2.0) == {"a": Rates()}


def test_a_total_that_fell_or_is_unknown_has_no_rate():
    clock = Clocked()
    clock.rates([(job(), Amounts(5, 1, None, 9, 9))], 1.0)
    assert clock.rates([(job(), Amounts(4, 1, 7, None, 9))], 2.0) == {"j": Rates(None, None, None, 0.0)}
    assert clock.rates([(job(), Amounts(8, 1, 7, 7, 9))], 2.0) == {"j": Rates()}, "no time has passed"


@pytest.mark.parametrize(
    ("by", "reverse", "order"),
    [("cpu", False, "abc"), ("cpu", True, "cba"), ("memory", False, "bca"), ("network", False, "cab"),
     ("io", False, "bac"), ("id", False, "abc"), ("id", True, "cba")],
)  # fmt: skip
def test_the_most_comes_first(by, reverse, order):
    lines = [
        Line(job("b"), Amounts(0, 9, 0, 0, 0), Rates(1.0, 0.0, 1.0, 9.0)),
        Line(job("a"), Amounts(0, None, 0, 0, 0), Rates(2.0, 2.0, 2.0, 1.0)),
        Line(job("c"), Amounts(0, 5, 0, 0, 0), Rates(None, 9.0, 0.0, None)),
    ]
    assert "".join(line.job.id for _, line in Order(by, reverse).sorted(lines)) == order


@pytest.mark.parametrize(
    ("value", "full", "text"),
    [(None, 4, ""), (1, None, ""), (0, 4, "[      ]"), (2, 4, "[|||   ]"), (4, 4, "[||||||]"), (9, 4, "[||||||]"),
     (1, 0, "")],
)  # fmt: skip
def test_bars(value, full, text):
    assert bar(value, full) == text


def test_the_bars_are_full_at_the_jobs_own_limits():
    limited = Line(job(limits={"cpus": 2.0, "memory": 1000}), Amounts(0, 500, 0, 0, 0), Rates(1.0, 0, 0, 0))
    assert [cell for cell in top.row(0, limited) if cell.startswith("[")] == ["[|||   ]", "[|||   ]"]


def test_the_heading_counts_a_family_once():
    board = Board(Order())
    family = [job("p", totals=TOTALS), job("c", parent="p", totals=TOTALS), job("lone", parent="gone", totals=TOTALS)]
    board.take(family, 1.0)
    more = {**TOTALS, "cpu_user": {"": 6 * 10**9}}
    board.take([job(each.id, parent=each.parent, totals=more) for each in family], 2.0)
    assert board.heading().startswith("3 jobs  4.0 of ")
    assert " cores  6.0G of " in board.heading()
