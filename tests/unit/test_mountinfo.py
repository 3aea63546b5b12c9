from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acctd.kernel.mountinfo import CgroupMount, cgroup_mounts, parse_mountinfo

TREES = Path(__file__).parents[2] / "fixtures" / "cgroupfs"


def found(name):
    root = TREES / name
    return {str(mount.mount.relative_to(root)): mount for mount in cgroup_mounts(root)}


def test_v1_controllers_one_by_one():
    mounts = found("v1-split")
    assert mounts["sys/fs/cgroup/memory"].controllers == ("memory",)
    assert {mount.version for mount in mounts.values()} == {1}
    assert "sys/fs/cgroup/systemd" not in mounts  # a named hierarchy counts nothing


@pytest.mark.parametrize("name", ["v1-joined", "rhel7"])
def test_joined_controllers_in_either_order_of_options(name):
    assert set(found(name)["sys/fs/cgroup/cpu,cpuacct"].controllers) == {"cpu", "cpuacct"}


def test_hybrid_has_both_versions():
    mounts = found("hybrid")
    assert mounts["sys/fs/cgroup/unified"].version == 2
    assert mounts["sys/fs/cgroup/memory"].version == 1


def test_v2_alone():
    (mount,) = found("v2").values()
    assert (mount.version, mount.controllers) == (2, ())


@pytest.mark.parametrize("name", ["v1-split", "v1-joined", "hybrid", "v2", "rhel7"])
def test_every_tree_has_its_job_where_its_mountinfo_says(name):
    jobs = [mount for mount in cgroup_mounts(TREES / name) if (mount.mount / "acctd/job_42").is_dir()]
    assert {mount.version for mount in jobs} == {mount.version for mount in cgroup_mounts(TREES / name)}


def test_a_hierarchy_mounted_twice_counts_once_where_it_came_first():
    text = "1 0 0:1 / /a rw - cgroup cgroup rw,memory\n2 0 0:1 / /b rw - cgroup cgroup rw,memory\n"
    assert parse_mountinfo(text) == [CgroupMount(Path("/a"), 1, ("memory",))]


def test_optional_fields_and_escapes():
    text = "1 0 0:1 / /with\\040space\\134x rw shared:1 master:2 - cgroup2 none rw\n"
    assert parse_mountinfo(text) == [CgroupMount(Path("/with space\\x"), 2, ())]


def test_a_mount_point_cannot_leave_the_given_root():
    (mount,) = parse_mountinfo("1 0 0:1 / /sys/fs/cgroup rw - cgroup2 none rw\n", Path("/captured"))
    assert mount.mount == Path("/captured/sys/fs/cgroup")


def test_other_file_systems_and_broken_lines_are_skipped():
    text = "22 28 0:21 / /proc rw - proc proc rw\n\ngarbage\n1 - cgroup\n1 0 0:1 / /x rw - cgroup cgroup\n"
    assert parse_mountinfo(text) == []


@given(st.text() | st.text().map(lambda tail: "1 0 0:1 / /x rw - cgroup2" + tail))
def test_no_text_raises(text):
    parse_mountinfo(text)
