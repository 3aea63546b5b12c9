"""Frames of the spool as points of InfluxDB's line protocol. Pure: opens nothing, sends nothing, remembers no job.

The same frame gives the same bytes whoever encodes it and when, which is what makes sending it again harmless: a
database keeps one point a series and time. https://docs.influxdata.com/influxdb/v2/reference/syntax/line-protocol/

The format has no way to write some values. A backslash is plain text, unless what follows is a comma, a space, an
equals sign or a backslash, or it ends a tag; and no line break may stand in a value. Such a backslash, and control
characters, are written as in a URL: %5C, %0A. An integer above 2^63-1 and a number that is not finite are left out.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from acctd.frames import AgentSample, EventFrame, Frame, RecordFrame, Sample, limits_of, tag
from acctd.meter import State
from acctd.metrics import BY_NAME, LIMITS, NETWORK_BYTES, NETWORK_PACKETS, Metric, split_rule
from acctd.model import INT64_MAX, Record
from acctd.sinks import ExportConfig, InfluxSink
from acctd.usage import nanoseconds
from exporters import billfields
from exporters.delivery import Item

TO_SAMPLES, TO_RECORDS = "samples", "records"
"""The places an item goes to: what is kept for weeks, and what is kept for years."""

NONE = "-"
"""A tag that there is none of: an empty one cannot be written, and a series always has the same tags."""

STRING_BYTES = 65535
"""A longer string cannot be stored by InfluxDB 1; the field is left out then, and the point is not lost for it."""

_PER_RULE = (NETWORK_BYTES, NETWORK_PACKETS)
_BACKSLASH = re.compile(r"\\(?=[\\,= ]|\Z)")
_CONTROL = re.compile("[\x00-\x1f\x7f]")
_SPECIAL = re.compile(r"[,= ]")


class Lines:
    """Encodes for one sink of one node."""

    def __init__(self, sink: InfluxSink, export: ExportConfig, host: str) -> None:
        self._job_tag = sink.job_tag
        self._scheduler = export.scheduler
        self._node = f"cluster={tag_value(export.cluster)},host={tag_value(host)}"
        self._agent = f"acctd_agent,{self._node} "
        self._jobs = lru_cache(maxsize=8192)(self._job)

    def encode(self, frame: Frame) -> list[Item]:
        """The points of a frame. Raises msgspec.DecodeError for a record that no agent has written."""
        match frame:
            case Sample():
                return self._sample(frame)
            case RecordFrame():
                return self._record(frame)
            case EventFrame():
                return [self._event(frame)]
            case AgentSample():
                fields = [f"{key(name)}={value!r}" for name, value in _finite(frame.numbers)]
                return [_item(TO_SAMPLES, self._agent, fields, frame.time)] if fields else []
        return []  # a mark says where a ledger began, and nothing about a job

    def _job(self, job: str, owner: str, parent: str | None, scheduler: str) -> tuple[str, str]:
        """Tags of a job's points, and what stands before their fields."""
        tags = f",{self._node},owner={tag_value(owner)},parent={tag_value(parent)},scheduler={tag_value(scheduler)}"
        if self._job_tag:
            return f"{tags},job={tag_value(job)}", ""
        return tags, f"job={string(job)},"

    def _sample(self, frame: Sample) -> list[Item]:
        scheduler = tag(frame.tags, "scheduler") or self._scheduler
        tags, job = self._jobs(frame.job, frame.owner, frame.parent, scheduler)
        items = _points(tags, job, frame.totals, frame.stacked, frame.time)
        if fields := _limit_fields(frame.limits, ""):
            items.append(_item(TO_SAMPLES, f"acctd_limit{tags} {job}", fields, frame.time))
        return items

    def _event(self, frame: EventFrame) -> Item:
        scheduler = frame.scheduler or (self._scheduler if frame.job else NONE)
        tags, job = self._jobs(frame.job or NONE, frame.owner or NONE, frame.parent, scheduler)
        fields = [f"number={frame.number}i"]
        if text := string(frame.text):
            fields.append(f"text={text}")
        head = f"acctd_event{tags},event={tag_value(frame.event)} {job}"
        return _item(TO_SAMPLES, head, fields, stamp(frame.time, frame.number))

    def _record(self, frame: RecordFrame) -> list[Item]:
        record = frame.record()
        scheduler = tag(record.tags, "scheduler") or self._scheduler
        tags, job = self._jobs(record.id, record.owner, record.parent, scheduler)
        fields = [*_total_fields(record), *_other_fields(record)]
        head = f"acctd_record{tags},payer={tag_value(tag(record.tags, 'account') or record.owner)} {job}"
        items = [_item(TO_RECORDS, head, fields, stamp(record.ended, frame.number))]
        # A job that was shorter than a tick has no sample; with these it has a series, and all others their last value.
        items += _points(tags, job, record.totals, record.stacked, frame.time)
        return items


