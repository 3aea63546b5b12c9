"""A bill as text for people and for programs: table, CSV, JSON. Pure; billpage.py has the page for browsers.

All of it comes from one Sheet, so that no form knows more than another. Numbers are written as they were reckoned,
never through a float; what users chose is harmless where it is shown.
"""

import csv
import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import msgspec

from acctd.bill import Bill, Line
from acctd.cli.billtime import shown
from acctd.cli.table import Column, clean, fit, plain
from acctd.sources.looked import Looked

OWN = (
    "only your own jobs are seen: what an account's other users took of its tiers, minimums and allowances is not in it"
)

_NAMED = 8
"""Payers and living jobs that a person is told by name; programs get all."""

_KINDS = {
    "ledger": "of the ledger",
    "both": "of the ledger and the files below",
    "records": "of the files below",
    "agent": "told by the agent at",
    "influxdb": "of the database",
}

_FORMULA = tuple("=+-@＝＋－＠")  # the wide ones mean the same
_ODD = re.compile(r"[^\n\x20-\x7e]")
"""What may need an escape in the text of JSON."""

_LABEL = 10


@dataclass(frozen=True, slots=True)
class Sheet:
    """A bill, and what it rests on."""

    bill: Bill
    selection: Mapping[str, str]  # what was asked for, in words of the options
    kind: str  # as gather.Gathered has it
    places: tuple[str, ...]
    looked: Looked
    own: bool
    asked: float  # s since the epoch: of what living jobs have used so far

    @property
    def zone(self) -> ZoneInfo:
        return ZoneInfo(self.bill.timezone)

    @property
    def period(self) -> tuple[str, str]:
        """Both ends in the tariff's timezone; "" for the beginning of everything."""
        since = self.bill.since
        return ("" if since is None else shown(since, self.zone)), shown(self.bill.until, self.zone)

    def iso(self, at: float | None) -> str | None:
        """An instant for programs."""
        return None if at is None else datetime.fromtimestamp(at, self.zone).isoformat()

    @property
    def notes(self) -> list[str]:
        """What must be known to judge the sums."""
        looked = self.looked
        notes = [*self.bill.notes, *([OWN] if self.own else [])]
        if looked.missing:
            notes.append(f"{looked.missing}; what they used is not in it")
        if looked.broken:
            notes.append(f"{so_many_lines(looked.broken)} could not be read, and what is in them is not in the bill")
        notes += looked.torn
        notes += [f"the end of {path} is not written yet, and not in the bill" for path in looked.unfinished]
        return notes


def facts(sheet: Sheet) -> list[tuple[str, str]]:
    """The header: names and values, for people."""
    bill, looked = sheet.bill, sheet.looked
    since, until = sheet.period
    found = [("period", f"{f'from {since} ' if since else ''}until {until}, {bill.timezone}")]
    if sheet.selection:
        found.append(("only", ", ".join(f"{name} {value}" for name, value in sheet.selection.items())))
    found += [("tariff", f"{bill.tariff}, in {bill.currency}"), ("sha256", bill.digest)]
    nodes = "node" if len(looked.nodes) == 1 else "nodes"
    again = f", {looked.repeated} more delivered again and not counted" if looked.repeated else ""
    where = f"{looked.records} {_KINDS[sheet.kind]} {', '.join(sheet.places)}, {len(looked.nodes)} {nodes}{again}"
    found.append(("records", where))
    if looked.first is not None and looked.last is not None:
        found += [("first", f"{looked.first[0]} {looked.first[1]}"), ("last", f"{looked.last[0]} {looked.last[1]}")]
    if looked.digest:
        found.append(("digests", f"{looked.digest}, their sum"))
    if bill.payers:  # no word for nobody: it may be a payer's name
        found.append(("payers", _few(bill.payers)))
    if bill.living:
        found.append(("so far", f"{_few(bill.living)}, as of {shown(int(sheet.asked), sheet.zone)}"))
    return found + [("note", note) for note in sheet.notes]


def columns(bill: Bill) -> list[tuple[str, Callable[[Line], str]]]:
    """What each line has, for people: titles and texts."""
    groups = [(word, _group(number)) for number, word in enumerate(bill.group_by) if word != "month"]  # has its own
    periods = len({line.valid_from for line in bill.lines}) > 1
    return [
        ("payer", lambda line: line.payer),
        *groups,
        ("month", lambda line: line.month),
        *([("prices of", lambda line: line.valid_from)] if periods else []),
        ("item", lambda line: line.item),
        ("tier", lambda line: line.tier),
        ("quantity", lambda line: number(line.quantity)),
        ("unit", lambda line: line.unit),
        ("price", lambda line: number(line.price)),
        ("amount", lambda line: number(line.amount)),
        *([("", lambda line: "so far" if line.living else "")] if bill.living else []),
    ]


NUMBERS = frozenset({"quantity", "price", "amount"})


