"""Reports as a person gets them: in Chromium, wide and narrow, light and dark, on paper, by keyboard and by ear."""

import re
from collections.abc import Callable
from datetime import UTC
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest

from acctd.report import period
from acctd.report.job import job_page
from tests.browser.conftest import Shown
from tests.unit.reporting import bill, points, record, subject
from tests.unit.test_report_page import ended, summed

Show = Callable[..., Shown]


def a_job() -> str:
    return job_page(subject())


def many_jobs() -> str:
    jobs = [ended(n, id=f"4711.{n}", owner=f"person{n % 7}", started=n * 7200.0) for n in range(150)]
    jobs.append(ended(1, id="short", totals={"cpu_user": {"": 2_000_000}, "cpu_system": {"": 0}}))
    sums = summed(jobs, zone=ZoneInfo("Europe/Berlin"))
    return period.period_page(period.Subject(title="Jobs of this node", sums=sums, bill=bill(), owners=True))


PAGES = {"a job": a_job, "many jobs": many_jobs}


@pytest.fixture(params=PAGES)
def text(request: pytest.FixtureRequest) -> str:
    return PAGES[request.param]()


def boxes(shown: Shown, selector: str) -> list[tuple[float, float, float, float]]:
    """Left, top, right and bottom of what is drawn there."""
    found = shown.run(
        "s => [...document.querySelectorAll(s)].map(e => { const b = e.getBoundingClientRect();"
        " return [b.left, b.top, b.right, b.bottom] })",
        selector,
    )
    return [tuple(box) for box in found]


def test_it_asks_for_nothing_and_says_nothing(show: Show, text: str) -> None:
    shown = show(text)
    shown.page.mouse.wheel(0, 10_000)
    for summary in shown.page.locator("summary").all():
        summary.click()
    assert shown.requests == [shown.url]
    assert shown.said == []


def test_its_policy_lets_nothing_in_even_if_it_were_there(show: Show) -> None:
    stranger = (
        "<img src='file:///x.png'><script>document.title = 'taken'</script><link rel=stylesheet href='file:///y.css'>"
    )
    shown = show(a_job().replace("<main ", f"{stranger}<main "))
    assert shown.page.title() == "Job 4711.0 - acctd report"
    assert sorted(set(shown.requests) - {shown.url}) == sorted(shown.refused) == ["file:///x.png", "file:///y.css"]
    assert len(shown.said) == 3, "the browser says what it refused, the script too"


@pytest.mark.parametrize("width", [320, 1280])
def test_plots_are_drawn(show: Show, text: str, width: int) -> None:
    shown = show(text, width=width)
    frames = boxes(shown, "svg.plot")
    assert len(frames) >= 3
    for left, top, right, bottom in frames:
        assert right - left > 0.75 * width or right - left > 700
        assert bottom - top > 150
    drawn = shown.run(
        "() => [...document.querySelectorAll('svg.plot')].map(svg => { const frame = svg.querySelector('.drawing');"
        " const f = frame.getBoundingClientRect(); return [...frame.querySelectorAll('path')].map(path => {"
        " const b = path.getBoundingClientRect(); return [b.width, b.height, f.left - b.left, b.right - f.right,"
        " f.top - b.top, b.bottom - f.bottom, getComputedStyle(path).fill, getComputedStyle(path).stroke] }) })"
    )
    for paths in drawn:
        assert paths
        assert max(path[0] * path[1] for path in paths) > 100, "an area"
        for *_, fill, stroke in paths:
            assert fill != "none" or stroke != "none"
        assert all(beyond < 3 for path in paths for beyond in path[2:6]), "inside its frame, but for half a line"


def test_colours_and_patterns_are_there(show: Show) -> None:
    """What a pattern paints is seen in the picture alone."""
    shown = show(a_job())
    fills = shown.run("() => [...document.querySelectorAll('.drawing path')].map(p => getComputedStyle(p).fill)")
    assert {fill for fill in fills if fill != "none"} == {f'url("#p{n}")' for n in (0, 1, 2, 5)}
    used = shown.run("() => [0, 1, 2, 3, 4, 5].map(n => getComputedStyle(document.querySelector(`#p${n} rect`)).fill)")
    assert len(set(used)) == 6
    swatch = shown.page.locator("#memory .swatch").first  # of page cache
    with_lines = swatch.screenshot()
    shown.run("() => document.querySelectorAll('#p5 path').forEach(line => line.remove())")
    without = swatch.screenshot()
    assert with_lines != without
    shown.run("() => document.querySelector('#p5').remove()")
    assert swatch.screenshot() != without, "and a colour"


@pytest.mark.parametrize("width", [320, 768, 1280])
def test_nothing_is_wider_than_the_window(show: Show, text: str, width: int) -> None:
    shown = show(text, width=width)
    for summary in shown.page.locator("summary").all():
        summary.click()
    assert shown.run("() => document.documentElement.scrollWidth") == width
    wide = shown.run(
        "w => [...document.querySelectorAll('main *, header *, footer *')].filter(e => !e.closest('.scroll') &&"
        " e.getBoundingClientRect().right > w + 1).map(e => e.outerHTML.slice(0, 200))",
        width,
    )
    assert wide == []


