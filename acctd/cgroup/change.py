"""Changing the limits of a living job."""

from acctd.cgroup.driver import JobCgroups
from acctd.errors import UnavailableError
from acctd.model import Limits


def change(cgroups: JobCgroups, old: Limits, new: Limits, *, reclaim: bool) -> None:
    """LIMITS replaces this whole file."""
    raise UnavailableError(f"limits of {cgroups.name} cannot be changed from {old} to {new} ({reclaim})")
