"""What bills need of a record: who used how much of what, and when. Pure data and arithmetic, floor 3.

Everything billed is a counter, so a part of a job is a difference of two of its values; between two that are known, use
is taken to be even. All of it is in the signed record: the same bill comes out wherever that is read.
"""

import msgspec

from acctd.model import Midnight


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """As much of model.Record as is billed; decoding skips the rest, which is most of it."""

    id: str
    owner: str
    node: str
    started: float  # s since the epoch; the job's whole use lies in wall_ns from there, whatever a clock did meanwhile
    wall_ns: int
    totals: dict[str, dict[str, int]]
    tags: dict[str, str] = {}
    stacked: tuple[str, ...] = ()
    parent: str | None = None  # a family: its use is in its parent's account already
    midnights: tuple[Midnight, ...] = ()


_decoder = msgspec.json.Decoder(Usage)


def decode(body: bytes | msgspec.Raw) -> Usage:
    """Of a signed record's JSON. Raises msgspec.DecodeError."""
    return _decoder.decode(body)
