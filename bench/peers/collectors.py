"""Three others that watch the same jobs at the same interval: collectd, Netdata (their cgroups plugins) and psutil.

Each runs in the foreground with a configuration and a directory of its own, everything off but what reads cgroups, and
listens at most on a unix socket there. None of them keeps totals across a restart or makes records; what each sees is
asked for when its cost has been taken, so that asking costs it nothing. Debian packages: collectd-core, netdata-core
with netdata-plugins-bash.
"""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acctd.cgroup.driver import JobCgroups
from acctd.cgroup.layout import discover
from bench.served import REPO, Served

_SECONDS = 60.0  # for a peer to answer

_COLLECTD = """\
BaseDir "{directory}"
PIDFile "{directory}/pid"
PluginDir "/usr/lib/collectd"
TypesDB "/usr/share/collectd/types.db"
Hostname "bench"
FQDNLookup false
Interval {interval}
LoadPlugin cgroups
LoadPlugin unixsock
<Plugin cgroups>
  CGroup "/^job_{prefix}/"
</Plugin>
<Plugin unixsock>
  SocketFile "{directory}/s"
</Plugin>
# Without a plugin that writes it complains of every value, unless none is to be written.
PostCacheChain "Keep"
<Chain "Keep">
  Target "stop"
</Chain>
"""

_NETDATA = """\
[global]
  run as user = root
[directories]
  config = {directory}/etc
  cache = {directory}/cache
  lib = {directory}/lib
  log = {directory}/log
[db]
  mode = ram
  update every = {every}
  retention = {keep}
[web]
  mode = static-threaded
  web server threads = 1
  bind to = unix:{directory}/s
[health]
  enabled = no
[ml]
  enabled = no
[registry]
  enabled = no
[statsd]
  enabled = no
[plugins]
  cgroups = yes
  enable running new plugins = no
  proc = no
  diskspace = no
  tc = no
  idlejitter = no
  timex = no
  netdata monitoring = no
  apps = no
  charts.d = no
  ebpf = no
  fping = no
  go.d = no
  ioping = no
  nfacct = no
  perf = no
  python.d = no
  slabinfo = no
[plugin:cgroups]
  update every = {every}
  check for new cgroups every = {every}
  max cgroups to allow = 4000
  enable by default cgroups matching = /{base}/*
  search for cgroups in subpaths matching = /{base} /
  use unified cgroups = {unified}
  enable systemd services = no
"""


class MissingError(RuntimeError):
    """The peer cannot be had here; says why."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What a peer shows of the jobs, as asked from it."""

    jobs: int
    numbers: int  # values of all jobs together
    network: int  # those of them that tell network traffic


@dataclass(frozen=True, slots=True)
class Peer:
    """One of them, running."""

    name: str
    process: "subprocess.Popen[Any]"
    found: Callable[[], int]  # how many jobs it knows of so far; costs it little
    look: Callable[[], Sight]


def collectd(served: Served, interval: float) -> Peer:
    """collectd.conf(5), plugins cgroups and unixsock; no plugin that writes."""
    program = _found("collectd", "collectd-core", Path("/usr/lib/collectd/cgroups.so"))
    directory = _directory(served, "collectd")
    (directory / "collectd.conf").write_text(
        _COLLECTD.format(directory=directory, interval=interval, prefix=served.prefix)
    )
    process = _start(served, directory, [program, "-f", "-C", str(directory / "collectd.conf")])

    def look() -> Sight:
        # "1795222071.164 bench/cgroups-job_x/cpu-user"; collectd-unixsock(5), LISTVAL.
        words = [line.split(" ", 1)[1].split("/") for line in _listval(directory / "s")]
        mine = [word for word in words if word[1].startswith(f"cgroups-job_{served.prefix}")]
        return _sight((plugin, kind) for _, plugin, kind in mine)

    return Peer("collectd", process, lambda: look().jobs, look)


