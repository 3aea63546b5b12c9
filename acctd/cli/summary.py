"""A record, or a living job, as a person reads it.

A few lines, sizes in binary units beside exact bytes where money depends on them.
"""

import signal
import time
from collections.abc import Iterable, Sequence

from acctd.cli.table import Column, clean, plain
from acctd.client import Job
from acctd.meter import State
from acctd.model import Record
from acctd.policies import Shortage

_WHOSE = {"job": "the job's own limit", "family": "a family inside it", "parent": "a job around it", "host": "the node"}

_PROCESSES = (Column("PID"), Column("RESIDENT"), Column("STARTED"), Column("NAME", right=False))


def size(number: int) -> str:
    """1536 -> 1.5 KiB; below 10 KiB exact bytes."""
    if number < 10240:
        return f"{number} B"
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024 or unit == "PiB":
            break
        value /= 1024
    return f"{value:.1f} {unit}"


def seconds(ns: int) -> str:
    """Nanoseconds as seconds, to the millisecond."""
    return f"{ns / 1e9:.3f} s"


def ending(record: Record) -> str:
    """done, exit 0 | killed by SIGKILL | lost (exit status unknown)."""
    if record.exit_signal is not None:
        return f"killed by {signal_name(record.exit_signal)}"
    if record.exit_code is not None:
        return f"done, exit {record.exit_code}"
    return "lost, exit status unknown"


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def summary(record: Record) -> str:
    """The whole record in some dozen lines; a kind of number the host does not count is left out."""
    first = f"job {record.id} of {record.owner}: {ending(record)}"
    lines = [first, *_account(record.wall_ns, record.totals)]
    if record.cpus:
        lines.append(_line("cores", [record.cpus]))
    if record.shortages:
        number = len(record.shortages) + record.shortages_dropped
        times = "" if number == 1 else f" {number} times, the last time"
        lines.append(_line("memory", [f"out of memory{times}: {clean(record.shortages[-1].text)}"]))
    return "\n".join([*lines, *_notes(record.notes)])


def shortages(kept: Sequence[Shortage], dropped: int = 0) -> str:
    """Each time that memory ran out, the oldest first: whose, what was done, and the evidence. "" for none.

    `dropped` others happened after the first one and are not kept.
    """
    lines = []
    for number, shortage in enumerate(kept, 1):
        if number == 2 and dropped:
            lines.append(f"({dropped} more in between, which are not kept)")
        lines += _shortage(shortage)
    return "\n".join(lines)


def living(job: Job) -> str:
    """A job that has not ended, in the same words, with what it was made with."""
    inside = f", inside {job.parent}" if job.parent is not None else ""
    lines = [f"job {job.id} of {job.owner}{inside}: {job.phase}, {len(job.pids)} processes, network {job.network}"]
    if limits := [f"{name} {value}" for name, value in job.limits.items() if value is not None]:
        lines.append(_line("limits", [", ".join(limits)]))
    if job.tags:
        lines.append(_line("tags", [", ".join(f"{key}={clean(value)}" for key, value in job.tags.items())]))
    if (now := _one(job.totals, "memory_resident")) is not None:
        lines.append(_line("resident", [f"{size(now)} now"]))
    return "\n".join([*lines, *_account(job.wall_ns, job.totals), *_notes(job.notes)])


def _shortage(shortage: Shortage) -> list[str]:
    lines = [f"out of memory at {_stamp(shortage.time)}: {_WHOSE[shortage.level]}, {clean(shortage.action)}"]
    lines.append(_line("what", [clean(shortage.text)] if shortage.text else []))
    of = "" if shortage.whose is None else f" of job {shortage.whose}"
    limit = [] if shortage.limit is None else [f"{size(shortage.limit)}{of}"]
    if shortage.usage is not None:
        limit.append(f"{size(shortage.usage)} in use")
    lines.append(_line("limit", limit))
    if shortage.memory:
        kinds = [f"{clean(kind)} {size(number)}" for kind, number in shortage.memory.items() if number]
        lines.append(_line("memory", [", ".join(kinds)]))
    if shortage.kills:
        lines.append(_line("killed", [f"{shortage.kills} by the kernel"]))
    rows = [
        (str(process.pid), size(process.resident), _stamp(process.started), clean(process.name))
        for process in shortage.processes
    ]
    return [line for line in lines if line] + ([f"  {line}" for line in plain(_PROCESSES, rows)] if rows else [])


def _stamp(epoch: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(epoch))


def _account(wall_ns: int, totals: State) -> list[str]:
    lines = []
    cpu = [f"wall {seconds(wall_ns)}"]
    if (user := _one(totals, "cpu_user")) is not None and (system := _one(totals, "cpu_system")) is not None:
        cpu.append(f"cpu {seconds(user)} user, {seconds(system)} system")
        if wall_ns:
            cpu.append(f"{(user + system) / wall_ns:.2f} cores")
    if throttled := _one(totals, "cpu_throttled"):
        cpu.append(f"throttled {seconds(throttled)}")
    lines.append(_line("time", cpu))
    lines.append(_line("memory", _memory(totals)))
    lines += [_line("block I/O", [text]) for text in _block(totals)]
    if (tasks := _one(totals, "pids_peak")) is not None:
        lines.append(_line("tasks", [f"{tasks} at most"]))
    network = totals.get("network", {})
    packets = totals.get("network_packets", {})
    for rule in sorted(network, key=lambda rule: (not rule.startswith("Outgoing"), rule)):
        lines.append(_line("network", [f"{rule} {network[rule]:,} bytes in {packets.get(rule, 0):,} packets"]))
    return [line for line in lines if line]


def _notes(notes: Iterable[str]) -> list[str]:
    return [_line("note", [clean(note)]) for note in notes]


def _memory(totals: State) -> list[str]:
    parts = []
    for name, label in (("memory_anon_peak", "anon"), ("memory_shmem_peak", "shmem"), ("memory_file_peak", "file")):
        if (value := _one(totals, name)) is not None:
            parts.append(f"{label} {size(value)}")
    text = [f"{', '.join(parts)} (sampled peaks)"] if parts else []
    if (peak := _one(totals, "memory_peak")) is not None:
        text.append(f"kernel's peak {size(peak)}")
    if kills := _one(totals, "memory_oom_kills"):
        text.append(f"{kills} killed for want of memory")
    return text


def _block(totals: State) -> list[str]:
    """One text a device that saw any I/O."""
    texts = []
    for device in sorted(totals.get("block_read", {}).keys() | totals.get("block_write", {}).keys()):
        read, reads = (totals.get(name, {}).get(device, 0) for name in ("block_read", "block_reads"))
        written, writes = (totals.get(name, {}).get(device, 0) for name in ("block_write", "block_writes"))
        if reads or writes:
            texts.append(
                f"{device} read {read:,} bytes in {reads:,}, written {written:,} bytes in {writes:,} operations"
            )
    return texts


def _line(label: str, parts: list[str]) -> str:
    return f"  {label:<10}{'; '.join(parts)}" if parts else ""


def _one(totals: State, name: str) -> int | None:
    return totals.get(name, {}).get("")
