"""A systemd that answers `systemctl show`, where none runs: a user manager with one unit, in a cgroup of its own.

systemd moves whatever processes share its top cgroup, and makes cgroups beside them. So it gets a cgroup namespace in
which its own cgroup is the top and no other hierarchy is mounted, and a mount namespace in which systemd seems to be
running. All of it ends with its cgroup's processes.
"""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from acctd.cgroup.layout import discover

UNIT = "sleeper.service"
_PROGRAM = Path("/lib/systemd/systemd")
_UNITS = {
    "default.target": f"[Unit]\nDescription=the one unit to be shown\nWants={UNIT}\n",
    UNIT: "[Service]\nExecStart=/bin/sleep 7200\n",
}
_SECONDS = 20.0  # for it to start, and to end

_INSIDE = """\
set -e
mount -t cgroup2 none /sys/fs/cgroup
mount -t tmpfs none /run
mkdir -p /run/systemd/system
exec env -i XDG_RUNTIME_DIR="$1/run" HOME="$1" PATH=/usr/bin:/bin SYSTEMD_UNIT_PATH="$1/units" \
    "$2" --user --log-target=console --log-level=err
"""


class ManagerError(RuntimeError):
    """There is no systemd to be had; says why."""


class Manager:
    """The host's systemd if one runs, else one of our own. Use as a context manager."""

    def __init__(self) -> None:
        self.booted = Path("/run/systemd/system").exists()
        self.argv = ["systemctl", "show", "init.scope"]
        self.environ = dict(os.environ)

    def __enter__(self) -> Self:
        if shutil.which("systemctl") is None:
            raise ManagerError("there is no systemctl; apt-get install systemd")
        if not self.booted:
            self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        if not self.booted:
            self._end()

    def _start(self) -> None:
        v2 = next((h for h in discover().hierarchies if h.version == 2), None)
        if v2 is None or not _PROGRAM.exists():
            raise ManagerError(f"no systemd runs, and one of our own needs {_PROGRAM} and a mount of cgroup v2")
        self._directory = Path(tempfile.mkdtemp(prefix="acctdbench-"))
        self._cgroup = v2.top.path / f"acctdbench-{os.getpid()}-manager"
        self._cgroup.mkdir()
        try:
            (self._directory / "run").mkdir(mode=0o700)
            (self._directory / "units").mkdir()
            for name, text in _UNITS.items():
                (self._directory / "units" / name).write_text(text)
            (self._directory / "inside").write_text(_INSIDE)
            join = f"echo 0 > {self._cgroup}/cgroup.procs && exec unshare --cgroup --mount sh {self._directory}/inside"
            self._process = subprocess.Popen(
                ["sh", "-c", f"{join} {self._directory} {_PROGRAM}"],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
            )  # fmt: skip
            self.argv = ["systemctl", "--user", "show", UNIT]
            self.environ["XDG_RUNTIME_DIR"] = f"{self._directory}/run"
            self._wait_for_unit()
        except BaseException:
            self._end()
            raise

    def _wait_for_unit(self) -> None:
        deadline = time.monotonic() + _SECONDS
        while True:
            asked = subprocess.run(self.argv, env=self.environ, capture_output=True, text=True, check=False)
            if "ActiveState=active" in asked.stdout:
                return
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise ManagerError(f"a systemd of our own does not start: {asked.stderr.strip()}")
            time.sleep(0.05)

    def _end(self) -> None:
        deadline = time.monotonic() + _SECONDS
        (self._cgroup / "cgroup.kill").write_text("1")
        while "populated 1" in (self._cgroup / "cgroup.events").read_text():
            if time.monotonic() > deadline:
                raise ManagerError(f"processes in {self._cgroup} do not end")
            time.sleep(0.01)
        if hasattr(self, "_process"):
            self._process.communicate()
        for directory, _, _ in os.walk(self._cgroup, topdown=False):
            os.rmdir(directory)
        shutil.rmtree(self._directory)
