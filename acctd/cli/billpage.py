"""A bill as one page that needs nothing else: for a browser, for paper, and to be sent. The frame is the reports'."""

from acctd.cli.billforms import NUMBERS, Sheet, columns, facts, number
from acctd.report import page
from acctd.report.markup import Html, tag
from acctd.report.page import Column, Section


def html_text(sheet: Sheet) -> Html:
    """The whole file."""
    bill = sheet.bill
    since, until = sheet.period
    lead = f"{number(bill.total)} {bill.currency} {f'from {since} ' if since else ''}until {until}, {bill.timezone}"
    sections = [
        Section("lines", "What is to be paid", _lines(sheet)),
        Section(
            "basis", "What it rests on", page.facts([(name, value) for name, value in facts(sheet) if name != "note"])
        ),
    ]
    if sheet.notes:
        sections.append(Section("notes", "Notes", tag("ul", [tag("li", note) for note in sheet.notes])))
    check = "quantity times price is the amount, rounded half to even once a line; the total is the sum of the amounts"
    return page.page(f"Bill by {bill.tariff}", lead, sections, f"To check it by hand: {check}.")


def _lines(sheet: Sheet) -> Html:
    bill = sheet.bill
    shown = columns(bill)
    if not bill.lines:
        return tag("p", "Nothing.")
    heads = [Column(title, number=title in NUMBERS) for title, _ in shown]
    rows = [[cell(line) for _, cell in shown] for line in bill.lines]
    total = {"payer": "total", "price": bill.currency, "amount": number(bill.total)}
    return page.table("Lines of the bill", heads, rows, foot=[[total.get(title, "") for title, _ in shown]])
