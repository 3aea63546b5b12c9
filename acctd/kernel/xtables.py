"""The raw door to the legacy xtables tables: the lock all writers share, and a table's bytes as the kernel gives them.

Reads only, and knows neither chains of jobs nor rules: acctd/network gives the bytes a meaning. Every call opens its
own socket, so it acts on the network namespace of the calling thread and pins none. A table that nobody has loaded
there is absent; asking never loads it (except in `require`, whose purpose that is).
Kernel sources: include/uapi/linux/netfilter_ipv4/ip_tables.h and netfilter_ipv6/ip6_tables.h.
"""

import ctypes
import errno
import os
import socket
import struct
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

from acctd.errors import KernelRefusedError, NotPermittedError, UnavailableError
from acctd.kernel import filelock

LOCK_PATIENCE = 15.0
"""Seconds to wait for another program's transaction: iptables-restore of a very large firewall takes about one."""

_GET_INFO, _GET_ENTRIES, _GET_REVISION_MATCH, _GET_REVISION_TARGET = 64, 65, 66, 67
_V6_GET_REVISION_MATCH, _V6_GET_REVISION_TARGET = 68, 69
_ENTRIES_HEAD = 40  # struct ipt_get_entries: char name[32]; unsigned size; padding up to the first entry
_ATTEMPTS = 64  # a table that changes between INFO and ENTRIES this often in a row is being changed in a loop

# struct ipt_getinfo: name[32], valid_hooks, hook_entry[5], underflow[5], num_entries, size
_INFO = struct.Struct("=32s I 5I 5I I I")

_getsockopt = ctypes.CDLL(None, use_errno=True).getsockopt
_getsockopt.restype = ctypes.c_int
_getsockopt.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint32)]


@dataclass(frozen=True, slots=True)
class Family:
    """Where things lie in one IP version's entries: struct ipt_entry, struct ip6t_entry. All offsets in bytes."""

    version: int
    domain: socket.AddressFamily
    level: int  # of its socket options
    names: str  # /proc file with the loaded tables
    command: str
    ifaces_at: int  # iniface[16], outiface[16], iniface_mask[16], outiface_mask[16]
    offsets_at: int  # u16 target_offset, u16 next_offset
    counters_at: int  # u64 packets, u64 bytes
    size: int  # of an entry without matches and target


V4 = Family(4, socket.AF_INET, 0, "ip_tables_names", "iptables", 16, 88, 96, 112)
V6 = Family(6, socket.AF_INET6, 41, "ip6_tables_names", "ip6tables", 64, 140, 152, 168)


def locked(*, shared: bool = False, patience: float = LOCK_PATIENCE) -> AbstractContextManager[None]:
    """Hold the lock that iptables-legacy, -restore and everything built on them hold while they change a table.

    A reader takes it shared: between a writer's two system calls (replace, add counters) all counts are near zero.
    Raises ExhaustedError after `patience` seconds.
    """
    path = os.environ.get("XTABLES_LOCKFILE") or "/run/xtables.lock"
    return filelock.held(path, shared=shared, patience=patience)


class Info(NamedTuple):
    """What IPT_SO_GET_INFO says: where each hook's chain begins, in bytes, by hook number; entries; bytes in all."""

    hooks: tuple[int, ...]
    entries: int
    size: int


