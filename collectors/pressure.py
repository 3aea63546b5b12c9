"""Pressure stall information of one job: how long its tasks waited for a CPU, for I/O or for memory.

Reads only: no trigger is set here. The files are in the unified hierarchy alone: on v2 the job's cgroup, on a hybrid
host the job's directory there. Kernel docs: accounting/psi.rst, "Cgroup2 interface".

Where PSI is compiled in but switched off (RHEL 8 without psi=1), older kernels show the files all the same and answer
every read with EOPNOTSUPP; that counts as absent.
"""

import errno

from acctd.errors import KernelRefusedError
from acctd.kernel.cgroupfs import CgroupDir
from acctd.metrics import CPU_STALL, IO_STALL, IO_STALL_FULL, MEMORY_STALL, MEMORY_STALL_FULL, Metric, Readings
from collectors.parse import MalformedFile, Parser, number
from collectors.reader import Reader, Source, present

METRICS = (CPU_STALL, IO_STALL, IO_STALL_FULL, MEMORY_STALL, MEMORY_STALL_FULL)


# memory.pressure (6.1); total is in us, and kernels before 5.13 have no `full` line in cpu.pressure:
#   some avg10=0.18 avg60=0.03 avg300=0.00 total=27808
#   full avg10=0.18 avg60=0.03 avg300=0.00 total=27808
def parse_pressure(text: bytes, path: str, metrics: dict[bytes, Metric]) -> Readings:
    """A pressure file's totals, us. `metrics` says which line becomes which metric."""
    readings: Readings = {}
    for line in text.split(b"\n"):
        if (metric := metrics.get(line.partition(b" ")[0])) is not None:
            _, total, value = line.rpartition(b" total=")
            if not total:
                raise MalformedFile(path, line)
            readings[metric, ""] = number(value, path, line)
    return readings


def _parser(metrics: dict[bytes, Metric]) -> Parser:
    return lambda text, path: parse_pressure(text, path, metrics)


# The `full` line of cpu.pressure is no metric: a cgroup waiting as a whole is its quota at work, see cpu_throttled.
_FILES: tuple[tuple[str, Parser], ...] = (
    ("cpu.pressure", _parser({b"some": CPU_STALL})),
    ("io.pressure", _parser({b"some": IO_STALL, b"full": IO_STALL_FULL})),
    ("memory.pressure", _parser({b"some": MEMORY_STALL, b"full": MEMORY_STALL_FULL})),
)


class PressureReader(Reader):
    """Reads one job's pressure: `directory` is its cgroup in the unified hierarchy."""

    def __init__(self, directory: CgroupDir) -> None:
        super().__init__([source for source in present(directory, _FILES) if _switched_on(source)])


def _switched_on(source: Source) -> bool:
    try:
        source.file.read()
    except KernelRefusedError as e:
        if isinstance(e.__cause__, OSError) and e.__cause__.errno == errno.EOPNOTSUPP:
            source.file.close()
            return False
        raise
    return True
