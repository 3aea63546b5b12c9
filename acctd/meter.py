"""Readings become totals: monotonic sums that survive lost counters and a restart of whoever reads.

Pure arithmetic on dictionaries; reads and stores nothing itself. A total never goes back and nothing is added twice:
a counter that comes back lower is taken to have forgotten something, and only what it gains from there on counts,
unless the caller knows that it began anew at zero and says so first (`rebase`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from acctd.metrics import BY_NAME, Key, Metric, Readings

State = dict[str, dict[str, int]]
"""Metric name -> label -> value: how totals are stored and published."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A meter at rest, as the ledger keeps it."""

    totals: State = field(default_factory=dict)
    kept: State = field(default_factory=dict)


class Meter:
    """One job's totals."""

    __slots__ = ("_kept", "changes", "totals")

    def __init__(self) -> None:
        self.changes = 0
        """How often something was fed: as long as it is the same, so is all that was ever fed. Sums over time, which
        integrals.py puts beside it, grow all the same.
        """
        self.totals: dict[Key, int] = {}
        # What belongs to a total and is not in its counter; almost always empty.
        self._kept: dict[Key, int] = {}

    def feed(self, readings: Readings) -> None:
        """Take in what the kernel counts now. A metric that is absent keeps its total."""
        self.changes += 1
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
                    # What it gained since the last reading cannot be told from what it lost.
                    kept[key] = before - value
                    total = before
                totals[key] = total

    def rebase(self, metrics: Iterable[Metric]) -> None:
        """These metrics' counters are new and begin at zero: what was counted so far is kept and they add to it."""
        wanted = set(metrics)
        for key, total in self.totals.items():
            if key[0] in wanted:
                self._kept[key] = total

    def last(self, metrics: tuple[Metric, ...]) -> Readings:
        """What the kernel's counters stood at when last read, for a reader that must go on from there."""
        return {key: total - self._kept.get(key, 0) for key, total in self.totals.items() if key[0] in metrics}

    def published(self) -> State:
        """Counters and peaks, for the record; a gauge says nothing about a job that has ended."""
        return named({key: value for key, value in self.totals.items() if key[0].kind != "gauge"})

    def now(self) -> State:
        """Everything, gauges included."""
        return named(self.totals)

    def stored(self) -> Stored:
        """All of it, for the ledger."""
        return Stored(named(self.totals), named(self._kept))

    @classmethod
    def restore(cls, stored: Stored) -> "Meter":
        """The meter as it was stored. Metrics that this version no longer declares are dropped."""
        meter = cls()
        meter.totals = keyed(stored.totals)
        meter._kept = keyed(stored.kept)
        return meter


def named(values: Mapping[Key, int]) -> State:
    """Readings by the metrics' names, for JSON."""
    state: State = {}
    for (metric, label), value in values.items():
        state.setdefault(metric.name, {})[label] = value
    return state


def add(*states: Mapping[str, Mapping[str, int]]) -> State:
    """The sums, by name and label."""
    total: State = {}
    for state in states:
        for name, labels in state.items():
            sums = total.setdefault(name, {})
            for label, value in labels.items():
                sums[label] = sums.get(label, 0) + value
    return total


def keyed(state: Mapping[str, Mapping[str, int]]) -> Readings:
    """The reverse of named(); names that this version does not declare are dropped."""
    return {
        (BY_NAME[name], label): value
        for name, labels in state.items()
        if name in BY_NAME
        for label, value in labels.items()
    }