@pytest.mark.parametrize("width", [320, 1280])
def test_words_on_plots_stand_inside_and_ticks_apart(show: Show, text: str, width: int) -> None:
    shown = show(text, width=width)
    words = shown.run(
        "() => [...document.querySelectorAll('svg.plot')].map(svg => [...svg.querySelectorAll('text')].filter(t =>"
        " getComputedStyle(t).display !== 'none').map(t => { const b = t.getBoundingClientRect(); return"
        " [t.textContent, b.left, b.top, b.right, b.bottom, !!t.closest('.axis')] }))"
    )
    for plot in words:
        axis = []
        for name, left, top, right, bottom, is_axis in plot:
            assert left >= 0, name
            assert right <= width, name
            if is_axis:
                axis.append((left, top, right, bottom, name))
        for number, one in enumerate(axis):
            for other in axis[number + 1 :]:
                apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] + 4 or other[3] <= one[1] + 4
                assert apart, f"{one[4]!r} and {other[4]!r} touch"


def test_a_screen_reader_finds_its_way(show: Show) -> None:
    shown = show(a_job())
    tree = shown.page.locator("body").aria_snapshot()
    for part in (
        "- banner:",
        "- main:",
        "- contentinfo:",
        '- navigation "Sections":',
        '- heading "Job 4711.0" [level=1]',
    ):
        assert part in tree
    levels = [int(level) for level in re.findall(r"\[level=(\d)\]", tree)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels)), "none is left out"
    pictures = re.findall(r'- img "([^"]+)"', tree)
    assert pictures == [
        *("Memory by kind", "Memory without page cache", "CPU in cores", "Network, outgoing, bytes per second"),
        *("Network, incoming, bytes per second", "Disks, bytes per second"),
    ]
    assert "- img:" not in tree, "a picture without a name"
    assert 'region "The largest processes at that moment"' in tree
    assert 'columnheader "Resident"' in tree
    assert 'rowheader "python3"' in tree


def test_a_plot_is_described_and_its_numbers_can_be_opened(show: Show) -> None:
    shown = show(a_job())
    picture = shown.page.get_by_role("img", name="Memory by kind")
    described = shown.run(
        "e => document.getElementById(e.getAttribute('aria-describedby')).textContent", picture.element_handle()
    )
    assert "anonymous 1.2 GiB" in described
    assert "The limit was 16 GiB." in described
    rows = shown.page.locator("#memory tbody tr")
    assert not rows.first.is_visible()
    shown.page.get_by_text("Memory by kind as a table").click()
    assert rows.first.is_visible()
    assert rows.count() == 24


def test_the_keyboard_reaches_everything_in_order(show: Show) -> None:
    shown = show(a_job())
    script = (
        "() => { const e = document.activeElement;"
        " return [e.tagName, e.textContent, e.getBoundingClientRect().top + scrollY] }"
    )
    shown.page.keyboard.press("Tab")
    assert shown.run(script)[:2] == ["A", "Skip to the report"]
    assert boxes(shown, ".skip")[0][0] >= 0, "it is seen while it has the focus"
    shown.page.keyboard.press("Enter")
    assert shown.run("() => document.activeElement.id") == "report"
    seen = []
    for _ in range(100):
        shown.page.keyboard.press("Tab")
        if shown.run("() => document.activeElement === document.body"):
            break
        seen.append(shown.run(script))
    assert [name for name, *_ in seen].count("SUMMARY") == 5
    tops = [top for *_, top in seen]
    assert tops == sorted(tops)
    first = shown.page.locator("summary").first
    first.focus()
    shown.page.keyboard.press("Enter")
    assert shown.page.locator("details").first.get_attribute("open") is not None
    assert shown.run("() => getComputedStyle(document.activeElement).outlineStyle") != "none"


def test_no_table_scrolls_on_a_wide_screen(show: Show, text: str) -> None:
    shown = show(text, width=1200)
    hidden = shown.run("() => [...document.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth)")
    assert max(hidden) == 0


def test_links_lead_to_sections(show: Show, text: str) -> None:
    shown = show(text)
    for link in shown.page.locator("nav a").all():
        target = link.get_attribute("href")
        link.click()
        assert 0 <= shown.page.locator(f"{target} h2").bounding_box()["y"] < 900  # type: ignore[index]  # it is there


@pytest.mark.parametrize(("scheme", "ground", "writing"), [("light", 255, 27), ("dark", 20, 230)])
def test_it_is_light_or_dark_as_is_wished(show: Show, scheme: str, ground: int, writing: int) -> None:
    shown = show(a_job(), color_scheme=scheme)
    found = shown.run(
        "() => { const s = getComputedStyle(document.body); return [s.backgroundColor, s.color,"
        " getComputedStyle(document.querySelector('.plot .levels text')).fill] }"
    )
    assert [int(re.findall(r"\d+", colour)[0]) for colour in found] == [ground, writing, writing]


def test_paper_is_light_has_no_links_and_shows_every_plot(show: Show) -> None:
    shown = show(a_job(), color_scheme="dark")
    shown.page.emulate_media(media="print", color_scheme="dark")
    assert shown.run("() => getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    for hidden in ("nav", ".skip", "summary"):
        assert not shown.page.locator(hidden).first.is_visible()
    assert shown.page.locator("svg.plot >> visible=true").count() == 6
    pdf = shown.page.pdf(format="A4", prefer_css_page_size=True)
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) in (5, 6, 7)
    assert b"/URI" not in pdf


def test_tables_of_many_jobs_fit_on_paper(show: Show) -> None:
    shown = show(many_jobs(), width=680)  # A4 less its margins, in CSS pixels
    shown.page.emulate_media(media="print")
    assert max(right for _, _, right, _ in boxes(shown, "table")) <= 681


def test_a_month_is_drawn_at_once(show: Show) -> None:
    month = record(seconds=31 * 86400)
    shown = show(job_page(subject(record=month, points=points(month, 50_000), zone=UTC)))
    assert shown.page.locator("svg.plot").count() == 6
    assert shown.run("() => document.querySelectorAll('*').length") < 3000
