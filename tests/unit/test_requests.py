"""Requests of batch systems as limits: each system's own words, sizes and multiplications."""

import pytest

from acctd.errors import UsageError
from acctd.model import Limits
from acctd.requests import limits_from

GIB = 1 << 30
MIB = 1 << 20


def test_the_documents_own_request():
    """`-binding linear:1 -l m_mem_free=2G,h_vmem=3G`, runc under Univa Grid Engine."""
    asked = limits_from("gridengine", {"-binding": "linear:1", "m_mem_free": "2G", "h_vmem": "3G"})
    assert asked == Limits(memory=3 * GIB, memory_soft=2 * GIB, cpuset="linear:1")
    assert (asked.hard, asked.soft, asked.linear) == (3 * GIB, 2 * GIB, 1)


@pytest.mark.parametrize(
    ("size", "bytes_"),
    [("2G", 2 * GIB), ("2g", 2 * 10**9), ("1500M", 1500 * MIB), ("1500m", 1500 * 10**6), ("4096K", 4 * MIB),
     ("4096k", 4096000), ("3000000", 3000000), ("1.5G", 3 * GIB // 2), ("0.5g", 5 * 10**8), ("0x40000000", GIB),
     ("0x400M", GIB), ("02000M", GIB), ("1T", 1024 * GIB), (" 1G ", GIB)],
)  # fmt: skip
def test_gridengine_counts_upper_case_in_1024_and_lower_case_in_1000(size, bytes_):
    assert limits_from("gridengine", {"h_vmem": size}).hard == bytes_


def test_gridengine_soft_alone_hard_alone_and_neither():
    assert limits_from("gridengine", {"m_mem_free": "2G"}) == Limits(memory=2 * GIB, memory_policy="soft")
    assert limits_from("gridengine", {"h_vmem": "2G"}) == Limits(memory=2 * GIB)
    assert limits_from("gridengine", {"h_vmem": "INFINITY", "m_mem_free": "1G"}).hard is None
    assert limits_from("gridengine", {}) == Limits()


def test_gridengine_multiplies_by_slots_but_not_the_binding():
    asked = limits_from("gridengine", {"m_mem_free": "2G", "h_vmem": "3G", "slots": "4", "binding": "set linear:4"})
    assert (asked.soft, asked.hard, asked.linear) == (8 * GIB, 12 * GIB, 4)


@pytest.mark.parametrize(
    ("asked", "limits"),
    [({"--mem": "2048"}, Limits(2 * GIB, memory_policy="hard")),
     ({"mem": "2G", "--cpus-per-task": "4"}, Limits(2 * GIB, memory_policy="hard", cpu_shares=4096)),
     ({"mem-per-cpu": "512M", "cpus-per-task": "4"}, Limits(2 * GIB, memory_policy="hard", cpu_shares=4096)),
     ({"mem_per_cpu": "512", "cpus_per_task": "2", "ntasks_per_node": "2"},
      Limits(2 * GIB, memory_policy="hard", cpu_shares=4096)),
     ({"mem": "0"}, Limits()),
     ({"cpus-per-task": "3", "ConstrainCores": "yes"}, Limits(cpuset="linear:3")),
     ({"cpus-per-task": "9999"}, Limits(cpu_shares=262144)),
     ({"mem": "1G", "ConstrainRAMSpace": "no"}, Limits(GIB, memory_policy="none")),
     ({"mem": "1G", "AllowedRAMSpace": "150"}, Limits(3 * GIB // 2, GIB)),
     ({"mem": "1G", "allowedramspace": "50%"}, Limits(GIB // 2, memory_policy="hard")),
     ({"mem": "1G", "ConstrainSwapSpace": "yes"}, Limits(GIB, swap=0, memory_policy="hard")),
     ({"mem": "1G", "ConstrainSwapSpace": "yes", "AllowedSwapSpace": "12.5"},
      Limits(GIB, swap=GIB // 8, memory_policy="hard")),
     ({"mem": "1G", "AllowedSwapSpace": "10"}, Limits(GIB, memory_policy="hard"))],
)  # fmt: skip
def test_slurm(asked, limits):
    assert limits_from("slurm", asked) == limits


@pytest.mark.parametrize(
    ("asked", "limits"),
    [({"RequestMemory": "2048"}, Limits(2 * GIB, memory_policy="hard")),
     ({"request_memory": "2 GB", "request_cpus": "2"}, Limits(2 * GIB, cpu_shares=2048, memory_policy="hard")),
     ({"RequestMemory": "1024", "CGROUP_MEMORY_LIMIT_POLICY": "soft"}, Limits(GIB, memory_policy="soft")),
     ({"RequestMemory": "1024", "CGROUP_MEMORY_LIMIT_POLICY": "None"}, Limits(GIB, memory_policy="none")),
     ({"RequestMemory": "512", "CGROUP_MEMORY_LIMIT_POLICY": "custom", "CGROUP_HARD_MEMORY_LIMIT_EXPR": "2048",
       "CGROUP_SOFT_MEMORY_LIMIT_EXPR": "1024"}, Limits(2 * GIB, GIB)),
     ({"RequestMemory": "1024", "DISABLE_SWAP_FOR_JOB": "True"}, Limits(GIB, swap=0, memory_policy="hard")),
     ({"RequestMemory": "1024", "disable_swap_for_job": "false"}, Limits(GIB, memory_policy="hard")),
     ({"RequestCpus": "1"}, Limits(cpu_shares=1024))],
)  # fmt: skip
def test_htcondor(asked, limits):
    assert limits_from("htcondor", asked) == limits


@pytest.mark.parametrize(
    ("system", "asked", "said"),
    [("pbs", {}, r"system 'pbs' is unknown; it is one of gridengine, slurm, htcondor"),
     ("gridengine", {"s_vmem": "2G"}, r"gridengine request s_vmem '2G' is not known; it is one of m_mem_free, h_vmem"),
     ("gridengine", {"h_vmem": "lots"}, r"h_vmem 'lots' is no size"),
     ("gridengine", {"h_vmem": "2Gi"}, r"h_vmem '2Gi' is no size"),
     ("gridengine", {"h_vmem": "-1G"}, r"h_vmem '-1G' is no size"),
     ("gridengine", {"h_vmem": "0"}, r"h_vmem '0' is out of range"),
     ("gridengine", {"h_vmem": "9999999T", "slots": "2"}, r"h_vmem '9999999T' x 2 is out of range"),
     ("gridengine", {"h_vmem": "1G", "m_mem_free": "2G"}, r"m_mem_free '2G' is above h_vmem '1G'"),
     ("gridengine", {"binding": "striding:2:4"}, r"binding 'striding:2:4' cannot be had; write it like linear:4"),
     ("gridengine", {"slots": "0"}, r"slots '0' is no count"),
     ("slurm", {"mem": "1G", "mem-per-cpu": "1G"}, r"mem '1G' and mem-per-cpu '1G' exclude each other"),
     ("slurm", {"mem": "1P"}, r"mem '1P' is no size"),
     ("slurm", {"mem": "1G", "AllowedRAMSpace": "all"}, r"AllowedRAMSpace 'all' is no percentage"),
     ("slurm", {"mem": "1G", "AllowedRAMSpace": "0.0001"}, r"AllowedRAMSpace '0.0001' leaves 1073 bytes"),
     ("slurm", {"mem": "9999999T", "AllowedRAMSpace": "999999"}, r"mem '9999999T' is out of range"),
     ("slurm", {"mem": "8000000T", "AllowedRAMSpace": "999999"}, r"AllowedRAMSpace '999999' of \d+ bytes is above"),
     ("slurm", {"mem": "1G", "ConstrainRAMSpace": "perhaps"}, r"ConstrainRAMSpace 'perhaps' is neither yes nor no"),
     ("slurm", {"cpus-per-task": "99999", "ntasks-per-node": "2", "ConstrainCores": "yes"},
      r"cpus-per-task 99999 x ntasks-per-node 2 is above 99999"),
     ("htcondor", {"RequestMemory": "1024", "request_memory": "5"}, r"RequestMemory is given twice, '1024' and '5'"),
     ("htcondor", {"RequestMemory": "ifThenElse(a, 1, 2)"}, r"RequestMemory 'ifThenElse\(a, 1, 2\)' is no size"),
     ("htcondor", {"CGROUP_MEMORY_LIMIT_POLICY": "firm"}, r"CGROUP_MEMORY_LIMIT_POLICY 'firm' is none"),
     ("htcondor", {"CGROUP_MEMORY_LIMIT_POLICY": "custom", "CGROUP_HARD_MEMORY_LIMIT_EXPR": "1"},
      r"'custom' needs CGROUP_SOFT_MEMORY_LIMIT_EXPR"),
     ("htcondor", {"CGROUP_MEMORY_LIMIT_POLICY": "custom", "CGROUP_HARD_MEMORY_LIMIT_EXPR": "1",
                   "CGROUP_SOFT_MEMORY_LIMIT_EXPR": "2"}, r"CGROUP_SOFT_MEMORY_LIMIT_EXPR '2' is above CGROUP_HARD"),
     ("htcondor", {"DISABLE_SWAP_FOR_JOB": "True"}, r"DISABLE_SWAP_FOR_JOB 'True' needs a memory limit"),
     ("htcondor", {"RequestCpus": "1.5"}, r"RequestCpus '1.5' is no count")],
)  # fmt: skip
def test_an_error_names_the_word_and_its_value(system, asked, said):
    with pytest.raises(UsageError, match=said) as e:
        limits_from(system, asked)
    assert "\n" not in str(e.value)
