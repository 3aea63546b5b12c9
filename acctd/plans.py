"""How a record's counters come to a tariff's items: worked out once a period, so that a record costs little.

Pure data, floor 3.
"""

from dataclasses import dataclass, field

from acctd.metrics import split_rule
from acctd.tariff import Item, Period, Tariff


@dataclass(slots=True)
class Rules:
    """Of one network metric: which items take which of a chain's rules."""

    metric: str
    items: list[tuple[int, Item]]  # column and item
    known: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)

    def of(self, rule: str) -> tuple[str, tuple[int, ...]]:
        """A rule's class, and the columns of the items that take it. Directions are outgoing and incoming only."""
        if (found := self.known.get(rule)) is None:
            cls, direction = split_rule(rule)
            columns = tuple(
                column
                for column, item in self.items
                if (not item.classes or cls in item.classes) and item.direction in (None, direction)
            )
            found = self.known[rule] = (cls, columns)
        return found


@dataclass(frozen=True, slots=True)
class Plan:
    """One period of a tariff. Columns are places in Tariff.item_names."""

    sums: tuple[tuple[int, str], ...]  # column, metric: all its labels together
    devices: tuple[tuple[int, str], ...]  # likewise, without devices that lie on others
    networks: tuple[Rules, ...]
    walls: tuple[int, ...]
    jobs: tuple[int, ...]
    telling: tuple[tuple[int, str], ...]  # column, metric: it is to be told that a record has none


def plans(tariff: Tariff) -> list[Plan]:
    """By period."""
    columns = {name: column for column, name in enumerate(tariff.item_names)}
    return [_plan(period, columns) for period in tariff.periods]


def _plan(period: Period, columns: dict[str, int]) -> Plan:
    items = [(columns[item.name], item) for item in period.items]
    networks: dict[str, Rules] = {}
    for column, item in items:
        if item.measure.network:
            metric = item.measure.metrics[0].name
            networks.setdefault(metric, Rules(metric, [])).items.append((column, item))
    counted = [(column, item.measure, metric.name) for column, item in items for metric in item.measure.metrics]
    return Plan(
        sums=tuple((column, name) for column, meter, name in counted if not meter.network and not meter.devices),
        devices=tuple((column, name) for column, meter, name in counted if meter.devices),
        networks=tuple(networks.values()),
        walls=tuple(column for column, item in items if item.meter == "wall"),
        jobs=tuple(column for column, item in items if item.meter == "jobs"),
        telling=tuple((column, i.measure.metrics[0].name) for column, i in items if i.measure.absent),
    )
