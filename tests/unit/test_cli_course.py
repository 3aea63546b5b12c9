"""How a job went, out of its kept points: what is said, what is drawn, and what is left out."""

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from acctd.cli import course, show
from acctd.history import FILE as SAMPLES
from acctd.history import History
from acctd.ledger import FILE as LEDGER
from acctd.ledger import Ledger
from acctd.points import Point
from tests.unit.test_apel import record as made
from tests.unit.test_ledger import SPEC, open_job

SECOND = 10**9
MIB = 2**20
NOTHING = Point(0, 0, 0, 0, 0, 0, None, 0, 0, 0, 0, 0, 0, 0, 0)


def point(at: int, **values: object) -> Point:
    given = {name: getattr(NOTHING, name) for name in Point.__struct_fields__}
    return Point(**{**given, "at": at * SECOND, **values})


KEPT = [
    point(10, memory_anon=2 * MIB, memory_file=MIB, cpu_user=5 * SECOND, network={"OutgoingExternal": 10240}),
    point(20, memory_anon=8 * MIB, cpu_user=20 * SECOND, cpu_system=5 * SECOND, network={"OutgoingExternal": 10240}),
]
NOW = point(40, memory_shmem=4 * MIB, cpu_user=20 * SECOND, cpu_system=5 * SECOND, network={"OutgoingExternal": 10240})
END = point(40, cpu_user=20 * SECOND, cpu_system=5 * SECOND, network={"OutgoingExternal": 10240})


def test_a_living_job() -> None:
    assert course.plots(KEPT, NOW, 57, colour=False).splitlines() == [
        "  in the course of 40.0s",
        "    memory      min  2.0M  max  8.0M  now  4.0M  ▁▃▃████▅",
        "    cores       min  0.00  max  2.00  now  0.00  ▃▃██▁▁▁▁",
        "    sent/s      min     0  max  1.0K  now     0  ██▁▁▁▁▁▁",
    ]


def test_a_job_that_has_ended() -> None:
    """Its last memory is what it was before the end, at which it has none."""
    assert course.plots([*KEPT, END], None, 58, colour=False).splitlines() == [
        "  in the course of 40.0s",
        "    memory      min  2.0M  max  8.0M  last  8.0M  ▁▃▃█████",
        "    cores       min  0.00  max  2.00  last  0.00  ▃▃██▁▁▁▁",
        "    sent/s      min     0  max  1.0K  last     0  ██▁▁▁▁▁▁",
    ]


def test_every_kind_has_its_line() -> None:
    last = point(
        20,
        memory_anon=1,
        cpu_system=SECOND,
        block_read=20,
        block_write=4096,
        network={"IncomingA": 20480, "IncomingB": 0},
    )
    lines = course.plots([point(5), point(10)], last, 80, colour=False).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["memory", "cores", "received/s", "read/s", "written/s"]
    assert [line.split()[6] for line in lines[1:]] == ["1", "0.10", "2.0K", "2", "409"]


@pytest.mark.parametrize("width", [1, 20, 40, 56, 57, 80, 200])
def test_words_are_whole_and_plots_fit_the_width(width: int) -> None:
    lines = course.plots(KEPT, NOW, width, colour=False).splitlines()
    assert all(
        line.startswith(whole)
        for line, whole in zip(lines[1:], ("    memory ", "    cores ", "    sent/s "), strict=True)
    )
    plotted = [line.rpartition("  ")[2] for line in lines[1:]]
    if width < 57:
        assert all(line.isascii() for line in lines)
    else:
        assert {len(plot) for plot in plotted} == {min(60, width - 49)}
        assert max(map(len, lines)) <= width


def test_colours_are_round_the_plots_only() -> None:
    coloured = course.plots(KEPT, NOW, 57, colour=True)
    assert "now  4.0M  \x1b[32m▁▃▃████▅\x1b[0m\n" in coloured
    assert coloured.replace("\x1b[32m", "").replace("\x1b[0m", "") == course.plots(KEPT, NOW, 57, colour=False)


def test_too_little_to_plot() -> None:
    assert course.plots([], NOW, 80, colour=False) == ""
    assert course.plots(KEPT[:1], None, 80, colour=False) == ""
    assert course.plots(KEPT[:1], KEPT[0], 80, colour=False) == ""
    assert course.plots([point(1), point(2)], point(3), 80, colour=False) == ""  # never used anything


def test_a_reading_older_than_the_last_sample_adds_nothing() -> None:
    assert course.plots(KEPT, point(15, memory_anon=1), 57, colour=False) == course.plots(
        KEPT, KEPT[-1], 57, colour=False
    )


def test_samples_that_cannot_be_read_hide_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(show, "say", said.append)
    monkeypatch.setattr(show, "_drawn", lambda: True)
    (tmp_path / "acctd.toml").write_text(f'state_dir = "{tmp_path}"\n')
    with Ledger(tmp_path / LEDGER) as book:
        row = open_job(book, replace(SPEC, id="42"))
        book.sign_off(row.seq, made(id="42"))
    with closing(History(tmp_path / SAMPLES)):
        pass
    with closing(sqlite3.connect(tmp_path / SAMPLES)) as newer:
        newer.execute("PRAGMA user_version = 9")
    arguments = ["42", "--config", str(tmp_path / "acctd.toml"), "--socket", str(tmp_path / "none.socket")]
    done = CliRunner().invoke(show.command, arguments)
    assert done.exit_code == 0 and "job 42" in done.output, (done.output, done.exception)
    assert "schema 9" in said[0]