def netdata(served: Served, interval: float) -> Peer:
    """netdata.conf, all plugins off but cgroups; metrics in memory for ten minutes; its API on a unix socket."""
    program = _found("netdata", "netdata-core", Path("/usr/lib/netdata/plugins.d/cgroup-network"))
    directory = _directory(served, "netdata")
    for name in ("cache", "lib", "log", "etc"):
        (directory / name).mkdir()
    every = max(1, round(interval))
    # On a hybrid host it would take v2 by itself, which has no memory controller there.
    v1 = discover().of("memory")
    unified = "no" if v1 is not None and v1.version == 1 else "yes"
    (directory / "netdata.conf").write_text(
        _NETDATA.format(directory=directory, every=every, keep=max(60, 600 // every), base=served.base, unified=unified)
    )
    (directory / "lib" / "cloud.d").mkdir()
    (directory / "lib" / "cloud.d" / "cloud.conf").write_text("[global]\n enabled = no\n")
    process = _start(served, directory, [program, "-D", "-c", str(directory / "netdata.conf")])

    def look() -> Sight:
        charts = json.loads(_http(directory / "s", "/api/v1/charts"))["charts"]
        found = []
        for chart in charts.values():
            family = chart["id"].split(".", 1)
            if chart["type"].startswith("cgroup_") and f"job_{served.prefix}" in chart["id"]:
                found += [(family[0], f"{chart['context']}:{name}") for name in chart["dimensions"]]
        return _sight(found)

    def found() -> int:
        # Its script names each cgroup as it finds it. Asking for the charts would cost it memory.
        log = directory / "log" / "error.log"
        text = log.read_text() if log.exists() else ""
        return len(set(re.findall(rf"_job_({served.prefix}\d+)' is called", text)))

    return Peer("netdata", process, found, look)


def psutil_sum(served: Served, interval: float) -> Peer:
    """psutil_sum.py, told where each job's processes are listed."""
    directory = _directory(served, "psutil")
    layout = discover()
    # A job's processes are in each of its hierarchies.
    tops = [JobCgroups(layout, served.base, f"job_{job}").all()[0][1] for job in served.jobs]
    listed = directory / "jobs"
    listed.write_text("".join(f"{top.path}\n" for top in tops))
    argv = [sys.executable, str(REPO / "bench" / "peers" / "psutil_sum.py"), str(listed), str(interval)]
    process = _start(served, directory, argv, stdout=directory / "sums")

    def look() -> Sight:
        lines = (directory / "sums").read_text().splitlines()
        if not lines:
            raise MissingError("psutil_sum.py has printed nothing yet")
        last: dict[str, dict[str, float]] = json.loads(lines[-1])
        return _sight((job, kind) for job, values in last.items() for kind in values)

    return Peer("psutil", process, lambda: look().jobs, look)


PEERS: dict[str, Callable[[Served, float], Peer]] = {
    "collectd": collectd,
    "netdata": netdata,
    "psutil": psutil_sum,
}


def _sight(pairs: Iterable[tuple[str, str]]) -> Sight:
    """From (job, kind of number) pairs."""
    found = set(pairs)
    network = [kind for _, kind in found if "net_" in kind or "if_" in kind]
    return Sight(len({job for job, _ in found}), len(found), len(network))


def _found(program: str, package: str, beside: Path) -> str:
    path = shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if path is None or not beside.exists():
        raise MissingError(
            f"{path or program}: {beside if path else 'program'} is not there; apt-get install {package}"
        )
    return path


def _directory(served: Served, name: str) -> Path:
    directory = served.directory / name
    directory.mkdir()
    return directory


def _start(served: Served, directory: Path, argv: list[str], stdout: Path | None = None) -> "subprocess.Popen[Any]":
    with open(directory / "log.txt", "wb") as log, open(stdout or directory / "out.txt", "wb") as out:
        return served.popen(argv, stdout=out, stderr=log, stdin=subprocess.DEVNULL)


def _listval(path: Path) -> list[str]:
    with _reached(path) as connection, connection.makefile("rw") as lines:
        lines.write("LISTVAL\n")
        lines.flush()
        number = int(lines.readline().split()[0])
        return [lines.readline().rstrip("\n") for _ in range(number)]


def _http(path: Path, wanted: str) -> bytes:
    with _reached(path) as connection:
        connection.sendall(f"GET {wanted} HTTP/1.0\r\nHost: bench\r\nConnection: close\r\n\r\n".encode())
        data = bytearray()
        while received := connection.recv(1 << 20):
            data += received
    head, _, body = bytes(data).partition(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        raise MissingError(f"{wanted}: {head.splitlines()[:1]!r}")
    return body


def _reached(path: Path) -> socket.socket:
    """A connection to a peer's socket, once there is one."""
    deadline = time.monotonic() + _SECONDS
    while True:
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(_SECONDS)
        try:
            made.connect(str(path))
        except OSError as e:
            made.close()
            if time.monotonic() > deadline:
                raise MissingError(f"nobody answers at {path.name} ({e.strerror}) within {_SECONDS:.0f} s") from None
            time.sleep(0.1)
        else:
            return made
