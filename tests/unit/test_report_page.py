"""Pages: whole, harmless whatever a job is called, small whatever it did, and readable in both colours."""

import re
from collections import Counter
from dataclasses import replace
from datetime import date
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pytest

from acctd.model import Limits, Midnight, Record
from acctd.points import Point, last_point
from acctd.report import page, period
from acctd.report.job import job_page
from acctd.report.markup import Html, join, tag
from acctd.report.sums import TOP, Ended, Sums, decode
from tests.unit.reporting import GIB, HARM, STARTED, bill, points, record, subject

UTC = ZoneInfo("UTC")
VOID = {"meta", "link"}


class Reader(HTMLParser):
    """Elements as they nest, attributes and texts; complains about what does not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def values(self, name: str) -> list[str | None]:
        return [value for _, attribute, value in self.attributes if attribute == name]

    def of(self, element: str) -> list[str]:
        return [text for inside, text in self.texts if inside == element]


def test_text_is_escaped_and_markup_is_not() -> None:
    assert tag("p", "a < b & 'c'", class_='x"y') == '<p class="x&quot;y">a &lt; b &amp; &#x27;c&#x27;</p>'
    assert tag("p", tag("b", "x"), None, ["y", [Html("<i>z</i>")]]) == "<p><b>x</b>y<i>z</i></p>"
    assert tag("a", hidden=True, title=None, disabled=False, aria_label="l") == '<a hidden aria-label="l"></a>'
    assert tag("meta", name="n") == '<meta name="n">'
    assert join("\x1b[31m\u202eevil\0") == "?[31m?evil?", "nothing that turns or hides what is read"
    assert isinstance(join("x"), Html)


def test_a_column_in_which_there_is_nothing_is_left_out() -> None:
    columns = [page.Column(name) for name in ("What", "Share", "Tier", "Amount")]
    shown = Reader(page.table("T", columns, [["a", None, "", "1"], ["b", None, "x", "2"]], foot=[["", "", "", "3"]]))
    assert [text for element, text in shown.texts if element in ("th", "td")] == [
        *("What", "Tier", "Amount", "a", "1", "b", "x", "2", "3")
    ]
    assert shown.tags["td"] == 6


def test_a_jobs_words_are_words() -> None:
    harmful = record(
        id="a.b", owner=HARM, node=HARM, tags={"Project": HARM, "account": HARM}, notes=(HARM,), exit_code=3,
        totals={"network": {f"Outgoing{HARM}": 5}, "nfs_read": {HARM: 7}, "block_read": {HARM: 9}},
    )  # fmt: skip
    shown = Reader(job_page(subject(record=harmful, points=[], looked=HARM)))
    assert not shown.tags["script"] + shown.tags["img"]
    assert not [name for _, name, _ in shown.attributes if name.startswith("on")]
    plain = HARM.replace("\x1b", "?").replace("\u202e", "?").replace("\0", "?")
    assert sum(plain in text for _, text in shown.texts) >= 7


@pytest.mark.parametrize("priced", [True, False])
def test_a_page_is_one_file_that_asks_for_nothing(priced: bool) -> None:
    text = job_page(subject(bill=bill() if priced else None))
    shown = Reader(text)
    assert "default-src 'none'" in text
    assert {tag for tag, name, _ in shown.attributes if name in ("src", "href")} == {"a", "link"}
    assert all(value is None or value.startswith(("#", "data:,")) for value in shown.values("href"))
    outside = re.findall(r"https?://[^\s\"'<]*|@import|url\((?!#)", text)
    assert outside == []
    assert ("The bill" in shown.of("h2")) is priced


def test_a_page_has_an_order() -> None:
    shown = Reader(job_page(subject()))
    assert shown.values("lang") == ["en"]
    assert (
        shown.tags["h1"] == shown.tags["main"] == shown.tags["header"] == shown.tags["footer"] == shown.tags["nav"] == 1
    )
    ids = shown.values("id")
    assert len(ids) == len(set(ids))
    named = {value for _, name, value in shown.attributes if name in ("aria-labelledby", "aria-describedby")}
    assert named <= set(ids)
    links = {value.removeprefix("#") for value in shown.values("href") if value and value.startswith("#")}
    assert links <= set(ids)
    assert shown.tags["caption"] == shown.tags["table"]
    assert shown.values("scope").count("col") + shown.values("scope").count("row") == shown.tags["th"]
    assert shown.tags["desc"] == len([value for value in shown.values("role") if value == "img"]) >= 6


def test_what_a_job_report_says() -> None:
    shown = Reader(job_page(subject()))
    assert shown.of("h1") == ["Job 4711.0"]
    assert shown.of("h2") == [
        *("The job", "In short", "Asked for and used", "When memory ran out", "Memory", "CPU", "Network, outgoing"),
        *("Network, incoming", "Disks", "What it used most", "The bill"),
    ]
    words = " ".join(text for _, text in shown.texts)
    for expected in (
        "Of alice on wn042.example: done, exit 0, 3 h 20 min.",
        "Ask for 2 GiB next time",
        "Part of it waited for disks during 30 %",
        "a family inside it reached its own limit",
        "4711.0-step",
        "python3",
        "253:0 (counted below it too)",
        "53.333333333",
        "0.39",
        "Memory without page cache",
        "From the record that was signed off on wn042.example",
    ):
        assert expected in words


def test_a_living_job_is_told_as_such() -> None:
    words = job_page(subject(record=record(state="running", exit_code=None)))
    assert "still running" in words
    assert "nobody has signed them" in words
    assert "Ended</dt>" not in words
    assert "Ask for 2 GiB" not in words, "it may still need what it asked for"


def test_a_job_shorter_than_a_reading_has_a_page() -> None:
    short = Record(
        id="5ms", owner="a", uid=1, node="n", state="done", started=STARTED, ended=STARTED, wall_ns=5 * 10**6,
        exit_code=0, exit_signal=None, network="none", limits=Limits(), tags={}, totals={},
    )  # fmt: skip
    words = job_page(subject(record=short, points=[], bill=None))
    assert "too short for readings in between" in words
    assert "too short for advice" in words
    assert '<svg class="plot"' not in words
    assert "done, exit 0, 0 s." in job_page(subject(record=replace(short, wall_ns=0), points=[], bill=None))


def test_a_job_without_a_memory_limit_has_its_plots() -> None:
    free = record(limits=Limits(), shortages=())
    shown = Reader(job_page(subject(record=free, points=points(free), bill=None)))
    assert "Memory by kind" in shown.of("title")
    assert not [text for text in shown.of("text") if text.startswith("limit")]


def test_a_limit_that_no_plot_reaches_is_told_in_words() -> None:
    near, far = record(shortages=()), record(limits=Limits(memory=1000 * GIB), shortages=())
    said = "lies far above what is drawn"
    assert said not in job_page(subject(record=near, points=points(near), bill=None))
    assert f"The limit, 1000 GiB, {said}" in job_page(subject(record=far, points=points(far), bill=None))


def memory_of(of: Record, drawn: list[Point]) -> str:
    text = job_page(subject(record=of, points=drawn))
    return text[text.index('id="memory"') : text.index('id="cpu"')]


def test_the_end_of_a_job_is_no_reading_of_its_memory() -> None:
    ended, alive = record(), record(state="running", exit_code=None)
    inner = points(ended, 10)
    assert memory_of(ended, [*inner, last_point(ended)]) == memory_of(ended, inner), "it does not fall to nothing"
    assert memory_of(alive, [*inner, last_point(alive)]) != memory_of(alive, inner), "of a living one it is a reading"


def test_memory_runs_out_while_a_job_lasts() -> None:
    """The clock of a shortage and that of the job begin at different moments."""
    of = record(seconds=60)
    late = replace(of.shortages[0], time=of.started + 60.6)
    early = replace(of.shortages[1], time=of.started - 1)
    text = job_page(subject(record=replace(of, shortages=(early, late))))
    assert Reader(text).of("h3") == ["Shortage 1, at the start", "Shortage 2, at the end"]


def test_no_number_has_an_exponent_and_sizes_have_one_unit() -> None:
    of = record(limits=Limits(memory=GIB, cpus=1.0))
    small = {"cpu_user": {"": 5 * 10**8}, "cpu_system": {"": 0}, "cpu_reserved": {"": of.wall_ns}}
    large = {"cpu_user": {"": 1234 * of.wall_ns}, "cpu_system": {"": 0}}
    short = replace(
        of.shortages[0], text="Job 4711.0 went over its memory limit of 100 MB (in use 100 MB: 99 MB heap)."
    )
    for totals in (small, large):
        each = replace(of, totals=of.totals | totals, shortages=(short,), notes=("It went over 1 MB.",))
        words = " ".join(
            text for tag, text in Reader(job_page(subject(record=each, bill=None))).texts if tag != "style"
        )
        assert re.findall(r"\b\d[\d.]*e[-+]\d+", words) == []
        assert "Asked for: 1 core." in words
        assert "limit of 100 MiB (in use 100 MiB: 99 MiB heap)" in words
        assert "It went over 1 MiB." in words


def test_why_there_are_no_plots_is_told() -> None:
    assert "Samples are root" in job_page(subject(points=[], why_no_points="Samples are root's."))


def test_a_month_with_a_reading_each_minute_is_a_small_page() -> None:
    month = record(seconds=31 * 86400)
    text = job_page(subject(record=month, points=points(month, 44_640)))
    assert len(text.encode()) < 160_000


def colours(scheme: str) -> dict[str, tuple[int, ...]]:
    light, dark = re.findall(r":root \{(.*?)\}", Path(page.__file__).with_name("style.css").read_text(), re.DOTALL)
    found = dict(re.findall(r"--(\w+): #(\w{6})", {"light": light, "dark": dark}[scheme]))
    return {name: tuple(bytes.fromhex(value)) for name, value in found.items()}


def contrast(one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio"""

    def luminance(colour: tuple[int, ...]) -> float:
        linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read(scheme: str) -> None:
    found = colours(scheme)
    for text in ("fg", "muted", "link", "problem", "advice", "note", "good"):
        for ground in ("bg", "raised"):
            assert contrast(found[text], found[ground]) >= 4.5, f"{text} on {ground}"
    for style in range(page.STYLES):
        assert contrast(found[f"c{style}"], found["bg"]) >= 3, f"band {style}"
        assert contrast(found["on"], found[f"c{style}"]) >= 4.5, f"the name in band {style}"


