"""What isolates a job, without a job: the plan, what mountinfo says, and removing what a user may have left."""

import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from acctd import enclosure, isolate, scratch
from acctd.config import Chroot, IsolationConfig
from acctd.errors import KernelRefusedError, NotPermittedError, UsageError
from acctd.model import Owner
from acctd.policies import Isolation

SITE = IsolationConfig(
    default=Isolation(scratch=("/tmp",)),
    scratch_dir=Path("/scratch"),
    chroots={"el9": Chroot("/srv/el9", (("/home", "/home", False), ("/cvmfs", "/cvmfs", True)))},
)


def test_nothing_asked_for_is_no_plan() -> None:
    assert enclosure.plan(Isolation(), "", SITE) is None


def test_a_plan_has_the_chroots_binds_and_then_the_jobs_own() -> None:
    wanted = Isolation(pid_namespace=True, scratch=("/tmp", "/home/work"), chroot="el9")
    assert enclosure.plan(wanted, "/scratch/1.ab", SITE) == {
        "pid_namespace": True,
        "root": "/srv/el9",
        "binds": [
            ["/home", "/home", False],
            ["/cvmfs", "/cvmfs", True],
            ["/scratch/1.ab/0", "/tmp", False],
            ["/scratch/1.ab/1", "/home/work", False],
        ],
        "no_new_privs": True,
    }


@pytest.mark.parametrize(
    ("wanted", "forbidden"),
    [
        (Isolation(scratch=("/tmp",)), False),
        (Isolation(scratch=("/tmp",), no_new_privs=True), True),
        # Over these, what the job puts there would be believed by programs that run as root.
        (Isolation(scratch=("/etc",)), True),
        (Isolation(scratch=("/tmp", "/var/tmp")), True),
        (Isolation(pid_namespace=True), False),
    ],
)
def test_scratch_that_only_the_job_asks_for_takes_set_user_id_away(wanted: Isolation, forbidden: bool) -> None:
    plan = enclosure.plan(wanted, "/scratch/1.ab", SITE)
    assert plan is not None
    assert plan["no_new_privs"] is forbidden


def test_a_chroot_that_was_taken_out_of_the_configuration_is_refused() -> None:
    with pytest.raises(UsageError, match=r"chroot 'el7' of this job is no name in isolation\.chroots any more"):
        enclosure.plan(Isolation(chroot="el7"), "", SITE)


def test_names_in_mountinfo_are_what_they_were() -> None:
    assert isolate._unescaped(rb"/a\040b\011c\134d\012") == b"/a b\tc\\d\n"
    assert isolate._unescaped(b"/plain") == b"/plain"
    mounts = isolate._mounts()
    assert any(path == "/" for _, _, path, _, _ in mounts)
    assert ("/proc", "proc") in [(path, kind) for _, _, path, _, kind in mounts]


def test_a_walk_goes_by_no_link_and_not_up(tmp_path: Path) -> None:
    (tmp_path / "root" / "a" / "b").mkdir(parents=True)
    (tmp_path / "root" / "link").symlink_to("a")
    (tmp_path / "root" / "out").symlink_to(tmp_path)
    root = os.open(tmp_path / "root", os.O_PATH)
    try:
        found = isolate._walk(root, "/a/b", "look")
        assert os.readlink(f"/proc/self/fd/{found}") == str(tmp_path / "root" / "a" / "b")
        os.close(found)
        before = set(os.listdir("/proc/self/fd"))
        for path in ("/link", "/link/b", "/out/root", "/../root", "/a/../a"):
            with pytest.raises(OSError, match=r"look .*symbolic link"):
                isolate._walk(root, path, "look")
        with pytest.raises(FileNotFoundError, match="at 'c' of /a/c/d"):
            isolate._walk(root, "/a/c/d", "look")
        assert set(os.listdir("/proc/self/fd")) == before
    finally:
        os.close(root)


def test_it_is_loaded_by_nobody_who_needs_it_not() -> None:
    code = "import sys; from acctd import helper, hookexec; print(*sys.modules)"
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ
    ).stdout
    assert "acctd.hookexec" in loaded.split()
    assert not {"acctd.isolate", "acctd.enter", "ctypes"} & set(loaded.split())


# Scratch


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A job's scratch of two directories."""
    path = Path(scratch.choose(tmp_path / "scratch", "42.0"))
    scratch.make(str(path), Owner(os.geteuid(), os.getegid(), "me"), 2)
    return path


