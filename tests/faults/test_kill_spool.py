"""`acctd serve` dies by SIGKILL at every step of filling its spool, and `acctd export` delivers what is there.

Every event and every record of the ledger is in the end once, and in order, in the file of a sink; what the records say
is what was signed. A sample may be lost with the agent that was about to write it, and none comes twice.
"""

import json
import time

import pytest

from acctd.ledger import FILE, Ledger
from tests.faults.bed import Bed
from tests.faults.dying import Death
from tests.faults.nursery import PATIENCE
from tests.faults.test_kill_serve import bed, disk, nursery

__all__ = ["bed", "disk", "nursery"]  # fixtures

WRITER, ROOM, OUTBOX = "acctd.spool:Writer", "acctd.spoolroom:SpoolRoom", "acctd.outbox:Outbox"
DEATHS = [
    *(Death(f"{WRITER}.append", when, number) for when in ("before", "after") for number in (1, 2, 3, 4)),
    *(Death(f"{WRITER}._begin_segment", when) for when in ("before", "after")),
    *(Death("acctd.kernel.libc:reserve", when, number) for when in ("before", "after") for number in (1, 3)),
    *(Death(f"{OUTBOX}.follow", when) for when in ("before", "after")),
    *(Death(f"{ROOM}.tidy", when) for when in ("before", "after")),
]
LIVES = 3  # of agents that die so, one after the other

SINK = """
[export]
spool_dir = "{directory}/spool"
positions_dir = "{directory}/positions"
[json.file]
path = "{directory}/lines.jsonl"
streams = ["records", "events", "samples"]
"""


def delivered(bed: Bed) -> dict[str, list[dict]]:
    """What the sink's file holds, by kind."""
    done = bed.node.acctd("export", "--once")
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict]] = {"event": [], "record": [], "sample": [], "agent": []}
    for line in (bed.node.directory / "lines.jsonl").read_text().splitlines():
        frame = json.loads(line)
        found[frame["kind"]].append(frame)
    return found


@pytest.mark.parametrize("bed", ["nftables"], indirect=True)
@pytest.mark.parametrize("death", DEATHS, ids=lambda death: f"{death.when} {death.point} {death.number}")
def test_each_event_and_record_once_whenever_the_agent_dies(bed: Bed, death: Death) -> None:
    bed.node.config.write_text(
        "poll_interval = 0.1\n" + bed.node.config.read_text() + SINK.format(directory=bed.node.directory)
    )
    for life in range(LIVES):
        bed.start(death)
        bed.ok("Create", job=f"job-{life}", network="host")
        bed.ok("Finish", job=f"job-{life}", exit_code=life)
        bed.ok("Create", job=f"living-{life}", network="host")
        bed.arm()
        bed.bury()
        if life == 1:
            delivered(bed)  # a sink is in the midst of it
    bed.start()
    for life in range(LIVES):
        bed.ok("Finish", job=f"living-{life}", exit_code=0)
    with Ledger(bed.node.directory / "state" / FILE) as ledger:
        records = ledger.records_after(0, 1000)
        events = ledger.events(since=0, limit=1000)
    assert len(records) == 2 * LIVES
    deadline = time.monotonic() + PATIENCE
    while not ((found := delivered(bed))["event"] and found["event"][-1]["number"] == events[-1].number):
        assert time.monotonic() < deadline, bed.log
    assert [(frame["number"], frame["digest"]) for frame in found["record"]] == [row[:2] for row in records]
    assert [frame["body"] for frame in found["record"]] == [json.loads(body) for _, _, body in records]
    assert [(frame["number"], frame["event"], frame["text"]) for frame in found["event"]] == [
        (event.number, event.event, event.text) for event in events
    ]
    times = [frame["time"] for kind in ("sample", "agent") for frame in found[kind]]
    assert len(set(times)) == len(times) > 0
