"""One guest a layout, booted once a session; each inner test's result becomes a test out here.

As many guests run at a time as $ACCTD_VM_GUESTS says, by default as there are CPUs.
"""

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.vm import guest, lanes

_TIMEOUT = 400.0
"""s. A guest needs about 60 with a core of its own; whoever waits this long waits for a machine that hangs."""


class Guests:
    """The guests of this session and what their tests said."""

    def __init__(self, layouts: list[str], directory: Path) -> None:
        guest.prepare()
        self._pool = ThreadPoolExecutor(int(os.environ.get("ACCTD_VM_GUESTS") or os.cpu_count() or 1))
        self._reports: dict[str, Future[dict[str, list[dict[str, str]]]]] = {
            layout: self._pool.submit(_run, layout, directory / layout) for layout in layouts
        }

    def check(self, layout: str, name: str) -> None:
        """Fail as the inner test failed, or because it never ran."""
        phases = self._reports[layout].result().get(name, [])
        trouble = [phase["text"] for phase in phases if phase["outcome"] != "passed"]
        if trouble:
            pytest.fail("\n".join(trouble), pytrace=False)
        if not any(phase["when"] == "call" for phase in phases):
            pytest.fail(f"{name} did not run in the {layout} guest", pytrace=False)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _run(layout: str, results: Path) -> dict[str, list[dict[str, str]]]:
    report = results / "report"
    for boot in lanes.boots(layout):
        command = [
            "env", f"ACCTD_VM_REPORT={guest.RESULTS}/report", f"ACCTD_VM_BACKEND={lanes.BACKENDS.get(layout, 'auto')}",
            # Plugins cost an emulated CPU seconds each.
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest",
            "--basetemp=/run/tmp/pytest", *(str(lanes.INSIDE / file) for file in boot),
        ]  # fmt: skip
        status = guest.run(layout, command, results, timeout=_TIMEOUT)
        if status not in (0, 1) or not report.exists():
            said = (results / "output").read_text()
            raise guest.GuestError(f"pytest in the {layout} guest ended with {status}\n{said}")
    phases: dict[str, list[dict[str, str]]] = {}
    for line in report.read_text().splitlines():
        phase = json.loads(line)
        phases.setdefault(phase["name"].partition("[")[0], []).append(phase)
    return phases


@pytest.fixture(scope="session")
def guests(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guests]:
    """Boots only the layouts of which a test was selected."""
    wanted = {
        item.callspec.params["layout"]
        for item in request.session.items
        if hasattr(item, "callspec")
        and "layout" in item.callspec.params
        and "guests" in getattr(item, "fixturenames", ())
    }
    made = Guests([layout for layout in lanes.LANES if layout in wanted], tmp_path_factory.mktemp("guests"))
    yield made
    made.close()
