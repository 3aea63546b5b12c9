"""What a job's owner is told, and what not: the numbers must carry it."""

from typing import Any

import pytest

from acctd.model import Limits
from acctd.policies import OomLevel, Shortage
from acctd.report.hints import Facts, Hint, advised, hints, needed, too_short

GIB, MIB = 1 << 30, 1 << 20
SECOND = 10**9
HOUR = 3600 * SECOND


def said(limits: Limits | None = None, *, wall: int = HOUR, **given: Any) -> list[Hint]:
    """Hints for totals without labels, by name; fields of Facts by theirs."""
    names = {"shortages", "shortages_dropped", "exclusive", "running", "failed", "cores_peak"}
    facts = {name: value for name, value in given.items() if name in names}
    totals = {name: {"": value} for name, value in given.items() if name not in names}
    return hints(Facts(wall_ns=wall, limits=limits or Limits(), totals=totals, **facts))


def text(found: list[Hint]) -> str:
    return "\n".join(f"{hint.level}: {hint.text}" for hint in found)


def test_much_too_much_memory() -> None:
    (hint,) = said(Limits(memory=16 * GIB), memory_resident_peak=int(1.2 * GIB))
    assert hint.level == "advice"
    assert hint.text.startswith("It asked for 16 GiB of memory and held 1.2 GiB at most. Ask for 1.5 GiB next time")


@pytest.mark.parametrize(
    ("need", "enough"),
    [(0, 64 * MIB), (100 * MIB, 128 * MIB), (int(1.2 * GIB), int(1.5 * GIB)), (5 * GIB, 6 * GIB), (30 * GIB, 40 * GIB)],
)
def test_what_is_advised_is_round_and_enough(need: int, enough: int) -> None:
    assert advised(need) == enough


@pytest.mark.parametrize("need", [1, 10**6, 123456789, 10**12, 2**60])
def test_what_is_advised_is_never_too_little_and_never_half_too_much(need: int) -> None:
    assert 1.2 * need <= advised(need) <= max(1.2 * need * 1.25 + 1, 64 * MIB)


def test_kernel_memory_is_needed_too() -> None:
    (hint,) = said(Limits(memory=16 * GIB), memory_resident_peak=GIB, memory_kernel_peak=GIB)
    assert "held 2 GiB" in hint.text


@pytest.mark.parametrize("state", ["running", "failed"])
def test_who_may_still_need_it_is_not_told_to_ask_for_less(state: str) -> None:
    limits = Limits(memory=16 * GIB, cpus=8.0)
    used = {"memory_resident_peak": GIB, "cpu_user": HOUR, "cpu_system": 0}
    assert said(limits, **used, **{state: True}) == []


def test_a_little_too_much_is_well_asked_for() -> None:
    (hint,) = said(Limits(memory=2 * GIB), memory_resident_peak=int(1.5 * GIB))
    assert hint == Hint("good", "Its memory was well asked for: 1.5 GiB of 2 GiB.")
    (hint,) = said(Limits(memory=128 * MIB), memory_resident_peak=10 * MIB)
    assert hint.level == "good", "nothing is gained by less than that"


def test_nearly_too_little_memory() -> None:
    (hint,) = said(Limits(memory=2 * GIB), memory_resident_peak=int(1.95 * GIB))
    assert hint.text == "It came close to its memory limit: 1.9 GiB of 2 GiB. Ask for 2.5 GiB next time."
    (soft,) = said(Limits(memory=2 * GIB, memory_policy="none"), memory_resident_peak=3 * GIB)
    assert soft.text == "It held 3 GiB and had asked for 2 GiB. Ask for 4 GiB."


