"""Near the limit and at it: what is no shortage, what is told before one, and what comes of many at a time."""

import os
import subprocess
import time
from pathlib import Path

from acctd.kernel import procs
from acctd.policies import OomPolicy
from exporters.classad import record_ad
from tests.bodies.living import MIB, Living
from tests.bodies.oom import LIMIT, version

POLICIES = {
    "kernel": OomPolicy(),
    "kill": OomPolicy("kill"),
    "hold": OomPolicy("hold"),
    "grow": OomPolicy("grow", ceiling=80 * MIB),
    "exec": OomPolicy("exec"),
}


def page_cache_is_no_shortage(living: Living, source: Path, action: str) -> None:
    """A job reads more than its limit from a disk: the kernel drops the pages again, and nothing is done to it."""
    job = living.job(f"cache-{action}", LIMIT, POLICIES[action])
    hog = living.hog(job)
    fd = os.open(source, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    hog.tell(f"cache 48 {source}", "take 8", f"cache 48 {source}", last=True)
    began, used, heard = time.monotonic(), time.process_time(), _Heard(living)
    living.until(lambda: hog.code is not None, "its end")
    passed = time.monotonic() - began
    print(f"\n{action}: {heard.count} wake-ups in {passed:.2f} s, {time.process_time() - used:.3f} s of CPU")
    heard.close()
    assert hog.said()[1:] == ["read 48", "has 8", "read 48"]
    record = living.finish(job, hog)
    # It did reach its limit; else this shows nothing.
    assert record.totals["memory_peak"][""] >= (LIMIT - 1) * MIB
    assert record.totals["memory_failcnt"][""] > 0 or version() == "v2"
    assert (record.exit_code, record.shortages) == (0, ())
    assert not living.told(job.spec.id, "out-of-memory")
    # A job that reclaims at its limit is listened to ten times a second.
    assert heard.count <= 30 * passed + 30


class _Heard:
    """How often the agent was woken up for a shortage."""

    def __init__(self, living: Living) -> None:
        self.count = 0
        self._alarms = living.daemon.shortages
        self._hear = hear = self._alarms.hear

        def counted() -> None:
            self.count += 1
            hear()

        self._alarms.hear = counted  # type: ignore[method-assign]

    def close(self) -> None:
        self._alarms.hear = self._hear  # type: ignore[method-assign]


def thresholds_are_told_once(living: Living) -> None:
    """80, 90 and 95 percent, each when it is crossed; again after the job was well below."""
    job = living.job("thresholds", 40, OomPolicy("hold"))
    hog = living.hog(job)
    told: list[int] = []
    for megabytes, crossed in (
        (28, 0),
        (33, 1),
        (33, 1),
        (37, 2),
        (39, 3),
        (38, 3),
        (10, 3),
        (33, 4),
        (28, 4),
        (34, 5),
    ):
        hog.tell(f"take {megabytes}")
        living.until(lambda wanted=megabytes: hog.said()[-1] == f"has {wanted}", "taking")
        if crossed > len(told):
            living.until(lambda wanted=crossed: len(living.told("thresholds", "memory")) >= wanted, "a warning")
        living.tick()
        living.tick()
        told = [int(text.split()[1]) for text in living.told("thresholds", "memory")]
        assert len(told) == crossed, (megabytes, told)
    assert [min(each // 5 * 5, 95) for each in told] in ([80, 90, 95, 80, 80], [80, 90, 95, 80, 85])
    hog.tell("take 0", last=True)
    living.until(lambda: hog.code is not None)
    assert living.finish(job, hog).shortages == ()


def coming_and_going_below_the_limit_is_no_shortage(living: Living) -> None:
    job = living.job("pulses", LIMIT, OomPolicy("kill"))
    hog = living.hog(job)
    hog.tell(*(f"take {megabytes}" for megabytes in (22, 4) * 20), last=True)
    living.until(lambda: hog.code is not None, "its end")
    record = living.finish(job, hog)
    assert (record.exit_code, record.shortages) == (0, ())


def what_was_raised_once_is_enough_the_next_time(living: Living) -> None:
    job = living.job("again", LIMIT, OomPolicy("grow", ceiling=80 * MIB, step=50))
    hog = living.hog(job)
    hog.tell("take 30", "take 2", "take 30", "take 2", "take 30", last=True)
    living.until(lambda: hog.code is not None, "its end")
    record = living.finish(job, hog)
    assert (record.exit_code, [each.action for each in record.shortages]) == (0, ["grown"])
    assert record.limits.memory == 36 * MIB


def one_call_takes_more_than_a_step(living: Living) -> None:
    """v2 does not slow down what a single read(2) fills: the job is far over its limit when it is looked at."""
    job = living.job("leap", LIMIT, OomPolicy("grow", ceiling=80 * MIB, step=10))
    dd = "read go; exec dd if=/dev/zero of=/dev/null bs=40M count=1"
    with subprocess.Popen(["sh", "-c", dd], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        living.attach(job, process.pid)
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        living.until(lambda: process.poll() is not None, "its end")
    record = living.finish(job)
    actions = {each.action for each in record.shortages}
    if version() == "v2":
        assert (process.returncode, actions) == (0, {"grown"})
    else:
        # The call fails there, or comes back with less, and nobody is killed for it.
        assert process.returncode in (0, 1)
        assert actions <= {"grown"}


def a_raised_limit_ends_a_shortage(living: Living) -> None:
    """SetLimits while the site's program still thinks: the job goes on, and the answer is not waited for."""
    living.program.write_text("#!/bin/sh\nexec sleep 1000\n")
    living.program.chmod(0o755)
    job = living.job("raised", LIMIT, OomPolicy("exec", deadline=60.0))
    hog = living.hog(job)
    hog.tell("take 40", last=True)
    living.until(lambda: any("is asked what to do" in text for text in living.told("raised", "memory")), "asking")
    living.set_limit(job, 64)
    living.until(lambda: hog.code is not None, "its end")
    record = living.finish(job, hog)
    assert (record.exit_code, [each.action for each in record.shortages]) == (0, ["undecided"])


def a_suspended_job_runs_out_when_it_goes_on(living: Living) -> None:
    job = living.job("suspended", LIMIT, OomPolicy("hold"))
    hog = living.hog(job)
    job.cgroups.freeze()
    hog.tell("take 64", last=True)
    living.tick()
    living.tick()
    assert hog.code is None
    assert not job.shortages
    job.cgroups.thaw()
    living.until(lambda: hog.code is not None, "its end")
    record = living.finish(job, hog)
    assert [(each.level, each.action) for each in record.shortages] == [("job", "held")]
    assert record_ad(record)["HoldReasonSubCode"] == 102


def many_at_a_time(living: Living, count: int) -> None:
    """Each of some jobs that run out together is dealt with, by itself."""
    jobs = [living.job(f"crowd-{number}", 16, OomPolicy(("hold", "kill")[number % 2])) for number in range(count)]
    hogs = [living.hog(job) for job in jobs]
    for hog in hogs:
        hog.tell("take 40", last=True)
    living.until(lambda: all(hog.code is not None for hog in hogs), "their end")
    for number, (job, hog) in enumerate(zip(jobs, hogs, strict=True)):
        assert hog.code == -9
        record = living.finish(job, hog)
        wanted = [("job", job.spec.id, ("held", "killed")[number % 2])]
        assert [(each.level, each.whose, each.action) for each in record.shortages] == wanted
        assert record_ad(record)["HoldReasonCode"] == 34


def a_waiting_job_is_dealt_with_by_the_next_agent(living: Living) -> None:
    """The agent goes, the job runs out, another agent comes."""
    job = living.job("orphan", LIMIT, OomPolicy("hold", deadline=60.0))
    hog = living.hog(job)
    memory = job.cgroups.directory("memory")
    assert memory is not None
    living.stop()
    hog.tell("take 64", last=True)
    deadline = time.monotonic() + 60
    if version() == "v1":
        while b"under_oom 1" not in (memory.read("memory.oom_control") or b""):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert hog.code is None
    living.begin()
    living.until(lambda: hog.code is not None, "its end")
    record = living.finish(living.daemon.find("orphan"), hog)
    assert record.exit_signal == 9
    # On v2 it may have overtaken the slowing down while nobody was there: then the kernel has ended it.
    action = record.shortages[-1].action
    assert action == "held" or (version() == "v2" and action == "killed by the kernel")
    assert {each.level for each in record.shortages} == {"job"}
    assert record_ad(record)["HoldReasonCode"] == 34


def no_descriptor_is_left(living: Living, count: int) -> None:
    def turn(number: int) -> None:
        action = tuple(POLICIES)[number % len(POLICIES)]
        job = living.job(f"turn-{number}", LIMIT, POLICIES[action])
        hog = living.hog(job)
        hog.tell("take 40", last=True)
        living.until(lambda: hog.code is not None, "its end")
        living.finish(job, hog)
        hog.close()

    living.program.write_text('#!/bin/sh\necho \'{"action": "kill"}\'\n')
    living.program.chmod(0o755)
    for number in range(len(POLICIES)):
        turn(number)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(len(POLICIES), count):
        turn(number)
    living.until(lambda: len(os.listdir("/proc/self/fd")) <= before, "the descriptors' return")


def the_node_runs_out(living: Living) -> None:
    """For a machine of its own: memory is used up outside of all jobs, and the kernel kills inside one."""
    protected, large = Path("/proc/self/oom_score_adj"), Path("/proc/sys/vm/nr_hugepages")
    before = protected.read_text()
    job = living.job("bystander", 200, OomPolicy())
    hog, greedy = living.hog(job), living.outside()
    try:
        protected.write_text("-1000")
        Path(f"/proc/{greedy.pid}/oom_score_adj").write_text("500")  # the next one, if it is not ended before
        Path(f"/proc/{hog.pid}/oom_score_adj").write_text("1000")
        hog.tell("take 40")
        living.until(lambda: hog.said()[-1] == "has 40", "taking")
        # Most of it at once, as large pages, which nobody has to touch one by one.
        meminfo = procs.meminfo()
        large.write_text(str((meminfo["MemAvailable"] - 160 * MIB) // meminfo["Hugepagesize"]))
        greedy.tell("take 400")
        living.until(lambda: hog.code is not None, "its end")
    finally:
        large.write_text("0")
        protected.write_text(before)
        greedy.close()
    record = living.finish(job, hog)
    (shortage,) = record.shortages
    assert (record.exit_signal, shortage.level, shortage.whose, shortage.kills) == (9, "host", None, 1)
    assert shortage.text.startswith("The node itself ran out of memory and the kernel killed 1 of job bystander's")
    assert "stayed within its limit of 200 MB" in shortage.text
    assert "HoldReasonCode" not in record_ad(record)
