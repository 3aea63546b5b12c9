"""Mending what other programs did to jobs' chains, with nothing counted twice and the loss told.

A chain that is not the one read before, or that stands lower, may have counted anything: it is made anew and counts
from zero, on top of what was metered. A whole chain that packets do not reach any more keeps its counts.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from acctd.job import NETWORK, NETWORK_NAMES, Job
from acctd.kernel import rtnetlink
from acctd.network import host
from acctd.network.backend import Chains


def mend(
    chains: Chains,
    jobs: Sequence[Job],
    lock: Callable[[], AbstractContextManager[None]],
    store: Callable[[Sequence[Job]], None],
) -> list[tuple[Job, str]]:
    """Mend the chains, of those that these jobs have in one back end, that do not count all of their packets.

    The jobs mended, and what befell each. What a chain had counted when it was read last is kept; what passed from then
    on until now is lost, and how much that can be at most is said, also in the job's notes. `lock` keeps other acctd
    from changing shared parts meanwhile; `store` puts accounts into the ledger. Raises KernelRefusedError: then it is
    to be tried again.
    """
    broken = chains.broken([job.plan for job in jobs if job.plan is not None])
    cut_off = [job for job in jobs if job.damage is None and job.plan and job.plan.chain in broken]
    if not cut_off and all(job.damage is None for job in jobs):
        return []
    # What a chain counted that is whole and only cut off is there to be read; or it shows that there is more to it.
    samples = chains.read()
    for job in cut_off:
        if job.plan is not None:
            job.take_sample(samples.get(job.plan.chain))
    damaged = [job.plan for job in jobs if job.damage is not None and job.plan is not None]
    whole = [job.plan for job in cut_off if job.damage is None and job.plan is not None]
    # Where the chain is gone, the intent to count from zero goes first: if we die behind it, what the new chain counts
    # is taken. A stranger's chain in its place must not be taken for it.
    gone = [job for job in jobs if job.damage is not None and job.plan is not None and job.plan.chain not in samples]
    for job in gone:
        _rebase(job)
    if gone:
        store(gone)
    with lock():
        for pools in {job.pools for job in jobs if job.pools is not None}:
            host.enable_forwarding(ipv6=pools.v6 is not None)
            host.keep_in(pools)
        if damaged:
            chains.add(*damaged)
        anew = {plan.chain for plan in damaged} | (chains.mend(*whole) if whole else set())
    done = {plan.chain for plan in (*damaged, *whole)}
    return [
        (job, _go_on(job, anew=job.plan.chain in anew))
        for job in jobs
        if job.plan is not None and job.plan.chain in done
    ]


def bound(job: Job, passed: int | None) -> str:
    """What can be missing at most, by what the pipe has passed in all; also what no rule counts is in that."""
    if passed is None:
        return "bytes since the last reading"
    counted = sum(job.meter.now().get(NETWORK_NAMES[0], {}).values())
    return f"at most {max(0, passed - counted)} bytes"


def _go_on(job: Job, *, anew: bool) -> str:
    """Count on from a mended chain, which is at zero if it was made anew; says what befell it."""
    passed = rtnetlink.link_bytes(job.lease.ifname) if job.lease else None
    what = job.damage or "its chain was cut off"
    sentence = f"{what} by another program and mended; {bound(job, passed)} of the job so far are not counted"
    if anew:
        _rebase(job)
    job.damage = None
    job.note(sentence)
    return sentence


def _rebase(job: Job) -> None:
    """What its chain counts is at zero now, and adds to what was metered. Twice is fine."""
    job.meter.rebase(NETWORK)
    job.incarnation = job.counts = None
    job.unstored = True
