import time
from dataclasses import replace

import pytest

from acctd.cli.summary import ending, seconds, shortages, size, summary
from acctd.model import Limits, Record
from acctd.policies import LargeProcess, Shortage

SHORTAGE = Shortage(
    time=0.0,
    level="family",
    whose="r1.a",
    action="killed by the kernel",
    limit=32 << 20,
    usage=(32 << 20) - 4096,
    kills=2,
    memory={"anon": 30 << 20, "shmem": 0, "kernel": 4096},
    processes=(LargeProcess(4711, "py\x1b[31m", 30 << 20, 1.0), LargeProcess(8, "sh", 4096, 2.0)),
    text="Job r1.a\x1b went over.",
)


def record(**changes):
    fields = {
        "id": "r1", "owner": "ada", "uid": 1000, "node": "n", "state": "done", "started": 1.5, "ended": 2.5,
        "wall_ns": 2_000_000_000, "exit_code": 0, "exit_signal": None, "network": "nat", "limits": Limits(), "tags": {},
        "totals": {},
    }  # fmt: skip
    return Record(**(fields | changes))


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (1023, "1023 B"), (10239, "10239 B"), (10240, "10.0 KiB"), (1 << 20, "1.0 MiB"), (3 << 29, "1.5 GiB"),
     (1 << 50, "1.0 PiB"), (1 << 63, "8192.0 PiB")],
)  # fmt: skip
def test_sizes(number, text):
    assert size(number) == text


@pytest.mark.parametrize(("ns", "text"), [(0, "0.000 s"), (1_499_999, "0.001 s"), (86_400 * 10**9, "86400.000 s")])
def test_seconds(ns, text):
    assert seconds(ns) == text


@pytest.mark.parametrize(
    ("code", "number", "text"),
    [(0, None, "done, exit 0"), (7, None, "done, exit 7"), (None, 9, "killed by SIGKILL"),
     (None, 64, "killed by SIGRTMAX"), (None, 40, "killed by signal 40"), (None, None, "lost, exit status unknown")],
)  # fmt: skip
def test_endings(code, number, text):
    assert ending(record(exit_code=code, exit_signal=number)) == text


def test_a_record_without_any_counter_is_still_a_summary():
    assert summary(record()) == "job r1 of ada: done, exit 0\n  time      wall 2.000 s"


def test_a_job_without_wall_time_divides_by_nothing():
    text = summary(record(wall_ns=0, totals={"cpu_user": {"": 5}, "cpu_system": {"": 5}}))
    assert "cores" not in text


def test_everything_has_its_line():
    text = summary(
        record(
            totals={
                "cpu_user": {"": 1_500_000_000},
                "cpu_system": {"": 500_000_000},
                "cpu_throttled": {"": 250_000_000},
                "memory_anon_peak": {"": 200 << 20},
                "memory_shmem_peak": {"": 50 << 20},
                "memory_file_peak": {"": 100 << 20},
                "memory_peak": {"": 350 << 20},
                "memory_oom_kills": {"": 2},
                "block_read": {"8:0": 0, "254:0": 20_971_520},
                "block_reads": {"8:0": 0, "254:0": 20},
                "block_write": {"254:0": 1},
                "block_writes": {"254:0": 1},
                "pids_peak": {"": 3},
                "network": {"IncomingExternal": 1, "OutgoingInternal": 10_000_000, "OutgoingExternal": 0},
                "network_packets": {"OutgoingInternal": 7},
            },
            notes=("First note.", "Second note."),
        )
    )
    assert text.splitlines() == [
        "job r1 of ada: done, exit 0",
        "  time      wall 2.000 s; cpu 1.500 s user, 0.500 s system; 1.00 cores; throttled 0.250 s",
        "  memory    anon 200.0 MiB, shmem 50.0 MiB, file 100.0 MiB (sampled peaks); kernel's peak 350.0 MiB; "
        "2 killed for want of memory",
        "  block I/O 254:0 read 20,971,520 bytes in 20, written 1 bytes in 1 operations",
        "  tasks     3 at most",
        "  network   OutgoingExternal 0 bytes in 0 packets",
        "  network   OutgoingInternal 10,000,000 bytes in 7 packets",
        "  network   IncomingExternal 1 bytes in 0 packets",
        "  note      First note.",
        "  note      Second note.",
    ]


@pytest.fixture
def utc(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_a_shortage_is_a_line_of_the_summary_and_a_page_of_its_own(utc):
    once = summary(record(shortages=(SHORTAGE,), cpus="2,5-7"))
    assert once.splitlines()[-2:] == ["  cores     2,5-7", "  memory    out of memory: Job r1.a? went over."]
    often = summary(record(shortages=(SHORTAGE, replace(SHORTAGE, text="Again.")), shortages_dropped=3))
    assert often.splitlines()[-1] == "  memory    out of memory 5 times, the last time: Again."
    assert shortages((SHORTAGE,)).splitlines() == [
        "out of memory at 1970-01-01 00:00:00: a family inside it, killed by the kernel",
        "  what      Job r1.a? went over.",
        "  limit     32.0 MiB of job r1.a; 32.0 MiB in use",
        "  memory    anon 30.0 MiB, kernel 4096 B",
        "  killed    2 by the kernel",
        "   PID  RESIDENT              STARTED  NAME",
        "  4711  30.0 MiB  1970-01-01 00:00:01  py?[31m",
        "     8    4096 B  1970-01-01 00:00:02  sh",
    ]


def test_what_is_not_known_of_a_shortage_has_no_line(utc):
    bare = Shortage(0.0, "host", None, "killed", None, None)
    assert shortages((bare, bare), 2).splitlines() == [
        "out of memory at 1970-01-01 00:00:00: the node, killed",
        "(2 more in between, which are not kept)",
        "out of memory at 1970-01-01 00:00:00: the node, killed",
    ]
    assert shortages(()) == ""
