"""The sentences of a shortage: whom they blame, what they count, and that no name can break them."""

from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acctd.policies import LargeProcess, OomLevel, Shortage
from acctd.wording import sentence

MB = 1 << 20

MEMORY = {"anon": 1990 * MB, "shmem": 30 * MB, "file": 3 * MB, "kernel": 28 * MB, "swap": 0, "slab": 20 * MB}

SHORTAGE = Shortage(
    time=1.0,
    level="job",
    whose="12.0",
    action="held",
    limit=2048 * MB,
    usage=2047 * MB + 1,
    memory=MEMORY,
    processes=(LargeProcess(4711, "python3", 1800 * MB, 1.0), LargeProcess(4712, "sh", 4096, 1.0)),
)

BARE = Shortage(1.0, "job", "12.0", "killed", None, None)

IN_USE = " (in use 2047 MB: 1990 MB heap, 30 MB shared, 28 MB kernel; largest: python3, pid 4711, 1800 MB)"

ACTIONS = ("killed by the kernel", "killed", "held", "grown", "released", "undecided")


def test_a_job_over_its_limit():
    assert sentence("12.0", SHORTAGE) == (
        f"Job 12.0 went over its memory limit of 2048 MB{IN_USE} and was stopped, then ended; "
        "submit it again with more memory."
    )


@pytest.mark.parametrize(
    ("action", "facts", "text"),
    [
        ("killed", {}, "Job 12.0 went over its memory limit and was ended; submit it again with more memory."),
        ("killed by the kernel", {},
         "Job 12.0 went over its memory limit and the kernel killed 2 of its processes; submit it again with more "
         "memory."),
        ("grown", {"raised_to": 40 * MB},
         "Job 12.0 reached its memory limit; its limit was raised to 40 MB and it goes on."),
        ("grown", {}, "Job 12.0 reached its memory limit; its limit was raised and it goes on."),
        ("undecided", {},
         "Job 12.0 reached its memory limit; before it was decided what to do, it ended or had another limit; submit "
         "it again with more memory."),
        ("released", {"waited": 10.0},
         "Job 12.0 reached its memory limit; nobody decided within 10 s, so the kernel's own killer was let loose and "
         "killed 2 of its processes; submit it again with more memory."),
        ("released", {},
         "Job 12.0 reached its memory limit; nobody decided in time, so the kernel's own killer was let loose and "
         "killed 2 of its processes; submit it again with more memory."),
        ("asked\nthe oracle", {},
         "Job 12.0 went over its memory limit; what was done: asked?the oracle; submit it again with more memory."),
    ],
)  # fmt: skip
def test_each_action_has_its_words(action, facts, text):
    waited = facts.pop("waited", None)
    assert sentence("12.0", replace(BARE, action=action, kills=2, waited=waited), **facts) == text


@pytest.mark.parametrize(
    ("level", "whose", "action", "own", "text"),
    [
        ("family", "12.0.a", "held", 4096 * MB,
         "Job 12.0.a, inside job 12.0, went over its own memory limit of 2048 MB and was stopped, then ended; "
         "job 12.0 itself stayed within its limit of 4096 MB."),
        ("family", None, "killed", None,
         "A job, inside job 12.0, went over its own memory limit of 2048 MB and was ended; "
         "job 12.0 itself did not run out."),
        ("parent", "pilot", "killed", 512 * MB,
         "Job pilot, which job 12.0 is inside of, went over its memory limit of 2048 MB and was ended with job 12.0 in "
         "it; job 12.0 itself stayed within its limit of 512 MB."),
        ("parent", "pilot", "killed by the kernel", None,
         "Job pilot, which job 12.0 is inside of, went over its memory limit of 2048 MB and the kernel killed 1 of job "
         "12.0's processes; job 12.0 itself did not run out."),
        ("host", None, "killed by the kernel", 512 * MB,
         "The node itself ran out of memory and the kernel killed 1 of job 12.0's processes; the job stayed within its "
         "limit of 512 MB and may be submitted again as it is."),
        ("host", None, "killed", None,
         "The node itself ran out of memory and job 12.0 was ended; the job had no memory limit."),
    ],
)  # fmt: skip
def test_whose_memory_ran_out_is_blamed_and_nobody_else(level, whose, action, own, text):
    shortage = replace(BARE, level=level, whose=whose, action=action, kills=1, limit=2048 * MB)
    assert sentence("12.0", shortage, own_limit=own) == text


def test_on_a_node_without_memory_the_facts_are_the_jobs():
    shortage = replace(
        SHORTAGE, level="host", whose=None, limit=None, usage=None, memory={"anon": 5 * MB}, processes=()
    )
    assert "the job stayed within its limit of 9 MB (in use: 5 MB heap) and" in sentence(
        "1", shortage, own_limit=9 * MB
    )


def test_what_a_kernel_did_not_count_is_not_told():
    assert sentence("1", replace(BARE, action="killed by the kernel")).startswith(
        "Job 1 went over its memory limit and the kernel killed to make room;"
    )
    assert "let loose;" in sentence("1", replace(BARE, action="released"))


def test_swap_beside_the_limit_and_within_the_use():
    text = sentence("1", replace(SHORTAGE, memory=MEMORY | {"swap": 500 * MB}), swap=512 * MB)
    assert "its memory limit of 2048 MB and 512 MB of swap (in use 2047 MB: 1990 MB heap" in text
    assert "28 MB kernel, 500 MB in swap; largest" in text


def test_kinds_under_a_hundredth_are_left_out_and_small_jobs_are_told_in_kb():
    shortage = replace(BARE, usage=700 * 1024, memory={"anon": 600 * 1024, "kernel": 100 * 1024 - 1, "file": 4096})
    assert "(in use 700 KB: 600 KB heap, 100 KB kernel)" in sentence("1", shortage)


def test_what_was_not_looked_at_is_said():
    assert sentence("1", BARE, unseen=1200).startswith(
        "Job 1 went over its memory limit (processes not looked at: 1200) and"
    )


@given(
    st.sampled_from(get_args(OomLevel)),
    st.sampled_from(ACTIONS),
    st.text(max_size=15),
    st.none() | st.integers(0, 2**63),
    st.none() | st.dictionaries(st.sampled_from([*MEMORY, "sock"]), st.integers(0, 2**63)),
)
def test_any_facts_make_one_line(level, action, name, number, memory):
    processes = (LargeProcess(1, name, number or 0, 0.0),)
    shortage = Shortage(0.0, level, None, action, number, number, 0, memory, processes)
    text = sentence("12.0", shortage, own_limit=number, raised_to=number)
    assert text.isprintable()
    assert text.endswith(".")
    assert ("submit it again with more memory" in text) == (level == "job" and action != "grown")
    assert ("went over" in text or "reached" in text) == (level != "host")
