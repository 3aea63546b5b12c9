"""The agent's socket seen from the other end: blocking calls and streams, for commands that a person types.

Refusals come back as the errors they were in the agent, so that a command ends with the same sentence and exit code.
The hook has a copy of its own that needs no msgspec. Wire format: varlink.py.
"""

import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from acctd.errors import AcctdError, UnavailableError, UsageError
from acctd.meter import State
from acctd.policies import Shortage
from acctd.varlink import ERRORS, INTERFACE

_T = TypeVar("_T")

TIMEOUT = 60.0
"""Seconds a call may take; a kill may wait 10 s for processes that do not want to die."""

_ERRORS: dict[str, type[AcctdError]] = {
    **{name: kind for kind, name in ERRORS},
    # org.varlink.service's own: it knows no such method, or no such parameter of it.
    "InvalidParameter": UsageError,
    "MethodNotFound": UnavailableError,
    "InterfaceNotFound": UnavailableError,
}


class Job(msgspec.Struct, frozen=True):
    """A job as the agent tells of it: sizes in bytes, times in ns. See varlink.DESCRIPTION."""

    id: str
    owner: str
    uid: int
    phase: str
    network: str
    started: float  # s since the epoch
    wall_ns: int
    parent: str | None = None
    pids: list[int] = []
    limits: dict[str, float | str | None] = {}
    tags: dict[str, str] = {}
    notes: list[str] = []
    shortages: tuple[Shortage, ...] = ()
    totals: State = {}  # empty for a job that the caller may only see


class Event(msgspec.Struct, frozen=True):
    """Something that happened to a job, or to the agent itself."""

    number: int
    time: float  # s since the epoch, a label
    job: str | None
    uid: int | None  # of the job's owner
    event: str
    text: str


class Client:
    """One connection to the agent. Use as a context manager. Raises UnavailableError where no agent answers."""

    def __init__(self, path: Path, *, timeout: float = TIMEOUT) -> None:
        self._path = path
        self._data = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        # Not settimeout(): connect() would then say EAGAIN at once where others wait to be accepted. unix(7).
        self._patience(timeout)
        try:
            self._socket.connect(str(path))
        except OSError as e:
            self._socket.close()
            raise self._silent(e) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """One call's answer. Raises what the agent refused it with; UnavailableError where it falls silent."""
        self._send(method, parameters)
        return self._answer()[0]

    def stream(self, method: str, **parameters: object) -> Iterator[dict[str, Any]]:
        """A call with many answers, for ever. It is sent at once; the connection is then of no other use."""
        self._send(method, parameters, more=True)
        self._patience(0)
        return self._answers()

    def _answers(self) -> Iterator[dict[str, Any]]:
        continues = True
        while continues:
            parameters, continues = self._answer()
            yield parameters

    def _send(self, method: str, parameters: dict[str, object], **flags: bool) -> None:
        try:
            body = msgspec.json.encode({"method": f"{INTERFACE}.{method}", "parameters": parameters, **flags})
        except UnicodeEncodeError as e:
            raise UsageError(f"{e.object!r} is no UTF-8 text; encode it") from None
        try:
            self._socket.sendall(body + b"\0")
        except (BrokenPipeError, ConnectionResetError):
            return  # hung up on: why is in what there is to read
        except OSError as e:
            raise self._silent(e) from None

    def _answer(self) -> tuple[dict[str, Any], bool]:
        """One reply's parameters, and whether more will come."""
        try:
            reply = msgspec.json.decode(self._frame())
            parameters, error = reply.get("parameters") or {}, reply.get("error")
        except (msgspec.DecodeError, UnicodeDecodeError, AttributeError):
            raise UnavailableError(f"what answers at {self._path} is no agent; see what listens there") from None
        if error is not None:
            kind = error.rpartition(".")[2]
            raise _ERRORS.get(kind, AcctdError)(parameters.get("message") or _said(kind, parameters))
        return parameters, bool(reply.get("continues"))

    def _frame(self) -> bytes:
        searched = 0
        while (end := self._data.find(0, searched)) < 0:
            searched = len(self._data)
            try:
                received = self._socket.recv(1 << 16)
            except OSError as e:
                raise self._silent(e) from None
            if not received:
                raise UnavailableError(f"the agent at {self._path} hung up; see its log")
            self._data += received
        frame = bytes(self._data[:end])
        del self._data[: end + 1]
        return frame

    def _patience(self, seconds: float) -> None:
        """How long one step may take; 0 is for ever."""
        interval = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))  # struct timeval
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, interval)

    def _silent(self, error: OSError) -> UnavailableError:
        if isinstance(error, BlockingIOError):
            return UnavailableError(f"the agent at {self._path} does not answer in time; see its log")
        return UnavailableError(f"no agent answers at {self._path} ({error.strerror or error}); start acctd serve")


def job(answer: object) -> Job:
    """One Job of an answer. AcctdError where it is not as declared."""
    return _as(answer, Job)


def event(answer: object) -> Event:
    """One Event of an answer. AcctdError where it is not as declared."""
    return _as(answer, Event)


def _as(answer: object, kind: type[_T]) -> _T:
    try:
        return msgspec.convert(answer, kind)
    except msgspec.ValidationError as e:
        raise AcctdError(f"the agent's answer is not as expected: {e}; see that it is of the same version") from None


def _said(kind: str, parameters: dict[str, Any]) -> str:
    what = ", ".join(str(value) for value in parameters.values())
    if issubclass(_ERRORS.get(kind, AcctdError), UnavailableError):
        return f"the agent does not know {what or kind}; see that it is of the same version"
    return f"the agent refused: {kind} {what}".rstrip()
