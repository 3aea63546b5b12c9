"""The door to cgroupfs, on directories that stand for cgroups: what it refuses, what it leaves alone, what it says."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acctd.errors import KernelRefusedError, NotPermittedError, UsageError
from acctd.kernel.cgroupfs import CgroupDir, checked_parts


@pytest.fixture
def top(tmp_path):
    """A mount point with a base below it, and a file outside that nothing may touch."""
    mount = tmp_path / "mount"
    (mount / "base").mkdir(parents=True)
    (tmp_path / "outside").write_text("untouched")
    return CgroupDir(mount)


@pytest.mark.parametrize(
    "path",
    ["", "/", "..", ".", "a/..", "a/../b", "../a", "/etc", "a//b", "a/", "./a", "a/.", "a\0b", "a\nb", "x" * 256],
)
def test_paths_that_could_leave_the_hierarchy_or_confuse_its_readers(path):
    with pytest.raises(UsageError, match="cannot be a directory name"):
        checked_parts(path)


@pytest.mark.parametrize("path", ["a", "a/b", "...", "..a", "a b", "x" * 255, "a\\b", "naïve", "\udcff", "-rf"])
def test_odd_but_harmless_names(path):
    assert "/".join(checked_parts(path)) == path


def test_a_name_is_measured_in_bytes():
    with pytest.raises(UsageError):
        checked_parts("é" * 128)


@given(st.text(st.characters(codec=None), max_size=20))
def test_whatever_passes_stays_below_the_mount(path):
    try:
        directory = CgroupDir(Path("/mount/point"), checked_parts(path))
    except UsageError:
        return
    assert os.path.normpath(directory.path) == os.fspath(directory.path)
    assert os.fspath(directory.path).startswith("/mount/point/")


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/", "../outside"])
def test_a_child_cannot_climb(top, name):
    with pytest.raises(UsageError):
        top.child("base").child(name)


@pytest.mark.parametrize("file", ["..", ".", "", "../outside", "a/b", "/etc/passwd"])
def test_a_file_name_cannot_climb(top, file):
    base = top.child("base")
    for act in (base.read, base.has, base.counter, lambda name: base.write(name, "x")):
        with pytest.raises(UsageError, match="is not an interface file name"):
            act(file)


def test_the_top_has_no_parent(top):
    assert top.child("base").parent == top
    with pytest.raises(UsageError, match="is the top of its hierarchy"):
        _ = top.parent


def test_symbolic_links_are_not_followed(top, tmp_path):
    base = top.child("base")
    (base.path / "link").symlink_to(tmp_path / "outside")
    for act in (lambda: base.read("link"), lambda: base.counter("link"), lambda: base.write("link", "broken")):
        with pytest.raises(KernelRefusedError, match="link: Too many levels of symbolic links"):
            act()
    assert (tmp_path / "outside").read_text() == "untouched"


def test_a_link_to_a_directory_is_no_child(top, tmp_path):
    base = top.child("base")
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (base.path / "link").symlink_to(tmp_path / "elsewhere")
    (base.path / "real").mkdir()
    assert [child.parts for child in base.children()] == [("base", "real")]
    assert [cgroup.parts for cgroup in base.subtree()] == [("base", "real"), ("base",)]


def test_absence_is_none_not_an_error(top):
    base = top.child("base")
    assert base.read("no.such") is None
    assert not base.has("no.such")
    counter = base.counter("no.such")
    assert (counter.present, counter.read()) == (False, None)
    counter.close()
    gone = top.child("gone")
    assert (gone.read("x"), gone.children(), gone.procs(), gone.exists(), gone.marked()) == (None, [], [], False, False)
    assert list(gone.subtree()) == [gone]
    assert gone.remove()


def test_a_refused_write_names_path_data_and_reason(top):
    with pytest.raises(KernelRefusedError) as refusal:
        top.child("base").write("no.such", "12 34")
    assert str(refusal.value) == f"cannot write '12 34' to {top.path}/base/no.such: No such file or directory"


def test_what_is_no_directory_is_refused_by_name(top):
    (top.path / "file").write_text("")
    file = top.child("file")
    for act, what in (
        (file.children, "list"),
        (lambda: file.child("x").make(), "make"),
        (lambda: file.read("x"), "open"),
        (file.remove, "remove"),
    ):
        with pytest.raises(KernelRefusedError, match=rf"cannot {what} .*/mount/file.*: Not a directory"):
            act()


def test_make_says_whether_it_made_and_marks_only_then(top):
    made, found = top.child("made"), top.child("base")
    assert made.make() is True
    assert made.make() is False
    assert found.make() is False
    assert not found.marked()
    with pytest.raises(KernelRefusedError, match=r"cannot make .*: No such file or directory"):
        top.child("no").child("way").make()


def test_a_busy_directory_is_false_and_stays(top):
    (top.path / "base" / "inner").mkdir()
    assert top.child("base").remove() is False
    assert top.child("base").exists()


def test_the_subtree_is_deepest_first_and_can_be_removed_in_that_order(top):
    for path in ("base/b/c/d", "base/a", "base/b/a"):
        (top.path / path).mkdir(parents=True, exist_ok=True)
    order = list(top.child("base").subtree())
    assert order[-1] == top.child("base")
    assert all(cgroup.remove() for cgroup in order)


@pytest.mark.parametrize("name", [b"\xff\xfe", b"with space", b"-rf", b"*", "日本".encode(), b"x" * 255])
def test_a_job_may_give_its_own_cgroups_any_name_the_kernel_takes(top, name):
    os.mkdir(os.path.join(os.fsencode(top.path), b"base", name))
    (child,) = top.child("base").children()
    assert child.read("cgroup.procs") is None
    assert all(cgroup.remove() for cgroup in top.child("base").subtree())


def test_pids_leave_out_those_we_cannot_name(top):
    (top.path / "base" / "cgroup.procs").write_text("12\n0\n345\n0\n")
    assert top.child("base").procs() == [12, 345]
    (top.path / "base" / "cgroup.procs").write_text("")
    assert top.child("base").procs() == []


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 8192, 100_000])
def test_a_counter_file_is_read_whole_and_afresh(top, size):
    path = top.path / "base" / "file"
    path.write_bytes(b"x" * size)
    counter = top.child("base").counter("file")
    try:
        assert counter.read() == b"x" * size
        path.write_bytes(b"y" * (size + 1))
        assert counter.read() == b"y" * (size + 1)
    finally:
        counter.close()
    assert counter.read() is None
    counter.close()


def test_lack_of_rights_is_told_apart():
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)  # noqa: S103  # the way there is open to all, as in /sys
        base = CgroupDir(Path(place), ("base",))
        base.make()
        (base.path / "file").write_text("")
        os.chmod(base.path / "file", 0o600)
        pid = os.fork()
        if pid == 0:
            try:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                base.write("file", "1")
            except NotPermittedError as e:
                os._exit(0 if str(e).endswith("base/file: Permission denied; run as root") else 2)
            except BaseException:
                os._exit(3)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
