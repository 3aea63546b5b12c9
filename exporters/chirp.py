"""HTCondor's Chirp, as far as it is spoken here: a starter is told attributes of its job, to pass on when it reports.

Framing and one client. Who is sent what and when is chirps.py's. Only addresses of this host are connected to, whatever
a job's owner names. A starter answers 0 to what it took, 1 to a name that it does not let through, and less than 0 to
what it does not do. Protocol: src/condor_chirp/PROTOCOL and src/condor_starter.V6.1/io_proxy_handler.cpp of HTCondor.
"""

import asyncio
import math
import re
import socket
from collections.abc import Mapping
from ipaddress import ip_address

from acctd.errors import AcctdError, UsageError
from acctd.metrics import BLOCK_READ_BYTES, BLOCK_READS, BLOCK_WRITE_BYTES, BLOCK_WRITES, CPU_THROTTLED, NFS
from acctd.model import INT64_MAX, Record
from acctd.rows import Proxy
from exporters.classad import ClassAdValue, record_ad

PREFIX = "Chirp"
"""What a name must begin with to be let through: CHIRP_DELAYED_UPDATE_PREFIX, as HTCondor has it by default."""

NAMES = 100
"""A starter takes so many different names in its life (CHIRP_DELAYED_UPDATE_MAX_ATTRS), the job's own among them."""

OURS = 50
"""And so many of them we use at most."""

_LINE = 5120  # bytes of a line, its newline included
_VALUE = 993  # bytes of a value; the starter takes no longer one
_NOT_OFFERED = -8
_PORTS = (1024, 65535)

_NAME = re.compile(r"Chirp[A-Za-z0-9_]{1,200}\Z")
_COOKIE = re.compile(r"[A-Za-z0-9]{1,64}\Z")
_SPACE = re.compile(r"([\\\s])")
_SPECIAL = re.compile(r'["\\\x00-\x1f\x7f]')
_ANSWER = re.compile(rb"-?[0-9]{1,9}\r?\n\Z")
_SURROGATE = re.compile("[\ud800-\udfff]")

_FEW = (
    "AcctdJobId",
    *(metric.attribute for metric in (BLOCK_READ_BYTES, BLOCK_WRITE_BYTES, BLOCK_READS, BLOCK_WRITES, CPU_THROTTLED)),
    *(metric.attribute for metric in NFS[:2]),
    "AcctdOomCount",
    "NetworkInputMb",
    "NetworkOutputMb",
)


class ChirpError(AcctdError):
    """What was to be sent did not arrive. `final`: nor would it the next time."""

    def __init__(self, message: str, *, final: bool) -> None:
        super().__init__(message)
        self.final = final


def attributes(record: Record) -> dict[str, ClassAdValue]:
    """What a job's ad gets of a record: what HTCondor does not count itself; OURS at most, the same each time."""
    ad = record_ad(record)
    rules = sorted(name for name in ad if name.startswith("Network") and name not in _FEW)
    names = [*(name for name in _FEW if name in ad), *rules[: OURS - len(_FEW)]]
    return {f"{PREFIX}{name}": ad[name] for name in names}


def checked(proxy: Proxy) -> Proxy:
    """A proxy that may be connected to. Raises UsageError, which says nothing of the cookie."""
    if not _is_here(proxy.host):
        raise UsageError(f"host {proxy.host!r} is no address of this host; the starter that a job belongs to has one")
    low, high = _PORTS
    if not low <= proxy.port <= high:
        raise UsageError(f"port {proxy.port} is out of range; it takes {low} to {high}")
    if not _COOKIE.match(proxy.cookie):
        raise UsageError(f"cookie of {len(proxy.cookie)} characters is none; it takes 1 to 64 letters and digits")
    return proxy


