"""One bill's records, each once, with the open jobs of this node where they belong to it.

A ledger of which records were archived makes no bill of their time without the archive: none is missing in silence.

Knows the places and their order; what is read how is files.py's and books.py's, what it costs is bill.py's.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from acctd.errors import AcctdError, NotFoundError, UsageError
from acctd.ledger import Ledger
from acctd.sources import books, crew, files
from acctd.sources.crew import Reader
from acctd.sources.looked import Key, key
from acctd.sources.seen import Seen
from acctd.usage import Usage
from acctd.wording import clean

Make = Callable[[frozenset[Key]], Reader]
"""A reader that has read nothing; the keys are those of open jobs."""

Begin = Callable[[int, int], Callable[[int, int], None]]
"""Told how many records and bytes there are to read, 0 where that is not known; gives what is told of each batch."""


@dataclass(slots=True)
class Gathered:
    """All that a bill is made from."""

    reader: Reader
    kind: str  # ledger, both (ledger and records), records, agent or influxdb
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
    found = _found(directories)
    tasks = files.pieces(found)
    size = sum(file.size for file in found)
    with Seen(partial(_differ, found, None)) as seen:
        progress = begin(0, size)
        reader = crew.read(tasks, lambda: make(frozenset()), size=size, check=seen.repeated, progress=progress)
    return Gathered(reader, "records", tuple(str(path) for path in directories))


def from_ledger(
    path: Path,
    living: Sequence[Usage],
    make: Make,
    begin: Begin,
    *,
    directories: Sequence[Path] = (),
    partly: bool = False,
) -> Gathered:
    """This node's ledger, and the open jobs, as they were before it is read: one that has ended since is a record by
    then. Of two accounts of an open job the later one in `living` counts.

    With directories also the records there, of this node and others, as from_files() does. Raises AcctdError where
    records of the period were archived and are not in them; with `partly` that is only told.
    """
    known = {key(usage): usage for usage in living}
    watched = frozenset(known)
    with Ledger(path) as book:
        since = make(watched).needed_from
        tasks = books.numbers(book, since)
        absent = books.missing(book, since)  # last: what is archived from here on shows in reading
        _, archived = book.anchor()
    if absent and not directories and not partly:
        raise AcctdError(f"{absent}; give --from ledger --from records DIR, with the directory of the archive")
    number = sum(task.until - task.after for task in tasks)
    size = number * books.SIZE
    if not directories:
        reader = crew.read(tasks, lambda: make(watched), size=size, check=None, progress=begin(number, 0))
    else:
        found = _found(directories)
        # The last one that was taken out: where it is, there are those before it, or `acctd ledger verify` tells.
        pieces = files.pieces(found, f'"digest":"{archived}"'.encode() if absent else b"")
        size += sum(file.size for file in found)
        with Seen(partial(_differ, found, path)) as seen:
            progress = begin(0, size)
            reader = crew.read(
                [*pieces, *tasks], lambda: make(watched), size=size, check=seen.repeated, progress=progress
            )
        if absent and not reader.looked.found:
            raise AcctdError(f"{absent}, and the last of them is in no file below {_shown(directories)}; name more")
        absent = ""
    kind, places = ("both", directories) if directories else ("ledger", ())
    reader.looked.missing = absent
    gathered = Gathered(reader, kind, (str(path), *map(str, places)))
    gathered.live(known.values())
    return gathered


def _found(directories: Sequence[Path]) -> list[files.File]:
    found = files.find(directories)
    if not found:
        raise NotFoundError(f"there is no file below {_shown(directories)}; name a directory of records")
    return found


def _shown(directories: Sequence[Path]) -> str:
    return clean(", ".join(map(str, directories)))


def _differ(found: list[files.File], path: Path | None, one: int, other: int) -> None:
    """Of the same record in two notations the digests differ, too. Below 0 a place is a number in the ledger."""
    usages, places = [], []
    for place in (one, other):
        if path is not None and place < 0:
            usages.append(books.again(path, -place))
            places.append(f"record {-place} of {path}")
        else:
            file, offset = files.at(found, place)
            usages.append(files.again(file, offset))
            places.append(files.where(file, offset))
    usage, another = usages
    if usage != another:
        raise UsageError(
            f"{' and '.join(places)} are two records of job {usage.id!r} on node {usage.node!r} that differ; find out "
            "which is right and take the other one away"
        )
