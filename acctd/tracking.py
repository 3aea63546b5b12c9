"""Finding the processes that a job is to take beside those put into it: by environment, login, supplementary group.

condor_procd's ways of tracking, for starters whose processes leave their tree. Finds only; daemon.py moves them. A
process can change its environment's text and so slip away before it is found: a cgroup is what holds, this is how one
gets in.
"""

import os
import pwd
from collections.abc import Iterable

from acctd.errors import NotFoundError, UsageError
from acctd.kernel import procs
from acctd.rows import Rule


def check(rule: Rule) -> Rule:
    """The rule, if it can match anything. Raises UsageError, and NotFoundError for a login that is not there."""
    given = [name for name in ("environment", "login", "group") if getattr(rule, name) is not None]
    if len(given) != 1:
        raise UsageError(f"tracking takes one of environment, login and group, not {len(given)}; name one")
    if rule.environment is not None:
        name, equals, _ = rule.environment.partition("=")
        if not name or not equals or "\0" in rule.environment:
            raise UsageError(f"environment {rule.environment!r} is not NAME=VALUE")
    if rule.group is not None and not 0 < rule.group < 2**32 - 1:
        raise UsageError(f"group {rule.group} is no supplementary group's gid; it takes 1 to {2**32 - 2}")
    if rule.login is not None:
        _uid(rule.login)
    return rule


class Survey:
    """The processes of one moment, read once for all who look for some. Kernel threads, pid 1 and we are left out."""

    def __init__(self) -> None:
        self._who: dict[int, procs.Credentials] | None = None
        self._environments: dict[int, set[bytes]] = {}

    def find(self, rules: Iterable[Rule], owner: int | None) -> set[int]:
        """The pids that some rule names; only those of a uid where one is given."""
        wanted = list(rules)
        logins = {uid for rule in wanted if rule.login is not None and (uid := _uid_now(rule.login)) is not None}
        groups = {rule.group for rule in wanted if rule.group is not None}
        texts = [rule.environment for rule in wanted if rule.environment is not None]
        variables = {text.encode("utf-8", "surrogateescape") for text in texts}
        found = set()
        for pid, who in self._processes().items():
            if owner is not None and who.uid != owner:
                continue
            named = who.uid in logins or not groups.isdisjoint(who.groups)
            if named or (variables and not variables.isdisjoint(self._environment(pid))):
                found.add(pid)
        return found

    def _processes(self) -> dict[int, procs.Credentials]:
        if self._who is None:
            pids = [pid for pid in procs.pids() if pid not in (1, os.getpid()) and not procs.is_kernel_thread(pid)]
            self._who = {pid: who for pid in pids if (who := procs.credentials(pid)) is not None}
        return self._who

    def _environment(self, pid: int) -> set[bytes]:
        if pid not in self._environments:
            self._environments[pid] = procs.environment(pid)
        return self._environments[pid]


def _uid(login: str) -> int:
    try:
        return pwd.getpwnam(login).pw_uid
    except (KeyError, ValueError):
        raise NotFoundError(f"login {login!r} is no user of this host; name one that is") from None


def _uid_now(login: str) -> int | None:
    """None for a user that has been deleted since the rule was made."""
    try:
        return _uid(login)
    except NotFoundError:
        return None
