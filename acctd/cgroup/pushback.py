"""v1: what the kernel does not do for soft limits there, done for it: the one that went over is pushed back.

v1's kernel minds memory.soft_limit_in_bytes only when the whole host runs short. Under the limit of a common parent, a
pilot with families inside, it takes from all alike (seen on 6.1 and 6.18). Whoever hears that the parent runs short
calls push_back() for those inside that are over, before the parent's limit is reached. v2 needs nothing of this:
memory.low holds there below any parent. Kernel docs: admin-guide/cgroup-v1/memory.rst (3 and 7).
"""

import errno
from contextlib import ExitStack
from functools import partial

from acctd.cgroup.limits import value_of
from acctd.errors import KernelRefusedError, UnavailableError
from acctd.kernel.cgroupfs import CgroupDir

_LIMIT, _USAGE, _CONTROL = "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.oom_control"


def push_back(cgroup: CgroupDir, soft: int) -> int:
    """Have the kernel reclaim what a v1 cgroup has above its soft limit; returns the bytes that were freed, also 0.

    Its hard limit is set to the soft one, which makes the kernel reclaim, and back at once. If not all of it can be
    reclaimed the kernel refuses the lower limit (EBUSY), and what was reclaimed is the result. Should a task run into
    the low limit before it is raised again it waits, and goes on with the old limit: nothing is killed, but whoever
    listens to the cgroup's OOM notices may get one, and finds under_oom 0.

    Raises UnavailableError on v2, KernelRefusedError if the old limit cannot be put back.
    """
    if not cgroup.has(_LIMIT):
        raise UnavailableError(f"{cgroup.path} is no v1 memory cgroup; v2 pushes back by itself, by memory.low")
    limit, before = value_of(cgroup, _LIMIT), int(value_of(cgroup, _USAGE) or 0)
    if not limit or before <= soft or int(limit) <= soft:
        return 0
    with ExitStack() as after:
        if "oom_kill_disable 0" in value_of(cgroup, _CONTROL):
            after.callback(partial(cgroup.write, _CONTROL, "0"))
            cgroup.write(_CONTROL, "1")
        after.callback(partial(cgroup.write, _LIMIT, limit))
        try:
            cgroup.write(_LIMIT, str(soft))
        except KernelRefusedError as e:
            if not isinstance(e.__cause__, OSError) or e.__cause__.errno != errno.EBUSY:
                raise
        freed = before - int(value_of(cgroup, _USAGE) or 0)
    return max(0, freed)
