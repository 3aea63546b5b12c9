"""Every number that acctd publishes, declared once: name, unit, kind, help, and what each exporter calls it.

Collectors emit readings under these metrics and nothing else; exporters and docs/metrics.md derive their names from
here; so are the limits that stand beside them. Pure data, floor 0. Integers all the way: an exporter scales at the
edge, nothing before it rounds.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "peak"]
"""counter: only grows. gauge: what is now. peak: the highest value seen; the meter keeps the maximum."""


_MEASUREMENTS = {"block": "blkio"}
_WRITTEN = {"bytes": "bytes", "ns": "ns", "us": "us", "ms": "ms", "KiB*s": "kib_s"}
"""Units as names in InfluxDB end with them."""
_BASE = {"bytes": "bytes", "KiB*s": "kib_seconds"}
"""Units of Prometheus; seconds apart."""
_PER_SECOND = {"ns": 10**9, "us": 10**6, "ms": 10**3}
_LABELS = {"acctd_blkio": ("device",), "acctd_nfs": ("mount",), "acctd_network": ("class", "direction")}


@dataclass(frozen=True, slots=True, eq=False)
class Metric:
    """One published number. Compared and hashed by identity: a metric is declared once and a tick hashes thousands.

    `classad` is HTCondor's attribute where there is one; `scale` divides the integer into the attribute's unit: bytes
    into whole KiB, rounded up, and ns into real seconds. A number labelled by rule has the rule's name appended.
    """

    name: str
    unit: str
    kind: Kind
    help: str
    classad: str | None = None
    scale: int = 1
    peak: "Metric | None" = None  # of a gauge: the metric that keeps the highest of its sampled values

    @property
    def attribute(self) -> str:
        """The ClassAd attribute: HTCondor's, else Acctd and the name in CamelCase, in the metric's own unit."""
        return self.classad or "Acctd" + camel(self.name)

    @property
    def measurement(self) -> str:
        """InfluxDB's measurement: that of the controller, which the name begins with; stalls have one of their own."""
        prefix = self.name.partition("_")[0]
        return "acctd_pressure" if "stall" in self.name else f"acctd_{_MEASUREMENTS.get(prefix, prefix)}"

    @property
    def field(self) -> str:
        """InfluxDB's field: the rest of the name, and the unit where that is one of size or time; always an integer."""
        stem = self.name if "stall" in self.name else self.name.partition("_")[2]
        return "_".join(part for part in (stem, self.suffix if stem else self.unit) if part)

    @property
    def suffix(self) -> str:
        """The unit as names in InfluxDB end with it: only one of size or time is written."""
        return _WRITTEN.get(self.unit, "")

    @property
    def prometheus(self) -> str:
        """Prometheus' name: base units (s, bytes), `_total` on counters only. https://prometheus.io/docs/practices/naming"""
        unit = _BASE.get(self.unit, "seconds" if self.unit in _PER_SECOND else "")
        return "_".join(part for part in ("acctd_job", self.name, unit, "total" * (self.kind == "counter")) if part)

    @property
    def per_base_unit(self) -> int:
        """How many of the metric's units make one of Prometheus'."""
        return _PER_SECOND.get(self.unit, 1)

    @property
    def labels(self) -> tuple[str, ...]:
        """What a reading's label is called outside; a rule's name is taken apart, see split_rule()."""
        return _LABELS.get(self.measurement, ())


@dataclass(frozen=True, slots=True)
class Limit:
    """An amount that a job may use of something, published beside what it does use; model.Limits.`name`."""

    name: str
    unit: str
    help: str

    @property
    def whole(self) -> bool:
        """Whether it is an integer always; cores are a fraction."""
        return self.unit != "cores"

    @property
    def field(self) -> str:
        """InfluxDB's field in acctd_limit; with `limit_` before it in acctd_record."""
        return f"{self.name}_{self.unit}" if self.unit in _WRITTEN else self.name

    @property
    def prometheus(self) -> str:
        """Prometheus' name; bytes are its base unit, too."""
        return f"acctd_job_limit_{self.field}"


def camel(name: str) -> str:
    """memory_soft -> MemorySoft, as ClassAd attributes are written."""
    return "".join(part.capitalize() for part in name.split("_"))


def split_rule(rule: str) -> tuple[str, str]:
    """A rule's name as class and direction: OutgoingInternal -> ("Internal", "outgoing")."""
    for direction in ("Outgoing", "Incoming"):
        if rule.startswith(direction):
            return rule.removeprefix(direction), direction.lower()
    return rule, "-"


