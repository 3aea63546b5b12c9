"""The configuration file as it is written: every key, its type, its range and its default, declared once.

Pure declarations. config.py reads a file by them and turns it into the types the agent works with.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from acctd.cgroup.layout import CONTROLLERS
from acctd.model import MemoryPolicy, OwnNetwork
from acctd.policies import OomAction

Others = Literal["ps", "nothing"]
Backend = Literal["auto", "iptables", "nftables"]
Stream = Literal["records", "events", "samples"]

_Text = Annotated[str, Meta(description="text")]
_Size = Annotated[int | str, Meta(description='a size such as "2G", or a number of bytes')]
_Names = Annotated[list[str], Meta(description="a list of names")]


class CgroupTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[cgroup] as written."""

    base: _Text = "acctd"
    controllers: _Names = msgspec.field(default_factory=lambda: list(CONTROLLERS))


class NetworkTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[network] as written."""

    mode: Annotated[OwnNetwork, Meta(description='"nat", "host" or "none"')] = "nat"
    pool4: _Text = "10.181.0.0/18"
    pool6: _Text = "fd61:6363:7464::/112"
    backend: Annotated[Backend, Meta(description='"auto", "iptables" or "nftables"')] = "auto"
    classes: Annotated[dict[str, list[str]], Meta(description="a table NAME = [CIDR, ...]")] = msgspec.field(
        default_factory=lambda: {"Internal": ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"]}
    )


class LimitsTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[limits] as written: what a job gets that asks for nothing else. Ranges are those of model.Limits."""

    memory: _Size | None = None
    memory_soft: _Size | None = None
    swap: _Size | None = None
    cpus: Annotated[float, Meta(description="a number of cores")] | None = None
    cpu_shares: Annotated[int, Meta(description="a whole number")] | None = None
    cpu_burst: Annotated[float, Meta(description="a number of seconds")] | None = None
    cpuset: Annotated[str, Meta(description='a CPU list such as "0-3", or "linear:N"')] | None = None
    pids: Annotated[int, Meta(description="a whole number")] | None = None
    memory_policy: Annotated[MemoryPolicy, Meta(description='"hard", "soft", "custom" or "none"')] | None = None


class OomTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[oom] as written: what is done about a job whose memory runs out, unless it asks otherwise."""

    action: Annotated[OomAction, Meta(description='"kernel", "kill", "hold", "grow" or "exec"')] = "kernel"
    ceiling: _Size | None = None
    step: Annotated[int, Meta(ge=1, le=1000, description="1 to 1000 percent")] = 25
    deadline: Annotated[float, Meta(ge=0.1, le=3600, description="0.1 to 3600 seconds")] = 10.0
    thresholds: Annotated[list[int], Meta(description="a list of percentages that rises")] = msgspec.field(
        default_factory=lambda: [80, 90, 95]
    )
    reserve: _Size = "512M"
    program: _Text | None = None


class ChrootTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[isolation.chroots.NAME] as written."""

    root: _Text
    bind: Annotated[list[str], Meta(description='a list of "/source", "/source:/target" or "/source:/target:ro"')] = (
        msgspec.field(default_factory=list)
    )


class IsolationTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[isolation] as written."""

    pid_namespace: Annotated[bool, Meta(description="true or false")] = False
    scratch: Annotated[list[str], Meta(description="a list of directories")] = msgspec.field(default_factory=list)
    scratch_dir: _Text = "/var/lib/acctd/scratch"
    chroot: _Text | None = None
    no_new_privs: Annotated[bool, Meta(description="true or false")] = False
    chroots: dict[str, ChrootTable] = msgspec.field(default_factory=dict)


class AccessTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[access] as written."""

    create: Annotated[list[str], Meta(description="a list of user names and @groups")] = msgspec.field(
        default_factory=list
    )
    read: Annotated[list[str], Meta(description="a list of user names and @groups")] = msgspec.field(
        default_factory=list
    )
    others: Annotated[Others, Meta(description='"ps" or "nothing"')] = "ps"
    jobs_per_user: Annotated[int, Meta(ge=1, le=100_000, description="a whole number, 1 to 100000")] = 100


class SamplesTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[samples] as written: what is kept of how a job went, for plots."""

    max: _Size = "1G"
    full: Annotated[float, Meta(ge=0, le=10**9, description="a number of seconds")] = 3600.0
    minutes: Annotated[float, Meta(ge=0, le=10**9, description="a number of seconds")] = 86400.0


class InfluxTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[influxdb.NAME] as written: one database that the series go to."""

    url: _Text
    version: Annotated[Literal[1, 2, 3], Meta(description="1, 2 or 3")] = 2
    org: _Text | None = None  # 2
    bucket: _Text | None = None  # 2 and 3; for 3 the database
    records_bucket: _Text | None = None
    database: _Text | None = None  # 1
    retention_policy: _Text | None = None  # 1
    records_retention_policy: _Text | None = None  # 1
    user: _Text | None = None  # 1
    password_file: _Text | None = None  # 1
    token_file: _Text | None = None
    ca_file: _Text | None = None
    job_tag: Annotated[bool, Meta(description="true or false")] = True
    batch: Annotated[int, Meta(ge=1, le=100_000, description="a number of points, 1 to 100000")] = 5000
    timeout: Annotated[float, Meta(ge=0.1, le=600, description="0.1 to 600 seconds")] = 10.0


class JsonTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[json.NAME] as written: a file or a socket that gets records and events, an object a line."""

    path: _Text | None = None
    socket: _Text | None = None
    streams: Annotated[list[Stream], Meta(description='a list of "records", "events" and "samples"')] = msgspec.field(
        default_factory=lambda: ["records", "events"]
    )
    rotate: _Size = "100M"
    keep: Annotated[int, Meta(ge=0, le=1000, description="a number of old files, 0 to 1000")] = 10


class PrometheusTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[prometheus] as written: where /metrics is served."""

    listen: _Text
    grace: Annotated[float, Meta(ge=0, le=86400, description="0 to 86400 seconds")] = 300.0


class ExportTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[export] as written: what holds for all that leaves this node."""

    cluster: Annotated[str, Meta(min_length=1, max_length=128, description="a name")] = "default"
    scheduler: Annotated[str, Meta(min_length=1, max_length=128, description="a name")] = "none"
    spool_dir: _Text = "/var/spool/acctd"
    spool_max: _Size = "4G"
    positions_dir: _Text = "/var/lib/acctd-export"
    group: _Text | None = None


class BillTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[bill] as written."""

    tariff: _Text = "/etc/acctd/tariff.toml"


class FileTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file's top level as written."""

    state_dir: _Text = "/var/lib/acctd"
    runtime_dir: _Text = "/run/acctd"
    socket: _Text = "/run/acctd/acctd.sock"
    poll_interval: Annotated[float, Meta(ge=0.1, le=3600, description="0.1 to 3600 seconds")] = 10.0
    cgroup: CgroupTable = msgspec.field(default_factory=CgroupTable)
    network: NetworkTable = msgspec.field(default_factory=NetworkTable)
    limits: LimitsTable = msgspec.field(default_factory=LimitsTable)
    access: AccessTable = msgspec.field(default_factory=AccessTable)
    oom: OomTable = msgspec.field(default_factory=OomTable)
    isolation: IsolationTable = msgspec.field(default_factory=IsolationTable)
    samples: SamplesTable = msgspec.field(default_factory=SamplesTable)
    export: ExportTable = msgspec.field(default_factory=ExportTable)
    influxdb: dict[str, InfluxTable] = msgspec.field(default_factory=dict)
    json: dict[str, JsonTable] = msgspec.field(default_factory=dict)
    prometheus: PrometheusTable | None = None
    bill: BillTable = msgspec.field(default_factory=BillTable)