class Table:
    """One table's entries, read into a buffer that is kept: at a thousand jobs fresh pages cost a tenth of a read."""

    def __init__(self, family: Family, name: str) -> None:
        self.family = family
        self.name = name
        self.fetched: Info | None = None
        """That of what entries() gave."""
        self._buffer = ctypes.create_string_buffer(_ENTRIES_HEAD)

    def entries(self) -> memoryview | None:
        """All entries as one blob, counters summed over CPUs; valid until the next call. None: no such table here."""
        if not self._loaded():
            return None
        try:
            with socket.socket(self.family.domain, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
                for _ in range(_ATTEMPTS):
                    info = self._info(sock)
                    if info is None:
                        return None
                    if self._fetch(sock, info.size):
                        self.fetched = info
                        return memoryview(self._buffer).cast("B")[_ENTRIES_HEAD : _ENTRIES_HEAD + info.size]
        except OSError as e:
            raise _refusal(f"read {self.family.command} table {self.name}", e) from e
        raise KernelRefusedError(
            f"{self.family.command} table {self.name} changed {_ATTEMPTS} times while being read; "
            "look for a program that rewrites it in a loop"
        )

    def info(self) -> Info | None:
        """Of the moment, at next to no cost. None: no such table here."""
        if not self._loaded():
            return None
        try:
            with socket.socket(self.family.domain, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
                return self._info(sock)
        except OSError as e:
            raise _refusal(f"look at {self.family.command} table {self.name}", e) from e

    def _loaded(self) -> bool:
        try:
            # Not /proc/net: that is the main thread's namespace, whichever thread asks.
            with open(f"/proc/thread-self/net/{self.family.names}", "rb") as names:
                return self.name.encode() in names.read().split()
        except FileNotFoundError:
            return False

    def _info(self, sock: socket.socket) -> Info | None:
        info = ctypes.create_string_buffer(_INFO.pack(self.name.encode(), *[0] * 13), _INFO.size)
        try:
            _ask(sock, self.family.level, _GET_INFO, info)
        except OSError as e:
            if e.errno in (errno.ENOENT, errno.ENOPROTOOPT):
                return None
            raise
        words = _INFO.unpack(info)
        return Info(words[2:7], words[-2], words[-1])

    def _fetch(self, sock: socket.socket, size: int) -> bool:
        """False if the table changed since its size was asked for."""
        if len(self._buffer) < _ENTRIES_HEAD + size:
            # A little more than needed: the next job is likely to come.
            self._buffer = ctypes.create_string_buffer(_ENTRIES_HEAD + size + size // 8)
        # The kernel writes a name up to its NUL and leaves the rest of the field alone: it must not show what the last
        # table had there, or equal chains would look different and other ones alike.
        ctypes.memset(self._buffer, 0, _ENTRIES_HEAD + size)
        struct.pack_into("=32sI", self._buffer, 0, self.name.encode(), size)
        try:
            _ask(sock, self.family.level, _GET_ENTRIES, self._buffer, _ENTRIES_HEAD + size)
        except OSError as e:
            if e.errno == errno.EAGAIN:
                return False
            raise
        return True


def require(family: Family, table: str, extensions: tuple[tuple[str, str, int], ...]) -> None:
    """Check, by having the kernel load them, that a table and its ("match" | "target", name, revision) are there.

    Raises UnavailableError naming what to load, NotPermittedError without CAP_NET_ADMIN.
    """
    try:
        with socket.socket(family.domain, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
            info = ctypes.create_string_buffer(_INFO.pack(table.encode(), *[0] * 13), _INFO.size)
            try:
                _ask(sock, family.level, _GET_INFO, info)
            except OSError as e:
                if e.errno in (errno.ENOENT, errno.ENOPROTOOPT):
                    module = "iptable" if family.version == 4 else "ip6table"
                    raise UnavailableError(
                        f"this kernel has no {family.command} table {table}; run modprobe {module}_{table}, "
                        "or set network.backend to nftables"
                    ) from e
                raise
            for kind, name, revision in extensions:
                option = _revision_option(family, kind)
                wish = ctypes.create_string_buffer(struct.pack("=29sB", name.encode(), revision), 30)
                try:
                    _ask(sock, family.level, option, wish)
                except OSError as e:
                    if e.errno in (errno.ENOENT, errno.EPROTONOSUPPORT):
                        raise UnavailableError(
                            f"this kernel has no {family.command} {kind} {name} (revision {revision}); "
                            "load the kernel module that has it, "
                            "or set network.backend to nftables"
                        ) from e
                    raise
    except OSError as e:
        if e.errno in (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT):
            raise UnavailableError(
                f"this kernel has no IPv{family.version}; take the IPv{family.version} pool out"
            ) from e
        raise _refusal(f"use {family.command} table {table}", e) from e


def _revision_option(family: Family, kind: str) -> int:
    if family.version == 4:
        return _GET_REVISION_MATCH if kind == "match" else _GET_REVISION_TARGET
    return _V6_GET_REVISION_MATCH if kind == "match" else _V6_GET_REVISION_TARGET


def _ask(
    sock: socket.socket, level: int, option: int, buffer: "ctypes.Array[ctypes.c_char]", size: int | None = None
) -> None:
    """getsockopt through libc: Python's own refuses more than 1024 bytes."""
    length = ctypes.c_uint32(len(buffer) if size is None else size)
    if _getsockopt(sock.fileno(), level, option, buffer, ctypes.byref(length)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _refusal(what: str, error: OSError) -> KernelRefusedError | NotPermittedError:
    if error.errno in (errno.EACCES, errno.EPERM):
        return NotPermittedError(f"cannot {what}: {error.strerror}; run as root")
    return KernelRefusedError(f"cannot {what}: {error.strerror}")
