"""What bills need of a record: who used how much of what, and when. Pure data and arithmetic, floor 3.

Everything billed is a counter, so a part of a job is a difference of two of its values; between two that are known, use
is taken to be even. All of it is in the signed record: the same bill comes out wherever that is read.
"""

from collections.abc import Mapping, Sequence

import msgspec

from acctd.frames import tag
from acctd.meter import State
from acctd.metrics import BILLED
from acctd.model import Midnight

_BILLED = frozenset(metric.name for metric in BILLED)


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


def payer(usage: Usage) -> str:
    """Who pays: the job's tag `account`, in any case, else its owner."""
    tags = usage.tags
    return (tags.get("account") or tag(tags, "account") or usage.owner) if tags else usage.owner


def nanoseconds(stamp: float) -> int:
    """A time stamp (s since the epoch) as ns, to the nearest microsecond: finer a double cannot tell today's dates."""
    return round(stamp * 1e6) * 1000


def parts(usage: Usage, cuts: Sequence[int]) -> list[State]:
    """What was used up to the first cut, between each two, and after the last: one State more than there are cuts.

    Cuts are ns since the job's start, rising, within its wall time. Each counter's value at a cut is the floor of the
    straight line between the two readings around it (start, midnights, end); parts are differences of such values, so
    that they always add up to the totals, and cutting once more changes no value at the other cuts.
    """
    times, readings = _readings(usage)
    before: Mapping[str, Mapping[str, int]] = {}
    found, place = [], 1
    for cut in (*cuts, usage.wall_ns):
        while place < len(times) - 1 and times[place] < cut:
            place += 1
        now = readings[-1] if cut >= usage.wall_ns else _between(times, readings, place, cut)
        found.append(_difference(now, before))
        before = now
    return found


def _readings(usage: Usage) -> tuple[list[int], list[State]]:
    """All that is known of the counters, oldest first: times in ns since the start, and values. They never go back."""
    end = {name: labels for name, labels in usage.totals.items() if name in _BILLED}
    times, readings = [0], [{name: dict.fromkeys(labels, 0) for name, labels in end.items()}]
    for midnight in usage.midnights:
        if times[-1] < midnight.ns < usage.wall_ns:
            last = readings[-1]
            times.append(midnight.ns)
            readings.append(
                {
                    name: {
                        label: min(max(last[name][label], midnight.totals.get(name, {}).get(label, 0)), total)
                        for label, total in labels.items()
                    }
                    for name, labels in end.items()
                }
            )
    return [*times, usage.wall_ns], [*readings, end]


def _between(times: list[int], readings: list[State], place: int, at: int) -> State:
    """The counters at a time between the reading at `place` and the one before it."""
    low, high = readings[place - 1], readings[place]
    passed, span = at - times[place - 1], times[place] - times[place - 1]
    return {
        name: {label: v + (high[name][label] - v) * passed // span for label, v in labels.items()}
        for name, labels in low.items()
    }


def _difference(now: State, before: Mapping[str, Mapping[str, int]]) -> State:
    return {
        name: {label: value - before[name][label] for label, value in labels.items()} if before else labels
        for name, labels in now.items()
    }
