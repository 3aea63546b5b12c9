"""A mount namespace that is held open outlives its processes; what NFS looks at, on a host that may have no NFS."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from acctd.kernel.mntns import Tables, namespace


@contextmanager
def inhabitant(directory: Path) -> Iterator["subprocess.Popen[str]"]:
    """A shell in a mount namespace of its own, which runs what it is given, line by line, and says done."""
    process = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=directory,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


def do(process: "subprocess.Popen[str]", command: str) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{command} && echo done\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n"


def test_mounts_are_told_after_the_last_process_has_ended(tmp_path: Path) -> None:
    place = tmp_path / "a place"
    place.mkdir()
    with inhabitant(tmp_path) as process:
        do(process, "true")
        tables = Tables(process.pid)
        assert tables.id == namespace(process.pid) != namespace("self")
        before = tables.mounts()
        assert tables.mounts() is before  # nothing changed: not read again
        do(process, "mount -t tmpfs mine 'a place'")
        process.kill()
        process.wait()
    assert namespace(process.pid) is None
    new = [mount for mount in tables.mounts() if mount not in before]
    assert [(mount.point, mount.kind) for mount in new] == [(str(place).replace(" ", "\\040"), "tmpfs")]
    assert str(place).replace(" ", "\\040").encode() in tables.statistics()
    tables.release(frozenset())


def test_a_file_system_with_something_behind_it_is_let_go_elsewhere(tmp_path: Path) -> None:
    """By a process that is not our child; no descriptor of ours stays open."""
    held = set(os.listdir("/proc/self/fd"))
    with inhabitant(tmp_path) as process:
        do(process, "true")
        tables = Tables(process.pid)
        assert {mount.kind for mount in tables.mounts()} - {"proc", "sysfs", "tmpfs"}
    tables.release(frozenset())
    assert set(os.listdir("/proc/self/fd")) == held


def test_who_is_gone_has_no_tables(tmp_path: Path) -> None:
    with inhabitant(tmp_path) as process:
        do(process, "true")
    with pytest.raises((FileNotFoundError, ProcessLookupError)):
        Tables(process.pid)
