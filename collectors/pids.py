"""Processes and threads of one job, from the pids controller of either hierarchy.

Reads only, and counts only: who the processes are is no matter here. Kernel docs: admin-guide/cgroup-v1/pids.rst,
admin-guide/cgroup-v2.rst ("PID Interface Files"). Older kernels have no `pids.peak`: there the peak
is the highest number that the meter saw.
"""

from acctd.kernel.cgroupfs import CgroupDir
from acctd.metrics import PIDS, PIDS_PEAK, PIDS_REFUSED
from collectors.parse import named, single
from collectors.reader import Reader, present

METRICS = (PIDS, PIDS_PEAK, PIDS_REFUSED)


# pids.current:
#   3
parse_pids_current = single(PIDS)


# pids.peak:
#   3
parse_pids_peak = single(PIDS_PEAK)

# pids.events: forks refused by the limit; `max` is the line's name:
#   max 0
parse_pids_events = named({b"max": PIDS_REFUSED})


class PidsReader(Reader):
    """Reads one job's task counts: `directory` is its cgroup in the pids hierarchy (v1) or the unified one (v2)."""

    def __init__(self, directory: CgroupDir) -> None:
        files = (
            ("pids.current", parse_pids_current),
            ("pids.peak", parse_pids_peak),
            ("pids.events", parse_pids_events),
        )
        super().__init__(present(directory, files))
