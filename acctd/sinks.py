"""What leaves this node and where to: the checked form of [export], [influxdb.NAME], [json.NAME] and [prometheus].

Pure data and its checks. Whether a database answers, a file is there or a port is free is found out by `acctd export`.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from acctd.errors import UsageError
from acctd.model import parse_size
from acctd.tables import ExportTable, InfluxTable, JsonTable, PrometheusTable, Stream

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class InfluxSink:
    """One database. Of what a version does not know the fields are None."""

    name: str
    url: str  # http(s)://host[:port][/path], no slash at the end
    version: Literal[1, 2, 3]
    bucket: str  # 1: the database; 3: likewise
    records_bucket: str  # where records go; the same unless said otherwise
    org: str | None = None
    retention_policy: str | None = None
    records_retention_policy: str | None = None
    user: str | None = None
    password_file: str | None = None
    token_file: str | None = None
    ca_file: str | None = None
    job_tag: bool = True
    batch: int = 5000  # points a request
    timeout: float = 10.0  # s

    @property
    def identity(self) -> str:
        """Where it leads, without secrets: under another name it is the same one."""
        where = [self.url, self.org, self.bucket, self.retention_policy]
        if (self.records_bucket, self.records_retention_policy) != (self.bucket, self.retention_policy):
            where += [self.records_bucket, self.records_retention_policy]
        return " ".join([f"influxdb{self.version}", *(part for part in where if part)])


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonSink:
    """One file, or one socket: of path and address one is None."""

    name: str
    path: Path | None = None
    address: str | tuple[str, int] | None = None  # path of a unix stream socket, or host and port
    streams: tuple[Stream, ...] = ("records", "events")
    rotate: int = 100 * 2**20  # bytes
    keep: int = 10  # rotated files

    @property
    def identity(self) -> str:
        """Where it leads: under another name it is the same one."""
        return f"json {self.path or self.address}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrometheusSink:
    """Where /metrics is served."""

    address: str | tuple[str, int]  # path of a unix stream socket, or host and port
    grace: float  # s for which a finished job is still shown


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """All of it."""

    cluster: str = "default"
    scheduler: str = "none"  # of jobs without a tag of that name
    spool_dir: Path = Path("/var/spool/acctd")
    spool_max: int = 4 * 2**30  # bytes on disk; beyond, the oldest samples go
    positions_dir: Path = Path("/var/lib/acctd-export")
    group: str | None = None  # which may read the spool beside root
    influxdb: tuple[InfluxSink, ...] = ()
    json: tuple[JsonSink, ...] = ()
    prometheus: PrometheusSink | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sinks that have a position in the spool."""
        return (*(sink.name for sink in self.influxdb), *(sink.name for sink in self.json))

    @property
    def active(self) -> bool:
        """Whether anything reads the spool at all."""
        return bool(self.influxdb or self.json or self.prometheus)


def influx(name: str, table: InfluxTable) -> InfluxSink:
    """Raises UsageError for what cannot work, with the key."""
    key = f"influxdb.{name}"
    check_name("influxdb", name)
    for field, value in msgspec.structs.asdict(table).items():
        if isinstance(value, str) and not value.isprintable():
            raise UsageError(f"{key}.{field} {value!r} is not usable; it takes printable text")
    if table.version == 1:
        _refuse(key, table, 1, ("org", "bucket", "records_bucket"), "use database and retention_policy")
        _need(key, table, 1, "database")
        if (table.user is None) != (table.password_file is None):
            raise UsageError(f"{key}.user and {key}.password_file go together; give both or neither")
    else:
        kept = ("database", "retention_policy", "records_retention_policy", "user", "password_file")
        _refuse(key, table, table.version, kept, "use bucket, records_bucket and token_file")
        _need(key, table, table.version, "bucket")
        if table.version == 2:
            _need(key, table, 2, "org")
    bucket = table.database or table.bucket or ""
    return InfluxSink(
        name=name,
        url=url(f"{key}.url", table.url),
        version=table.version,
        bucket=bucket,
        records_bucket=table.records_bucket or bucket,
        org=table.org,
        retention_policy=table.retention_policy,
        records_retention_policy=table.records_retention_policy or table.retention_policy,
        user=table.user,
        password_file=_file(f"{key}.password_file", table.password_file),
        token_file=_file(f"{key}.token_file", table.token_file),
        ca_file=_file(f"{key}.ca_file", table.ca_file),
        job_tag=table.job_tag,
        batch=table.batch,
        timeout=table.timeout,
    )