# Reports of many jobs

DAY = 86400.0


def ended(number: int, **changes: Any) -> Ended:
    known: dict[str, Any] = {
        "id": f"j{number}", "owner": "alice", "uid": 1, "node": "n", "state": "done", "exit_code": 0,
        "started": 0.0, "wall_ns": 3600 * 10**9, "limits": Limits(memory=GIB, cpus=2.0),
        "totals": {
            "cpu_user": {"": 3600 * 10**9}, "cpu_system": {"": 0}, "cpu_reserved": {"": 7200 * 10**9},
            "memory_resident_time": {"": 1 << 20}, "memory_reserved_time": {"": 4 << 20},
            "memory_resident_peak": {"": 100 << 20}, "block_read": {"8:0": 10, "253:0": 10},
            "network": {"OutgoingExternal": 1000, "IncomingExternal": 5},
        },
        "stacked": ("253:0",),
    }  # fmt: skip
    return decode(msgspec.json.encode(known | changes))


def test_of_many_jobs_cores_and_needs_are_reckoned_as_of_one() -> None:
    own = ended(1, cpus="0-3", limits=Limits(cpus=2.0))
    peaks = {name: {"": 600 << 20} for name in ("memory_resident_peak", "memory_kernel_peak")}
    sums = summed([own, ended(2, totals=peaks | {"memory_peak": {"": 500 << 20}})])
    assert {top.id: top.cores for top in sums.top()} == {"j1": 4.0, "j2": 2.0}
    assert (sums.asked_memory, sums.wasted_memory) == (1, 1)
    several = [ended(1), ended(2, parent="j1"), ended(3, shortages=[{}])]
    words = period.period_page(period.Subject(title="T", sums=summed(several)))
    for expected in ("needed by 2 of 2 jobs of 30 s", "1 family inside them", "<dd>1 job</dd>"):
        assert expected in words
    brief = summed([ended(n, wall_ns=10**9, started=30.0 - n) for n in (2, 10, 9)])
    assert (brief.asked_memory, brief.wasted_memory) == (0, 0), "they are too short for advice on memory"
    assert [top.id for top in brief.top()] == ["j10", "j9", "j2"], "those that used as much by their start"


