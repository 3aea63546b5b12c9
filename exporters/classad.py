"""A record as a ClassAd in long form: HTCondor's own attribute names and units, and ours, which begin with Acctd.

Pure functions; opens nothing. Attribute names come from the metric catalogue. Two HTCondor names need saying: ImageSize
is the kernel's peak of all charged memory (page cache included), as in HTCondor's own cgroup code, and NumPids is the
highest number of processes and threads. What a ClassAd cannot carry (an integer above 2^63-1, which would be read as 0;
a number that is not finite; a name that differs from another only in case) is left out, and named in AcctdOmitted.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import fields

from acctd.errors import UsageError
from acctd.metrics import (
    BY_NAME,
    CPU_SYSTEM,
    CPU_USER,
    MEMORY_OOM_KILLS,
    MEMORY_RESIDENT_PEAK,
    NETWORK_BYTES,
    NETWORK_PACKETS,
    Metric,
    camel,
)
from acctd.model import INT64_MAX, Limits, Record
from acctd.wording import clean, sentence

ClassAdValue = str | int | float | bool

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_SURROGATE = re.compile("[\ud800-\udfff]")
_PER_RULE = (NETWORK_BYTES, NETWORK_PACKETS)
_SIGKILL = 9
_BY_AGENT, _BY_KERNEL, _RELEASED = ("killed", "held"), "killed by the kernel", "released"  # of policies.Shortage

_NEWLINE = 'formatTime(0,"%n")'
"""The only way to a newline: long form has one escape, \\", and a raw newline ends the ad for its reader."""


class _Ad:
    """Attributes in order, names unique in any case; what cannot be carried is remembered by name."""

    def __init__(self) -> None:
        self.attributes: dict[str, ClassAdValue] = {}
        self.omitted: list[str] = []
        self._taken: set[str] = set()

    def put(self, name: str, value: ClassAdValue | None) -> None:
        """Add one attribute; None is absence and adds nothing."""
        if value is None:
            return
        if name.lower() in self._taken or not _NAME.match(name) or not _carried(value):
            self.omitted.append(re.sub(r"[^A-Za-z0-9_]", "_", name))
            return
        self._taken.add(name.lower())
        self.attributes[name] = value


def record_ad(record: Record) -> dict[str, ClassAdValue]:
    """The record's attributes, in a fixed order. A metric the kernel did not count is absent, never 0.

    AcctdOmitted is a ClassAd string list (comma-separated) of what had to be left out; absent when nothing was.
    """
    ad = _Ad()
    ad.put("AcctdJobId", record.id)
    ad.put("AcctdState", record.state)
    if record.parent is not None:
        ad.put("AcctdParent", record.parent)
    ad.put("Owner", record.owner)
    ad.put("AcctdUid", record.uid)
    ad.put("Machine", record.node)
    ad.put("JobStartDate", _epoch(record.started))
    ad.put("CompletionDate", _epoch(record.ended) if record.state != "running" else None)
    ad.put("RemoteWallClockTime", record.wall_ns / 10**9)
    if record.exit_code is not None or record.exit_signal is not None:
        ad.put("ExitBySignal", record.exit_signal is not None)
    ad.put("ExitCode", record.exit_code)
    ad.put("ExitSignal", record.exit_signal)
    _put_totals(ad, record)
    ad.put("AcctdNetworkMode", record.network)
    for limit in fields(Limits):
        value = getattr(record.limits, limit.name)
        ad.put(f"AcctdLimit{camel(limit.name)}", value if value != limit.default else None)
    ad.put("AcctdCpus", record.cpus or None)
    _put_shortages(ad, record)
    _put_hold(ad, record)
    if record.notes:
        ad.put("AcctdNotes", " ".join(record.notes))
    # Sorted, so that of two keys that differ only in case the same one is kept each time.
    for key in sorted(record.tags):
        ad.put(f"AcctdTag{key}", record.tags[key])
    if ad.omitted:
        ad.put("AcctdOmitted", ",".join(ad.omitted))
    return ad.attributes


def format_ad(attributes: Mapping[str, ClassAdValue]) -> str:
    """The ad in long form, one `Name = value` a line; "" for no attributes. Raises UsageError as format_value does."""
    lines = []
    for name, value in attributes.items():
        if not _NAME.match(name):
            raise UsageError(f"{name!r} is no ClassAd attribute name; use letters, digits and _, no digit first")
        lines.append(f"{name} = {format_value(value)}\n")
    return "".join(lines)


def format_value(value: ClassAdValue) -> str:
    """One value on one line, such that a ClassAd reader evaluates it to the same value.

    Raises UsageError for NUL, an integer outside 64 bits and a number that is not finite. Half a surrogate pair (what
    Python makes of a byte that is no UTF-8) has no form in UTF-8 and becomes U+FFFD.
    """
    if not _carried(value):
        raise UsageError(f"{value!r} cannot be written to a ClassAd; it takes 64-bit integers and finite numbers")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    return _format_string(value)


