"""How one job is shut in: from what it asks for and what the configuration says to the plan that isolate.py follows.

Decides; does nothing to the kernel. The plan goes to the helper of `acctd run`, and as the answer of Entry to
`acctd-hook exec`.
"""

from acctd import scratch
from acctd.config import IsolationConfig
from acctd.errors import UsageError
from acctd.policies import Isolation

Plan = dict[str, object]


def plan(wanted: Isolation, place: str, config: IsolationConfig) -> Plan | None:
    """The plan for a job's processes, as isolate.py words it; None where nothing is asked for.

    `place` is the job's scratch directory. Raises UsageError for a chroot that the configuration has no more.
    """
    if not wanted:
        return None
    chroot = None
    if wanted.chroot is not None:
        chroot = config.chroots.get(wanted.chroot)
        if chroot is None:
            raise UsageError(
                f"chroot {wanted.chroot!r} of this job is no name in isolation.chroots any more; put it back there"
            )
    binds = list(chroot.binds) if chroot is not None else []
    binds += [(str(own), target, False) for own, target in scratch.entries(place, wanted.scratch)]
    return {
        # Another root without it is left by way of /proc/PID/root of any process of the same owner.
        "pid_namespace": wanted.pid_namespace or chroot is not None,
        "root": chroot.root if chroot is not None else None,
        "binds": [list(bind) for bind in binds],
        # What only the job asks for may lie anywhere, also over what set-user-id programs trust, such as /etc.
        "no_new_privs": wanted.no_new_privs or not set(wanted.scratch) <= set(config.default.scratch),
    }
