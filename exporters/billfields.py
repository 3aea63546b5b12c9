"""What of acctd_record is there so that a bill can be made from it that is the ledger's to the last digit.

A record's other fields have sums over devices and mounts. A job that a bill must part, at midnight as a rule, is parted
by what was known of each of them then: that is kept as text, in pieces, because a string of InfluxDB 1 has a limit.
Pure.
"""

from collections.abc import Iterator, Mapping

import msgspec

from acctd.meter import State
from acctd.metrics import BILLED, NETWORK_BYTES, NETWORK_PACKETS
from acctd.model import Midnight, Record

FIELD = "billed"
"""billed, billed_2, ...: pieces of one text of JSON."""

_PIECE = 16_000
"""Characters of a piece: four bytes each at most, and none that is written as two."""

_LABELLED = frozenset(metric.name for metric in BILLED) - {NETWORK_BYTES.name, NETWORK_PACKETS.name}


class Parts(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the sums of a record do not tell."""

    totals: State = {}  # of what has labels and is summed over them in the point
    midnights: tuple[Midnight, ...] = ()


_decoder = msgspec.json.Decoder(Parts)


def texts(record: Record) -> Iterator[tuple[str, str]]:
    """Fields and their strings; none of a job that is parted by its sums alone."""
    labelled = {
        name: {label: value for label, value in labels.items() if label not in record.stacked}
        for name, labels in record.totals.items()
        if name in _LABELLED and "" not in labels
    }
    if not record.midnights and all(len(labels) < 2 for labels in labelled.values()):
        return
    text = msgspec.json.encode(Parts(labelled, record.midnights)).decode()
    for number, start in enumerate(range(0, len(text), _PIECE), 1):
        yield FIELD if number == 1 else f"{FIELD}_{number}", text[start : start + _PIECE]


def restored(fields: Mapping[str, object]) -> Parts:
    """The reverse, of a point's fields. Raises msgspec.DecodeError for what texts() did not write."""
    pieces, number = [], 1
    while isinstance(piece := fields.get(FIELD if number == 1 else f"{FIELD}_{number}"), str):
        pieces.append(piece)
        number += 1
    return _decoder.decode("".join(pieces)) if pieces else Parts()
