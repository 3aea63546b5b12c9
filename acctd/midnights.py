"""When a job comes to another day (UTC), and what is kept of it then: what a bill tells one month from the next by.

Pure functions, floor 3. A job's day is that of its start plus the time since on the boottime clock, so that no step of
the wall clock moves anything.
"""

from collections.abc import Mapping
from fractions import Fraction

from acctd.meter import State
from acctd.metrics import BILLED

_DAY = 86_400 * 10**9
_NAMES = tuple(metric.name for metric in BILLED)


def following(started: float, ns: int) -> int:
    """The end of the day in which a job is `ns` after its start (s since the epoch); in ns since the start, too."""
    begin = int(Fraction(started) * 10**9)
    return ((begin + ns) // _DAY + 1) * _DAY - begin


def billed(totals: Mapping[str, Mapping[str, int]]) -> State:
    """Of a job's totals those that a tariff can price."""
    return {name: dict(totals[name]) for name in _NAMES if name in totals}