def json(name: str, table: JsonTable) -> JsonSink:
    """Raises UsageError for what cannot work, with the key."""
    key = f"json.{name}"
    check_name("json", name)
    if (table.path is None) == (table.socket is None):
        raise UsageError(f"{key} needs path, a file, or socket, where a log shipper listens: one of the two")
    if table.path is not None and (not table.path.startswith("/") or "\0" in table.path):
        raise UsageError(f"{key}.path {table.path!r} is not usable; it takes an absolute path")
    if not table.streams or len(set(table.streams)) != len(table.streams):
        raise UsageError(f"{key}.streams {table.streams} is not usable; name each wanted stream once")
    rotate = parse_size(f"{key}.rotate", table.rotate) if isinstance(table.rotate, str) else table.rotate
    if rotate < 4096:
        raise UsageError(f"{key}.rotate {table.rotate!r} is too small; it takes 4096 bytes at least")
    return JsonSink(
        name=name,
        path=Path(table.path) if table.path is not None else None,
        address=address(f"{key}.socket", table.socket) if table.socket is not None else None,
        streams=tuple(table.streams),
        rotate=rotate,
        keep=table.keep,
    )


def prometheus(table: PrometheusTable) -> PrometheusSink:
    """Raises UsageError for an address that is none."""
    return PrometheusSink(address=address("prometheus.listen", table.listen), grace=table.grace)


def export(table: ExportTable) -> ExportConfig:
    """Without sinks. Raises UsageError for what cannot work, with the key."""
    for key, text in (("spool_dir", table.spool_dir), ("positions_dir", table.positions_dir)):
        if not text.startswith("/") or "\0" in text:
            raise UsageError(f"export.{key} {text!r} is not usable; it takes an absolute path")
    for key, text in (("cluster", table.cluster), ("scheduler", table.scheduler)):
        if any(ord(character) < 32 for character in text) or text != text.strip():
            raise UsageError(f"export.{key} {text!r} is not usable; it takes a name without control characters")
    if table.group is not None and not re.fullmatch(r"[^\s:\0]{1,64}", table.group):
        raise UsageError(f"export.group {table.group!r} is not usable; it takes the name of a group")
    spool_max = table.spool_max
    most = parse_size("export.spool_max", spool_max) if isinstance(spool_max, str) else spool_max
    if most < 2**20:
        raise UsageError(f"export.spool_max {spool_max!r} is too small; it takes 1M at least")
    return ExportConfig(
        cluster=table.cluster,
        scheduler=table.scheduler,
        spool_dir=Path(table.spool_dir),
        spool_max=most,
        positions_dir=Path(table.positions_dir),
        group=table.group,
    )


def check_name(kind: str, name: str) -> None:
    """A sink's name becomes a file's."""
    if not _NAME.match(name):
        raise UsageError(f"{kind}.{name!r} is no usable name of a sink; it takes A-Z a-z 0-9 _ -, 64 at most")


def url(key: str, text: str) -> str:
    """A base URL. Raises UsageError: also for a password in it, which would stand in logs."""
    takes = "write it like https://influx.example.org:8086"
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError as e:
        raise UsageError(f"{key} {text!r} is not usable ({e}); {takes}") from None
    if parts.username is not None or parts.password is not None:
        raise UsageError(f"{key} has a user or password in it; leave them out and use token_file or password_file")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UsageError(f"{key} {text!r} is not usable; {takes}")
    if not text.isascii() or not text.isprintable() or " " in text:
        raise UsageError(f"{key} {text!r} has characters that no URL has; {takes}")
    return text.rstrip("/")


def address(key: str, text: str) -> str | tuple[str, int]:
    """unix:/path or host:port, [host]:port for IPv6. Raises UsageError."""
    if text.startswith("unix:"):
        path = text.removeprefix("unix:")
        if not path.startswith("/") or "\0" in path or len(path.encode()) > 107:
            raise UsageError(f"{key} {text!r} is not usable; it takes unix: and an absolute path of 107 bytes at most")
        return path
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not colon or not host or not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise UsageError(f"{key} {text!r} is not usable; write it like 127.0.0.1:9735, [::1]:9735 or unix:/run/x.sock")
    return host, int(port)


def _file(key: str, text: str | None) -> str | None:
    if text is None:
        return None
    if not text or "\0" in text or (not text.startswith("/") and ("/" in text or text.startswith("."))):
        raise UsageError(
            f"{key} {text!r} is not usable; it takes an absolute path, or the name of a systemd credential"
        )
    return text


def _refuse(key: str, table: InfluxTable, version: int, names: tuple[str, ...], instead: str) -> None:
    for name in names:
        if getattr(table, name) is not None:
            raise UsageError(f"{key}.{name} means nothing to version {version}; {instead}")


def _need(key: str, table: InfluxTable, version: int, name: str) -> None:
    if not getattr(table, name):
        raise UsageError(f"{key}.{name} is missing; version {version} needs it")
