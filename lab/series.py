"""Samples of jobs that never ran, by their number: the same number is the same sample, for whoever makes it.

What a database holds in the end can so be compared with what was written, without remembering any of it. As a program
it stands in for an agent: `python -m lab.series CONFIG COUNT [PACE]` leaves samples 0 to COUNT - 1 in the spool of a
configuration, goes on where a dead one was, and keeps the spool's room as an agent does.
"""

import json
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

from acctd import config as configuration
from acctd.frames import EVENTS, SAMPLES, EventFrame, Sample, decode, encode
from acctd.spoolroom import SpoolRoom

JOBS = 50  # a tick has a sample of each
POINTS = 8  # of a sample, in InfluxDB's line protocol
BEGAN = 1_790_000_000_000_000_000  # ns since the epoch; a spool holds no future, a database may
STEP = 20_000_000  # ns between a tick's samples
BAD_EVERY = 1000  # samples
NAMED = "named-bad"  # a job that whoever stands before the database refuses
LONG = "long-" + "x" * 70_000  # one that InfluxDB itself refuses: a series' key has 65535 bytes at most
EVENT_EVERY = 20  # samples


class Sums(NamedTuple):
    """What the good ones among the first so many samples come to."""

    samples: int
    user: int  # of acctd_cpu's user_ns
    bad: int  # samples that are none of the good


def job(number: int) -> str:
    """Most are good; every so many are bad, in one way or in the other."""
    if number % BAD_EVERY == BAD_EVERY // 2:
        return LONG if number % (2 * BAD_EVERY) == BAD_EVERY // 2 else NAMED
    return f"job-{number % JOBS}"


def sample(number: int) -> Sample:
    """Of six measurements, acctd_network with two series, and limits: POINTS points."""
    growing = number * 1000
    return Sample(
        time=BEGAN + number * STEP,
        job=job(number),
        owner=f"user{number % 7}",
        uid=1000 + number % 7,
        started=BEGAN / 1e9,
        network="host",
        totals={
            "memory_anon": {"": 2**20 + growing},
            "memory_file": {"": growing},
            "memory_anon_peak": {"": 2**20 + growing},
            "memory_peak": {"": 2**21 + growing},
            "cpu_user": {"": growing + 1},
            "cpu_system": {"": growing},
            "block_read": {"8:0": growing},
            "block_write": {"8:0": 4096 * number},
            "pids": {"": 3},
            "pids_peak": {"": 4},
            "cpu_stall": {"": number},
            "memory_stall": {"": number},
            "network": {"OutgoingInternal": growing, "IncomingExternal": 7 * number},
            "network_packets": {"OutgoingInternal": number, "IncomingExternal": number},
        },
        tags={"account": "physics"},
        limits={"memory": 2**30, "cpus": 2.0, "pids": 100},
    )


def event(number: int) -> EventFrame:
    """With what a text may hold."""
    return EventFrame(number, BEGAN / 1e9 + number, "limit", f'"{number}" is told,\n\\ with=all ÄÖ', f"job-{number}")


def sums(count: int) -> Sums:
    good = [number for number in range(count) if job(number).startswith("job-")]
    return Sums(len(good), sum(1000 * number + 1 for number in good), count - len(good))


def ticks(first: int, count: int) -> Iterator[list[bytes]]:
    """Encoded, as many as there are jobs at a time."""
    for start in range(first, count, JOBS):
        yield [encode(sample(number)) for number in range(start, min(start + JOBS, count))]


def main(config: str, count: int, pace: float) -> None:
    room = SpoolRoom(configuration.load(config, {}).export)
    samples, events = room.writers[SAMPLES], room.writers[EVENTS]
    last, told = (decode(writer.last) if writer.last else None for writer in (samples, events))
    first = (last.time - BEGAN) // STEP + 1 if isinstance(last, Sample) else 0
    number = told.number + 1 if isinstance(told, EventFrame) else 0
    for turn, lines in enumerate(ticks(first, count)):
        samples.append(lines)
        written = first + (turn + 1) * JOBS
        while number < min(written, count) // EVENT_EVERY:
            events.append([encode(event(number))])
            number += 1
        if turn % 20 == 0:
            room.tidy()
        time.sleep(pace)
    room.tidy()
    room.close()
    print(json.dumps({"samples": samples.next, "events": events.next}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]) if len(sys.argv) > 3 else 0.0)