def summed(jobs: list[Ended], since: float = 0.0, until: float = 30 * DAY, zone: ZoneInfo = UTC) -> Sums:
    sums = Sums(since, until, zone)
    for job in jobs:
        sums.add(job)
    return sums


def test_a_record_is_read_as_it_was_signed() -> None:
    read = decode(msgspec.json.encode(record()))
    assert (read.id, read.ending, len(read.shortages), read.limits.memory) == ("4711.0", "done", 2, 16 * GIB)


def test_sums_of_jobs() -> None:
    sums = summed([ended(1), ended(2, owner="bob", exit_code=1), ended(3, parent="j1"), ended(4, started=40 * DAY)])
    assert (sums.all.jobs, sums.families) == (2, 1)
    assert sums.all.cpu == 7200 * 10**9
    assert sums.all.block_read == 20, "what lies on another device is counted there"
    assert sums.all.network == {"OutgoingExternal": 2000, "IncomingExternal": 10}
    assert sums.endings == {"done": 1, "failed": 1}
    assert (sums.asked_memory, sums.wasted_memory) == (1, 1), "of the one that ended well"
    assert {owner: each.jobs for owner, each in sums.owners.items()} == {"alice": 1, "bob": 1}
    assert [top.id for top in sums.top()] == ["j1", "j2"]


