"""A simulated year of a site: records of ordinary batch jobs, as an agent signs them and as a sink writes them.

Seeded by node and month, so that it is the same wherever and in whatever order it is made. Written by hand, because ten
million records are wanted and an encoder would take most of the time.
"""

import random
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

YEAR = 2026
OWNERS, ACCOUNTS = 300, 40
MONTHS = range(1, 13)
_DAY = 86400

END = datetime(YEAR + 1, 1, 1, tzinfo=UTC).timestamp()
"""The last jobs end then at the latest: what the plain sum over all records is, the year's bill is, too."""


class Part(NamedTuple):
    """The records of one node that began in one month."""

    node: int
    month: int
    records: int

    def write(self, directory: Path) -> int:
        """Into a file of JSON lines; its bytes."""
        with open(directory / f"node{self.node:04}-{self.month:02}.jsonl", "wb", buffering=2**20) as lines:
            for number, (_, body) in enumerate(self.bodies(), 1):
                lines.write(
                    b'{"at":"%d-01-01T00:00:00.000000Z","kind":"record","number":%d,"digest":"%064x","time":%d,"body":%b}\n'
                    % (YEAR, number, number, number, body)
                )
            return lines.tell()

    def bodies(self) -> Iterator[tuple[float, bytes]]:
        """When each ended, and its JSON. Most jobs take hours; some see days end, and so have what was used by then."""
        rng = random.Random(f"{self.node} {self.month}")  # noqa: S311  # nobody is to be surprised
        begin = datetime(YEAR, self.month, 1, tzinfo=UTC).timestamp()
        end = datetime(YEAR + self.month // 12, self.month % 12 + 1, 1, tzinfo=UTC).timestamp()
        step = (end - begin) / self.records
        for number in range(self.records):
            started = begin + (number + rng.random()) * step
            wall = min(int(rng.expovariate(1 / 9000) * 1e9) + 10**9, int((END - started) * 1e9) - 10**6)
            yield started + wall / 1e9, self._body(rng, number, started, wall)

    def _body(self, rng: random.Random, number: int, started: float, wall: int) -> bytes:
        cores, memory = rng.choice((1, 1, 1, 2, 4, 8)), rng.choice((2, 2, 4, 8, 16))
        owner = int(OWNERS * rng.random() ** 2)
        use = (
            *(int(wall * cores * rng.uniform(0.6, 0.95)), int(wall * cores * rng.uniform(0, 0.05)), wall * cores),
            *(wall * memory // 1000 * 2**20 // 10**6, wall * memory // 2000 * 2**20 // 10**6),
            *(int(rng.expovariate(1 / mean)) for mean in (2e8, 3e9, 1e8, 4e8, 5e9, 1e9)),
        )
        days = range(int(started) // _DAY + 1, int(started + wall / 1e9) // _DAY + 1)
        midnights = []
        for ns in (int((day * _DAY - started) * 1e9) + 5 * 10**9 for day in days):
            if ns < wall:
                midnights.append(f'{{"ns":{ns},"totals":{_totals([value * ns // wall for value in use])}}}')
        peaks = (
            f',"memory_resident_peak":{{"":{memory << 29}}},"memory_file_peak":{{"":{memory << 28}}},"memory_peak":'
            f'{{"":{memory << 30}}},"pids_peak":{{"":{cores + 3}}}}}'
        )
        return (
            f'{{"id":"{self.month}{number:06}.0","owner":"user{owner}","uid":{1000 + owner},'
            f'"node":"node{self.node:04}",'
            f'"state":"done","started":{started!r},"ended":{started + wall / 1e9!r},"wall_ns":{wall},"exit_code":0,'
            f'"exit_signal":null,"network":"nat","limits":{{"memory":{memory << 30},"memory_soft":null,"swap":null,'
            f'"cpus":{cores}.0,"cpu_burst":null,"cpu_shares":null,"cpuset":null,"pids":null,"memory_policy":"custom"}},'
            f'"tags":{{"account":"account{owner % ACCOUNTS}","scheduler":"htcondor"}},'
            f'"totals":{_totals(use)[:-1]}{peaks},'
            '"stacked":[],"notes":[],"parent":null,"shortages":[],"shortages_dropped":0,"cpus":"",'
            f'"midnights":[{",".join(midnights)}]}}'
        ).encode()


_SHAPE = (
    '{"cpu_user":{"":%d},"cpu_system":{"":%d},"cpu_reserved":{"":%d},"memory_reserved_time":{"":%d},'
    '"memory_resident_time":{"":%d},"network":{"OutgoingExternal":%d,"IncomingExternal":%d,"OutgoingInternal":%d,'
    '"IncomingInternal":%d},"block_read":{"8:0":%d},"block_write":{"8:0":%d}}'
)


def _totals(values: Sequence[int]) -> str:
    return _SHAPE % tuple(values)


def parts(records: int, nodes: int) -> list[Part]:
    """A whole year of so many records, rounded up to the same for each node and month."""
    each = -(-records // (nodes * len(MONTHS)))
    return [Part(node, month, each) for month in MONTHS for node in range(nodes)]
