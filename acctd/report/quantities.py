"""What a job used, as exact numbers: the same that a tariff prices, and who asks for no bill wants to see as well.

Formats only. Exact bytes stand beside sizes that a person can take in.
"""

from acctd.metrics import split_rule
from acctd.model import Record
from acctd.report.markup import Child, Html, join
from acctd.report.page import Column, bar, table
from acctd.report.units import amount, decimal, duration

_ROWS = 100
"""Of a table: a job has 64 classes at most, and as many devices and mounts as it likes."""


def quantities(record: Record) -> Html:
    """A table of each kind that there is anything of, the largest first."""
    return join(_times(record), _network(record), _block(record), _nfs(record))


def _times(record: Record) -> Html:
    rows: list[list[Child]] = []
    for metric, name in (
        ("cpu_user", "CPU in user mode"),
        ("cpu_system", "CPU in the kernel"),
        ("cpu_reserved", "Cores asked for, over time"),
    ):
        if (ns := record.totals.get(metric, {}).get("")) is not None:
            rows.append([name, f"{amount(ns / 3.6e12)} core-hours", duration(ns), f"{ns:,} ns"])
    for metric, name in (
        ("memory_resident_time", "Memory held, over time"),
        ("memory_reserved_time", "Memory asked for, over time"),
    ):
        if (kib := record.totals.get(metric, {}).get("")) is not None:
            rows.append([name, f"{amount(kib / 2**20 / 3600)} GiB-hours", "", f"{kib:,} KiB*s"])
    columns = [Column("What"), *(Column(title, number=True) for title in ("Quantity", "Time", "Exactly"))]
    return table("CPU and memory", columns, rows) if rows else join()


def _network(record: Record) -> Html:
    used = {rule: number for rule, number in record.totals.get("network", {}).items() if number}
    packets = record.totals.get("network_packets", {})
    most = max(used.values(), default=0)
    rows: list[list[Child]] = []
    for rule in sorted(used, key=lambda rule: (-used[rule], rule))[:_ROWS]:
        name, direction = split_rule(rule)
        rows.append(
            [
                f"{name}, {direction}",
                decimal(used[rule], "B"),
                f"{used[rule]:,}",
                f"{packets.get(rule, 0):,}",
                bar(used[rule] / most),
            ]
        )
    numbers = (Column(title, number=True) for title in ("Size", "Bytes", "Packets"))
    columns = [Column("Class and direction"), *numbers, Column("Against the largest", spare=True)]
    return table("Network", columns, rows) if rows else join()


def _block(record: Record) -> Html:
    get = record.totals.get
    read, written = get("block_read", {}), get("block_write", {})
    devices = sorted(read.keys() | written.keys(), key=lambda each: (-read.get(each, 0) - written.get(each, 0), each))
    rows: list[list[Child]] = [
        [
            f"{device} (counted below it too)" if device in record.stacked else device,
            decimal(read.get(device, 0), "B"),
            f"{get('block_reads', {}).get(device, 0):,}",
            decimal(written.get(device, 0), "B"),
            f"{get('block_writes', {}).get(device, 0):,}",
        ]
        for device in devices[:_ROWS]
        if read.get(device) or written.get(device)
    ]
    columns = [
        Column("Device"),
        *(Column(title, number=True) for title in ("Read", "Reads", "Written", "Writes")),
    ]
    return table("Disks", columns, rows) if rows else join()


def _nfs(record: Record) -> Html:
    get = record.totals.get
    read, written = get("nfs_read", {}), get("nfs_write", {})
    mounts = sorted(read.keys() | written.keys(), key=lambda each: (-read.get(each, 0) - written.get(each, 0), each))
    rows: list[list[Child]] = [
        [
            mount,
            decimal(read.get(mount, 0), "B"),
            decimal(written.get(mount, 0), "B"),
            f"{get('nfs_operations', {}).get(mount, 0):,}",
        ]
        for mount in mounts[:_ROWS]
    ]
    columns = [Column("NFS mount"), *(Column(title, number=True) for title in ("Read", "Written", "Requests"))]
    return table("NFS", columns, rows) if rows else join()
