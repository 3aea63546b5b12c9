"""`python -m bench.bill`: a bill over a year of a site's records, and one over a ledger; against DuckDB and SQLite.

First the simulated year of bench/year.py in files, billed by the command as a person calls it: seconds, and the memory
of its processes. The peer does as little as can be done: DuckDB adds up the same numbers in the same files, and knows
no payers, months, tiers or prices, nor what comes twice. Then a ledger, billed by the command, and the same question by
hand in SQL. All sums must be the same to the last digit, or there is no table.
"""

import argparse
import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Any, NamedTuple

from acctd.ledger import FILE, Ledger
from bench import year
from bench.report import machine, table

# Units in which a quantity of nine decimals is the sum itself.
TARIFF = """
name = "bench"
currency = "USD"
[[period]]
valid_from = 2020-01-01
[[period.item]]
name = "CPU"
meter = "cpu"
unit = "core-second"
price = 0.00001
[[period.item]]
name = "Egress"
meter = "network"
classes = ["External"]
direction = "outgoing"
unit = "byte"
tiers = [ {up_to = 107374182400, price = 0}, {price = 0.00000000009} ]
[[period.item]]
name = "Reads"
meter = "block_read"
unit = "byte"
price = 0.00000000001
[[period.item]]
name = "Jobs"
meter = "jobs"
unit = "job"
price = 0.001
[[period.discount]]
account = "account7"
percent = 10
"""
ITEMS = ("CPU", "Egress", "Reads", "Jobs")
PER_UNIT = {"CPU": 10**9}
GROUPS = "account,month"

# The quickest of five ways that were tried; with a schema in place of paths DuckDB takes ten times as long.
DUCKDB = """
SELECT sum(found[1]::BIGINT + found[2]::BIGINT), sum(found[3]::BIGINT), sum(found[4]::BIGINT), count(*)
FROM (SELECT json_extract_string(json, [
          '/body/totals/cpu_user/', '/body/totals/cpu_system/', '/body/totals/network/OutgoingExternal',
          '/body/totals/block_read/8:0']) AS found
      FROM read_json_objects('{files}', format = 'newline_delimited'))
"""
# A sum in SQLite is of 64 bits, and a year of CPU is more ns than that: whole seconds and the rest apart.
SQLITE = """
WITH used AS (
    SELECT json_extract(body, '$.totals.cpu_user.""') + json_extract(body, '$.totals.cpu_system.""') AS cpu,
           json_extract(body, '$.totals.network.OutgoingExternal') AS egress,
           json_extract(body, '$.totals.block_read."8:0"') AS reads
    FROM (SELECT CAST(body AS TEXT) AS body FROM record)
)
SELECT sum(cpu / 1000000000), sum(cpu % 1000000000), sum(egress), sum(reads), count(*) FROM used
"""


class Run(NamedTuple):
    """What a program took."""

    first: float  # s until its first line was there
    seconds: float
    cpu: float  # s of all its processes
    largest: float  # MiB of its largest process
    together: (
        float  # MiB of all its processes at the worst of the moments that were looked at; what they share counts once
    )
    out: bytes


def run(argv: Sequence[str]) -> Run:
    """Raises RuntimeError where it fails."""
    began, worst = time.perf_counter(), 0.0
    with tempfile.TemporaryFile() as out, subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        first, open_ = 0.0, True
        while open_:
            worst = max(worst, sum(map(_memory, _family(process.pid))))
            time.sleep(0.05)
            while (piece := process.stdout.read(2**20)) is not None:
                first = first or time.perf_counter() - began
                out.write(piece)
                if not piece:
                    open_ = False
                    break
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - began
        out.seek(0)
        text = out.read()
    if process.returncode:
        raise RuntimeError(f"{argv} ended with {process.returncode}")
    return Run(first, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, worst, text)


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(each for child in children for each in _family(int(child)))]


def _memory(pid: int) -> float:
    """Its proportional share, MiB. Kernel docs: filesystems/proc.rst, smaps_rollup."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def acctd(config: Path, *arguments: str) -> list[str]:
    """The command over the whole year."""
    period = ("--since", f"{year.YEAR}-01", "--until", f"{year.YEAR + 1}-01")
    return [sys.executable, "-m", "acctd", "bill", "--config", str(config), *period, *arguments]


def billed(text: bytes) -> list[int]:
    """The sums of a bill's lines, in the records' own units, in the order of ITEMS."""
    document: dict[str, Any] = json.loads(text)
    sums = dict.fromkeys(ITEMS, Fraction(0))
    for line in document["lines"]:
        if not line["tier"].startswith("discount"):
            sums[line["item"]] += Fraction(line["quantity"]) * PER_UNIT.get(line["item"], 1)
    if any(each.denominator != 1 for each in sums.values()):
        raise RuntimeError(f"quantities are no whole numbers: {sums}")
    return [int(each) for each in sums.values()]


def same(what: str, ours: list[int], theirs: Sequence[int]) -> None:
    """Raises RuntimeError unless they are."""
    if ours != list(theirs):
        raise RuntimeError(f"{what}: the bill has {ours}, and the plain sum is {list(theirs)}")


def setup(directory: Path) -> Path:
    """A node's configuration; what is in it."""
    (directory / "tariff.toml").write_text(TARIFF)
    config = directory / "acctd.toml"
    config.write_text(
        f'state_dir = "{directory}"\nruntime_dir = "{directory}"\n[bill]\ntariff = "{directory}/tariff.toml"\n'
    )
    return config


