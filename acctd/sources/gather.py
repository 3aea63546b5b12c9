"""One bill's records from one place, each once, with the open jobs of this node where they belong to it.

Knows the places and their order; what is read how is files.py's and books.py's, what it costs is bill.py's.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from acctd.errors import NotFoundError, UsageError
from acctd.ledger import Ledger
from acctd.sources import books, crew, files
from acctd.sources.crew import Reader
from acctd.sources.looked import Key, key
from acctd.sources.seen import Seen
from acctd.usage import Usage

Make = Callable[[frozenset[Key]], Reader]
"""A reader that has read nothing; the keys are those of open jobs."""

Begin = Callable[[int, int], Callable[[int, int], None]]
"""Told how many records and bytes there are to read, 0 where that is not known; gives what is told of each batch."""


@dataclass(slots=True)
class Gathered:
    """All that a bill is made from."""

    reader: Reader
    kind: str  # ledger, records, agent or influxdb
    places: tuple[str, ...]  # where that is
    living: list[Usage] = field(default_factory=list)  # those that were added
    own: bool = False  # of one user's jobs alone

    def live(self, usages: Iterable[Usage]) -> None:
        """Add the open jobs that have no record by now."""
        for usage in usages:
            if key(usage) not in self.reader.ended:
                self.reader.tally.add(usage, living=True)
                self.reader.looked.nodes.add(usage.node)
                self.living.append(usage)


def from_files(directories: Sequence[Path], make: Make, begin: Begin) -> Gathered:
    """Records of any number of nodes. Raises NotFoundError, UsageError where two say other things of one job."""
    found = files.find(directories)
    if not found:
        raise NotFoundError(f"there is no file below {', '.join(map(str, directories))}; name a directory of records")
    tasks = files.pieces(found)
    size = sum(file.size for file in found)

    def differ(one: int, other: int) -> None:
        """Of the same record in two notations the digests differ, too."""
        first, second = files.at(found, one), files.at(found, other)
        usage = files.again(*first)
        if usage != files.again(*second):
            raise UsageError(
                f"{files.where(*first)} and {files.where(*second)} are two records of job {usage.id!r} on node "
                f"{usage.node!r} that differ; find out which is right and take the other one away"
            )

    with Seen(differ) as seen:
        progress = begin(0, size)
        reader = crew.read(tasks, lambda: make(frozenset()), size=size, check=seen.repeated, progress=progress)
    return Gathered(reader, "records", tuple(str(path) for path in directories))


def from_ledger(path: Path, living: Sequence[Usage], make: Make, begin: Begin) -> Gathered:
    """This node's ledger, and the open jobs, as they were before it is read: one that has ended since is a record by
    then. Of two accounts of an open job the later one in `living` counts.
    """
    known = {key(usage): usage for usage in living}
    watched = frozenset(known)
    with Ledger(path) as book:
        tasks = books.numbers(book, make(watched).needed_from)
    number = sum(task.until - task.after for task in tasks)
    size = number * books.SIZE
    progress = begin(number, 0)
    reader = crew.read(tasks, lambda: make(watched), size=size, check=None, progress=progress)
    gathered = Gathered(reader, "ledger", (str(path),))
    gathered.live(known.values())
    return gathered
