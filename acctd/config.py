"""The configuration file, /etc/acctd/acctd.toml: read, checked and turned into the types the agent works with.

Keys, types, ranges and defaults are declared once, in tables.py; docs/acctd.toml.example explains them.
Nothing here looks at the kernel: whether this host can do what is asked is found out by whoever does it.
"""

import math
import os
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin

import msgspec
from msgspec import Meta

from acctd import sinks
from acctd.cgroup.layout import CONTROLLERS
from acctd.errors import ConfigError, NotFoundError, NotPermittedError, UsageError
from acctd.kernel.cgroupfs import checked_parts
from acctd.model import (
    INT64_MAX,
    DestinationClass,
    JobSpec,
    Limits,
    OwnNetwork,
    check_classes,
    parse_class,
    parse_size,
)
from acctd.policies import Isolation, OomPolicy
from acctd.sinks import ExportConfig
from acctd.tables import (
    AccessTable,
    Backend,
    CgroupTable,
    FileTable,
    IsolationTable,
    LimitsTable,
    NetworkTable,
    OomTable,
    Others,
    SamplesTable,
)

DEFAULT_FILE = "/etc/acctd/acctd.toml"
ENVIRONMENT = "ACCTD_CONFIG"
SAMPLES_MIN = 4 * 2**20
SUN_PATH = 107
"""The longest path of a unix socket, in bytes: sun_path less its NUL, unix(7)."""

