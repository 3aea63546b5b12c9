"""Which job a process is in, what lies in what, and what families used together; on jobs that are only rows."""

from pathlib import Path

import pytest

from acctd import family
from acctd.cgroup.layout import Hierarchy, Layout
from acctd.job import Job, hold
from acctd.kernel.cgroupfs import CgroupDir
from acctd.metrics import BLOCK_READ_BYTES, CPU_USER, NETWORK_BYTES
from acctd.model import JobSpec, Owner
from acctd.rows import OpenJob, Place

LAYOUTS = {
    version: Layout((Hierarchy(CgroupDir(Path("/nowhere")), version, ("memory", "blkio")),)) for version in (1, 2)
}


def job(name: str, seq: int, base: str = "acctd", parent: int | None = None, version: int = 1) -> Job:
    spec = JobSpec(name, Owner(0, 0, "root"), network="host")
    return hold(OpenJob(seq, "running", None, Place(base), spec, 0.0, "b", 0, 0, "", parent=parent), LAYOUTS[version])


def tree(version: int = 1) -> dict[str, Job]:
    pilot = job("pilot", 1, version=version)
    payload = job("payload", 2, "acctd/job_pilot", 1, version)
    step = job("step", 3, "acctd/job_pilot/job_payload", 2, version)
    return {each.spec.id: each for each in (pilot, payload, step, job("other", 4, version=version))}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/acctd/job_pilot", "pilot"),
        ("/acctd/job_pilot/own", "pilot"),
        ("/acctd/job_pilot/job_payload/job_step/deep/er", "step"),
        ("/docker/abc/acctd/job_other", "other"),
        ("/user.slice/acctd/job_other", None),  # of that name, in somebody's own subtree
        ("/acctd/job_pilots", None),
        ("/acctd", None),
        ("/", None),
    ],
)
def test_a_process_is_in_the_innermost_job_of_its_path(path: str, name: str | None) -> None:
    found = family.innermost(tree(), ["/elsewhere", path], ["", "/docker/abc"])
    assert (found.spec.id if found else None) == name


def test_what_lies_in_what() -> None:
    jobs = tree()
    assert [each.spec.id for each in family.below(jobs, jobs["pilot"])] == ["step", "payload"]
    assert family.below(jobs, jobs["other"]) == []
    assert family.is_inside(jobs["step"], jobs["pilot"])
    assert family.is_inside(jobs["pilot"], jobs["pilot"])
    assert not family.is_inside(jobs["pilot"], jobs["step"])
    assert not family.is_inside(jobs["step"], jobs["other"])


@pytest.mark.parametrize(("version", "read"), [(1, 7), (2, 1)])
def test_what_the_kernel_does_not_add_is_added_once(version: int, read: int) -> None:
    """CPU is in the parent's own counters; a chain of a family's is not, and on v1 neither is its block I/O."""
    jobs = tree(version)
    for amount, name in ((1, "pilot"), (2, "payload"), (4, "step")):
        readings = {(CPU_USER, ""): amount, (NETWORK_BYTES, "Out"): amount, (BLOCK_READ_BYTES, "8:0"): amount}
        jobs[name].meter.feed(readings)
    jobs["payload"].families = {"network": {"Out": 10}}
    totals = family.totals(jobs["pilot"], family.below(jobs, jobs["pilot"]))
    assert totals == {"cpu_user": {"": 1}, "network": {"Out": 17}, "block_read": {"8:0": read}}
