"""Processes and threads of one job, from the pids controller of either hierarchy.

Reads only, and counts only: who the processes are is no matter here. Kernel docs: admin-guide/cgroup-v1/pids.rst,
admin-guide/cgroup-v2.rst ("PID Interface Files"). Older kernels have no `pids.peak`: there the number of the moment
is emitted as the peak, of which the meter keeps the highest.
"""

from acctd.kernel.cgroupfs import CgroupDir
from acctd.metrics import PIDS, PIDS_PEAK, PIDS_REFUSED, Readings
from collectors.parse import named, parse_number, single
from collectors.reader import Reader, present

METRICS = (PIDS, PIDS_PEAK, PIDS_REFUSED)


_PIDS, _PIDS_PEAK = (PIDS, ""), (PIDS_PEAK, "")

# pids.current:
#   3
parse_pids_current = single(PIDS)


def parse_pids_current_as_peak(text: bytes, path: str) -> Readings:
    """Tasks now, standing in for pids.peak too."""
    now = parse_number(text, path)
    return {_PIDS: now, _PIDS_PEAK: now}


# pids.peak:
#   3
parse_pids_peak = single(PIDS_PEAK)

# pids.events: forks refused by the limit; `max` is the line's name:
#   max 0
parse_pids_events = named({b"max": PIDS_REFUSED})


class PidsReader(Reader):
    """Reads one job's task counts: `directory` is its cgroup in the pids hierarchy (v1) or the unified one (v2)."""

    def __init__(self, directory: CgroupDir) -> None:
        current = parse_pids_current if directory.has("pids.peak") else parse_pids_current_as_peak
        files = (("pids.current", current), ("pids.peak", parse_pids_peak), ("pids.events", parse_pids_events))
        super().__init__(present(directory, files))