# A reading's key: the metric, and the device or rule it belongs to ("" where there is only one).
Key = tuple[Metric, str]
Readings = dict[Key, int]


# Memory: kinds apart, never blended. Kernel docs: admin-guide/cgroup-v1/memory.rst, admin-guide/cgroup-v2.rst.
MEMORY_ANON_PEAK = Metric("memory_anon_peak", "bytes", "peak", "highest sampled memory_anon")
MEMORY_SHMEM_PEAK = Metric("memory_shmem_peak", "bytes", "peak", "highest sampled memory_shmem")
MEMORY_FILE_PEAK = Metric("memory_file_peak", "bytes", "peak", "highest sampled memory_file")
MEMORY_KERNEL_PEAK = Metric("memory_kernel_peak", "bytes", "peak", "highest sampled memory_kernel")
MEMORY_SWAP_PEAK = Metric("memory_swap_peak", "bytes", "peak", "highest sampled memory_swap")
MEMORY_RESIDENT_PEAK = Metric(
    "memory_resident_peak", "bytes", "peak", "highest sampled memory_resident", classad="ResidentSetSize", scale=1024
)
MEMORY_ANON = Metric(
    "memory_anon", "bytes", "gauge", "anonymous memory: heap, stack, private mappings", peak=MEMORY_ANON_PEAK
)
MEMORY_SHMEM = Metric("memory_shmem", "bytes", "gauge", "shared memory and tmpfs", peak=MEMORY_SHMEM_PEAK)
MEMORY_FILE = Metric(
    "memory_file", "bytes", "gauge", "page cache of files, without shared memory", peak=MEMORY_FILE_PEAK
)
MEMORY_KERNEL = Metric("memory_kernel", "bytes", "gauge", "kernel memory charged to the job", peak=MEMORY_KERNEL_PEAK)
MEMORY_SWAP = Metric("memory_swap", "bytes", "gauge", "swapped-out memory", peak=MEMORY_SWAP_PEAK)
MEMORY_RESIDENT = Metric(
    "memory_resident", "bytes", "gauge", "anonymous and shared memory together", peak=MEMORY_RESIDENT_PEAK
)
MEMORY_PEAK = Metric(
    "memory_peak",
    "bytes",
    "peak",
    "the kernel's own peak of all charged memory, page cache included",
    classad="ImageSize",
    scale=1024,
)
MEMORY_RESIDENT_TIME = Metric(
    "memory_resident_time", "KiB*s", "counter", "memory_resident summed over time: 1 GiB for 1 h is 3774873600"
)
MEMORY_RESERVED_TIME = Metric(
    "memory_reserved_time", "KiB*s", "counter", "the memory that the job asked for, summed over time"
)
MEMORY_FAILCNT = Metric("memory_failcnt", "events", "counter", "times the memory limit was hit")
MEMORY_SWAP_FAILCNT = Metric(
    "memory_swap_failcnt", "events", "counter", "times v1's limit of memory and swap together was hit"
)
MEMORY_OOM_KILLS = Metric("memory_oom_kills", "events", "counter", "processes the kernel killed for want of memory")

# CPU. Kernel docs: admin-guide/cgroup-v1/cpuacct.rst, scheduler/sched-bwc.rst.
CPU_USER = Metric("cpu_user", "ns", "counter", "CPU time in user mode", classad="RemoteUserCpu", scale=10**9)
CPU_SYSTEM = Metric("cpu_system", "ns", "counter", "CPU time in the kernel", classad="RemoteSysCpu", scale=10**9)
CPU_RESERVED = Metric("cpu_reserved", "ns", "counter", "the cores that the job asked for, summed over time")
CPU_PERIODS = Metric("cpu_periods", "periods", "counter", "quota periods in which the job wanted to run")
CPU_THROTTLED_PERIODS = Metric(
    "cpu_throttled_periods", "periods", "counter", "quota periods in which the job was stopped"
)
CPU_THROTTLED = Metric("cpu_throttled", "ns", "counter", "time the job was stopped by its quota")

