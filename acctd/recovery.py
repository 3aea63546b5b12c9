"""Putting right what a dead acctd left: the ledger and the kernel held against each other.

Every open job whose keeper is gone is taken over: a half-made one is undone, an ended one gets its record, a removal is
completed, a living one is let be or adopted. What carries acctd's mark below the base and is in no ledger is put back
into it from what its maker wrote down on its cgroups. What carries no mark is never touched.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec

from acctd import readers
from acctd.agent import Agent
from acctd.cgroup.driver import JobCgroups, orphans, sweep_sentinels
from acctd.cgroup.layout import discover
from acctd.errors import AcctdError, LedgerError
from acctd.job import Ending, Job, cgroup_name, hold
from acctd.kernel import private, procs
from acctd.metrics import CPU_SYSTEM, CPU_USER
from acctd.model import Record
from acctd.rows import OpenJob, decode_row

_PATIENCE = 0.5  # s for processes to die; nobody is served meanwhile, and the next tick tries again


def recover(agent: Agent, adopt: Callable[[Job], None] | None = None) -> list[Record]:
    """Take over what nobody keeps; the records written.

    Living jobs, and made ones that wait for somebody to enter, are given to `adopt`, held open and ours from then on;
    without it they are let be. Trouble with one job goes to `agent.trouble` and does not keep another from being dealt
    with.
    """
    written: list[Record] = []
    agent.unrecovered = False
    sweep_sentinels(agent.layout, agent.config.cgroup.base)
    if adopt is not None:
        _reinstate(agent)
    # Families first: an ended one tells its parent what it used before the parent's own record is written; and a parent
    # goes on as long as one of them does.
    above: set[int] = set()
    for row in reversed(agent.ledger.open_jobs()):
        kept = row.keeper != agent.keeper and procs.is_alive(row.keeper) and row.boot_id == agent.boot_id
        if kept or row.seq in agent.held:
            above.update({row.parent} if row.parent is not None else ())
            continue
        try:
            record = _recover_one(agent, row, adopt, above)
            if record is not None:
                written.append(record)
        except (AcctdError, OSError) as e:
            agent.trouble.append(f"job {row.spec.id}, whose acctd had died: {e}")
            agent.unrecovered = True
    return written


def unaccounted(agent: Agent) -> list[tuple[Path, str]]:
    """What acctd-hook exec --fail-open let by while no agent answered (hookexec.py): files, to be removed once told."""
    place = agent.config.socket.parent / "unaccounted"
    private.make(place)
    return [(path, path.read_text(errors="replace").strip()[:4096]) for path in sorted(place.iterdir())]


def _recover_one(agent: Agent, seen: OpenJob, adopt: Callable[[Job], None] | None, above: set[int]) -> Record | None:
    # With the controllers it was made with: the configuration may name others by now.
    layout = discover(seen.place.controllers)
    if adopt is None and _stays(agent, hold(seen, layout), above):
        return None
    row = _claimed(agent, seen, adopt, above)
    if row is None:
        return None  # somebody else deals with it
    # From here on the row as it is now: its keeper may have done more before it died.
    job = hold(row, layout)
    if adopt is not None and row.phase == "running" and row.terms.member is not None and not _ran(agent, job):
        # The agent died between its intent and the first process: its starter will call again.
        agent.ledger.made(row.seq)
        job = hold(replace(row, phase="made", terms=replace(row.terms, member=None)), layout)
    elif adopt is not None and row.phase == "made" and row.boot_id == agent.boot_id and _ran(agent, job):
        # Its beginning could not be written, on a full disk.
        agent.ledger.begin(row.seq, row.boot_ns, row.terms)
        member = procs.identity(min(living)) if (living := job.cgroups.living()) else None
        job = hold(replace(row, phase="running", terms=replace(row.terms, member=member)), layout)
    row, stays = job.row, _stays(agent, job, above)
    if stays and adopt is None:
        return None  # we do not stay; the next one finds our claim dead
    if row.phase == "making" or (row.phase == "made" and not stays):
        agent.abandon(job, _PATIENCE)
        return None
    if row.phase == "closed":
        # Signed off: nobody needs to wait for what is left of it. Held, or the next recover() would list it once more,
        # and clear_up() take the second time whatever has its id by then.
        agent.held[row.seq] = job
        agent.leftovers.append(job)
        agent.clear_up()
        return None
    if row.boot_id == agent.boot_id:
        readers.open_for(job, agent.nfs)
    agent.held[row.seq] = job
    if stays and adopt is not None:
        if row.terms.run:
            # Whose `acctd run` has died: nobody will finish it, so it is given up once it has ended.
            job.row = replace(row, terms=replace(row.terms, watcher=seen.keeper))
        adopt(job)
        return None
    if row.boot_id != agent.boot_id:
        job.note("the node rebooted while this job ran; totals and wall time are those stored last")
    elif row.terms.ended_ns is not None:
        job.note("whoever watched this job died after it ended; its exit status is unknown")
    else:
        job.note(
            "whoever watched this job died before it ended; its exit status is unknown, and its wall time ends when it "
            "was found to have ended"
        )
    try:
        return agent.finish(job, Ending(at=row.terms.ended_ns), _PATIENCE)
    except BaseException:
        # Not ours yet: recover() is to find it again.
        agent.held.pop(row.seq, None)
        job.close()
        raise


def _claimed(agent: Agent, seen: OpenJob, adopt: Callable[[Job], None] | None, above: set[int]) -> OpenJob | None:
    """The row as it is now, ours from here on; None if somebody else was first."""
    try:
        return agent.ledger.claim(seen, agent.keeper)
    except LedgerError:
        # A full disk: one that lives is held all the same, and becomes ours in the ledger when that can be written.
        if adopt is None or not _stays(agent, hold(seen, discover(seen.place.controllers)), above):
            raise
        return seen


def _stays(agent: Agent, job: Job, above: set[int]) -> bool:
    """Whether the job goes on: it has processes, or waits for its first, or a family inside it goes on (`above` has it
    then, and gets the job's own parent). No job outlives a boot.
    """
    row = job.row
    if row.boot_id != agent.boot_id:
        return False
    runs = row.phase == "running" and (row.seq in above or bool(job.cgroups.living()))
    if (runs or row.phase == "made") and row.parent is not None:
        above.add(row.parent)
    return runs or row.phase == "made"


def _reinstate(agent: Agent) -> None:
    """Put jobs that are in the kernel and not in the ledger back into it: it was lost, and this one is new."""
    layout = discover()
    known = {(row.place.base, cgroup_name(row.spec.id)) for row in agent.ledger.open_jobs()}
    # Parents first, so that families find them.
    for (base, name), text in sorted(orphans(layout, agent.config.cgroup.base, cgroup_name("")).items()):
        if (base, name) in known:
            continue
        cgroups = JobCgroups(layout, base, name)
        try:
            if text is None:
                # Its maker died before it could write anything down, and so before anybody was let in.
                if not cgroups.living() and cgroups.remove():
                    agent.trouble.append(f"cgroups {base}/{name}, half made by an acctd that died, are removed")
                continue
            row = decode_row(text)
            if procs.is_alive(row.keeper) or row.boot_id != agent.boot_id:
                continue
            agent.ledger.reinstate(_as_found(agent, row))
        except (AcctdError, OSError, msgspec.MsgspecError, KeyError, TypeError, ValueError) as e:
            agent.trouble.append(f"cgroups {base}/{name} are of a job that is in no ledger, and stay: {e}")
            continue
        agent.trouble.append(f"job {row.spec.id} was in the kernel and not in the ledger; it is known again")


def _as_found(agent: Agent, row: OpenJob) -> OpenJob:
    """The row as its job is now: under its parent's seq of today, and running if anybody ever entered."""
    known = {other.spec.id: other.seq for other in agent.ledger.open_jobs()}
    parent = known.get(row.spec.parent) if row.spec.parent is not None else None
    ran = _ran(agent, hold(row, discover(row.place.controllers)))
    return replace(row, phase="running" if ran else "made", parent=parent)


def _ran(agent: Agent, job: Job) -> bool:
    """Whether anybody ever entered: not even to end costs a process no CPU time. True for one of an earlier boot."""
    if job.row.boot_id != agent.boot_id or job.cgroups.living():
        return True
    readers.open_for(job, agent.nfs)
    try:
        agent.take(job)
    finally:
        job.close()
    return any(job.meter.totals.get((metric, "")) for metric in (CPU_USER, CPU_SYSTEM))