def table(sheet: Sheet, *, terminal: bool) -> str:
    """For a person. What is too wide for a terminal is cut or left out; elsewhere nothing is."""
    bill = sheet.bill
    width = shutil.get_terminal_size().columns if terminal else None
    lines = [f"{name:<{_LABEL}}{clean(value)}" for name, value in facts(sheet)]
    if not bill.lines:
        return "\n".join([*lines, "", f"nothing to pay: {number(bill.total)} {bill.currency}"])
    shown_columns = columns(bill)
    spare = {"prices of": 2, "month": 1}
    heads = [Column(title.upper(), spare.get(title, 0), title in NUMBERS) for title, _ in shown_columns]
    rows = [[clean(cell(line)) for _, cell in shown_columns] for line in bill.lines]
    total = {"payer": "total", "amount": number(bill.total), "price": bill.currency}
    rows.append([total.get(title, "") for title, _ in shown_columns])
    body = plain(heads, rows) if width is None else ["".join(cells).rstrip() for cells in fit(heads, rows, width)[1]]
    return "\n".join([*lines, "", *body])


def csv_text(sheet: Sheet) -> str:
    """RFC 4180 with one row of titles and a row a line; what the bill rests on is repeated in each."""
    bill, looked = sheet.bill, sheet.looked
    rest = {
        "currency": bill.currency,
        "since": sheet.period[0],
        "until": sheet.period[1],
        "timezone": bill.timezone,
        "tariff": _cell(bill.tariff),
        "tariff_sha256": bill.digest,
        "records": str(looked.records),
        "first_record": _end(looked.first),
        "last_record": _end(looked.last),
        "records_digest": looked.digest,
        "own_only": "yes" if sheet.own else "no",
    }
    written = io.StringIO()
    writer = csv.writer(written)
    own = (
        "payer",
        *(word for word in bill.group_by if word != "month"),
        "month",
        "prices_of",
        "item",
        "tier",
        "quantity",
        "unit",
        "price",
        "amount",
        "so_far",
    )
    writer.writerow((*own, *rest))
    for line in bill.lines:
        groups = [value for word, value in zip(bill.group_by, line.group, strict=True) if word != "month"]
        cells = (line.payer, *groups, line.month, line.valid_from, line.item, line.tier)
        numbers = (number(line.quantity), line.unit, number(line.price), number(line.amount))
        writer.writerow((*map(_cell, cells), *numbers, "yes" if line.living else "no", *rest.values()))
    return written.getvalue().removesuffix("\r\n")


def json_text(sheet: Sheet) -> str:
    """All of it. Decimals are strings, times as in ISO 8601 and in the tariff's timezone."""
    bill, looked = sheet.bill, sheet.looked
    document: dict[str, Any] = {
        "period": {"since": sheet.iso(bill.since), "until": sheet.iso(bill.until), "timezone": bill.timezone},
        "selection": dict(sheet.selection),
        "tariff": {"name": bill.tariff, "sha256": bill.digest, "currency": bill.currency, "digits": bill.digits},
        "source": {
            "kind": "ledger and records" if sheet.kind == "both" else sheet.kind,
            "places": list(sheet.places),
            "records": looked.records,
            "repeated": looked.repeated,
            "nodes": len(looked.nodes),
            "digest": looked.digest or None,
            "first": _numbered(looked.first),
            "last": _numbered(looked.last),
            "broken": looked.broken,
            "torn": len(looked.torn),
            "unfinished": looked.unfinished,
            "own_only": sheet.own,
        },
        "group_by": list(bill.group_by),
        "records": bill.records,
        "payers": list(bill.payers),
        "living": list(bill.living),
        "lines": [
            {
                "payer": line.payer,
                "group": dict(zip(bill.group_by, line.group, strict=True)),
                "month": line.month,
                "valid_from": line.valid_from,
                "item": line.item,
                "tier": line.tier,
                "quantity": number(line.quantity),
                "unit": line.unit,
                "price": number(line.price),
                "amount": number(line.amount),
                "living": line.living,
            }
            for line in bill.lines
        ],
        "total": number(bill.total),
        "notes": sheet.notes,
    }
    return _ODD.sub(_escaped, msgspec.json.format(msgspec.json.encode(document), indent=2).decode())


def number(value: Decimal) -> str:
    """All digits, no exponent."""
    return f"{value:f}"


def on_terminal(path: str | None) -> bool:
    """Whether a person looks at what is written."""
    return path is None and sys.stdout is not None and sys.stdout.isatty()


def so_many_lines(count: int) -> str:
    """So many of them, in words."""
    return f"{count} line{'' if count == 1 else 's'}"


def _group(position: int) -> Callable[[Line], str]:
    return lambda line: line.group[position] or "-"


def _few(names: tuple[str, ...]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _cell(text: str) -> str:
    """A spreadsheet takes what begins so for a formula; the apostrophe makes it text. owasp.org, CSV Injection.

    What cannot be seen becomes `?` as in the table: CSV has no escapes, and is looked at on terminals too.
    """
    shown_text = clean(text)
    return f"'{shown_text}" if shown_text.lstrip().startswith(_FORMULA) else shown_text


def _escaped(found: re.Match[str]) -> str:
    """What acts on a terminal though JSON allows it, as JSON's own escape: the value stays the same."""
    char = found[0]
    return char if char.isprintable() else json.dumps(char)[1:-1]


def _end(found: tuple[int, str] | None) -> str:
    return "" if found is None else f"{found[0]}:{found[1]}"


def _numbered(found: tuple[int, str] | None) -> dict[str, object] | None:
    return None if found is None else {"number": found[0], "digest": found[1]}