def stamp(seconds: float, number: int) -> int:
    """ns since the epoch for what the ledger has numbered: two of the same microsecond differ by their numbers."""
    return int(seconds * 1e6) * 1000 + number % 1000


@lru_cache(maxsize=8192)
def tag_value(text: str | None) -> str:
    """Escaped, and written out where there is nothing."""
    if not text:
        return NONE
    return _SPECIAL.sub(r"\\\g<0>", _BACKSLASH.sub("%5C", _printable(text)))


def key(text: str) -> str:
    """A field's key, escaped as a tag is."""
    return tag_value(text)


def string(text: str) -> str | None:
    """A string field's value, in quotes; None for one that is too long."""
    escaped = _printable(text).replace("\\", r"\\").replace('"', r"\"")
    return f'"{escaped}"' if len(escaped.encode()) <= STRING_BYTES else None


def _printable(text: str) -> str:
    return _CONTROL.sub(lambda match: f"%{ord(match[0]):02X}", text)


def _item(to: str, head: str, fields: Iterable[str], time: int) -> Item:
    return Item(to, f"{head}{','.join(fields)} {time}".encode())


def _points(tags: str, job: str, totals: State, stacked: tuple[str, ...], time: int) -> list[Item]:
    """One point a measurement, and a device, mount or rule."""
    series: dict[tuple[str, str], list[str]] = {}
    for name, values in totals.items():
        if (place := _places(name)) is None:
            continue
        measurement, field = place
        for label, value in values.items():
            if value > INT64_MAX or (label and label in stacked):
                continue
            at = measurement, label
            if at in series:
                series[at].append(f"{field}={value}i")
            else:
                series[at] = [f"{field}={value}i"]
    return [
        _item(TO_SAMPLES, f"{measurement}{tags}{_label_tags(measurement, label)} {job}", fields, time)
        for (measurement, label), fields in series.items()
    ]


@lru_cache
def _places(name: str) -> tuple[str, str] | None:
    """Measurement and field of a metric; None for one that only a newer agent knows."""
    metric = BY_NAME.get(name)
    return (metric.measurement, metric.field) if metric is not None else None


@lru_cache(maxsize=8192)
def _label_tags(measurement: str, label: str) -> str:
    names = _labels(measurement)
    if not names:
        return ""
    values = split_rule(label) if len(names) == 2 else (label,)
    return "".join(f",{name}={tag_value(value)}" for name, value in zip(names, values, strict=True))


@lru_cache
def _labels(measurement: str) -> tuple[str, ...]:
    return next(metric.labels for metric in BY_NAME.values() if metric.measurement == measurement)


def record_field(metric: Metric, rule: str = "") -> str:
    """A total's field in acctd_record, where all of them are in one point: the metric's name, the rule, the unit."""
    return "_".join(part for part in (metric.name, rule, metric.suffix) if part)


def _total_fields(record: Record) -> list[str]:
    sums: dict[str, int] = {}
    for name, values in record.totals.items():
        if (metric := BY_NAME.get(name)) is None:
            continue
        for label, value in values.items():
            if not (label and label in record.stacked):
                field = record_field(metric, label if metric in _PER_RULE else "")
                sums[field] = sums.get(field, 0) + value
    return [f"{key(field)}={value}i" for field, value in sums.items() if value <= INT64_MAX]


def _other_fields(record: Record) -> list[str]:
    integers = {
        "exit_code": record.exit_code,
        "exit_signal": record.exit_signal,
        "wall_ns": record.wall_ns,
        "started_ns": nanoseconds(record.started),
        "uid": record.uid,
    }
    strings = {
        "state": record.state,
        "network_mode": record.network,
        "account": tag(record.tags, "account") or NONE,
        "tags": json.dumps(record.tags, ensure_ascii=False, separators=(",", ":")) if record.tags else None,
        "notes": " ".join(record.notes) or None,
        **dict(billfields.texts(record)),
    }
    fields = [f"{name}={value}i" for name, value in integers.items() if value is not None]
    for name, text in strings.items():
        if text is not None and (quoted := string(text)) is not None:
            fields.append(f"{name}={quoted}")
    return fields + _limit_fields(limits_of(record.limits), "limit_")


def _limit_fields(limits: Mapping[str, float | int], prefix: str) -> list[str]:
    """A field has one type for ever, whatever a limit was written as."""
    had = [(limit, limits[name]) for name, limit in LIMITS.items() if name in limits]
    return [
        f"{prefix}{limit.field}={int(value)}i" if limit.whole else f"{prefix}{limit.field}={float(value)!r}"
        for limit, value in had
    ]


def _finite(numbers: Mapping[str, float]) -> Iterable[tuple[str, float]]:
    return ((name, float(value)) for name, value in numbers.items() if math.isfinite(value))
