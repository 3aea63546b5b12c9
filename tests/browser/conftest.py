"""A real Chromium without a screen, one for all tests, each with a page of its own; what it asks for is written down.

Debian's build (tools/system-packages browser), driven by playwright, which must not bring a browser of its own.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser")

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--force-color-profile=srgb"),
)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        if shutil.which("apt-get"):
            pytest.fail("there is no Chromium; run tools/system-packages browser")
        pytest.skip("there is no Chromium, and apt-get is not here to install it")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=[*FLAGS], timeout=60_000)
        yield launched
        launched.close()


@dataclass
class Shown:
    """A file in the browser, what it asked for and what it said."""

    page: Page
    context: BrowserContext
    url: str
    requests: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # of those: by the page's own policy
    said: list[str] = field(default_factory=list)

    def run(self, script: str, argument: object = None) -> Any:
        """A function of JavaScript of the test's own; the page has none."""
        return self.page.evaluate(script, argument)


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Shown]]:
    """`show(html, width=, ...)`: the page as a person has it before them. Options as of playwright's new_context()."""
    with ExitStack() as stack:

        def opened(html: str, *, width: int = 1280, **options: Any) -> Shown:
            path = tmp_path / "report.html"
            path.write_text(html, encoding="utf-8")
            context = browser.new_context(viewport={"width": width, "height": 900}, **options)
            stack.callback(context.close)
            page = context.new_page()
            shown = Shown(page, context, path.as_uri())
            context.on("request", lambda request: shown.requests.append(request.url))
            context.on(
                "requestfailed",
                lambda request: shown.refused.append(request.url) if request.failure == "csp" else None,
            )
            page.on("console", lambda message: shown.said.append(message.text))
            page.on("pageerror", lambda error: shown.said.append(str(error)))
            page.goto(shown.url, wait_until="load")
            return shown

        yield opened