def test_a_job_over_midnight_is_in_both_days_and_a_period_takes_its_part() -> None:
    over = ended(1, started=DAY - 900)
    sums = summed([over])
    assert {day: each.cpu // 10**9 for day, each in sums.days.items()} == {
        date(1970, 1, 1): 900,
        date(1970, 1, 2): 2700,
    }
    assert [each.jobs for each in sums.days.values()] == [1, 0]
    part = summed([over], since=DAY)
    assert (part.all.cpu // 10**9, part.all.jobs, list(part.days)) == (2700, 1, [date(1970, 1, 2)])
    assert part.days[date(1970, 1, 2)].jobs == 1
    seen = (Midnight(900 * 10**9, {"cpu_user": {"": 3000 * 10**9}}),)
    assert summed([ended(1, started=DAY - 900, midnights=seen)], since=DAY).all.cpu == 600 * 10**9
    west = summed([over], zone=ZoneInfo("America/New_York"))
    assert list(west.days) == [date(1970, 1, 1)]


@pytest.mark.parametrize(("since", "until", "jobs"), [(0, 10, 1), (3600, 7200, 0), (3599, 7200, 1), (-10, 0, 0)])
def test_only_jobs_that_were_in_the_period_count(since: float, until: float, jobs: int) -> None:
    assert summed([ended(1)], since, until).all.jobs == jobs


def test_parts_of_periods_sum_to_the_whole() -> None:
    jobs = [ended(n, started=n * 5000.5, wall_ns=(n + 1) * 7777 * 10**9) for n in range(30)]
    cuts = [0.0, 12345.0, DAY, 3.3 * DAY, 30 * DAY]
    parts = [summed(jobs, since, until).all for since, until in pairwise(cuts)]
    whole = summed(jobs).all
    assert sum(part.cpu for part in parts) == whole.cpu
    assert sum((Counter(part.network) for part in parts), Counter()) == whole.network


def test_a_report_of_many_jobs_is_bounded() -> None:
    jobs = [
        ended(n, owner=f"u{n % 500}", started=n * 60.0, totals={"cpu_user": {"": n}, "cpu_system": {"": 0},
              "network": {f"OutgoingC{n % 20}": 1}})
        for n in range(3000)
    ]  # fmt: skip
    sums = summed(jobs)
    assert [top.cpu for top in sums.top()] == list(range(2999, 2999 - TOP, -1))
    text = period.period_page(period.Subject(title="Jobs of this node", sums=sums, bill=bill(), owners=True))
    shown = Reader(text)
    assert "By CPU time in the period; 2,900 smaller ones are in the sums" in shown.of("caption")
    assert "By CPU time; 400 more owners are in the sums" in shown.of("caption")
    assert any("15 other classes" in text for text in shown.of("li"))
    assert len(text) < 200_000


def test_a_long_period_is_shown_by_month_and_a_short_one_with_its_idle_days() -> None:
    long = summed([ended(n, started=n * 40 * DAY) for n in range(20)], until=1000 * DAY)
    words = period.period_page(period.Subject(title="Jobs of alice", sums=long))
    assert "CPU by month" in words
    short = summed([ended(1, started=3 * DAY)])
    words = period.period_page(period.Subject(title="Jobs of alice", sums=short))
    assert "CPU by day" in words
    assert ">1970-01-01</th>" in words
    assert "By owner" not in words


def test_a_period_without_jobs_says_so() -> None:
    words = period.period_page(period.Subject(title="Jobs of nobody", sums=summed([]), looked="0 records"))
    assert "No job had any of its time in this period." in words
    Reader(words)
