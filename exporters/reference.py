"""docs/metrics.md, made from the metric catalogue: `python -m exporters.reference > docs/metrics.md`.

A test holds the page against this, so that what is documented is what is published.
"""

import sys

from acctd.metrics import CATALOGUE

_HEAD = """# Published numbers

Made from `acctd/metrics.py` by `make docs`; do not edit. A *counter* only grows, a *peak* is the highest value seen, a
*gauge* is what is now (gauges are shown while a job lives; its record keeps counters and peaks). All are integers in
the unit given; an attribute that is HTCondor's own name is in HTCondor's unit, which is the division in brackets.
Numbers per device carry the label `major:minor`, those of NFS the mount point, numbers per rule the rule's name; in a
ClassAd the first two are summed and the last become one attribute a rule, such as `NetworkOutgoingInternal`. What the
kernel does not count is absent, never 0.

| name | unit | kind | ClassAd attribute | meaning |
|---|---|---|---|---|
"""

_SERIES = """
## What they are called as series

In Prometheus every one has the label `jobid` beside those named here, times are in seconds, and a peak is a gauge. In
InfluxDB the labels are tags, beside `cluster`, `host`, `owner`, `scheduler`, `job` and `parent`; values are integers
in the unit above. A rule's name is taken apart: `OutgoingInternal` is class `Internal`, direction `outgoing`.

| name | Prometheus | InfluxDB measurement, field | labels |
|---|---|---|---|
"""


def markdown() -> str:
    """The whole page."""
    rows, series = [], []
    for metric in CATALOGUE:
        attribute = f"`{metric.attribute}`" + (f" (/{metric.scale:,})" if metric.scale != 1 else "")
        rows.append(f"| `{metric.name}` | {metric.unit} | {metric.kind} | {attribute} | {metric.help} |\n")
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "-"
        series.append(
            f"| `{metric.name}` | `{metric.prometheus}` | `{metric.measurement}`, `{metric.field}` | {labels} |\n"
        )
    return _HEAD + "".join(rows) + _SERIES + "".join(series)


if __name__ == "__main__":
    sys.stdout.write(markdown())
