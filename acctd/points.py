"""One kept sample of a job: what a plot needs to know of one moment, made from a job's totals or its record.

Pure data and its encoding; history.py keeps it. No money rests on it.
"""

import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

from acctd.meter import keyed
from acctd.metrics import (
    BLOCK_READ_BYTES,
    BLOCK_READS,
    BLOCK_WRITE_BYTES,
    BLOCK_WRITES,
    CPU_SYSTEM,
    CPU_THROTTLED,
    CPU_USER,
    MEMORY_ANON,
    MEMORY_FILE,
    MEMORY_KERNEL,
    MEMORY_SHMEM,
    MEMORY_SWAP,
    NETWORK_BYTES,
    PIDS,
    Key,
)
from acctd.model import Record


class Point(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A job at one moment, with the families inside it. Counters stand at 0 when the job starts; no point says so.

    The time is that of midnights and wall_ns in its record: no step of a clock bends a plot.
    """

    at: int  # ns since the job's start, on the boottime clock
    memory_anon: int  # bytes, as the next five
    memory_shmem: int
    memory_file: int
    memory_kernel: int
    memory_swap: int
    memory_limit: int | None  # what the job might use then; None: no limit of its own
    cpu_user: int  # ns so far, as the next two
    cpu_system: int
    cpu_throttled: int
    block_read: int  # bytes so far, on all devices that lie on no other; likewise the next three
    block_write: int
    block_reads: int  # operations so far
    block_writes: int
    pids: int  # processes and threads
    network: dict[str, int] = {}  # bytes so far by the chain's rule (metrics.split_rule); one without traffic is absent


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Point])
_PRESSED = b"\x78"  # RFC 1950: CMF of a window of 32 KiB; a Point begins with an array's mark


def point(at: int, totals: Mapping[Key, int], limit: int | None, stacked: Collection[str]) -> Point:
    """A job's totals as a point; devices in `stacked` are counted under those that they lie on."""
    network: dict[str, int] = {}
    block = {BLOCK_READ_BYTES: 0, BLOCK_WRITE_BYTES: 0, BLOCK_READS: 0, BLOCK_WRITES: 0}
    for (metric, label), value in totals.items():
        if not label or not value:
            continue
        if metric is NETWORK_BYTES:
            network[label] = value
        elif metric in block and label not in stacked:
            block[metric] += value
    get = totals.get
    return Point(
        at,
        get((MEMORY_ANON, ""), 0),
        get((MEMORY_SHMEM, ""), 0),
        get((MEMORY_FILE, ""), 0),
        get((MEMORY_KERNEL, ""), 0),
        get((MEMORY_SWAP, ""), 0),
        limit,
        get((CPU_USER, ""), 0),
        get((CPU_SYSTEM, ""), 0),
        get((CPU_THROTTLED, ""), 0),
        block[BLOCK_READ_BYTES],
        block[BLOCK_WRITE_BYTES],
        block[BLOCK_READS],
        block[BLOCK_WRITES],
        get((PIDS, ""), 0),
        network,
    )


def last_point(record: Record) -> Point:
    """A job's end, as its record has it: of what is no counter it uses nothing any more."""
    return point(record.wall_ns, keyed(record.totals), record.limits.memory, record.stacked)


def ended(kept: Sequence[Point], record: Record) -> list[Point]:
    """The kept points of a job up to its end, which is missing where an agent died between signing and keeping it."""
    if not kept or kept[-1].at >= record.wall_ns:
        return list(kept)
    return [*kept, last_point(record)]


def encode(point: Point) -> bytes:
    """One point; of several, one is written after the other."""
    return _encoder.encode(point)


def packed(bodies: Iterable[bytes]) -> bytes:
    """Encoded points in one piece that others may be added to."""
    return b"".join(bodies)


def pressed(body: bytes) -> bytes:
    """A piece made small, once nothing is added to it any more."""
    return body if body.startswith(_PRESSED) else zlib.compress(body)


def unpressed(body: bytes) -> bytes:
    """The reverse. Raises zlib.error for what was not written here."""
    return zlib.decompress(body) if body.startswith(_PRESSED) else body


def decode(count: int, body: bytes) -> list[Point]:
    """A piece's points, of which there are so many. Raises msgspec.MsgspecError and zlib.error for another one."""
    return _decoder.decode(b"\xdd" + count.to_bytes(4, "big") + unpressed(body))
