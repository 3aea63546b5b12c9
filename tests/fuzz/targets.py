"""What reads bytes that a job or a peer can shape, each as a function of bytes that must not fail but in its own way.

Each target takes any bytes, makes of them what could come that way, and asserts what must hold. An exception that
leaves it is a defect. test_fuzz.py feeds them by hypothesis, fuzz_atheris.py by coverage. Nothing here needs root or
changes anything; no target calls an agent or starts a command.
"""

import io
import json
import os
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import msgspec

from acctd import config, hook, hookcall, hookexec, methods, tracking, varlink, wishes
from acctd.caller import Caller
from acctd.errors import AcctdError, KernelRefusedError, UsageError
from acctd.kernel import conntrack, mountinfo, nftrules, procs
from acctd.kernel.xtables import V4, V6, Family
from acctd.metrics import BLOCK_READ_BYTES, BLOCK_WRITE_BYTES, CPU_STALL, PIDS
from acctd.model import JobSpec, Limits, Owner, Record, chain_name, parse_class, parse_size
from acctd.network import host, resolver, xtplan, xtrules
from acctd.network.backend import ChainPlan, Pools
from acctd.network.xtcounts import Sampler, total
from acctd.rows import Rule, decode_row
from acctd.varlink import FRAME_LIMIT, READ, Call, Decoder, FrameError
from collectors import blkio, cpu, memory, parse, pids, pressure
from exporters.classad import format_ad, record_ad

REPO = Path(__file__).parents[2]
NETFILTER = REPO / "fixtures/netfilter"
OWNER = Owner(1000, 1000, "alice")
CONFIG = config.parse("", None)[0] or sys.exit("the defaults are no configuration")
_directory = tempfile.TemporaryDirectory(prefix="acctd-fuzz-")  # gone with the process
_SCRATCH = Path(_directory.name)


# The socket


def frames(data: bytes) -> None:
    """Any bytes in any pieces: calls or a FrameError, nothing kept beyond the bound, no call lost by the cutting."""
    cuts, stream = data[:8], data[8:]
    pieces = list(_cut(cuts, stream))
    assert _calls(pieces) == _calls([stream[at : at + READ] for at in range(0, len(stream), READ)])


def _calls(pieces: list[bytes]) -> tuple[list[Call], bool]:
    decoder = Decoder(limit=FRAME_LIMIT)
    found: list[Call] = []
    try:
        for piece in pieces:
            decoder.push(piece)
            assert decoder.pending <= FRAME_LIMIT + READ
            for call in decoder.calls():
                found.append(call)
            assert decoder.pending <= FRAME_LIMIT
    except FrameError as e:
        assert "\n" not in str(e)
        return found, True
    return found, False


def _cut(cuts: bytes, stream: bytes) -> Iterator[bytes]:
    at = turn = 0
    while at < len(stream):
        size = (cuts[turn % len(cuts)] if cuts else 0) + 1
        yield stream[at : at + size]
        at, turn = at + size, turn + 1


def calls_survive(data: bytes) -> None:
    """Well-formed calls come out as they went in, whatever the pieces."""
    sent = [Call(f"a.B{n}", {"x": data[n : n + 7].hex()}, more=bool(n % 2)) for n in range(len(data) % 7)]
    stream = b"".join(msgspec.json.encode(call) + b"\0" for call in sent)
    assert _calls(list(_cut(data, stream))) == (sent, False)


def parameters(data: bytes) -> None:
    """A method's parameters: as declared, or refused with a reason that can be sent back."""
    try:
        raw = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    for kind in _kinds():
        try:
            wanted = msgspec.convert(raw, kind)
        except msgspec.ValidationError as e:
            varlink.failure("a.B", parameter=str(e))
            continue
        try:
            _take(wanted)
        except AcctdError as e:
            varlink.refusal(e)


def _kinds() -> list[type[msgspec.Struct]]:
    unbound = methods.Methods(None, reload=lambda: None, leave=lambda: None)  # type: ignore[arg-type]  # never asked
    return sorted({kind for kind, _ in unbound.table.values()}, key=lambda kind: kind.__name__)


