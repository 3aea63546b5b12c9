"""Three network namespaces in a row: campus - node - wan, with IPv4 and IPv6 from the documentation ranges.

The node stands for the worker node: acctd runs inside and makes its pipes there. Everything goes when the context ends,
also by exception, SIGINT and SIGTERM; what a killed run left behind goes when the next one starts. Touches no link,
rule or sysctl of the host. Commands are entered by nsenter(1): `ip netns exec` would hide /sys/fs/cgroup from them.
"""

import contextlib
import ctypes
import itertools
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

NETNS = Path("/run/netns")
PREFIX = "acctdlab-"
_CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)
_serial = itertools.count()


@dataclass(frozen=True, slots=True)
class Site:
    """One namespace. `dev` is its link: to the node, or for the node itself towards the wan; v4, v6 its addresses."""

    name: str
    dev: str
    v4: str
    v6: str

    @property
    def path(self) -> Path:
        return NETNS / self.name


class Topology:
    """campus and wan each have a link to the node and a default route through it; the node's default is the wan.

    The node forwards nothing until its own sysctls say so: that is acctd's to do, or `forward()`'s. With `offload`
    false, GSO, TSO and GRO are off on all links, so that what leaves the node is cut to the MTU before it is counted.
    """

    def __init__(self, *, offload: bool = True) -> None:
        base = f"{PREFIX}{os.getpid()}-{next(_serial)}"
        self.node = Site(f"{base}-node", "wan", "203.0.113.1", "2001:db8:2::1")
        self.campus = Site(f"{base}-campus", "node", "198.51.100.2", "2001:db8:1::2")
        self.wan = Site(f"{base}-wan", "node", "203.0.113.2", "2001:db8:2::2")
        self.sites = (self.node, self.campus, self.wan)
        self._offload = offload
        self._children: list[subprocess.Popen[Any]] = []
        self._old_sigterm: Any = None

    def __enter__(self) -> "Topology":
        sweep()
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            # By default SIGTERM ends Python without unwinding. The exit code is the shell's for a death by it.
            self._old_sigterm = signal.signal(signal.SIGTERM, _leave)
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End what was started here and remove the namespaces. Twice is fine."""
        for child in self._children:
            if child.poll() is None:
                child.kill()
                child.wait()
        self._children.clear()
        _remove([site.name for site in self.sites])
        if self._old_sigterm is not None:
            signal.signal(signal.SIGTERM, self._old_sigterm)
            self._old_sigterm = None

    def run(self, site: Site, argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        """subprocess.run inside a site; a non-zero exit raises unless check=False is given."""
        options.setdefault("check", True)
        return subprocess.run(_inside(site, argv), **options)

    def popen(self, site: Site, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """subprocess.Popen inside a site; killed at the end if it still runs."""
        child = subprocess.Popen(_inside(site, argv), **options)
        self._children.append(child)
        return child

    @contextlib.contextmanager
    def enter(self, site: Site) -> Iterator[None]:
        """Take the calling thread into a site: sockets made meanwhile belong to it for good."""
        with open("/proc/thread-self/ns/net", "rb") as home, open(site.path, "rb") as there:
            _setns(there.fileno())
            try:
                yield
            finally:
                _setns(home.fileno())

    def forward(self) -> None:
        """Let the node forward, both families."""
        with self.enter(self.node):
            for key in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
                Path("/proc/sys/net", key).write_text("1")

    def _make(self) -> None:
        node = self.node
        _ip(*(f"netns add {site.name}" for site in self.sites))
        ways = ((self.campus, "campus", "198.51.100.1", "2001:db8:1::1"), (self.wan, node.dev, node.v4, node.v6))
        for site, dev, v4, v6 in ways:
            # Made inside: no moment at which the host has a link of ours.
            _ip(
                f"link add {dev} type veth peer name {site.dev} netns {site.name}",
                *_link(dev, v4, v6),
                namespace=node.name,
            )
            _ip(
                "link set lo up",
                *_link(site.dev, site.v4, site.v6),
                f"route add default via {v4}",
                f"route add ::/0 via {v6}",
                namespace=site.name,
            )
        _ip(
            "link set lo up",
            f"route add default via {self.wan.v4}",
            f"route add ::/0 via {self.wan.v6}",
            namespace=node.name,
        )
        if not self._offload:
            off = ["gso", "off", "tso", "off", "gro", "off", "tx-udp-segmentation", "off"]
            for site, dev, _, _ in ways:
                self.run(node, ["ethtool", "-K", dev, *off], capture_output=True)
                self.run(site, ["ethtool", "-K", site.dev, *off], capture_output=True)


def sweep() -> None:
    """Remove the namespaces of runs whose process is gone."""
    if not NETNS.is_dir():
        return
    left = []
    for entry in NETNS.iterdir():
        if entry.name.startswith(PREFIX):
            pid = entry.name.removeprefix(PREFIX).partition("-")[0]
            if pid.isdigit() and not Path("/proc", pid).exists():
                left.append(entry.name)
    _remove(left)


def _link(dev: str, v4: str, v6: str) -> tuple[str, ...]:
    """Link-local too, because a router asks for its neighbours from there; set here, as the kernel's own would wait."""
    return (
        f"link set {dev} addrgenmode none",
        f"link set {dev} up",
        f"address add {v4}/24 dev {dev}",
        f"address add {v6}/64 dev {dev} nodad",
        f"address add fe80::{v6.rpartition('::')[2]}/64 dev {dev} nodad",
    )


def _remove(names: Sequence[str]) -> None:
    """Links first: a namespace lives on without its name while a process is inside, and would keep them."""
    for name in names:
        if not (NETNS / name).exists():
            continue
        for dev in ("campus", "wan", "node"):
            subprocess.run(["ip", "-n", name, "link", "del", dev], capture_output=True, check=False)
        _ip(f"netns del {name}")


def _ip(*lines: str, namespace: str | None = None) -> None:
    argv = ["ip", *(["-n", namespace] if namespace else []), "-batch", "-"]
    done = subprocess.run(argv, input="\n".join(lines) + "\n", text=True, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip -batch: {done.stderr.strip()}; of {lines}")


def _inside(site: Site, argv: Sequence[str]) -> list[str]:
    return ["nsenter", f"--net={site.path}", "--", *argv]


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        error = ctypes.get_errno()
        raise OSError(error, f"setns: {os.strerror(error)}")


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
