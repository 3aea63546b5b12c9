"""Readings become totals: monotonic sums that survive a counter reset and a restart of whoever reads.

Pure arithmetic on dictionaries; reads and stores nothing itself. A counter that comes back lower was reset: what it had
counted is kept and counting goes on from there.
"""

from collections.abc import Mapping

from acctd.metrics import BY_NAME, Key, Metric, Readings

State = dict[str, dict[str, int]]
"""Metric name -> label -> value: how totals are stored and published."""


class Meter:
    """One job's totals."""

    __slots__ = ("_kept", "totals")

    def __init__(self) -> None:
        self.totals: dict[Key, int] = {}
        # What a counter had counted before it was reset; almost always empty.
        self._kept: dict[Key, int] = {}

    def feed(self, readings: Readings) -> None:
        """Take in what the kernel counts now. A metric that is absent keeps its total."""
        totals, kept = self.totals, self._kept
        for key, value in readings.items():
            kind = key[0].kind
            if kind == "gauge":
                totals[key] = value
                if (peak := key[0].peak) is not None and value > totals.get((peak, key[1]), -1):
                    totals[peak, key[1]] = value
            elif kind == "peak":
                if value > totals.get(key, -1):
                    totals[key] = value
            else:
                total = value + kept[key] if key in kept else value
                before = totals.get(key, 0)
                if total < before:
                    kept[key] = before
                    total = before + value
                totals[key] = total

    def last(self, metrics: tuple[Metric, ...]) -> Readings:
        """What the kernel's counters stood at when last read, for a reader that must go on from there."""
        return {key: total - self._kept.get(key, 0) for key, total in self.totals.items() if key[0] in metrics}

    def published(self) -> State:
        """Counters and peaks, for the record; a gauge says nothing about a job that has ended."""
        return _named({key: value for key, value in self.totals.items() if key[0].kind != "gauge"})

    def state(self) -> tuple[State, State]:
        """Totals and kept parts, for the ledger."""
        return _named(self.totals), _named(self._kept)

    @classmethod
    def restore(cls, totals: Mapping[str, Mapping[str, int]], kept: Mapping[str, Mapping[str, int]]) -> "Meter":
        """The meter as it was stored. Metrics that this version no longer declares are dropped."""
        meter = cls()
        meter.totals = _keyed(totals)
        meter._kept = _keyed(kept)
        return meter


def _named(values: Mapping[Key, int]) -> State:
    state: State = {}
    for (metric, label), value in values.items():
        state.setdefault(metric.name, {})[label] = value
    return state


def _keyed(state: Mapping[str, Mapping[str, int]]) -> dict[Key, int]:
    return {
        (BY_NAME[name], label): value
        for name, labels in state.items()
        if name in BY_NAME
        for label, value in labels.items()
    }
