"""`acctd doctor`: what this host can do, line by line, and what to do about what it cannot. Changes nothing."""

import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click

from acctd import config as configuration
from acctd import oomprogram
from acctd.cgroup.layout import Layout, discover
from acctd.cli.output import emit
from acctd.config import Config
from acctd.errors import AcctdError
from acctd.kernel import procs
from acctd.network import host, probe, resolver
from acctd.network.backend import Pools
from exporters import positions

State = Literal["ok", "note", "missing"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, how it stands, and what to do where it does not stand well."""

    subject: str
    state: State
    text: str


@click.command("doctor")
@click.option("--config", "config_path", metavar="FILE", help="Configuration file.")
def command(config_path: str | None) -> int:
    """Say what this host can do, and what to do about what it cannot. Exits 69 where a job could not be run."""
    config = configuration.load(config_path, os.environ)
    missing = False
    for look in _LOOKS:
        for finding in look(config):
            missing |= finding.state == "missing"
            emit(f"{finding.state:<8}{finding.subject:<22}{finding.text}")
    return 69 if missing else 0


def _privilege(_: Config) -> Iterator[Finding]:
    if os.geteuid() == 0:
        yield Finding("privilege", "ok", "running as root")
    else:
        yield Finding("privilege", "missing", f"running as uid {os.geteuid()}; acctd run needs root, use sudo")


def _hierarchies(config: Config) -> Iterator[Finding]:
    try:
        layout = discover(config.cgroup.controllers)
    except AcctdError as e:
        yield Finding("cgroups", "missing", str(e))
        return
    for hierarchy in layout.hierarchies:
        carried = ", ".join(hierarchy.controllers) or "no controllers; pressure and events only"
        yield Finding(f"cgroup v{hierarchy.version}", "ok", f"{hierarchy.top.path}: {carried}")
    yield Finding("layout", "ok", f"{layout.kind}, jobs below {config.cgroup.base}")
    for controller in config.cgroup.controllers:
        if layout.of(controller) is None:
            hint = f"boot without cgroup_disable={controller}, or take it out of cgroup.controllers"
            yield Finding(f"controller {controller}", "note", f"not offered by this kernel, not counted; {hint}")
    yield from _memory_details(layout)


def _memory_details(layout: Layout) -> Iterator[Finding]:
    memory = layout.of("memory")
    if memory is None:
        return
    if memory.version == 1 and not memory.top.has("memory.memsw.limit_in_bytes"):
        yield Finding("swap", "note", "swap is not accounted; boot with swapaccount=1 to limit and count it")
    if memory.version == 1 and (memory.top.read("memory.use_hierarchy") or b"1").strip() == b"0":
        yield Finding("memory hierarchy", "note", "off at the top; acctd switches it on for its own base")
    if layout.unified is None or not Path("/proc/pressure/cpu").exists():
        yield Finding("pressure", "note", "no pressure files; they need cgroup v2 mounted and a kernel with psi=1")
    else:
        yield Finding("pressure", "ok", "stall times are counted")


def _out_of_memory(config: Config) -> Iterator[Finding]:
    try:
        layout = discover(config.cgroup.controllers)
    except AcctdError:
        return  # said above
    memory = layout.of("memory")
    if memory is not None and memory.version == 1:
        yield Finding("out of memory", "ok", f"jobs wait for acctd, {config.oom.default.deadline:g} s at most")
    elif memory is not None:
        yield Finding(
            "out of memory", "ok", "jobs are slowed down at their limit; a little above it the kernel ends them"
        )
    if layout.of("freezer") is None:
        yield Finding("freezer", "note", "none: jobs cannot be suspended, and are not stopped while evidence is taken")
    program = config.oom.program
    if program is not None and (why := oomprogram.unusable(program)) is not None:
        yield Finding("oom.program", "missing", why)


def _killing(config: Config) -> Iterator[Finding]:
    try:
        layout = discover(config.cgroup.controllers)
    except AcctdError:
        return  # said above
    if layout.unified is None and layout.of("freezer") is None:
        yield Finding(
            "killing", "note", "neither cgroup v2 nor a freezer: what forks quickly is chased process by process"
        )
    else:
        yield Finding("killing", "ok", "no fork can outrun it")


def _block_io(config: Config) -> Iterator[Finding]:
    try:
        layout = discover(config.cgroup.controllers)
    except AcctdError:
        return  # said above
    blkio = layout.of("blkio")
    if blkio is None:
        return
    disks = procs.disks()
    if blkio.version == 2:
        yield Finding("block counters", "ok", f"io.stat counts {len(disks)} disks")
        return
    bytes_file = blkio.top.read("blkio.throttle.io_service_bytes")
    if bytes_file is None:
        yield Finding(
            "block counters", "missing", "no blkio.throttle files; the kernel needs CONFIG_BLK_DEV_THROTTLING"
        )
    elif bytes_file.split() == [b"Total", b"0"]:
        yield Finding("block counters", "note", f"not armed yet for {len(disks)} disks; the first job arms them")
    else:
        yield Finding("block counters", "ok", f"armed; {len(disks)} disks")


def _netfilter(config: Config) -> Iterator[Finding]:
    pools = Pools(config.network.pool4, config.network.pool6 if host.has_ipv6() else None)
    working = []
    for name in probe.NAMES:
        try:
            probe.open_backend(name, pools).close()
        except AcctdError as e:
            yield Finding(f"netfilter {name}", "note", str(e))
        else:
            working.append(name)
            yield Finding(f"netfilter {name}", "ok", "can be used")
    if taken := host.overlap(pools):
        yield Finding(
            "pool", "missing", f"network.pool4 or pool6 overlaps this host's own {taken}; choose another network"
        )
    wanted = config.network.backend
    if not working or wanted not in ("auto", *working):
        yield Finding("network mode nat", "missing", "no usable back end; install libnftables1 or iptables")
    else:
        yield Finding("network mode nat", "ok", f"uses {working[0] if wanted == 'auto' else wanted}")


def _namespaces(_: Config) -> Iterator[Finding]:
    for kind, use in (
        ("net", "pipes"),
        ("pid", "PID isolation"),
        ("mnt", "private mounts"),
        ("user", "unprivileged entry"),
    ):
        present = Path(f"/proc/self/ns/{kind}").exists()
        yield Finding(
            f"namespace {kind}", "ok" if present else "note", use if present else f"not in this kernel: no {use}"
        )
    limit = Path("/proc/sys/user/max_user_namespaces")
    if limit.exists() and limit.read_text().strip() == "0":
        yield Finding(
            "user namespaces", "note", "switched off; set user.max_user_namespaces above 0 for unprivileged entry"
        )


def _forwarding(_: Config) -> Iterator[Finding]:
    v4, v6 = host.forwards()
    for family, on in (("IPv4", v4), ("IPv6", v6)):
        if family == "IPv6" and not host.has_ipv6():
            yield Finding("forwarding IPv6", "note", "this host has no IPv6; jobs get IPv4 alone")
        else:
            text = "on" if on else "off; the first job with a pipe switches it on"
            yield Finding(f"forwarding {family}", "ok" if on else "note", text)


def _resolver(_: Config) -> Iterator[Finding]:
    servers = resolver.host_servers()
    shown = ", ".join(map(str, servers))
    text = f"on loopback ({shown}); acctd relays it into jobs" if servers else "reached through the pipe"
    yield Finding("resolver", "ok", text)


def _bpf(_: Config) -> Iterator[Finding]:
    off = Path("/proc/sys/kernel/unprivileged_bpf_disabled")
    if not off.exists():
        yield Finding("bpf", "note", "this kernel has no bpf(2): no byte counts for jobs in the host's network")
    else:
        yield Finding("bpf", "ok", "bpf(2) is there")


def _sinks(config: Config) -> Iterator[Finding]:
    export = config.export
    if not export.active:
        return
    running = _is_held(export.positions_dir / positions.LOCK)
    if not running:
        hint = "start acctd-export.service, or acctd export; until then all waits in the spool"
        yield Finding("acctd export", "note", f"is not running; {hint}")
    for name in export.names:
        try:
            state = positions.load(export.positions_dir, name)
        except AcctdError as e:
            yield Finding(f"sink {name}", "note", str(e))
            continue
        if state is not None and state.trouble is not None and running:
            yield Finding(f"sink {name}", "note", state.trouble)
        elif state is not None:
            yield Finding(f"sink {name}", "ok", f"{state.counts.sent} points sent, {state.counts.quarantined} refused")


def _is_held(lock: Path) -> bool:
    """Whether somebody has this lock; who may not ask takes it to be so."""
    try:
        # The exporter's user may have put anything there.
        fd = os.open(lock, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        finally:
            os.close(fd)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


_LOOKS = (
    *(_privilege, _hierarchies, _out_of_memory, _killing, _block_io, _netfilter, _namespaces, _forwarding, _resolver),
    *(_bpf, _sinks),
)
