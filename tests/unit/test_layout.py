"""Which directory carries which controller, on captured hosts and on made-up ones."""

from pathlib import Path

import pytest

from acctd.cgroup.layout import CONTROLLERS, discover
from acctd.errors import UnavailableError, UsageError

TREES = Path(__file__).parents[2] / "fixtures" / "cgroupfs"


def where(layout, root):
    """Controller -> its hierarchy's mount point below the root."""
    return {
        c: str(h.top.mount.relative_to(root / "sys/fs/cgroup")) for c in CONTROLLERS if (h := layout.of(c)) is not None
    }


def test_v1_one_by_one():
    layout = discover(root=TREES / "v1-split")
    assert layout.kind == "v1"
    assert where(layout, TREES / "v1-split") == {c: c for c in CONTROLLERS}
    assert layout.unified is None


@pytest.mark.parametrize("name", ["v1-joined", "rhel7"])
def test_v1_joined_is_one_hierarchy(name):
    layout = discover(root=TREES / name)
    assert layout.kind == "v1"
    assert layout.of("cpu") is layout.of("cpuacct")
    assert where(layout, TREES / name)["cpu"] == "cpu,cpuacct"
    mounts = [h.top.mount for h in layout.hierarchies]
    assert len(mounts) == len(set(mounts))


def test_hybrid_counts_in_v1_and_takes_the_bare_v2_tree_along():
    layout = discover(root=TREES / "hybrid")
    assert layout.kind == "hybrid"
    assert {h.version for c in CONTROLLERS if (h := layout.of(c))} == {1}
    assert layout.unified is not None
    assert layout.unified.controllers == ()


def test_v2_alone_is_one_hierarchy_with_all():
    layout = discover(root=TREES / "v2")
    assert layout.kind == "v2"
    (only,) = layout.hierarchies
    assert only.version == 2
    assert set(only.controllers) == set(CONTROLLERS)


@pytest.mark.parametrize("name", ["v1-split", "v1-joined", "hybrid", "v2", "rhel7"])
def test_every_controller_has_one_place_where_the_captured_job_is(name):
    layout = discover(root=TREES / name)
    for controller in CONTROLLERS:
        holders = [h for h in layout.hierarchies if controller in h.controllers]
        assert len(holders) <= 1
        for hierarchy in holders if controller != "cpuset" else []:  # nothing is read from a cpuset, so none is kept
            assert hierarchy.job("acctd", "job_42").exists()


@pytest.mark.parametrize("name", ["v1-split", "v1-joined", "v2", "rhel7"])
def test_controllers_that_nobody_wants_are_left_alone(name):
    layout = discover(["pids"], root=TREES / name)
    (only,) = layout.hierarchies
    assert only.controllers == ("pids",)
    assert layout.of("memory") is None


@pytest.mark.parametrize("wanted", [["disk"], ["memory", "Memory"], [""], ["cpu,cpuacct"], ["io"]])
def test_an_unknown_controller(wanted):
    with pytest.raises(UsageError, match=rf"controller '{wanted[-1]}' is unknown; it is one of memory, cpu, "):
        discover(wanted, root=TREES / "v2")


def made_up(tmp_path, mountinfo, **files):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(mountinfo)
    for mount, controllers in files.items():
        (tmp_path / mount).mkdir()
        (tmp_path / mount / "cgroup.controllers").write_text(controllers)
    return tmp_path


def test_no_cgroups_at_all(tmp_path):
    with pytest.raises(UnavailableError, match="no cgroup controllers are mounted here; mount cgroup2"):
        discover(root=made_up(tmp_path, "22 28 0:21 / /proc rw - proc proc rw\n"))


def test_a_v2_tree_without_controllers_still_counts_cpu_time_and_freezes(tmp_path):
    layout = discover(root=made_up(tmp_path, "1 0 0:1 / /u rw - cgroup2 none rw\n", u="\n"))
    assert {c for c in CONTROLLERS if layout.of(c)} == {"cpuacct", "freezer"}


def test_a_host_with_its_controllers_divided_between_v1_and_v2(tmp_path):
    mounts = "1 0 0:1 / /m rw - cgroup cgroup rw,memory\n2 0 0:2 / /u rw - cgroup2 none rw\n"
    layout = discover(root=made_up(tmp_path, mounts, u="cpu io memory pids\n"))
    memory, blkio = layout.of("memory"), layout.of("blkio")
    assert memory is not None
    assert blkio is not None
    assert (memory.version, blkio.version, layout.kind) == (1, 2, "hybrid")


def test_a_base_that_climbs_is_refused():
    (only,) = discover(root=TREES / "v2").hierarchies
    for base in ("..", "a/../..", "/etc", ""):
        with pytest.raises(UsageError, match="cannot be a directory name"):
            only.job(base, "job_1")