def _take(wanted: Any) -> None:
    """What the methods make of their parameters before they look at any job."""
    name = type(wanted).__name__
    if name == "_Finish":
        methods._ending(wanted)
    elif name == "_Track":
        tracking.check(Rule(wanted.environment, wanted.login, wanted.group))
    elif name == "_SetLimits":
        wishes.limits(Limits(), wanted.limits)
    elif name in ("_Create", "_Register"):
        methods._terms(Caller(1, 0, 0, ""), wanted.watcher, wanted.interval)
        classes = limits = None
        network = "nat"
        if name == "_Create":
            if wanted.user is not None:
                methods.accounts.named(wanted.user)
            limits = wishes.limits(Limits(), wanted.limits or {}, wanted.requests)
            network = wishes.network(wanted.network or "nat")
            wishes.oom(CONFIG, wanted.oom or {}, root=False)
            wishes.isolation(CONFIG, wanted.isolation or {})
            classes = tuple(parse_class(key, cidrs) for key, cidrs in (wanted.classes or {}).items())
        spec = JobSpec(wanted.job, OWNER, limits or Limits(), network, classes or (), wanted.tags or {}, wanted.parent)
        _is_one_directory(spec.id)


def job_ids(data: bytes) -> None:
    """Any text as a job's id is refused, or names one directory and one chain."""
    text = data.decode("utf-8", "surrogateescape")
    try:
        JobSpec(text, OWNER)
    except UsageError:
        return
    _is_one_directory(text)


def _is_one_directory(name: str) -> None:
    assert name not in ("", ".", "..")
    assert not set("/\0\n\r ") & set(name)
    chain = chain_name(name)
    assert len(chain.encode()) <= 28
    assert chain.isascii()


def sizes(data: bytes) -> None:
    """A size as text."""
    try:
        assert parse_size("memory", data.decode("utf-8", "replace")) >= 0
    except UsageError:
        pass


# Counter files of a cgroup


def counters(data: bytes) -> None:
    """Each parser on any text: numbers of at most 64 bits and a bit, or MalformedFile; twice the same."""
    for parser in _parsers():
        outcome = _parsed(parser, data)
        assert outcome == _parsed(parser, data)
        if isinstance(outcome, dict):
            for (metric, label), value in outcome.items():
                assert isinstance(value, int)
                assert value >= 0
                assert isinstance(label, str)
                assert metric.name


def _parsers() -> list[Callable[[bytes, str], Any]]:
    return [
        memory.parse_memory_stat_v1,
        memory.parse_memory_stat_v2,
        cpu.parse_cpuacct_stat,
        parse.single(PIDS),
        *(parser for _, parser in (*memory._V1_FILES, *memory._V2_FILES, *pressure._FILES)),
        lambda text, path: blkio.parse_blkio(text, path, {b"Read": BLOCK_READ_BYTES, b"Write": BLOCK_WRITE_BYTES}),
        lambda text, path: pressure.parse_pressure(text, path, {b"some": CPU_STALL}),
        *_found(blkio, "parse_"),
        *_found(cpu, "parse_"),
        *_found(pids, "parse_"),
    ]


def _found(module: ModuleType, prefix: str) -> list[Callable[[bytes, str], Any]]:
    """A module's parsers of (text, path)."""
    found = [getattr(module, name) for name in sorted(vars(module)) if name.startswith(prefix)]
    return [f for f in found if f.__module__ == module.__name__ and f.__code__.co_argcount == 2]


def _parsed(parser: Callable[[bytes, str], Any], data: bytes) -> Any:
    try:
        return parser(data, "memory.stat")
    except parse.MalformedFile as e:
        assert len(str(e)) < 1000
        return None


def stat_lines(data: bytes) -> None:
    """The parser that remembers where lines stand gives what the one gives that does not, file after file."""
    fast = parse.StatLines((b"a", b"bb", b"c"))
    names: dict[int, list[bytes]] = {}
    for text in data.split(b"\xff"):
        lines = [line.partition(b" ")[0] for line in text.split(b"\n")]
        if len(set(lines)) != len(lines) or names.setdefault(len(lines), lines) != lines:
            continue  # no kernel writes a name twice, or puts another in its place
        outcomes = []
        for take in (fast.take, lambda t, p: parse.parse_stat(t, p, (b"a", b"bb", b"c"))):
            try:
                outcomes.append(take(text, "f"))
            except parse.MalformedFile:
                outcomes.append(None)
        assert outcomes[0] == outcomes[1]


