"""`python -m bench.stamped FILE serve`: acctd, which writes down when it did what about a job that is out of memory.

For bench/oom.py. Nothing of acctd is changed but that a clock is looked at: stamps wait in memory and go to FILE, a
line each, once the job has got its SIGKILLs. A line: the cgroup's name, what was done, ns of CLOCK_MONOTONIC.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from acctd import inquest, shortages
from acctd.cgroup.driver import JobCgroups
from acctd.cli.main import main as acctd

_Stamp = tuple[str, str, int]


class _Clerk:
    """Who writes it down."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._waiting: dict[str, list[_Stamp]] = {}
        self._heard = 0

    def heard(self, hear: Callable[[Any], None]) -> Callable[[Any], None]:
        """The loop has come to it. Which job it is about turns out later."""

        def wrapped(self_: Any) -> None:
            self._heard = time.monotonic_ns()
            hear(self_)

        return wrapped

    def frozen(self, freeze: Callable[[JobCgroups], None]) -> Callable[[JobCgroups], None]:
        """The write to the freezer has returned."""

        def wrapped(cgroups: JobCgroups) -> None:
            said = time.monotonic_ns()
            freeze(cgroups)
            now = time.monotonic_ns()
            self._waiting[cgroups.name] = [
                (cgroups.name, "heard", self._heard), (cgroups.name, "guarded", said), (cgroups.name, "frozen", now)
            ]  # fmt: skip

        return wrapped

    def examined(self, examine: Callable[..., Any]) -> Callable[..., Any]:
        """Evidence was taken."""

        def wrapped(job: Any, **options: Any) -> Any:
            found = examine(job, **options)
            name = job.cgroups.name
            self._waiting.get(name, []).append((name, "examined", time.monotonic_ns()))
            return found

        return wrapped

    def killed(self, end: Callable[[JobCgroups, bool], None]) -> Callable[[JobCgroups, bool], None]:
        """SIGKILL was sent to all, and they were thawed so that they can die."""

        def wrapped(cgroups: JobCgroups, again: bool) -> None:
            end(cgroups, again)
            now = time.monotonic_ns()
            if (stamps := self._waiting.pop(cgroups.name, None)) is not None:
                stamps.append((cgroups.name, "killed", now))
                os.write(self._fd, "".join(f"{name} {what} {at}\n" for name, what, at in stamps).encode())

        return wrapped


def main() -> None:
    clerk = _Clerk(sys.argv.pop(1))
    patched: Any = JobCgroups
    patched.freeze, patched._end = clerk.frozen(JobCgroups.freeze), clerk.killed(JobCgroups._end)
    keeper: Any = shortages.Shortages
    keeper.hear = clerk.heard(shortages.Shortages.hear)
    record: Any = inquest
    record.examine = clerk.examined(inquest.examine)
    sys.exit(acctd())


if __name__ == "__main__":
    main()
