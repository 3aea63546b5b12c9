"""Opening a lasting agent's ledger, and another in its place: where the file is corrupt, or was taken away.

What the agent holds goes into the new one. Decides nothing: books.py knows when.
"""

from dataclasses import replace
from pathlib import Path

from acctd.errors import LedgerError
from acctd.job import Job, boottime
from acctd.ledger import Ledger
from acctd.rows import OpenJob, Phase
from acctd.sqlitefile import empty_successor, move_aside, take_successor


def opened(path: Path, trouble: list[str], *, lasting: bool) -> Ledger:
    """The ledger. For a lasting agent a corrupt one is moved aside, which `trouble` tells. Raises LedgerError."""
    try:
        if lasting:
            take_successor(path)
        if lasting and path.is_dir():
            raise LedgerError(f"ledger {path} is a directory", corrupt=True)
        ledger = Ledger(path)
        if lasting:
            ledger.check()
    except LedgerError as e:
        if not e.corrupt or not lasting:
            raise
        aside = move_aside(path)
        trouble.append(f"{e}; it is now {aside}, and jobs are found again by what stands on their cgroups")
        ledger = Ledger(path)
        ledger.begin_numbers_anew()
    return ledger


def begun_anew(old: Ledger, held: dict[int, Job], leftovers: list[Job]) -> tuple[Ledger, Path]:
    """A new ledger in a corrupt one's place, with the jobs that are held; and where the old one is now.

    The jobs' rows are those of the new one then. Raises LedgerError if there can be no new one now, and the old one
    goes on.
    """
    with Ledger(empty_successor(old.path)) as new:
        new.begin_numbers_anew()
        rows: dict[int, OpenJob] = {}
        for seq, job in sorted(held.items()):
            phase: Phase = "closed" if job in leftovers else job.row.phase
            parent = rows[job.row.parent].seq if job.row.parent in rows else None
            row = replace(
                job.row,
                phase=phase,
                account=job.account,
                parent=parent,
                seen_ns=boottime(),
                midnights=tuple(job.midnights),
            )
            rows[seq] = new.reinstate(row)
    ledger, aside = replaced(old)
    for seq, row in rows.items():
        held[seq].row = row
    return ledger, aside


def reopened(old: Ledger) -> Ledger:
    """Open it again, where it was closed and its successor could not be opened then. Raises LedgerError."""
    take_successor(old.path)
    return Ledger(old.path)


def restored(old: Ledger) -> tuple[Ledger, Path | None]:
    """Write a ledger again that was taken away while it was open; and where that is which lies in its place now."""
    old.copy_to(empty_successor(old.path))
    ledger, aside = replaced(old)
    return ledger, aside if aside.exists() else None


def replaced(old: Ledger) -> tuple[Ledger, Path]:
    """Put the successor, whole and closed, into the old one's place; and where that is now. Raises LedgerError."""
    old.close()
    try:
        aside = move_aside(old.path)
        take_successor(old.path)
    except OSError as e:
        raise LedgerError(f"ledger {old.path} cannot be replaced: {e.strerror}; see its directory") from e
    return Ledger(old.path), aside
