"""One call of the agent's, from the hook's side: a varlink message out, one back, within a bounded time.

Imports next to nothing, because a starter waits for it. Does not know what a call is for.
"""

import os
import sys
import time

# The C halves of json and socket: the Python halves load re and enum, which takes as long as all else together.
from _json import encode_basestring_ascii, make_scanner
from _socket import AF_UNIX, SO_PEERCRED, SO_RCVTIMEO, SO_SNDTIMEO, SOCK_STREAM, SOL_SOCKET
from _socket import socket as Socket  # noqa: N812  # a class
from struct import pack

EX_USAGE, EX_UNAVAILABLE, EX_SOFTWARE, EX_NOPERM = 64, 69, 70, 77
_CODES = {
    "UsageError": 64, "NotFound": 66, "Unavailable": 69, "Failed": 70, "KernelRefused": 71, "InUse": 73,
    "LedgerFailed": 74, "Exhausted": 75, "ConfigError": 78,
    "NotPermitted": 77, "InvalidParameter": 64, "MethodNotFound": 69,
}  # fmt: skip
_PATIENCE = 60.0
"""s for one answer, all in all. To end a job may take the agent 10 s, and others may be before us."""

TYPE_CHECKING = False  # typing itself takes 3 ms; type checkers know the name
if TYPE_CHECKING:
    from typing import Any
Answer = dict[str, "Any"]  # JSON as it came


class HookError(Exception):
    """One sentence for the caller, and the exit code. `unreachable`: no agent answered."""

    def __init__(self, message: str, code: int, *, unreachable: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.unreachable = unreachable


class UsageError(HookError):
    """What was typed makes no sense; the sentence says what would."""

    def __init__(self, message: str) -> None:
        super().__init__(message, EX_USAGE)


def call(path: str, method: str, **parameters: object) -> Answer:
    """One varlink call. Raises HookError, with `unreachable` where no agent answers."""
    request = to_json({"method": f"org.acctd.Node.{method}", "parameters": parameters}).encode() + b"\0"
    deadline = time.monotonic() + _PATIENCE
    agent = Socket(AF_UNIX, SOCK_STREAM)
    try:
        # Not settimeout(): a socket that does not block is refused at once where others wait to be accepted.
        _wait_at_most(agent, _PATIENCE)
        agent.connect(path)
        _check_agent(agent, path)
        try:
            agent.sendall(request)
        except (BrokenPipeError, ConnectionResetError):
            pass  # whom an agent turns away at the door it tells why
        data = b""
        while not data.endswith(b"\0"):
            _wait_at_most(agent, deadline - time.monotonic())
            received = agent.recv(1 << 16)
            if not received:
                raise HookError(f"the agent at {path} hung up; see its log", EX_UNAVAILABLE, unreachable=True)
            data += received
    except BlockingIOError:
        said = f"the agent at {path} has not answered within {_PATIENCE:g} s; see its log"
        raise HookError(said, EX_UNAVAILABLE, unreachable=True) from None
    except OSError as e:
        said = f"no agent answers at {path} ({e.strerror or e}); start acctd serve"
        raise HookError(said, EX_UNAVAILABLE, unreachable=True) from None
    finally:
        agent.close()
    try:
        reply, _ = _scan(data[:-1].decode(), 0)
        if "error" not in reply:
            return dict(reply["parameters"])
        name = str(reply["error"]).rpartition(".")[2]
        about = dict(reply["parameters"])
    except (ValueError, TypeError, KeyError, StopIteration, SystemError):
        # SystemError: what the C half says of bad JSON when json.decoder is not loaded.
        raise HookError(f"what answers at {path} is no acctd agent; see --socket", EX_UNAVAILABLE) from None
    said = about.get("message") or f"{name}: {about.get('parameter') or about.get('method') or method}"
    raise HookError(said, _CODES.get(name, EX_SOFTWARE))


def _wait_at_most(agent: Socket, seconds: float) -> None:
    """Let no call on this socket take longer; at least a ms, because 0 is for ever."""
    left = max(seconds, 0.001)
    timeval = pack("@ll", int(left), int(left % 1 * 1_000_000))
    agent.setsockopt(SOL_SOCKET, SO_RCVTIMEO, timeval)
    agent.setsockopt(SOL_SOCKET, SO_SNDTIMEO, timeval)


def _check_agent(agent: Socket, path: str) -> None:
    """Root does what the agent says, so it must be root's: $ACCTD_SOCKET may come from a job's environment."""
    if os.geteuid() == 0:
        uid = int.from_bytes(agent.getsockopt(SOL_SOCKET, SO_PEERCRED, 12)[4:8], sys.byteorder)
        if uid != 0:
            raise HookError(f"the agent at {path} belongs to uid {uid}; root listens to root's alone", EX_NOPERM)


class _Plain:
    """How the JSON scanner is to read: numbers, strings, lists and dicts as they are."""

    strict = True
    object_hook = object_pairs_hook = array_hook = None
    parse_float, parse_int, parse_constant = float, int, float


_scan = make_scanner(_Plain)  # type: ignore[arg-type]  # it asks for these attributes and no more


def to_json(value: object, margin: str | None = None) -> str:
    """JSON on one line, or indented by two where there is a margin."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if not isinstance(value, dict | list):
        return repr(value)
    below = None if margin is None else margin + "  "
    if isinstance(value, dict):
        parts = [f"{encode_basestring_ascii(key)}: {to_json(part, below)}" for key, part in value.items()]
    else:
        parts = [to_json(part, below) for part in value]
    left, right = "{}" if isinstance(value, dict) else "[]"
    if margin is None or not parts:
        return f"{left}{', '.join(parts)}{right}"
    lines = f",\n{below}".join(parts)
    return f"{left}\n{below}{lines}\n{margin}{right}"