# Block I/O, labelled by device "major:minor". Kernel docs: admin-guide/cgroup-v1/blkio-controller.rst.
BLOCK_READ_BYTES = Metric(
    "block_read", "bytes", "counter", "bytes read from a device", classad="BlockReadKbytes", scale=1024
)
BLOCK_WRITE_BYTES = Metric(
    "block_write", "bytes", "counter", "bytes written to a device", classad="BlockWriteKbytes", scale=1024
)
BLOCK_READS = Metric("block_reads", "operations", "counter", "reads from a device", classad="BlockReads")
BLOCK_WRITES = Metric("block_writes", "operations", "counter", "writes to a device", classad="BlockWrites")
BLOCK_DISCARD_BYTES = Metric("block_discard", "bytes", "counter", "bytes discarded on a device")
BLOCK = (BLOCK_READ_BYTES, BLOCK_WRITE_BYTES, BLOCK_READS, BLOCK_WRITES, BLOCK_DISCARD_BYTES)

# Processes. Kernel docs: admin-guide/cgroup-v1/pids.rst.
PIDS_PEAK = Metric("pids_peak", "tasks", "peak", "highest number of processes and threads", classad="NumPids")
PIDS = Metric("pids", "tasks", "gauge", "processes and threads now", peak=PIDS_PEAK)
PIDS_REFUSED = Metric("pids_refused", "events", "counter", "forks refused by the pids limit")

# Pressure stall information. Kernel docs: accounting/psi.rst.
CPU_STALL = Metric("cpu_stall", "us", "counter", "time in which some task of the job waited for a CPU")
IO_STALL = Metric("io_stall", "us", "counter", "time in which some task of the job waited for I/O")
MEMORY_STALL = Metric("memory_stall", "us", "counter", "time in which some task of the job waited for memory")
IO_STALL_FULL = Metric("io_stall_full", "us", "counter", "time in which all tasks of the job waited for I/O")
MEMORY_STALL_FULL = Metric("memory_stall_full", "us", "counter", "time in which all tasks waited for memory")

# Network, labelled by the chain's rule name (OutgoingInternal, ...). The ClassAd attribute is Network<RuleName>.
NETWORK_BYTES = Metric(
    "network", "bytes", "counter", "L3 bytes, IP headers included, by rule of the job's chain", classad="Network"
)
NETWORK_PACKETS = Metric("network_packets", "packets", "counter", "packets (a GSO super-packet is one), by rule")

# NFS, labelled by mount point as the job sees it. Kernel: fs/nfs/super.c nfs_show_stats(), net/sunrpc/stats.c.
NFS_READ_BYTES = Metric("nfs_read", "bytes", "counter", "bytes read from an NFS server")
NFS_WRITE_BYTES = Metric("nfs_write", "bytes", "counter", "bytes written to an NFS server")
NFS_READS = Metric("nfs_reads", "operations", "counter", "READ requests to an NFS server")
NFS_WRITES = Metric("nfs_writes", "operations", "counter", "WRITE requests to an NFS server")
NFS_OPERATIONS = Metric("nfs_operations", "operations", "counter", "all requests to an NFS server about files")
NFS_TIME = Metric("nfs_time", "ms", "counter", "sum over these requests of the time from making one to its end")
NFS_SERVER_TIME = Metric("nfs_server_time", "ms", "counter", "what of nfs_time passed from sending to the reply")
NFS = (NFS_READ_BYTES, NFS_WRITE_BYTES, NFS_READS, NFS_WRITES, NFS_OPERATIONS, NFS_TIME, NFS_SERVER_TIME)

BILLED = (
    *(CPU_USER, CPU_SYSTEM, CPU_RESERVED, MEMORY_RESIDENT_TIME, MEMORY_RESERVED_TIME),
    *(*BLOCK, NETWORK_BYTES, NETWORK_PACKETS, *NFS),
)
"""What a tariff can price, beside wall time: counters all, so that a part of a job is a difference of two values."""

CATALOGUE: tuple[Metric, ...] = tuple(value for value in globals().values() if isinstance(value, Metric))
BY_NAME: dict[str, Metric] = {metric.name: metric for metric in CATALOGUE}

LIMITS: dict[str, Limit] = {
    limit.name: limit
    for limit in (
        Limit("memory", "bytes", "memory that the job may use"),
        Limit("memory_soft", "bytes", "memory above which the job is pushed back first"),
        Limit("swap", "bytes", "swap that the job may use, beside the memory"),
        Limit("cpus", "cores", "cores that the job may use"),
        Limit("pids", "tasks", "processes and threads that the job may have"),
    )
}