# /proc


@contextmanager
def _proc_file(data: bytes) -> Iterator[None]:
    """procs' open() gives these bytes, as the kernel's file would, in the mode asked for."""

    def opened(_path: str, mode: str = "r") -> Any:
        raw = io.BytesIO(data)
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding="utf-8")

    with mock.patch.object(procs, "open", opened, create=True):
        yield


def proc_stat(data: bytes) -> None:
    """A process may be called anything of 15 bytes: its start and its parent are read all the same."""
    name = data[:15].replace(b"\0", b"")
    numbers = b" ".join(b"%d" % n for n in range(5, 53))
    with _proc_file(b"42 (" + name + b") S 4 " + numbers + b"\n"):
        assert procs._start_time(42) == "22"
        assert procs._parent(42) == 4


def proc_status(data: bytes) -> None:
    """So are its owner and its groups: newline and backslash are escaped in status, the rest is not."""
    name = data[:15].replace(b"\0", b"").replace(b"\\", b"\\\\").replace(b"\n", b"\\n")
    text = b"Name:\t" + name + b"\nUmask:\t0022\nState:\tS (sleeping)\nUid:\t7\t8\t9\t10\nGid:\t1\t1\t1\t1\n"
    with _proc_file(text + b"FDSize:\t64\nGroups:\t4 24 \nNStgid:\t42\n"):
        assert procs.owner(42) == 7
        assert procs.credentials(42) == procs.Credentials(7, frozenset({4, 24}))


def proc_environ(data: bytes) -> None:
    """Any environment is a set of entries; tracking by one finds it exactly."""
    with (
        mock.patch.object(procs, "_read_patiently", lambda _path: data),
        mock.patch.object(procs.os, "listdir", lambda _path: []),
    ):
        assert b"\0".join(procs.environment(42)).count(b"\0") <= data.count(b"\0")
        assert procs.environment(42) == set(data.split(b"\0"))


def proc_cgroup(data: bytes) -> None:
    """A cgroup may be called anything without newline, slash and NUL (cgroup_mkdir), and adds no line."""
    name = data.replace(b"\0", b"").replace(b"\n", b"").replace(b"/", b"")[:255]
    with _proc_file(b"9:memory:/acctd/job_1\n8:pids:/" + name + b"/acctd/job_2\n0::/\n"):
        assert procs.cgroups(42) == ["/acctd/job_1", f"/{os.fsdecode(name)}/acctd/job_2", "/"]


def mounts(data: bytes) -> None:
    """Whatever somebody mounts somewhere (FUSE lets anyone), the cgroup mounts are found as without it."""
    plain = (
        b"27 1 254:0 / / rw - ext4 /dev/vda rw\n32 31 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
        b"41 31 0:38 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n",
    )
    path = data.replace(b"\0", b"")
    for special in b"\\ \t\n#":
        path = path.replace(bytes([special]), b"\\%03o" % special)
    odd = b"99 27 0:99 / /home/u/" + path + b" rw,nosuid - fuse.x " + (path or b"x") + b" rw,user_id=1000\n"
    file = _SCRATCH / "proc/self/mountinfo"
    file.parent.mkdir(parents=True, exist_ok=True)
    found = []
    for text in (b"".join(plain), plain[0] + odd + plain[1]):
        file.write_bytes(text)
        found.append((mountinfo.cgroup_mounts(_SCRATCH), procs._device_of("/images/a", _SCRATCH)))
    assert found[0] == found[1]
    assert len(found[0][0]) == 2


def routes(data: bytes) -> None:
    """A device may be called anything without blanks, slash and colon (dev_valid_name)."""
    name = bytes(b for b in data[:15] if chr(b) not in " \t\n\r\v\f/:\0")
    if name in (b"", b".", b".."):
        return
    net = _SCRATCH / "net"
    net.mkdir(exist_ok=True)
    (net / "route").write_bytes(
        b"Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
        + name + b"\t00000000\t00000000\t0003\t0\t0\t0\t00000000\t0\t0\t0\n"
    )  # fmt: skip
    zero = b"00000000000000000000000000000000"
    (net / "ipv6_route").write_bytes(zero + b" 00 " + zero + b" 00 " + zero + b" 00000400 1 0 00000003 " + name + b"\n")
    assert host.overlap(Pools(IPv4Network("10.181.0.0/18"), IPv6Network("fd61::/112")), net) is None