def test_page_cache_is_not_need() -> None:
    found = said(Limits(memory=4 * GIB), memory_peak=4 * GIB, memory_resident_peak=GIB)
    assert text(found).count("page cache") == 1
    assert "The job itself needed 1 GiB." in text(found)
    assert "page cache" not in text(
        said(Limits(memory=4 * GIB), memory_peak=4 * GIB, memory_resident_peak=int(3.9 * GIB))
    )
    assert "page cache" not in text(said(memory_peak=4 * GIB, memory_resident_peak=GIB)), "it had no limit"


def shortage(level: OomLevel, limit: int | None = 2 * GIB) -> Shortage:
    return Shortage(time=0.0, level=level, whose=None, action="killed", limit=limit, usage=limit)


def test_out_of_memory_at_its_own_limit() -> None:
    found = said(Limits(memory=2 * GIB), shortages=(shortage("job"),), memory_resident_peak=GIB)
    assert text(found) == (
        "problem: The job ran out of memory once at its limit of 2 GiB. How much more it needs is not known: try twice "
        "as much, 4 GiB, next time, or make it need less."
    )
    found = said(shortages=(shortage("job"), shortage("job", None)), shortages_dropped=5)
    assert "ran out of memory at least 2 times at its limit of 2 GiB" in text(found), "others may be of the node"


def test_who_was_given_more_memory_and_ended_well_is_told_what_it_needed() -> None:
    grown = Shortage(time=0.0, level="job", whose=None, action="grown", limit=2 * GIB, usage=2 * GIB)
    used: dict[str, Any] = {"shortages": (grown,), "memory_resident_peak": 3 * GIB}
    assert "Ask for 4 GiB next time." in text(said(Limits(memory=4 * GIB), **used))
    others: tuple[dict[str, Any], ...] = ({"failed": True}, {"running": True}, {"shortages": (grown, shortage("job"))})
    for unknown in others:
        assert "is not known" in text(said(Limits(memory=4 * GIB), **(used | unknown)))


@pytest.mark.parametrize(
    ("level", "words"), [("host", "the node itself"), ("parent", "the job around it"), ("family", "a family inside")]
)
def test_out_of_memory_at_anothers_limit_is_not_blamed_on_the_job(level: OomLevel, words: str) -> None:
    (hint,) = said(Limits(memory=2 * GIB), shortages=(shortage(level),))
    assert words in hint.text
    assert "Ask for" not in hint.text


def test_kills_without_evidence() -> None:
    assert "killed 3 processes" in text(said(memory_oom_kills=3))
    assert said(memory_oom_kills=0) == []


