import mmap

import pytest

from acctd.cgroup.layout import Hierarchy, Layout
from acctd.cgroup.limits import (
    Setting,
    apply,
    burst_us,
    carry_protection,
    quota_us,
    settings,
    v1_settings,
    v2_settings,
    weight,
)
from acctd.errors import KernelRefusedError, NotFoundError, UnavailableError, UsageError
from acctd.kernel.cgroupfs import CgroupDir
from acctd.model import Limits

ALL = Limits(
    memory=64 << 20, memory_soft=32 << 20, swap=1 << 20, cpus=1.5, cpu_shares=512, cpuset="0-1", pids=20
)  # fmt: skip


def files(settings):
    return {setting.file: setting.value for setting in settings}


def test_v1():
    assert files(v1_settings(ALL)) == {
        "memory.limit_in_bytes": str(64 << 20),
        "memory.memsw.limit_in_bytes": str(65 << 20),
        "memory.soft_limit_in_bytes": str(32 << 20),
        "cpu.cfs_period_us": "100000",
        "cpu.cfs_quota_us": "150000",
        "cpu.shares": "512",
        "cpuset.cpus": "0-1",
        "pids.max": "20",
    }


def test_v1_takes_memory_before_memory_and_swap_together():
    order = [setting.file for setting in v1_settings(ALL)]
    assert order.index("memory.limit_in_bytes") < order.index("memory.memsw.limit_in_bytes")


def test_v2():
    assert files(v2_settings(ALL)) == {
        "memory.max": str(64 << 20),
        "memory.swap.max": str(1 << 20),
        "memory.low": str(32 << 20),
        "cpu.max": "150000 100000",
        "cpu.weight": str(weight(512)),
        "cpuset.cpus": "0-1",
        "pids.max": "20",
    }


def hard(policy, **more):
    return Limits(memory=64 << 20, memory_policy=policy, **more)


@pytest.mark.parametrize(
    ("limits", "v1", "v2"),
    [(hard("hard"), {"memory.limit_in_bytes": "67108864"}, {"memory.max": "67108864"}),
     (hard("soft"), {"memory.soft_limit_in_bytes": "67108864"}, {"memory.low": "67108864"}),
     (hard("custom"), {"memory.limit_in_bytes": "67108864"}, {"memory.max": "67108864"}),
     (hard("none"), {}, {}),
     (hard("none", swap=0), {}, {}),
     (hard("hard", swap=0),
      {"memory.limit_in_bytes": "67108864", "memory.memsw.limit_in_bytes": "67108864", "memory.swappiness": "0"},
      {"memory.max": "67108864", "memory.swap.max": "0"}),
     (hard("soft", swap=0), {"memory.soft_limit_in_bytes": "67108864", "memory.swappiness": "0"},
      {"memory.low": "67108864", "memory.swap.max": "0"})],
)  # fmt: skip
def test_what_a_policy_makes_of_the_memory_asked_for(limits, v1, v2):
    assert files(v1_settings(limits)) == v1
    assert files(v2_settings(limits)) == v2


def test_v1_has_no_limit_of_swap_without_one_of_memory():
    with pytest.raises(UnavailableError, match="swap 1048576 cannot be limited under memory_policy soft: cgroup v1"):
        v1_settings(hard("soft", swap=1 << 20))
    assert files(v2_settings(hard("soft", swap=1 << 20)))["memory.swap.max"] == "1048576"


def test_memory_on_v2_and_the_rest_on_v1(tmp_path):
    """Any division of controllers: what v1 alone cannot have is no obstacle where memory is on v2."""
    tops = [CgroupDir(tmp_path / name) for name in ("v1", "v2")]
    divided = Layout((Hierarchy(tops[0], 1, ("cpu", "cpuset")), Hierarchy(tops[1], 2, ("memory", "pids"))))
    limits = hard("soft", swap=1 << 20, cpus=1, cpu_burst=0.1, pids=3, cpuset="0")
    assert files(settings(divided, limits)) == {
        "cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "100000", "cpu.cfs_burst_us": "100000", "cpuset.cpus": "0",
        "memory.low": "67108864", "memory.swap.max": "1048576", "pids.max": "3",
    }  # fmt: skip


@pytest.mark.parametrize("made", [v1_settings, v2_settings])
def test_chosen_cores_win_over_what_was_asked(made):
    chosen = made(Limits(cpuset="linear:2"), "2-3", "1")
    assert [(setting.file, setting.value) for setting in chosen] == [("cpuset.cpus", "2-3"), ("cpuset.mems", "1")]
    assert files(made(Limits(cpuset="0-7"), "2-3"))["cpuset.cpus"] == "2-3"
    with pytest.raises(UnavailableError, match="cpuset 'linear:2': no cores were chosen"):
        made(Limits(cpuset="linear:2"))