def resolv_conf(data: bytes) -> None:
    """Any resolv.conf."""
    for server in resolver.loopback_servers(data.decode("utf-8", "replace")):
        assert ip_address(str(server)).is_loopback


# Netfilter's answers


def netlink(data: bytes) -> None:
    """Any bytes as a dump."""
    for read in (
        lambda: nftrules.parse_rules(data, len(data)),
        lambda: list(nftrules.parse_gotos(data, len(data))),
        lambda: conntrack.parse_entries(data, len(data), {bytes(4)}),
    ):
        try:
            read()
        except KernelRefusedError as e:
            assert "cannot be read" in str(e)


_RETURN = struct.pack("=H29sBi4x", 40, b"", 0, -5)  # as the kernel gives it back: a standard target is its verdict


def table(data: bytes) -> None:
    """Foreign chains and rules of any name and comment beside a job's: the job's counts are as without them."""
    name, _, comment = data.replace(b"\0", b"").partition(b"\xff")
    for family in (V4, V6):
        end = xtrules.entry(family, _RETURN)
        plan = ChainPlan("JOB_1", "ac10", (parse_class("A", ["10.0.0.0/8"]),), ipv6=True)
        ours = b"".join(xtplan.rules(family, plan, 7)).replace(xtrules.verdict("RETURN"), _RETURN)
        job = _head(family, b"JOB_1") + ours + end
        foreign = _head(family, name or b"x") + _commented(family, comment) + end
        closing = _head(family, b"ERROR")
        found = [
            total([Sampler(family).take(memoryview(end * 3 + chains + closing))])["JOB_1"]
            for chains in (job, foreign + job, job + foreign)
            if not name.startswith(b"JOB_")  # nobody else's may: it would be one of acctd's
        ]
        assert all(one == found[0] for one in found)
        assert all("External" in "".join(one) for one in found)


def _head(family: Family, name: bytes) -> bytes:
    return xtrules.entry(family, struct.pack("=H29sB32s", 64, b"ERROR", 0, name[:31]))


def _commented(family: Family, text: bytes) -> bytes:
    """A foreign rule with a comment match of these bytes."""
    match = struct.pack("=H29sB256s", 288, b"comment", 0, text[:255])
    return xtrules.entry(family, _RETURN, matches=match)


# Records, ledger, hook


def ads(data: bytes) -> None:
    """Odd tags, notes and names make an ad of whole lines, in UTF-8."""
    words = data.decode("utf-8", "surrogateescape").split("\x01")
    tags = {word[:40]: word for word in words}
    record = Record(
        id="1", owner=words[0], uid=1, node=words[-1], state="done", started=1.0, ended=2.0, wall_ns=10**9,
        exit_code=0, exit_signal=None, network="nat", limits=Limits(), tags=tags, totals={words[0]: {words[-1]: 1}},
        notes=tuple(words),
    )  # fmt: skip
    text = format_ad(record_ad(record))
    text.encode()
    lines = text.split("\n")
    assert lines.pop() == ""
    assert all(" = " in line for line in lines)
    assert len({line.partition(" = ")[0].lower() for line in lines}) == len(lines)


def rows(data: bytes) -> None:
    """A row kept outside the ledger, in whatever state: a row, or one of the errors that its reader expects."""
    try:
        decode_row(data)
    except (msgspec.MsgspecError, KeyError, TypeError, UsageError):
        pass


class _Reached(Exception):  # noqa: N818  # no error: the arguments were understood
    pass


def arguments(data: bytes) -> None:
    """The hook's arguments: understood, or one sentence and an exit code. No agent is called."""
    argv = [os.fsdecode(word) for word in data.split(b"\0")]

    def reached(*_: object, **__: object) -> Any:
        raise _Reached

    with (
        mock.patch.object(hookcall, "call", reached),
        mock.patch.object(hookexec, "run", reached),
        redirect_stdout(io.StringIO()),
    ):
        try:
            assert hook.run(argv) == 0
        except _Reached:
            pass
        except hookcall.HookError as e:
            assert 0 < e.code < 256
            str(e).encode("utf-8", "surrogateescape")


