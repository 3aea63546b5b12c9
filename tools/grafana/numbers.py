"""What dashboards show, by its names in each database: metrics of the catalogue, limits, the agent's own numbers.

Names come from the declarations and the exporters, so that a dashboard cannot name what nobody writes.
"""

from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily

from acctd.metrics import LIMITS, Metric
from exporters.prometheus import AGENT


@dataclass(frozen=True)
class Number:
    """One published number. `per_unit` of InfluxDB's are one of Prometheus', which is what is shown."""

    measurement: str
    field: str
    prometheus: str
    labels: tuple[str, ...] = ()
    per_unit: int = 1
    of_job: bool = True


def of(metric: Metric) -> Number:
    """A metric of the catalogue."""
    return Number(metric.measurement, metric.field, metric.prometheus, metric.labels, metric.per_base_unit)


def limit(name: str) -> Number:
    """A limit of a job. Raises KeyError for one that is not published."""
    return Number("acctd_limit", LIMITS[name].field, LIMITS[name].prometheus)


def agent(name: str) -> Number:
    """One of AgentSample.numbers. Raises KeyError for one that exporters do not know."""
    family, _ = AGENT[name]
    suffix = "_total" if family is CounterMetricFamily else ""
    return Number("acctd_agent", name, f"acctd_agent_{name}{suffix}", of_job=False)
