"""This node's records and open jobs, for bills and reports: from the ledger where it may be read, else from the agent.

Says where they are and asks for them; what is made of them is for who asks.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from acctd import ledger, statement
from acctd.client import Client
from acctd.config import Config
from acctd.errors import NotFoundError, UnavailableError
from acctd.ledger import Ledger


def ledger_or_agent(config: Config, socket: Path) -> Path | None:
    """The ledger if this user may read it; None: the agent is to be asked, and answers.

    Raises NotFoundError where there is neither, UnavailableError where the ledger is root's and no agent answers.
    """
    path = config.state_dir / ledger.FILE
    try:
        there = path.exists()
    except PermissionError:
        there = True
    if there and os.access(path, os.R_OK | os.W_OK):  # of a database with a WAL a reader writes, too
        return path
    try:
        with Client(socket):
            return None
    except UnavailableError as e:
        if not there:
            raise NotFoundError(f"there is no ledger {path}, and {e}; set state_dir") from None
        raise UnavailableError(f"the ledger {path} is root's, and {e}; run as root") from None


def living(book: Ledger, socket: Path) -> list[bytes]:
    """The open jobs as JSON of records; where a job is there twice the later one counts. Read it before the records:
    a job that ends meanwhile has one of its own by then.

    First as of their last readings, jobs of `acctd run` among them, which no agent reads; then as the agent holds
    them now, if one answers.
    """
    found = [msgspec.json.encode(record) for record in statement.living(book)]
    try:
        with Client(socket) as agent:
            found += [msgspec.json.encode(body) for page in pages(agent, "Interim") for body in page["records"]]
    except UnavailableError:
        pass
    return found


def pages(agent: Client, method: str) -> Iterator[dict[str, Any]]:
    """All that a method gives a page at a time. Raises UnavailableError for an agent that is too old."""
    last, more = 0, True
    while more:
        page = agent.call(method, after=last)
        last, more = page["last"], page["more"]
        yield page
