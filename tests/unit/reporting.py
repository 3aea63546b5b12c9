"""A job as reports are tested with, here and in the browser: much of everything, and text that means harm."""

import math
from datetime import UTC
from decimal import Decimal
from typing import Any

from acctd.bill import Bill, Line
from acctd.model import Limits, Record
from acctd.points import Point
from acctd.policies import LargeProcess, Shortage
from acctd.report.job import Subject

GIB = 1 << 30
SECOND = 10**9
STARTED = 1790000000.0  # 2026-09-21 14:13:20 UTC
HARM = "</title><script>alert(1)</script><img src=x onerror='alert(2)'> \"&amp; \x1b[31m\u202e\0"

_RULES = {"External": 6, "LHCONE": 4, "Internal": 2}


def record(*, seconds: int = 12000, **changes: Any) -> Record:
    """A job with a limit of 16 GiB that needed 1.5 GiB, which ran short of memory twice in a family."""
    wall = seconds * SECOND
    shortages = (
        Shortage(
            time=STARTED + 0.75 * seconds,
            level="family",
            whose="4711.0-step",
            action="grown",
            limit=2 * GIB,
            usage=2 * GIB,
            memory={"anon": 2040 << 20, "file": 5 << 20, "shmem": 0},
            processes=(
                LargeProcess(4242, "python3", 1900 << 20, STARTED + 1),
                LargeProcess(4243, "<b>sh</b>", 1 << 20, STARTED),
            ),
            text="The family reached its limit of 2.0 GiB, which was raised to 2.5 GiB.",
        ),
        Shortage(
            time=STARTED + 0.76 * seconds,
            level="family",
            whose="4711.0-step",
            action="killed",
            limit=5 * GIB // 2,
            usage=5 * GIB // 2,
            kills=2,
        ),
    )
    network = {
        f"{way}{name}": size * (10**9 if way == "Incoming" else 10**8)
        for name, size in _RULES.items()
        for way in ("Outgoing", "Incoming")
    }
    known: dict[str, Any] = {
        "id": "4711.0",
        "owner": "alice",
        "uid": 1001,
        "node": "wn042.example",
        "state": "done",
        "started": STARTED,
        "ended": STARTED + seconds,
        "wall_ns": wall,
        "exit_code": 0,
        "exit_signal": None,
        "network": "nat",
        "limits": Limits(memory=16 * GIB, cpus=4.0, pids=500),
        "tags": {"account": "physics", "Project": HARM},
        "totals": {
            "memory_resident_peak": {"": 3 * GIB // 2},
            "memory_kernel_peak": {"": 20 << 20},
            "memory_swap_peak": {"": 0},
            "memory_peak": {"": 15 * GIB},
            "memory_resident_time": {"": seconds << 20},
            "memory_reserved_time": {"": seconds << 24},
            "cpu_user": {"": wall * 11 // 10},
            "cpu_system": {"": wall // 10},
            "cpu_reserved": {"": 4 * wall},
            "pids_peak": {"": 37},
            "io_stall": {"": wall * 3 // 10_000},
            "io_stall_full": {"": wall // 10_000},
            "block_read": {"8:0": 80 * 10**9, "253:0": 80 * 10**9},
            "block_write": {"8:0": 3 * 10**9},
            "block_reads": {"8:0": 123456},
            "block_writes": {"8:0": 4567},
            "network": network,
            "network_packets": {rule: size // 1000 for rule, size in network.items()},
        },
        "stacked": ("253:0",),
        "notes": ("Its chain was removed by others and made anew.",),
        "shortages": shortages,
    }
    return Record(**(known | changes))


def points(of: Record, number: int = 1200) -> list[Point]:
    """Samples of the job; what grows ends as the record says."""
    wall = of.wall_ns
    network = of.totals.get("network", {})
    user, system = of.totals["cpu_user"][""], of.totals["cpu_system"][""]
    found = []
    for n in range(number):
        part = n / number
        wave = 0.5 + 0.5 * math.sin(part * 20)
        found.append(
            Point(
                at=int(wall * part),
                memory_anon=int(GIB * (0.3 + 0.8 * min(1, part * 3) + 0.1 * wave)),
                memory_shmem=int(0.1 * GIB * wave),
                memory_file=int(13 * GIB * min(1, part * 1.2) * (0.6 + 0.4 * wave)),
                memory_kernel=20 << 20,
                memory_swap=0,
                memory_limit=of.limits.memory,
                cpu_user=int(user * (part + 0.02 * math.sin(part * 12 * math.pi))),
                cpu_system=int(system * part),
                cpu_throttled=0,
                block_read=int(80e9 * part**2),
                block_write=int(3e9 * part),
                block_reads=int(123456 * part),
                block_writes=int(4567 * part),
                pids=30,
                network={rule: int(size * part ** (1 + len(rule) % 3)) for rule, size in network.items()},
            )
        )
    return found


def bill() -> Bill:
    """Four lines, one of them a discount."""

    def line(item: str, tier: str, quantity: str, unit: str, price: str, amount: str) -> Line:
        return Line(
            payer="physics",
            group=(),
            month="2026-09",
            valid_from="2026-01-01",
            item=item,
            tier=tier,
            quantity=Decimal(quantity),
            unit=unit,
            price=Decimal(price),
            amount=Decimal(amount),
        )

    return Bill(
        tariff="example",
        digest="ab" * 32,
        currency="USD",
        digits=2,
        timezone="UTC",
        since=STARTED,
        until=STARTED + 12000,
        group_by=(),
        lines=(
            line("CPU", "", "4.000000000", "core-hour", "0.0425", "0.17"),
            line("CPU", "discount 10 %", "0.17", "USD", "-0.1", "-0.02"),
            line("Egress to the internet", "up to 100 GB", "0.6", "GB", "0", "0.00"),
            line("Memory asked for", "", "53.333333333", "GiB-hour", "0.00457", "0.24"),
        ),
        total=Decimal("0.39"),
        records=1,
        payers=("physics",),
        living=(),
        notes=("item 'Tapes': no counter of it is in any record",),
    )


def subject(**changes: Any) -> Subject:
    """All of a job's report."""
    of = changes.get("record") or record()
    known: dict[str, Any] = {
        "record": of,
        "bill": bill(),
        "looked": "records: 4711 from ledger; first: 1 0a1b; last: 4711 9f8e",
        "zone": UTC,
    }
    if "points" not in changes:
        known["points"] = points(of)
    return Subject(**(known | changes))