def files(directory: Path, records: int, nodes: int) -> tuple[int, int]:
    """Make the year; records and bytes."""
    place = directory / "records"
    place.mkdir()
    made = year.parts(records, nodes)
    with Pool(len(os.sched_getaffinity(0))) as pool:
        size = sum(pool.imap_unordered(partial(year.Part.write, directory=place), made, chunksize=16))
    return sum(part.records for part in made), size


def by_duckdb(directory: Path) -> None:
    """In a process of its own: prints the sums."""
    import duckdb

    connection = duckdb.connect()
    row = connection.execute(DUCKDB.format(files=f"{directory}/records/*.jsonl")).fetchone()
    print(json.dumps([int(value) for value in row or ()]))


def by_sqlite(directory: Path) -> None:
    """In a process of its own: prints the sums."""
    with sqlite3.connect(f"file:{directory / FILE}?mode=ro", uri=True) as db:
        seconds, rest, *others = db.execute(SQLITE).fetchone()
        print(json.dumps([seconds * 10**9 + rest, *others]))


PEERS: dict[str, Callable[[Path], None]] = {"duckdb": by_duckdb, "sqlite": by_sqlite}


def peer(name: str, directory: Path) -> Run:
    return run([sys.executable, "-m", "bench.bill", "--peer", name, "--directory", str(directory)])


def ledger(directory: Path, records: int) -> int:
    """A ledger with so many records of one node; how many there are. One by one: what we hold in memory when we start
    another process would count as its own.
    """

    def rows() -> Iterator[tuple[object, ...]]:
        digest = ""
        for number, (ended, body) in enumerate((each for part in parts for each in part.bodies()), 1):
            digest = hashlib.sha256(digest.encode() + body).hexdigest()
            yield number, number, str(number), "bench", ended, body, digest

    parts = year.parts(records, 1)
    with Ledger(directory / FILE):
        pass
    with sqlite3.connect(directory / FILE) as db:
        db.executemany(
            "INSERT INTO record (number, seq, id, owner, ended, body, digest) VALUES (?, ?, ?, ?, ?, ?, ?)", rows()
        )
    return sum(part.records for part in parts)


def row(name: str, records: int, done: Run) -> list[object]:
    return [
        *(name, f"{done.first:.2f}", f"{done.seconds:.1f}", f"{done.cpu:.1f}", f"{done.cpu * 1e6 / records:.1f}"),
        *(f"{done.largest:.0f}", f"{done.together:.0f}"),
    ]


HEAD = ["what", "first line, s", "all, s", "CPU, s", "CPU us/record", "largest, MiB", "together, MiB"]


def over_files(directory: Path, records: int, nodes: int) -> None:
    config = setup(directory)
    began = time.perf_counter()
    there, size = files(directory, records, nodes)
    made = time.perf_counter() - began
    source = ("--from", "records", str(directory / "records"))
    bill = run(acctd(config, "--format", "json", "--group-by", GROUPS, *source))
    duck = peer("duckdb", directory)
    same("files", billed(bill.out), json.loads(duck.out))
    print(
        f"{there} records of {nodes} nodes in {size / 2**30:.1f} GiB of files (made in {made:.0f} s), {year.YEAR} by "
        f"payer and month; sums are the same. {machine()}\n"
    )
    rows = [row("acctd bill", there, bill), row("DuckDB, plain sum", there, duck)]
    print(table(HEAD, rows))


def over_ledger(directory: Path, records: int) -> None:
    config = setup(directory)
    there = ledger(directory, records)
    bill = run(acctd(config, "--format", "json", "--group-by", GROUPS))
    month = run(acctd(config, "--since", f"{year.YEAR}-12", "--format", "csv"))
    hand = peer("sqlite", directory)
    same("ledger", billed(bill.out), json.loads(hand.out))
    size = (directory / FILE).stat().st_size
    print(f"\nA ledger of {there} records, {size / 2**30:.1f} GiB; sums are the same. {machine()}\n")
    rows = [
        row("acctd bill, the year", there, bill),
        row("acctd bill, its last month", there, month),
        row("SQLite, plain sum", there, hand),
    ]
    print(table(HEAD, rows))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bill", description="bills over many records")
    parser.add_argument("--records", type=int, default=10_000_000, help="in files; some 1.6 KiB each, on disk")
    parser.add_argument("--nodes", type=int, default=1000, help="that they are of")
    parser.add_argument("--ledger", type=int, default=1_000_000, help="records of a ledger")
    parser.add_argument("--directory", type=Path, help="where room is for them; a new directory is made in it")
    parser.add_argument("--quick", action="store_true", help="small figures: does it run at all?")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer is not None:
        PEERS[options.peer](options.directory)
        return
    if options.quick:
        options.records, options.nodes, options.ledger = 2400, 20, 1200
    for work in (
        partial(over_files, records=options.records, nodes=options.nodes),
        partial(over_ledger, records=options.ledger),
    ):
        with tempfile.TemporaryDirectory(prefix="acctdbench-", dir=options.directory) as made:
            work(Path(made))


if __name__ == "__main__":
    main()