def test_burst():
    limits = Limits(cpus=2, cpu_burst=0.05)
    assert files(v1_settings(limits))["cpu.cfs_burst_us"] == files(v2_settings(limits))["cpu.max.burst"] == "50000"
    order = [setting.file for setting in v1_settings(limits)]
    assert order.index("cpu.cfs_quota_us") < order.index("cpu.cfs_burst_us")
    assert burst_us(0.5, 0.05) == 50000
    with pytest.raises(UsageError, match=r"cpu_burst 0\.06 is above what 0\.5 cpus save up at most, 0\.05 seconds"):
        burst_us(0.5, 0.06)


def test_no_limit_writes_nothing():
    assert v1_settings(Limits()) == v2_settings(Limits()) == []


def test_zero_swap_is_a_limit():
    assert files(v1_settings(Limits(memory=1 << 20, swap=0)))["memory.memsw.limit_in_bytes"] == str(1 << 20)
    assert files(v2_settings(Limits(memory=1 << 20, swap=0)))["memory.swap.max"] == "0"


@pytest.mark.parametrize(("shares", "expected"), [(2, 1), (1024, 39), (262144, 10000)])
def test_weight_is_what_the_container_runtimes_write(shares, expected):
    assert weight(shares) == expected


@pytest.mark.parametrize(("cpus", "us"), [(0.01, 1000), (0.5, 50000), (1, 100000), (2.345, 234500)])
def test_quota(cpus, us):
    assert quota_us(cpus) == us


@pytest.fixture
def cgroup(tmp_path):
    """A directory standing for a cgroup: what is written there is read back."""
    return CgroupDir(tmp_path)


class Rounding(CgroupDir):
    """A cgroup whose kernel stores something else than was written."""

    __slots__ = ()
    stores = ""

    def write(self, file, data):
        CgroupDir.write(self, file, self.stores)


def rounding(path, stores):
    kind = type("Kernel", (Rounding,), {"stores": stores, "__slots__": ()})
    return kind(path)


@pytest.mark.parametrize(
    ("controller", "wrote", "reads"),
    [("pids", "5", "5"), ("memory", str(2 * mmap.PAGESIZE + 5), str(2 * mmap.PAGESIZE)),
     ("memory", str(2**63 - 1), str(2**63 - mmap.PAGESIZE)), ("cpuset", "0,1", "0-1"), ("cpuset", "1,0", "0-1"),
     ("cpuset", "0-1,1", "0-1")],
)  # fmt: skip
def test_the_kernels_own_form_of_a_value_is_accepted(tmp_path, controller, wrote, reads):
    (tmp_path / "file").write_text("")
    apply([Setting("limit", controller, "file", wrote)], lambda _: rounding(tmp_path, reads))


@pytest.mark.parametrize(
    ("controller", "wrote", "reads"),
    [("memory", "8192", "0"), ("memory", "8192", "8193"), ("memory", "8192", str(8192 - mmap.PAGESIZE)),
     ("pids", "20", "max"), ("pids", "20", "19"), ("cpu", "1024", "512"), ("cpuset", "0-1", "0"), ("cpuset", "0", ""),
     ("cpu", "150000 100000", "max 100000")],
)  # fmt: skip
def test_a_value_that_was_not_taken_is_an_error_naming_both(tmp_path, controller, wrote, reads):
    (tmp_path / "file").write_text("")
    with pytest.raises(KernelRefusedError, match=f"limit: wrote '{wrote}' to file, read back '{reads}'"):
        apply([Setting("limit", controller, "file", wrote)], lambda _: rounding(tmp_path, reads))


def test_absent_controllers_and_files_say_which_limit_to_leave_out(cgroup):
    setting = Setting("swap", "memory", "memory.memsw.limit_in_bytes", "5")
    with pytest.raises(UnavailableError, match="swap cannot be limited: this host has no memory controller"):
        apply([setting], lambda _: None)
    with pytest.raises(UnavailableError, match=r"swap cannot be limited: this kernel has no memory\.memsw\.limit"):
        apply([setting], lambda _: cgroup)
    burst = Setting("cpu_burst", "cpu", "cpu.max.burst", "5")
    with pytest.raises(
        UnavailableError, match=r"this kernel has no cpu\.max\.burst \(Linux 5\.14 has it\); leave it out"
    ):
        apply([burst], lambda _: cgroup)
    assert list(cgroup.path.iterdir()) == []
    with pytest.raises(NotFoundError, match=r"cgroup /.*/gone is gone, and the job with it"):
        apply([burst], lambda _: cgroup.child("gone"))


def test_v1_carries_no_protection_up(cgroup):
    job = cgroup.child("base").child("job")
    job.path.mkdir(parents=True)
    carry_protection(job, "own")
    assert list(job.parent.path.iterdir()) == [job.path]