def test_idle_cores() -> None:
    limits = Limits(cpus=8.0)
    (hint,) = said(limits, cpu_user=HOUR, cpu_system=HOUR // 10, cores_peak=1.9)
    assert (
        hint.text
        == "It asked for 8 cores and used 1.1 on average (14 %), 1.9 in its busiest time. Ask for 2 cores next time."
    )
    (hint,) = said(limits, cpu_user=HOUR, cpu_system=0, cores_peak=7.8)
    assert hint.level == "note"
    assert "up to 7.8 at times" in hint.text
    (hint,) = said(limits, cpu_user=HOUR, cpu_system=0)
    assert "See whether it can use all of them" in hint.text, "without samples nobody knows its busiest time"


def test_busy_cores() -> None:
    (hint,) = said(Limits(cpus=2.0), cpu_user=2 * HOUR, cpu_system=0)
    assert hint == Hint("good", "Its CPUs were well used: 2 cores of 2 cores on average.")


def test_cores_are_those_reserved_over_its_time() -> None:
    (hint,) = said(Limits(cpus=2.0), cpu_user=HOUR, cpu_system=0, cpu_reserved=8 * HOUR, cores_peak=1.0)
    assert "asked for 8 cores" in hint.text
    (hint,) = said(exclusive="0-3,8", cpu_user=HOUR, cpu_system=0, cores_peak=1.0)
    assert "asked for 5 cores" in hint.text


def test_one_core_that_is_idle_cannot_be_halved() -> None:
    assert said(Limits(cpus=1.0), cpu_user=HOUR // 10, cpu_system=0) == []


def test_stopped_by_its_quota() -> None:
    limits = Limits(cpus=2.0)
    found = said(limits, cpu_user=HOUR, cpu_system=0, cpu_periods=1000, cpu_throttled_periods=600)
    assert text(found).startswith("problem: It was stopped by its CPU quota of 2 cores in 60 %")
    found = said(limits, cpu_user=2 * HOUR, cpu_system=0, cpu_periods=1000, cpu_throttled_periods=980)
    assert [hint.level for hint in found] == ["problem"], "nothing is well where it was stopped"
    assert said(limits, cpu_periods=1000, cpu_throttled_periods=10) == []
    assert said(limits, cpu_periods=10, cpu_throttled_periods=10) == [], "ten periods are a second"


def test_waiting_for_disks() -> None:
    found = said(io_stall=HOUR // 1000 * 4 // 10, io_stall_full=HOUR // 1000 // 4)
    assert text(found).startswith("advice: Part of it waited for disks during 40 % of its time, all of it during 25 %.")
    assert said(io_stall=HOUR // 1000 // 10) == []


def test_waiting_for_a_cpu_is_not_told_twice() -> None:
    stalled: dict[str, Any] = {"cpu_stall": HOUR // 1000 // 2}
    assert "waited for a free CPU during 50 %" in text(said(**stalled))
    assert said(**stalled, cpu_throttled=HOUR // 2) == []


def test_refused_processes_and_swap() -> None:
    assert "because of its limit of 100" in text(said(Limits(pids=100), pids_refused=7))
    assert "Up to 1 GiB of its memory was swapped out" in text(said(memory_swap_peak=GIB, memory_resident_peak=2 * GIB))
    assert said(memory_swap_peak=MIB, memory_resident_peak=2 * GIB) == []


def test_a_job_of_5_ms_gets_no_advice() -> None:
    limits = Limits(memory=16 * GIB, cpus=8.0)
    used = {"memory_resident_peak": MIB, "cpu_user": 1000, "cpu_system": 0, "io_stall": 5000}
    assert said(limits, wall=5 * 10**6, **used) == []
    assert too_short(Facts(wall_ns=5 * 10**6, limits=limits, totals={})).startswith("The job took 5 ms: too short")
    assert said(limits, wall=5 * 10**6, shortages=(shortage("job"),)), "what went wrong is told to everybody"


def test_nothing_is_said_of_what_was_not_counted() -> None:
    assert said(Limits(memory=GIB, cpus=4.0, pids=10)) == []
    assert hints(Facts(wall_ns=0, limits=Limits(cpus=4.0), totals={"cpu_user": {"": 1}, "cpu_system": {"": 1}})) == []


def test_the_worst_comes_first() -> None:
    found = said(
        Limits(memory=16 * GIB, cpus=2.0),
        memory_resident_peak=GIB,
        memory_peak=16 * GIB,
        cpu_user=2 * HOUR,
        cpu_system=0,
        pids_refused=1,
    )
    assert [hint.level for hint in found] == ["problem", "advice", "note", "good"]


def test_a_need_is_no_larger_than_all_that_the_kernel_saw() -> None:
    peaks = {"memory_resident_peak": {"": 5}, "memory_kernel_peak": {"": 4}}
    assert needed(peaks) == 9
    assert needed(peaks | {"memory_peak": {"": 7}}) == 7, "the peaks were at different moments"
    assert needed(peaks | {"memory_peak": {"": 0}}) == 9
    assert needed({"memory_peak": {"": 7}}) is None


def test_an_idle_job_is_told_in_plain_numbers() -> None:
    (hint,) = said(Limits(cpus=2.0), cpu_user=HOUR // 20_000, cpu_system=0, cores_peak=0.0015)
    assert hint.text == (
        "It asked for 2 cores and used less than 0.01 on average (0 %), less than 0.01 in its busiest time. "
        "Ask for 1 core next time."
    )
