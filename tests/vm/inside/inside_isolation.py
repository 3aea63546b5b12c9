"""Isolation on a host with the unified hierarchy alone, and an older kernel: each option, all of them, and escapes.

By the hook, as root and as the job's owner, and once by acctd run. tests/kernel/test_isolation.py has more.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from acctd import hookcall
from tests.unit.test_hook import install
from tests.vm.guest import REPO
from tests.vm.inside.conftest import BASE

NOBODY = 65534
ALL: dict[str, Any] = {"pid_namespace": True, "scratch": ["/tmp"], "chroot": "small", "no_new_privs": True}
EACH: list[dict[str, Any]] = [*({key: value} for key, value in ALL.items()), ALL]
PERSON = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]


@dataclass
class Serving:
    """A living agent, and the hook as any user has it."""

    directory: Path
    hook: Path
    environ: dict[str, str]
    jobs: int = 0

    @property
    def socket(self) -> str:
        return f"{self.directory}/run/s"

    def exec(self, isolation: dict[str, Any], script: str, person: list[str]) -> subprocess.CompletedProcess[str]:
        """A script in a job of its own, which is over afterwards."""
        self.jobs += 1
        job = f"j{self.jobs}"
        hookcall.call(self.socket, "Create", job=job, user=str(NOBODY), network="none", isolation=isolation)
        argv = [*person, str(self.hook), "--socket", self.socket, "exec", "--job", job, "--", "sh", "-c", script]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False, cwd="/")
        hookcall.call(self.socket, "Finish", job=job)
        return done

    def left(self) -> list[str]:
        place = self.directory / "scratch"
        found = [*place.iterdir(), *(place / ".trash").iterdir()] if (place / ".trash").exists() else []
        return sorted(path.name for path in found)


@pytest.fixture
def serving() -> Iterator[Serving]:
    before = Path("/proc/self/mountinfo").read_text()
    with tempfile.TemporaryDirectory(prefix="acctd-", dir="/var/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        (directory / "id").write_bytes(Path("/usr/bin/id").read_bytes())
        (directory / "id").chmod(0o4755)
        root = directory / "small"
        for each in ("usr", "dev", "proc", "tmp", "data"):
            (root / each).mkdir(parents=True)
        for each in ("bin", "lib", "lib64"):
            (root / each).symlink_to(f"usr/{each}")
        config = directory / "acctd.toml"
        config.write_text(
            f'state_dir = "{name}/state"\nruntime_dir = "{name}/run"\nsocket = "{name}/run/s"\n'
            f'[cgroup]\nbase = "{BASE}"\n[isolation]\nscratch_dir = "{name}/scratch"\n'
            f'[isolation.chroots.small]\nroot = "{root}"\nbind = ["/usr:/usr:ro", "{name}:/data:ro"]\n'
        )
        environ = {**os.environ, "ACCTD_CONFIG": str(config), "PYTHONPATH": str(REPO)}
        argv = [sys.executable, "-m", "acctd", "serve"]
        with subprocess.Popen(argv, env=environ, stderr=subprocess.PIPE, text=True) as agent:
            assert agent.stderr is not None
            try:
                while "serving on" not in (line := agent.stderr.readline()):
                    assert line, "the agent ended"
                made = Serving(directory, install(directory / "app", "/usr/bin/python3").hook, environ)
                yield made
                deadline = time.monotonic() + 60
                while made.left() not in ([], [".trash"]):
                    assert time.monotonic() < deadline, made.left()
                    time.sleep(0.1)
            finally:
                agent.terminate()
                agent.communicate(timeout=120)
        assert Path("/proc/self/mountinfo").read_text() == before


def test_each_alone_and_all_together(serving: Serving) -> None:
    script = "ps -e -o pid= | wc -l; grep NoNewPrivs /proc/self/status; id -u; stat -c %a /tmp; ls -d /data; true"
    for person in ([], PERSON):
        for isolation in EACH:
            done = serving.exec(isolation, script, person)
            assert done.returncode == 0, done
            lines = done.stdout.split()
            assert (int(lines[0]) <= 4) == bool(isolation.keys() & {"pid_namespace", "chroot"}), isolation
            assert lines[2] == str(int("no_new_privs" in isolation or "scratch" in isolation))
            assert lines[3] == str(NOBODY)
            assert (lines[4] == "700") == ("scratch" in isolation)
            assert ("/data" in lines) == ("chroot" in isolation)


def test_the_end_is_the_commands_own_and_that_of_all_it_left(serving: Serving) -> None:
    for person in ([], PERSON):
        assert serving.exec(ALL, "setsid sleep 1000 >/dev/null 2>&1 & exit 7", person).returncode == 7
        assert serving.exec(ALL, "kill -KILL $$", person).returncode == -9
        assert subprocess.run(["pgrep", "-x", "sleep"], check=False).returncode == 1


def test_what_a_job_may_try(serving: Serving) -> None:
    script = f"""
umount -l /proc && echo away; mount -o remount,rw /usr && echo away; mount -t tmpfs none /tmp && echo away
unshare --user --map-root-user --mount sh -c 'umount -l /proc && echo away; umount -l /tmp && echo away'
ls /proc/1/root/ /proc/1/cwd/ && echo away; cat /proc/1/environ && echo away; kill -9 {os.getpid()} && echo away
cd ../../..; ls -d var/tmp && echo away
/data/id -u; ps -e -o pid= | wc -l"""
    for person in ([], PERSON):
        done = serving.exec(ALL, script, person)
        lines = done.stdout.split()
        assert lines[0] == str(NOBODY), done
        assert int(lines[1]) <= 4


def test_acctd_run_has_it_too(serving: Serving) -> None:
    """Beside the agent, which it needs not."""
    options = ["--pid-namespace", "--scratch", "/tmp", "--chroot", "small", "--no-new-privs"]
    argv = [sys.executable, "-m", "acctd", "run", "-q", "--network", "host", "--user", str(NOBODY), *options, "--"]
    script = "touch /tmp/x; ps -e -o comm= | head -1; exit 5"
    done = subprocess.run(
        [*argv, "sh", "-c", script], env=serving.environ, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (5, "acctd-init\n"), done.stderr
    assert serving.left() in ([], [".trash"])
