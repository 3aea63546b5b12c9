"""Records and open jobs by the agent's socket: for whoever may not read the ledger, and so far for those who may."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from acctd.client import Client
from acctd.sources.files import Batch, usage_of
from acctd.sources.gather import Begin, Gathered, Make
from acctd.sources.looked import Looked, digest, key
from acctd.usage import Usage


def living(agent: Client) -> list[Usage]:
    """The open jobs that the caller may read, as of now. Raises UnavailableError for an agent that is too old."""
    return [usage for page in _pages(agent, "Interim") for usage in map(_usage, page["records"])]


@dataclass(slots=True)
class Ended:
    """The signed records that the caller may see."""

    agent: Client
    every: bool = field(default=False, init=False)  # known once they were read

    def batches(self, looked: Looked) -> Iterator[Batch]:
        for page in _pages(self.agent, "Records"):
            self.every = page["all"]
            batch = Batch([], [], [])
            for signed in page["records"]:
                body = msgspec.json.encode(signed["body"])
                batch.usages.append(usage_of(body))
                batch.places.append(signed["number"])
                batch.digests.append(digest(body))
                batch.size += len(body)
            if ends := [(signed["number"], signed["digest"]) for signed in page["records"]]:
                looked.first = min(looked.first or ends[0], ends[0])
                looked.last = max(looked.last or ends[-1], ends[-1])
            yield batch


def from_agent(agent: Client, path: Path, make: Make, begin: Begin) -> Gathered:
    """What the caller may see: as a rule own jobs alone."""
    open_jobs = living(agent)
    ended = Ended(agent)
    reader = make(frozenset(key(usage) for usage in open_jobs))
    reader.read(ended, None, begin(0, 0))
    gathered = Gathered(reader, "agent", (str(path),), own=not ended.every)
    gathered.live(open_jobs)
    return gathered


def _pages(agent: Client, method: str) -> Iterator[dict[str, Any]]:
    last, more = 0, True
    while more:
        page = agent.call(method, after=last)
        last, more = page["last"], page["more"]
        yield page


def _usage(body: Any) -> Usage:
    return usage_of(msgspec.json.encode(body))