def fill(directory: Path, victim: Path) -> None:
    """All that makes removing hard."""
    (directory / "link").symlink_to(victim)
    (directory / "file").hardlink_to(victim / "precious")
    (directory / "closed").mkdir()
    (directory / "closed" / "inner").mkdir()
    (directory / "closed" / "inner" / "link").symlink_to(victim)
    (directory / "closed").chmod(0)
    (directory / "wide").mkdir()
    for number in range(1050):
        (directory / "wide" / str(number)).touch()
        (directory / "wide" / f"{number}.d" / "x").mkdir(parents=True)
    top = os.open(directory, os.O_RDONLY)
    for _ in range(1100):
        os.mkdir("deep", dir_fd=top)
        below = os.open("deep", os.O_RDONLY, dir_fd=top)
        os.close(top)
        top = below
    os.symlink(victim, "link", dir_fd=top)
    os.close(top)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.mkdir()
    (path / "precious").write_text("kept")
    return path


def test_scratch_is_its_owners_alone_and_the_way_there_is_nobodys(place: Path) -> None:
    modes = {str(path): stat.S_IMODE(path.stat().st_mode) for path in (place.parent, place, place / "0", place / "1")}
    assert list(modes.values()) == [0o711, 0o711, 0o700, 0o700]
    assert scratch.choose(place.parent, "42.0") != str(place)
    assert scratch.entries(str(place), ["/tmp", "/x"]) == [(place / "0", "/tmp"), (place / "1", "/x")]


@pytest.mark.parametrize("wait", [True, False])
def test_whatever_lies_there_is_removed_and_nothing_else(place: Path, victim: Path, wait: bool) -> None:
    fill(place / "0", victim)
    said: list[str] = []
    trash = scratch.Trash(said.append, wait=wait)
    trash.take(str(place))
    assert not place.exists()
    for thread in threading.enumerate():
        if thread.name == "scratch removal":
            thread.join(60)
    assert os.listdir(place.parent / ".trash") == []
    assert (victim / "precious").read_text() == "kept"
    assert said == []
    trash.take(str(place))  # what is gone is fine


def test_what_a_dead_acctd_left_in_the_trash_goes_too(place: Path, victim: Path) -> None:
    (place.parent / ".trash").mkdir()
    fill(place / "1", victim)
    place.rename(place.parent / ".trash" / place.name)
    scratch.Trash(pytest.fail, wait=True).take(str(place))
    assert os.listdir(place.parent / ".trash") == []


def test_links_in_its_place_lead_nowhere(place: Path, victim: Path) -> None:
    """By the job's directory itself or by the trash: neither is followed."""
    elsewhere = place.with_name("elsewhere")
    place.rename(elsewhere)
    place.symlink_to(victim)
    scratch.Trash(pytest.fail, wait=True).take(str(place))
    assert not place.is_symlink()
    assert (victim / "precious").read_text() == "kept"
    (place.parent / ".trash").rmdir()
    (place.parent / ".trash").symlink_to(victim)
    elsewhere.rename(place)
    with pytest.raises(KernelRefusedError, match="cannot be removed: Not a directory"):
        scratch.Trash(pytest.fail, wait=True).take(str(place))
    assert os.listdir(victim) == ["precious"]


def test_a_place_that_others_can_change_is_not_worked_in(place: Path) -> None:
    place.parent.chmod(0o777)
    with pytest.raises(NotPermittedError, match="can be changed by others than root"):
        scratch.Trash(pytest.fail, wait=True).take(str(place))
    assert (place / "0").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what cannot be removed")
def test_what_cannot_be_removed_is_told_once_and_keeps_nothing_else(place: Path, tmp_path: Path) -> None:
    stuck = place / "0" / "immutable"
    stuck.touch()
    if subprocess.run(["chattr", "+i", stuck], capture_output=True, check=False).returncode != 0:
        pytest.skip("this file system has no immutable files")
    other = Path(scratch.choose(place.parent, "43.0"))
    scratch.make(str(other), Owner(0, 0, "root"), 1)
    said: list[str] = []
    trash = scratch.Trash(said.append, wait=False)
    moved = place.parent / ".trash" / place.name
    try:
        trash.take(str(place))
        trash.take(str(other))
        trash.empty(place.parent)
        deadline = time.monotonic() + 30
        while any(thread.name == "scratch removal" for thread in threading.enumerate()):
            assert time.monotonic() < deadline
        assert os.listdir(moved.parent) == [moved.name]
        assert said == [f"scratch {moved} cannot be removed: Operation not permitted; remove it by hand"]
    finally:
        for path in moved.rglob("immutable"):
            subprocess.run(["chattr", "-i", path], check=True)
    scratch.Trash(pytest.fail, wait=True).take(str(place))
    assert os.listdir(moved.parent) == []
