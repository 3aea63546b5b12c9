"""One guest a layout, booted once a session; each inner test's result becomes a test out here.

Guests are begun with the session, because they take long and other lanes leave a CPU half idle: one at a time beside
these, as many as there are CPUs once the tests wait for them.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.vm import guest, lanes

_TIMEOUT = 400.0
"""s. A guest needs about 60 with a core of its own; whoever waits this long waits for a machine that hangs."""


class Guests:
    """The guests of this session and what their tests said."""

    def __init__(self, layouts: list[str], directory: Path) -> None:
        self._cpus = os.cpu_count() or 1
        self._room = threading.Semaphore(1)
        self._alone = False
        self._lock = threading.Lock()
        self._closed = False
        self._machines: list[subprocess.Popen[str]] = []
        self._pool = ThreadPoolExecutor(max_workers=max(1, min(len(layouts), self._cpus)))
        self._reports: dict[str, Future[dict[str, list[dict[str, str]]]]] = {
            layout: self._pool.submit(self._run, layout, directory / layout) for layout in layouts
        }

    def check(self, layout: str, name: str) -> None:
        """Fail as the inner test failed, or because it never ran."""
        if not self._alone:
            self._alone = True
            self._room.release(self._cpus)
        phases = self._reports[layout].result().get(name, [])
        trouble = [phase["text"] for phase in phases if phase["outcome"] != "passed"]
        if trouble:
            pytest.fail("\n".join(trouble), pytrace=False)
        if not any(phase["when"] == "call" for phase in phases):
            pytest.fail(f"{name} did not run in the {layout} guest", pytrace=False)

    def close(self) -> None:
        """End those that nobody waits for any more."""
        with self._lock:
            self._closed = True
            for machine in self._machines:
                machine.kill()
        self._pool.shutdown(cancel_futures=True)

    def _started(self, machine: subprocess.Popen[str]) -> None:
        with self._lock:
            self._machines.append(machine)
            if self._closed:
                machine.kill()

    def _run(self, layout: str, results: Path) -> dict[str, list[dict[str, str]]]:
        with self._room:
            for boot in lanes.boots(layout):
                self._boot(layout, boot, results)
        phases: dict[str, list[dict[str, str]]] = {}
        for line in (results / "report").read_text().splitlines():
            phase = json.loads(line)
            phases.setdefault(phase["name"].partition("[")[0], []).append(phase)
        return phases

    def _boot(self, layout: str, files: tuple[str, ...], results: Path) -> None:
        command = [
            "env", f"ACCTD_VM_REPORT={guest.RESULTS}/report", f"ACCTD_VM_BACKEND={lanes.BACKENDS.get(layout, 'auto')}",
            # Plugins cost an emulated CPU seconds each.
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest",
            "--basetemp=/run/tmp/pytest", *(str(lanes.INSIDE / file) for file in files),
        ]  # fmt: skip
        status = guest.run(layout, command, results, timeout=_TIMEOUT, started=self._started)
        if status not in (0, 1) or not (results / "report").exists():
            said = (results / "output").read_text()
            raise guest.GuestError(f"pytest in the {layout} guest ended with {status}\n{said}")


_KEY = pytest.StashKey[Guests]()


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    """Begins the layouts of which a test was selected, and lets none outlive the tests."""
    wanted = {
        item.callspec.params["layout"]
        for item in session.items
        if isinstance(item, pytest.Function) and "guests" in item.fixturenames
    }
    if not wanted or guest.runnable_here() is not None or session.config.option.collectonly:
        return (yield)
    with tempfile.TemporaryDirectory(prefix="acctd-guests-", ignore_cleanup_errors=True) as directory:
        guests = Guests([layout for layout in lanes.LANES if layout in wanted], Path(directory))
        session.config.stash[_KEY] = guests
        try:
            return (yield)
        finally:
            guests.close()


@pytest.fixture
def guests(request: pytest.FixtureRequest) -> Guests:
    return request.config.stash[_KEY]
