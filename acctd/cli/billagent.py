"""Records and open jobs by the agent's socket: for whoever may not read the ledger."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from acctd.cli.thisnode import pages
from acctd.client import Client
from acctd.sources.files import Batch, usage_of
from acctd.sources.gather import Begin, Gathered, Make
from acctd.sources.looked import Looked, digest, key


@dataclass(slots=True)
class Ended:
    """The signed records that the caller may see."""

    agent: Client
    every: bool = field(default=False, init=False)  # known once they were read
    archived: float = field(default=0.0, init=False)  # until then went jobs of which the agent has no record any more

    def batches(self, looked: Looked) -> Iterator[Batch]:
        for page in pages(self.agent, "Records"):
            self.every = page["all"]
            self.archived = page.get("archived") or 0.0
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
    told = [body for page in pages(agent, "Interim") for body in page["records"]]
    open_jobs = [usage_of(msgspec.json.encode(body)) for body in told]
    ended = Ended(agent)
    reader = make(frozenset(key(usage) for usage in open_jobs))
    reader.read(ended, None, begin(0, 0))
    gathered = Gathered(reader, "agent", (str(path),), own=not ended.every)
    if ended.archived + 1 >= reader.needed_from and ended.archived:
        reader.looked.missing = (
            "older records were archived, and some of them may be of this period; root can bill them"
        )
    gathered.live(open_jobs)
    return gathered