_T = TypeVar("_T")
_N = TypeVar("_N", IPv4Network, IPv6Network)


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupConfig:
    """Where the jobs' cgroups are made, and with which controllers."""

    base: str  # relative to every hierarchy's mount point, checked
    controllers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """What a job's network is unless it asks otherwise, and the addresses its pipes take."""

    mode: OwnNetwork
    pool4: IPv4Network
    pool6: IPv6Network | None  # None: jobs have no IPv6
    backend: Backend
    classes: tuple[DestinationClass, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessConfig:
    """What users other than root may do and see."""

    create: tuple[str, ...]  # user names, and groups as @NAME
    read: tuple[str, ...]  # likewise
    others: Others
    jobs_per_user: int

    def may_create(self, user: str, groups: Collection[str]) -> bool:
        """Whether a user in these groups may create jobs. Root may anyway and need not be asked about here."""
        return _named(self.create, user, groups)

    def may_read(self, user: str, groups: Collection[str]) -> bool:
        """Whether a user in these groups may see what everybody's jobs use. Root may anyway."""
        return _named(self.read, user, groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class OomConfig:
    """What is done about a job whose memory runs out."""

    default: OomPolicy  # of a job that asks for no other
    ceiling: int | None  # bytes; how far a job that is not root's may let its limit grow
    reserve: int  # bytes that the node keeps for itself; below, no limit grows
    program: str | None  # what decides where the policy is exec


@dataclass(frozen=True, slots=True)
class Chroot:
    """A root directory that jobs may ask for by name."""

    root: str
    binds: tuple[tuple[str, str, bool], ...]  # source, target inside the root, whether read-only


@dataclass(frozen=True, slots=True, kw_only=True)
class IsolationConfig:
    """How far jobs are shut in."""

    default: Isolation  # of every job; it may ask for more
    scratch_dir: Path  # below it each job that asks for scratch has a directory
    chroots: Mapping[str, Chroot]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplesConfig:
    """What is kept of how jobs went; history.py."""

    max: int  # bytes on disk; 0: nothing is kept
    full: float  # s of age up to which every sample is kept
    minutes: float  # s of age up to which the first of each minute is; then the first of each hour


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole configuration, checked."""

    file: str | None  # None: there is no file and all values are defaults
    state_dir: Path
    runtime_dir: Path
    socket: Path
    poll_interval: float  # s
    cgroup: CgroupConfig
    network: NetworkConfig
    limits: Limits
    access: AccessConfig
    oom: OomConfig
    isolation: IsolationConfig
    samples: SamplesConfig
    export: ExportConfig
    tariff: Path  # by which acctd bill prices; whether it is there is found out by that


def load(path: str | None, environ: Mapping[str, str]) -> Config:
    """The configuration in `path`, else in $ACCTD_CONFIG, else in /etc/acctd/acctd.toml, which may be absent.

    Raises ConfigError for the first mistake, NotFoundError for a named file that is not there.
    """
    name, config, mistakes = check(path, environ)
    if config is None:
        more = f" ({len(mistakes) - 1} more: see acctd config check)" if len(mistakes) > 1 else ""
        raise ConfigError(f"{name}: {mistakes[0]}{more}")
    return config


def check(path: str | None, environ: Mapping[str, str]) -> tuple[str, Config | None, list[str]]:
    """The file's name, the configuration or None, and all mistakes in it, one sentence each.

    Raises NotFoundError and NotPermittedError for a file that cannot be read at all.
    """
    named = path if path is not None else environ.get(ENVIRONMENT) or None
    name = named if named is not None else DEFAULT_FILE
    try:
        with open(name, "rb") as stream:
            text = stream.read()
    except (FileNotFoundError, NotADirectoryError):
        if named is None:
            config, mistakes = parse("", None)
            return name, config, mistakes
        raise NotFoundError(f"configuration file {name!r} does not exist; name one that does") from None
    except IsADirectoryError:
        return name, None, ["this is a directory; name a TOML file"]
    except PermissionError:
        raise NotPermittedError(f"configuration file {name} may not be read by this user; run as root") from None
    try:
        config, mistakes = parse(text.decode(), name)
    except UnicodeDecodeError as e:
        return name, None, [f"byte {e.start} is no UTF-8; save the file as UTF-8"]
    return name, config, mistakes


def parse(text: str, file: str | None) -> tuple[Config | None, list[str]]:
    """The configuration in TOML text, or None and all mistakes in it."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        return None, [f"this is no TOML: {e}; see docs/acctd.toml.example"]
    reader = _Reader()
    table = cast(FileTable, reader.table(FileTable, data, ""))
    if "runtime_dir" in data and "socket" not in data:
        table = msgspec.structs.replace(table, socket=f"{table.runtime_dir}/acctd.sock")
    config = Config(
        file=file,
        state_dir=reader.directory("state_dir", table.state_dir),
        runtime_dir=reader.directory("runtime_dir", table.runtime_dir),
        socket=reader.socket("socket", table.socket),
        poll_interval=table.poll_interval,
        cgroup=reader.cgroup(table.cgroup),
        network=reader.network(table.network),
        limits=reader.limits(table.limits),
        access=reader.access(table.access),
        oom=reader.oom(table.oom),
        isolation=reader.isolation(table.isolation),
        samples=reader.samples(table.samples),
        export=reader.export(table),
        tariff=reader.directory("bill.tariff", table.bill.tariff),
    )
    return (None if reader.mistakes else config), reader.mistakes


class _Reader:
    """Goes through the whole file and collects the mistakes; a wrong value is replaced by its default to go on."""

    def __init__(self) -> None:
        self.mistakes: list[str] = []

    def table(self, kind: type[msgspec.Struct], data: Mapping[str, Any], prefix: str) -> msgspec.Struct:
        """One table by its declaration: unknown keys and wrong types are mistakes."""
        known = {field.name: field for field in msgspec.structs.fields(kind)}
        values: dict[str, Any] = {}
        for name, value in data.items():
            key = prefix + name
            if name not in known:
                import difflib  # only for a mistake: half a megabyte

                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(known)}"
                self.mistakes.append(f"{key} is no key of acctd; {hint}")
                continue
            wanted = known[name].type
            if get_origin(wanted) is dict:  # of tables, by name
                if self._is_table(key, value):
                    inner = get_args(wanted)[1]
                    each = {
                        one: self.table(inner, it, f"{key}.{one}.")
                        for one, it in value.items()
                        if self._is_table(f"{key}.{one}", it)
                    }
                    values[name] = each
                continue
            if (inner := _struct(wanted)) is not None:
                if self._is_table(key, value):
                    values[name] = self.table(inner, value, f"{key}.")
                continue
            try:
                values[name] = _converted(value, wanted)
            except msgspec.ValidationError:
                self.mistakes.append(f"{key} {_shown(value)} is not usable; it takes {_description(wanted)}")
        for name in [name for name, field in known.items() if field.required and name not in values]:
            if name not in data:
                self.mistakes.append(f"{prefix}{name} is missing; it takes {_description(known[name].type)}")
            values[name] = ""
        return kind(**values)

    def _is_table(self, key: str, value: object) -> bool:
        if not isinstance(value, dict):
            self.mistakes.append(f"{key} {_shown(value)} is not usable; it takes a table, written [{key}]")
        return isinstance(value, dict)

    def directory(self, key: str, text: str) -> Path:
        """An absolute path."""
        if not text.startswith("/") or "\0" in text:
            self.mistakes.append(f"{key} {_shown(text)} is not usable; it takes an absolute path")
        return Path(text)

    def socket(self, key: str, text: str) -> Path:
        """An absolute path that fits into a socket address."""
        if (length := len(text.encode())) > SUN_PATH:
            self.mistakes.append(f"{key} {_shown(text)} has {length} bytes; a socket's path takes {SUN_PATH} at most")
        return self.directory(key, text)

    def cgroup(self, table: CgroupTable) -> CgroupConfig:
        """The base as a path that cannot leave its hierarchy, and controllers that exist."""
        self._try("cgroup.base: ", lambda: checked_parts(table.base))
        for name, times in Counter(table.controllers).items():
            if name not in CONTROLLERS:
                known = ", ".join(CONTROLLERS)
                self.mistakes.append(f"cgroup.controllers {_shown(name)} is no controller; known are {known}")
            elif times > 1:
                self.mistakes.append(f"cgroup.controllers has {name!r} {times} times; once is enough")
        if not table.controllers:
            self.mistakes.append("cgroup.controllers [] counts nothing; it takes at least one controller")
        return CgroupConfig(base=table.base, controllers=tuple(table.controllers))

    def network(self, table: NetworkTable) -> NetworkConfig:
        """Pools as networks of their IP version, classes as the command line would make them."""
        pool4 = self._pool("network.pool4", table.pool4, IPv4Network, (8, 30))
        pool6 = self._pool("network.pool6", table.pool6, IPv6Network, (64, 126)) if table.pool6 else None
        made = [
            self._try("network.classes: ", partial(parse_class, name, cidrs)) for name, cidrs in table.classes.items()
        ]
        classes = tuple(cls for cls in made if cls is not None)
        self._try("network.classes: ", lambda: check_classes(classes))
        return NetworkConfig(
            mode=table.mode,
            pool4=pool4 or IPv4Network("0.0.0.0/0"),
            pool6=pool6,
            backend=table.backend,
            classes=classes,
        )

    def limits(self, table: LimitsTable) -> Limits:
        """Each limit by itself, then all together: they are held against each other too."""
        before = len(self.mistakes)
        values = {name: value for name, value in msgspec.structs.asdict(table).items() if value is not None}
        for name, value in values.items():
            if isinstance(value, str) and name not in ("cpuset", "memory_policy"):
                size = self._try("", partial(parse_size, f"limits.{name}", value))
                if size is None:
                    continue
                values[name] = size
            # A memory limit that fits whatever the other one is: swap and memory_soft are refused without.
            alone = {"memory": INT64_MAX, "cpus": 65536.0} | {name: values[name]}
            self._try("limits.", partial(Limits, **alone))
        if len(self.mistakes) > before:
            return Limits()
        return self._try("limits.", lambda: Limits(**values)) or Limits()

    def oom(self, table: OomTable) -> OomConfig:
        """A policy that can be followed, and a program that is there for it."""
        ceiling = self._size("oom.ceiling", table.ceiling)
        program = table.program
        if program is not None and (not program.startswith("/") or "\0" in program):
            self.mistakes.append(f"oom.program {_shown(program)} is not usable; it takes an absolute path")
        if table.action == "exec" and program is None:
            self.mistakes.append('oom.action "exec" needs oom.program, what decides then; give its path')
        made = self._try(
            "oom: ",
            lambda: OomPolicy(table.action, ceiling, table.step, table.deadline, tuple(table.thresholds)),
        )
        return OomConfig(
            default=made or OomPolicy(),
            ceiling=ceiling,
            reserve=self._size("oom.reserve", table.reserve) or 0,
            program=program,
        )

    def isolation(self, table: IsolationTable) -> IsolationConfig:
        """Paths that are whole, and a default that names a chroot which is there."""
        chroots = {}
        for name, each in table.chroots.items():
            key = f"isolation.chroots.{name}"
            self._try(f"{key}: ", partial(Isolation, chroot=name))
            self.directory(f"{key}.root", each.root)
            chroots[name] = Chroot(each.root, tuple(self._bind(f"{key}.bind", text) for text in each.bind))
        if table.chroot is not None and table.chroot not in chroots:
            known = ", ".join(chroots) or "there is none"
            self.mistakes.append(f"isolation.chroot {table.chroot!r} is no name in isolation.chroots ({known})")
        made = self._try(
            "isolation: ",
            lambda: Isolation(table.pid_namespace, tuple(table.scratch), table.chroot, table.no_new_privs),
        )
        return IsolationConfig(
            default=made or Isolation(),
            scratch_dir=self.directory("isolation.scratch_dir", table.scratch_dir),
            chroots=chroots,
        )

    def samples(self, table: SamplesTable) -> SamplesConfig:
        """A bound that a file can keep, or none at all; ages that rise."""
        most = self._size("samples.max", table.max)
        if most is not None and 0 < most < SAMPLES_MIN:
            self.mistakes.append(f"samples.max {table.max!r} is too small; it takes 4M at least, or 0 to keep none")
        if table.minutes < table.full:
            self.mistakes.append(
                f"samples.minutes {table.minutes:g} is below samples.full {table.full:g}; the first is the greater age"
            )
        return SamplesConfig(max=most or 0, full=table.full, minutes=table.minutes)

    def export(self, table: FileTable) -> ExportConfig:
        """What leaves the node: every sink by itself, then that no two have one name."""
        made = self._try("", partial(sinks.export, table.export)) or ExportConfig()
        influxdb = [self._try("", partial(sinks.influx, name, each)) for name, each in table.influxdb.items()]
        json = [self._try("", partial(sinks.json, name, each)) for name, each in table.json.items()]
        for name in table.influxdb.keys() & table.json.keys():
            self.mistakes.append(f"influxdb.{name} and json.{name} have one name; rename one")
        # Each cuts its file back to what it knows: two would take each other's lines away.
        files: dict[str, str] = {}
        for sink in json:
            if sink is not None and sink.path is not None:
                other = files.setdefault(os.path.normpath(sink.path), sink.name)
                if other != sink.name:
                    self.mistakes.append(f"json.{other}.path and json.{sink.name}.path are one file; choose another")
        return replace(
            made,
            influxdb=tuple(sink for sink in influxdb if sink is not None),
            json=tuple(sink for sink in json if sink is not None),
            prometheus=self._try("", partial(sinks.prometheus, table.prometheus)) if table.prometheus else None,
        )

    def _bind(self, key: str, text: str) -> tuple[str, str, bool]:
        source, _, rest = text.partition(":")
        target, _, mode = rest.partition(":")
        target = target or source
        whole = all(
            path.startswith("/") and "\0" not in path and ".." not in path.split("/") for path in (source, target)
        )
        if not whole or mode not in ("", "ro"):
            self.mistakes.append(f"{key} {_shown(text)} is not usable; write it like /source, /source:/target:ro")
        return source, target, mode == "ro"

    def _size(self, key: str, value: int | str | None) -> int | None:
        if isinstance(value, str):
            return self._try("", partial(parse_size, key, value))
        if value is not None and not 0 <= value <= INT64_MAX:
            self.mistakes.append(f"{key} {value} is out of range; it takes 0 to {INT64_MAX} bytes")
        return value

    def access(self, table: AccessTable) -> AccessConfig:
        """Names that could be a user's or a group's. Whether the host has them is found out when somebody asks."""
        for key, names in (("create", table.create), ("read", table.read)):
            for name, times in Counter(names).items():
                # passwd(5) and group(5): a field ends at a colon, an entry at the line's end.
                if not re.fullmatch(r"@?[^\s:/@-][^\s:/]*", name):
                    self.mistakes.append(
                        f"access.{key} {_shown(name)} is neither a user nor a group; write a name, or @NAME for a group"
                    )
                elif times > 1:
                    self.mistakes.append(f"access.{key} has {name!r} {times} times; once is enough")
        return AccessConfig(
            create=tuple(table.create), read=tuple(table.read), others=table.others, jobs_per_user=table.jobs_per_user
        )

    def _pool(self, key: str, text: str, kind: type[_N], prefix: tuple[int, int]) -> _N | None:
        low, high = prefix
        takes = f"it takes an {kind.__name__[:4]} network with a prefix of /{low} to /{high}"
        try:
            network = kind(text)
        except ValueError as e:
            self.mistakes.append(f"{key} {_shown(text)} is not usable ({e}); {takes}")
            return None
        if (
            network.is_loopback
            or network.is_multicast
            or network.is_link_local
            or network.network_address.is_unspecified
        ):
            self.mistakes.append(f"{key} {_shown(text)} is no network that a job could have an address of; {takes}")
            return None
        if not low <= network.prefixlen <= high:
            self.mistakes.append(f"{key} {_shown(text)} is out of range; {takes}")
            return None
        return network

    def _try(self, prefix: str, make: Callable[[], _T]) -> _T | None:
        """What `make` gives, or None and a mistake."""
        try:
            return make()
        except UsageError as e:
            self.mistakes.append(f"{prefix}{e}")
            return None


def _converted(value: object, wanted: Any) -> Any:
    """The value if it is of the declared type and in its range, else msgspec.ValidationError."""
    if isinstance(value, float) and not math.isfinite(value):
        raise msgspec.ValidationError("TOML's nan and inf are in no range")
    return msgspec.convert(value, wanted)


def _named(names: Collection[str], user: str, groups: Collection[str]) -> bool:
    return (user in names and not user.startswith("@")) or any(f"@{group}" in names for group in groups)


def _struct(wanted: Any) -> type[msgspec.Struct] | None:
    """The table that a key takes, if it takes one."""
    kinds = [
        kind for kind in (wanted, *get_args(wanted)) if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
    ]
    return kinds[0] if kinds else None


def _description(wanted: Any) -> str:
    """What the declaration says the key takes; for an optional key, what it takes when it is there."""
    for part in get_args(wanted):
        if isinstance(part, Meta) and part.description:
            return part.description
        if found := _description(part):
            return found
    return ""


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def with_default_classes(spec: JobSpec, config: Config) -> JobSpec:
    """The configured classes, with those that the job names itself put in their place by name."""
    own = {cls.name for cls in spec.classes}
    return replace(spec, classes=(*spec.classes, *(cls for cls in config.network.classes if cls.name not in own)))