def expression(value: ClassAdValue) -> str:
    """A value as a ClassAd expression, in the syntax without lines, where a backslash escapes. Raises UsageError."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and abs(value) <= INT64_MAX:
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return repr(value)
    if isinstance(value, str) and "\0" not in value:
        text = _SURROGATE.sub("\ufffd", value)
        return '"' + _SPECIAL.sub(lambda found: _escaped(found[0]), text) + '"'
    raise UsageError(
        f"{value!r} cannot be sent by Chirp; it takes 64-bit integers, finite numbers and text without NUL"
    )


def update(name: str, value: ClassAdValue) -> bytes:
    """The request that sets an attribute of the job. Raises UsageError for what no starter takes."""
    if not _NAME.match(name):
        raise UsageError(f"{name!r} is no attribute for Chirp; it takes {PREFIX}, then up to 200 letters, digits and _")
    text = expression(value)
    if (length := len(text.encode())) > _VALUE:
        raise UsageError(f"{name} has {length} bytes; a value takes {_VALUE} at most")
    return _request("set_job_attr_delayed", name, text)


async def send(proxy: Proxy, ad: Mapping[str, ClassAdValue], patience: float) -> list[str]:
    """Set attributes within `patience` s; the names that the starter refused. Raises ChirpError, and UsageError."""
    if len(ad) > NAMES:
        raise UsageError(f"{len(ad)} attributes are too many for Chirp; it takes {NAMES}")
    requests = {name: update(name, value) for name, value in ad.items()}
    checked(proxy)  # again: the host's addresses may be others by now
    where = f"the starter's Chirp proxy at {proxy.host} port {proxy.port}"
    try:
        async with asyncio.timeout(patience):
            return await _converse(proxy, requests, where)
    except TimeoutError:
        raise ChirpError(f"{where} does not answer within {patience:g} s", final=False) from None
    except OSError as e:
        final = isinstance(e, ConnectionRefusedError)
        raise ChirpError(f"{where} cannot be reached ({e.strerror or e})", final=final) from None
    except (EOFError, asyncio.LimitOverrunError) as e:
        raise ChirpError(f"{where} hung up" if isinstance(e, EOFError) else f"{where} is none", final=False) from None


async def _converse(proxy: Proxy, requests: Mapping[str, bytes], where: str) -> list[str]:
    reader, writer = await asyncio.open_connection(proxy.host, proxy.port, limit=_LINE)
    try:
        # One at a time, as the starter reads them. To a wrong cookie it answers a second later, so that is said once.
        if await _ask(reader, writer, _request("cookie", proxy.cookie), where) != 0:
            raise ChirpError(f"{where} does not know the cookie", final=True)
        refused = []
        for name, request in requests.items():
            said = await _ask(reader, writer, request, where)
            if said == _NOT_OFFERED:
                raise ChirpError(f"{where} takes no delayed updates; see ENABLE_CHIRP_DELAYED", final=True)
            if said != 0:
                refused.append(name)
        return refused
    finally:
        writer.transport.abort()  # what it has answered it has done; nothing is left to be sent


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes, where: str) -> int:
    writer.write(request)
    await writer.drain()
    answer = await reader.readuntil(b"\n")
    if not _ANSWER.match(answer):
        raise ChirpError(f"{where} does not speak Chirp", final=True)
    return int(answer)


def _request(command: str, *words: str) -> bytes:
    """One line: words apart by spaces, what would end a word escaped by a backslash."""
    line = " ".join((command, *(_SPACE.sub(r"\\\1", word) for word in words))).encode() + b"\n"
    if len(line) > _LINE:
        raise UsageError(f"{command} of {len(line)} bytes is too long for Chirp; it takes {_LINE}")
    return line


def _escaped(character: str) -> str:
    return f"\\{character}" if character in '"\\' else f"\\{ord(character):03o}"


def _is_here(host: str) -> bool:
    """Whether this is an address of this host: what is sent to it would be sent from it. Nothing is sent."""
    try:
        address = ip_address(host)
        if address.is_loopback:
            return True
        kind = socket.AF_INET if address.version == 4 else socket.AF_INET6
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return ip_address(probe.getsockname()[0]) == address
    except (ValueError, OSError):
        return False
