"""One legacy table between refresh and commit: the few edits the iptables back end makes, through python-iptables.

Nothing reaches the kernel before the commit, which replaces the whole table at once and carries the counters of every
rule that stays over. Foreign rules pass through as the kernel's own bytes and are never parsed. Knows no jobs.
The caller holds the xtables lock.
"""

import ctypes
import errno
import os
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, TypeVar

from acctd.errors import KernelRefusedError, NotPermittedError, UnavailableError
from acctd.kernel.xtables import Family
from acctd.network import xtrules

ATTEMPTS = 10
"""A commit is refused with EAGAIN only if somebody without the lock came between; ten in a row are no accident."""

T = TypeVar("T")


def transact(iptc: ModuleType, family: Family, name: str, edit: Callable[["Edit"], T]) -> T:
    """Run `edit` on a fresh copy of a table, commit, and start over if the kernel's table changed meanwhile.

    Raises KernelRefusedError (nothing changed), NotPermittedError, UnavailableError.
    """
    for _ in range(ATTEMPTS):
        table = _open(iptc, family, name)
        try:
            result = edit(Edit(iptc, family, table))
            table.commit()
        except iptc.IPTCError as e:
            if os.strerror(errno.EAGAIN) in str(e):
                continue
            raise _refusal(family, name, e) from e
        finally:
            # A table is a singleton that would stay in this namespace, and keep it alive.
            table.close()
        return result
    raise KernelRefusedError(
        f"{family.command} table {name} changed under each of {ATTEMPTS} attempts to commit; "
        "look for a program that writes iptables rules without taking the xtables lock (iptables -w)"
    )


class Edit:
    """A table being edited. Chains and their rules in order; positions count from 0."""

    def __init__(self, iptc: ModuleType, family: Family, table: Any) -> None:  # iptc has no types
        self.family = family
        self._iptc = iptc
        self._table = table

    def has(self, chain: str) -> bool:
        return bool(self._table.is_chain(chain))

    def chains(self) -> list[str]:
        return [chain.name for chain in self._table.chains]

    def ensure(self, chain: str) -> bool:
        """Make the chain if it is missing; whether it was."""
        missing = not self.has(chain)
        if missing:
            self._table.create_chain(chain)
        return missing

    def fill(self, chain: str, rules: list[bytes]) -> None:
        """Make the chain hold these rules and no others."""
        if not self.ensure(chain):
            self._table.flush_entries(chain)
        for rule in rules:
            self.append(chain, rule)

    def append(self, chain: str, rule: bytes) -> None:
        self._table.append_entry(chain, ctypes.create_string_buffer(rule, len(rule)))

    def rules(self, chain: str) -> Iterator[tuple[bytes, str]]:
        """Every rule's head (the entry without matches and target) and its target's name."""
        rule = self._table.first_rule(chain)
        while rule:
            target = self._table.get_target(rule)
            yield ctypes.string_at(ctypes.addressof(rule), self.family.size), target.decode() if target else ""
            rule = self._table.next_rule(rule)

    def drop(self, chain: str, unwanted: Callable[[bytes, str], bool]) -> None:
        """Delete the rules whose head and target's name say so."""
        doomed = [position for position, rule in enumerate(self.rules(chain)) if unwanted(*rule)]
        for position in reversed(doomed):
            # Table has delete_entry alone, which wants a whole rule and its mask; libiptc takes the position.
            if not self._table._iptc.iptc_delete_num_entry(chain.encode(), position, self._table._handle):
                raise self._iptc.IPTCError(f"can't delete rule {position} of {chain}: {self._table.strerror()}")

    def put_first(self, chain: str, target: str) -> None:
        """Make `-j target` the chain's first rule and its only jump there."""
        rule = xtrules.entry(self.family, xtrules.verdict(target))
        jumps = [position for position, (_, name) in enumerate(self.rules(chain)) if name == target]
        if jumps == [0] and xtrules.same(self.family, next(self.rules(chain))[0], rule):
            return
        self.drop(chain, lambda _, name: name == target)
        self._table.insert_entry(chain, ctypes.create_string_buffer(rule, len(rule)), 0)

    def references(self, chain: str) -> int:
        """How many rules jump to the chain."""
        count = ctypes.c_uint(0)
        self._table._iptc.iptc_get_references(ctypes.byref(count), chain.encode(), self._table._handle)
        return count.value

    def delete(self, *chains: str) -> None:
        """Delete chains with their rules, which may jump to each other; refused while others jump to them."""
        for chain in chains:
            self._table.flush_entries(chain)
        for chain in chains:
            self._table.delete_chain(chain)


def _open(iptc: ModuleType, family: Family, name: str) -> Any:
    kind = iptc.Table if family.version == 4 else iptc.Table6
    try:
        table = kind(name, autocommit=False)
        table.refresh()  # it may be the one of an earlier call: closed, or bound to another namespace
    except iptc.IPTCError as e:
        raise _refusal(family, name, e) from e
    return table


def _refusal(family: Family, name: str, error: Exception) -> KernelRefusedError | NotPermittedError | UnavailableError:
    text = re.sub(r"b'(.*)'", r"\1", str(error))  # python-iptables shows C strings as Python does
    if "ermission denied" in text or "not permitted" in text:
        return NotPermittedError(f"{family.command} table {name}: {text}; run as root")
    if "can't initialize" in text:
        return UnavailableError(f"{family.command} table {name}: {text}; load its kernel module")
    return KernelRefusedError(f"{family.command} table {name}: {text}")