SEEDS: dict[Callable[[bytes], None], list[bytes]] = {
    frames: [b"\x03\x50\x00\xff\x01\x02\x07\x09" + b'{"method":"a.B","parameters":{"x":1}}\0{"method":"c"}\0'],
    calls_survive: [bytes(range(13))],
    parameters: [
        json.dumps(seed).encode()
        for seed in (
            {
                "job": "1.0",
                "user": "root",
                "limits": {"memory": 1 << 30, "cpus": 1.5, "cpuset": "0-3"},
                "network": "nat",
                "classes": {"A": ["10.0.0.0/8", "::/0"]},
                "tags": {"Vo": "cms"},
                "interval": 5,
            },
            {"job": "1", "user": "0", "limits": {"swap": -1}, "watcher": 1},
            {"job": "1", "signal": 9},
            {"job": "1", "exit_code": 300, "exit_signal": -1},
            {"since": 1, "limit": 5},
            {"job": "1", "environment": "A=b"},
            {"job": "1", "login": "root"},
            {"job": "1", "group": 4294967296},
            {"job": "1", "pid": -1, "parent": "2"},
            {"job": "1", "user": "a\0"},
            {"job": "1", "user": "9" * 5000},
            {"job": "1", "login": "a\0"},
            {"job": "1", "environment": "A=\0"},
            {"job": "1", "user": "\x7f/../"},
        )
    ],
    job_ids: [b"42.0", b"12[3].server.domain", b"..", b"JOB_17_0123abcd"],
    sizes: [b"2G", b"1.5 GiB", b"99999999999999999999T", b"9" * 5000],
    counters: [
        path.read_bytes()
        for path in sorted((REPO / "fixtures/cgroupfs").glob("*/sys/fs/cgroup/**/job_42/*"))
        if path.is_file() and path.stat().st_size < 4096
    ],
    stat_lines: [b"a 1\nbb 2\nd 7\nc 3\n\xffa 2\nbb 3\nd 8\nc 4\n\xffbb 1\n"],
    proc_stat: [b"dd", b"a) R 1 (b", b")\n) Z 1 "],
    proc_status: [b"dd", b"\nUid:\t0\t0", b"\\nUid:\t0"],
    proc_environ: [b"A=b\0C=d\0", b""],
    proc_cgroup: [b"user.slice", b"a:b", b"x\r0::", b"caf\xc3\xa9", b"\xff"],
    mounts: [b"mnt", b"a b\\c", b" - cgroup cgroup rw,memory", b"caf\xc3\xa9", b"\xff", b"a\rb"],
    routes: [b"eth0", b"ac0", b"\xff"],
    table: [b"ufw\xffComment", b"\xffac10", b"JOB\xffIncomingA"],
    resolv_conf: [b"nameserver 127.0.0.53\nnameserver ::1%lo\n", b"search x\n"],
    netlink: [path.read_bytes()[:6000] for path in sorted(NETFILTER.glob("*.bin"))],
    ads: [b"Vo\x01cms", b'a"b\\\x01\n\nx\\\n\x01'],
    rows: [
        b"{}",
        b"0",
        b'{"\xff":1}',
        b'{"seq":1,"spec":{"id":"1","owner":{"uid":0,"gid":0,"name":"r"},"limits":{},"classes":[]}}',
    ],
    arguments: [
        b"create\0--job\x001.0\0--memory\x002G\0--class=A=10.0.0.0/8\0--tag\0K=v",
        b"exec\0--job\x001\0--\0ls",
        b"signal\0--job\x001\x009",
        b"--socket=/x\0usage\0--job=1\0--json",
        b"track\0--job\x001\0--group\x004",
        b"list",
        b"finish\0--job\x001\0--exit-code\x003",
        b"-h",
        b"register\0--job\0a\0--pid\x001\0--interval\0.5",
    ],
}
"""Every target, with bytes to start from."""

TARGETS = {target.__name__: target for target in SEEDS}
