"""Records as OGF Usage Records 2.0, XML for any accounting server that reads the standard. Pure.

The format, its schema in chapter 14: https://www.ogf.org/documents/GFD.204.pdf. The schema wants the elements in its
order, and the attributes in its namespace. What XML cannot hold (control characters) is written as in a URL: %01; what
is not ASCII, as character references. Block and NFS I/O are left out: the standard counts bytes that lie in a store,
not those that were moved.
"""

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from xml.etree import ElementTree as ET

from acctd.metrics import NETWORK_BYTES, split_rule
from acctd.model import Record
from exporters.apel import Benchmark
from exporters.jobfacts import JobFacts, percent

NAMESPACE = "http://schema.ogf.org/urf/2013/04/urf"

ABORTED = frozenset({1, 2, 3, 9, 15, 24})
"""SIGHUP, SIGINT, SIGQUIT, SIGKILL, SIGTERM and SIGXCPU come from somebody, or from a policy; others the job made."""

# C0 but for tab and newline, DEL and C1; what a parser would take for a newline; what is no character of XML 1.0.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufffe\uffff]")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

ET.register_namespace("ur", NAMESPACE)


def document(
    records: Iterable[Record], *, created: datetime, site: str | None = None, benchmark: Benchmark | None = None
) -> bytes:
    """One file of records. `created`, in UTC, is when they are written. Raises what JobFacts.of() does."""
    root = ET.Element(_name("UsageRecords"))
    for record in records:
        _add(root, record, _stamp(created), site, benchmark)
    ET.indent(root)
    text: bytes = ET.tostring(root, encoding="us-ascii", xml_declaration=True)
    return text + b"\n"


def record_id(record: Record) -> str:
    """The same wherever and whenever the record is written: NODE/ID/START."""
    job = JobFacts.of(record)
    return f"{job.node}/{job.id}/{_time(job.started_us)}"


def _add(root: ET.Element, record: Record, created: str, site: str | None, benchmark: Benchmark | None) -> None:
    job = JobFacts.of(record)
    top = ET.SubElement(root, _name("UsageRecord"))

    block = _block(top, "RecordIdentityBlock")
    _put(block, "RecordId", record_id(record))
    _put(block, "CreateTime", created)
    _put(block, "Site", site)

    block = _block(top, "SubjectIdentityBlock")
    _put(block, "LocalUserId", job.owner)
    _put(block, "LocalGroupId", job.account)
    _put(block, "GlobalUserId", job.user)
    _put(block, "GlobalGroupId", job.vo)
    if job.vo is not None:
        _put(block, "GlobalGroupAttribute", job.fqan, type="FQAN")

    block = _block(top, "ComputeUsageBlock")
    _put(block, "CpuDuration", _duration(job.cpu_ns))
    _put(block, "WallDuration", _duration(job.wall_ns))
    _period(block, job)
    host = _block(block, "ExecutionHost")
    _put(host, "Hostname", job.node)
    if benchmark is not None:
        _put(host, "Benchmark", f"{benchmark.value:f}", type=benchmark.type)
    _put(block, "Processors", job.cores)
    _put(block, "NodeCount", 1)
    _put(block, "ExitStatus", _exit_status(record))

    block = _block(top, "JobUsageBlock")
    _put(block, "LocalJobId", job.id)
    _put(block, "MachineName", job.node)
    _put(block, "SubmitHost", job.submit_host)
    _put(block, "SubmitType", "grid" if job.on_a_grid else "local", description=job.scheduler or "acctd")
    _put(block, "Queue", job.queue)
    _put(block, "Status", _status(record))

    for kind, used, limit in (
        ("RAM", job.resident, record.limits.memory),
        ("swap", job.swapped, record.limits.swap),
    ):
        if used is not None:
            block = _block(top, "MemoryUsageBlock")
            _put(block, "MemoryClass", kind)
            _put(block, "MemoryResourceCapacityUsed", used)
            _put(block, "MemoryResourceCapacityRequested", limit)
            _period(block, job)

    _network(top, record.totals.get(NETWORK_BYTES.name, {}))


def _network(top: ET.Element, totals: dict[str, int]) -> None:
    """A block for each class that the job's traffic was told apart by, whether it had any or not."""
    classes: dict[str, dict[str, int]] = {}
    for rule, total in sorted(totals.items()):
        name, direction = split_rule(rule)
        classes.setdefault(name, {})[direction] = total
    for name, used in classes.items():
        block = _block(top, "NetworkUsageBlock")
        _put(block, "NetworkClass", name)
        _put(block, "NetworkInboundUsed", used.get("incoming", 0))
        _put(block, "NetworkOutboundUsed", used.get("outgoing", 0))


def _period(block: ET.Element, job: JobFacts) -> None:
    _put(block, "StartTime", _time(job.started_us))
    _put(block, "EndTime", _time(job.ended_us))


def _status(record: Record) -> str:
    """Of chapter 6.10 what fits. "unknown" is ours: the standard lets a community have words of its own."""
    if record.state != "done" or record.exit_code is record.exit_signal is None:
        return "unknown"
    if record.exit_signal is not None:
        return "aborted" if record.exit_signal in ABORTED else "failed"
    return "failed" if record.exit_code else "completed"


def _exit_status(record: Record) -> int | None:
    """As a shell has it: 128 and the number of the signal, where one ended the job."""
    return record.exit_code if record.exit_signal is None else 128 + record.exit_signal


def _name(name: str) -> str:
    return f"{{{NAMESPACE}}}{name}"


def _block(parent: ET.Element, name: str) -> ET.Element:
    return ET.SubElement(parent, _name(name))


def _put(parent: ET.Element, name: str, value: str | int | None, **attributes: str) -> None:
    if value is not None:
        element = ET.SubElement(parent, _name(name))
        element.text = percent(str(value), _UNSAFE)
        element.attrib.update({_name(key): percent(text, _UNSAFE) for key, text in attributes.items()})


def _duration(ns: int) -> str:
    """ISO 8601, exact: PT1.5S."""
    seconds, rest = divmod(ns, 10**9)
    return f"PT{seconds}{f'.{rest:09}'.rstrip('0') if rest else ''}S"


def _time(us: int) -> str:
    return _stamp(_EPOCH + timedelta(microseconds=us))


def _stamp(at: datetime) -> str:
    """UTC: 2026-01-02T03:04:05.000006Z."""
    return at.astimezone(UTC).replace(tzinfo=None).isoformat() + "Z"