def _put_totals(ad: _Ad, record: Record) -> None:
    """Every metric under its own name, then what HTCondor derives from several."""
    for name in sorted(record.totals):
        totals = record.totals[name]
        metric = BY_NAME.get(name)
        if metric is None:
            # Written by another version: its unit is not known here, so its number would mean nothing.
            ad.omitted.append("Acctd" + camel(name))
        elif metric in _PER_RULE:
            for rule in sorted(totals):
                ad.put(metric.attribute + rule, totals[rule])
        elif totals:
            # A device that lies on another would be billed twice: the same bytes are counted under both.
            counts = [count for label, count in totals.items() if label not in record.stacked]
            ad.put(metric.attribute, _scaled(metric, sum(counts)))

    user, system = _sole(record, CPU_USER), _sole(record, CPU_SYSTEM)
    if user is not None and system is not None and record.wall_ns > 0:
        ad.put("CpusUsage", (user + system) / record.wall_ns)
    resident = _sole(record, MEMORY_RESIDENT_PEAK)
    if resident is not None:
        ad.put("MemoryUsage", _memory_usage(resident))
    rules = record.totals.get(NETWORK_BYTES.name)
    if rules is not None:
        for name, way in (("NetworkInputMb", "Incoming"), ("NetworkOutputMb", "Outgoing")):
            ad.put(name, sum(count for rule, count in rules.items() if rule.startswith(way)) / 10**6)


def _put_shortages(ad: _Ad, record: Record) -> None:
    """The newest time that memory ran out, whoever's it was, and how many there were."""
    if not record.shortages:
        return
    last = record.shortages[-1]
    ad.put("AcctdOomCount", len(record.shortages) + record.shortages_dropped)
    ad.put("AcctdOomTime", _epoch(last.time))
    ad.put("AcctdOomLevel", last.level)
    ad.put("AcctdOomWhose", last.whose)
    ad.put("AcctdOomAction", last.action)
    ad.put("AcctdOomLimit", last.limit)
    ad.put("AcctdOomUsage", last.usage)
    ad.put("AcctdOomKills", last.kills)
    for kind, size in (last.memory or {}).items():
        ad.put(f"AcctdOomMemory{camel(kind)}", size)
    if last.processes:
        largest = (f"{process.pid} {clean(process.name)} {process.resident}" for process in last.processes)
        ad.put("AcctdOomLargest", ", ".join(largest))
    ad.put("AcctdOomText", last.text or None)


def _put_hold(ad: _Ad, record: Record) -> None:
    """HTCondor's hold for an exceeded memory limit: 34, and 102 for one that its cgroup told of.

    Its rule: the job itself was ended for it, not only a process of it: no pilot is blamed for its payload. Nor is a
    job for another's limit or for a node without memory.
    """
    reason = _hold_reason(record)
    if reason is not None:
        ad.put("HoldReasonCode", 34)
        ad.put("HoldReasonSubCode", 102)
        ad.put("HoldReason", reason)


def _hold_reason(record: Record) -> str | None:
    if record.exit_code is not None:
        return None
    by_kill, kills = record.exit_signal == _SIGKILL, _sole(record, MEMORY_OOM_KILLS)
    if record.shortages:
        last = record.shortages[-1]
        by_kernel = by_kill and (last.action == _BY_KERNEL or (last.action == _RELEASED and bool(last.kills or kills)))
        if last.level != "job" or not (last.action in _BY_AGENT or by_kernel):
            return None
        return last.text or sentence(record.id, last)
    if not by_kill or not kills:
        return None
    # Nobody was there to see it: the kernel's count is all there is.
    limit, resident = record.limits.memory, _sole(record, MEMORY_RESIDENT_PEAK)
    over = "the memory its cgroup may use" if limit is None else f"its memory limit of {limit // 2**20} MB"
    used = "" if resident is None else f" (highest use seen: {_memory_usage(resident)} MB)"
    return f"The kernel killed the job for going over {over}{used}; submit it again with more memory."


def _scaled(metric: Metric, total: int) -> int | float:
    if metric.scale == 1:
        return total
    return -(-total // metric.scale) if metric.unit == "bytes" else total / metric.scale


def _memory_usage(resident: int) -> int:
    """MB, in HTCondor's own formula: (ResidentSetSize+1023)/1024."""
    return (-(-resident // 1024) + 1023) // 1024


def _sole(record: Record, metric: Metric) -> int | None:
    return record.totals.get(metric.name, {}).get("")


def _epoch(stamp: float) -> int | float:
    """Whole seconds, down; a stamp that is not finite passes as it is, to be omitted."""
    return math.floor(stamp) if math.isfinite(stamp) else stamp


def _carried(value: ClassAdValue) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return -INT64_MAX - 1 <= value <= INT64_MAX
    return "\0" not in value


def _format_string(text: str) -> str:
    text = _SURROGATE.sub("\ufffd", text)
    if "\n" not in text:
        return _literal(text)
    pieces: list[str] = []
    for index, line in enumerate(text.split("\n")):
        if index:
            pieces.append(_NEWLINE)
        if line:
            pieces.append(_argument(line))
    return f"strcat({','.join(pieces)})"


def _literal(text: str) -> str:
    """A literal at the end of its line. A backslash is itself there, even the last one; only \\" is an escape."""
    return '"' + text.replace('"', '\\"') + '"'


def _argument(text: str) -> str:
    """A literal inside an expression, where a last backslash would take the closing quote with it."""
    return f"substr({_literal(text + '.')},0,-1)" if text.endswith("\\") else _literal(text)
