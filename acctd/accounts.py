"""Who a job belongs to and runs as, from the host's user database."""

import os
import pwd
from dataclasses import dataclass

from acctd.errors import NotFoundError
from acctd.model import Owner


@dataclass(frozen=True, slots=True)
class Account:
    """A user of this host, as a login would have it."""

    owner: Owner
    groups: list[int]
    environment: dict[str, str]  # HOME, SHELL, USER, LOGNAME


def named(user: str) -> Account:
    """A user by name or number. Raises NotFoundError."""
    try:
        entry = pwd.getpwuid(int(user)) if user.isascii() and user.isdecimal() else pwd.getpwnam(user)
    except (KeyError, OverflowError, ValueError):
        raise NotFoundError(f"user {user!r} does not exist on this host; name one that does") from None
    environment = {"HOME": entry.pw_dir, "SHELL": entry.pw_shell, "USER": entry.pw_name, "LOGNAME": entry.pw_name}
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return Account(Owner(entry.pw_uid, entry.pw_gid, entry.pw_name), groups, environment)


def of(uid: int, gid: int) -> Owner:
    """An owner by numbers, who need not have an account."""
    try:
        return Owner(uid, gid, pwd.getpwuid(uid).pw_name)
    except KeyError:
        return Owner(uid, gid, str(uid))
