"""A raw NETLINK_NETFILTER socket: requests, dumps, and the walk over messages and attributes.

Transport only: nftrules.py and conntrack.py know what the messages mean. A socket belongs to the network namespace its
thread was in when it was made, and serves one thread at a time. Kernel docs: userspace-api/netlink/intro.rst;
uapi/linux/netlink.h, uapi/linux/netfilter/nfnetlink.h.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from types import TracebackType

from acctd.errors import KernelRefusedError, NotPermittedError, UnavailableError

NETLINK_NETFILTER = 12
NLM_F_REQUEST = 1
NLM_F_ACK = 4
NLM_F_DUMP = 0x300
NLM_F_DUMP_INTR = 0x10
NLMSG_ERROR = 2
NLMSG_DONE = 3
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
NLA_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
HEADERS = 20  # nlmsghdr, then nfgenmsg: where a message's attributes begin

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_NFGENMSG = struct.Struct(">BBH")  # family, version, resource id
_ATTRIBUTE = struct.Struct("=HH")
_STEP = 1 << 18  # a dump's buffer grows by: 1000 jobs take 2.5 MB
_ROOM = 1 << 16  # the kernel fills at most 32 KiB of one receive
_ATTEMPTS = 20
_SECONDS = 10  # a dump answers at once; a socket that stays silent that long is broken

Buffer = bytes | bytearray | memoryview


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded to four bytes. `kind` includes NLA_F_NESTED where the payload is attributes."""
    return _ATTRIBUTE.pack(4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def nested(kind: int, *inner: bytes) -> bytes:
    """One attribute holding others."""
    return attribute(kind | 0x8000, b"".join(inner))


def text(kind: int, value: str) -> bytes:
    """A NUL-terminated string attribute."""
    return attribute(kind, value.encode() + b"\0")


def attributes(buffer: Buffer, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Each attribute in buffer[start:end] as (type, first byte of its payload, end of its payload), in any order.

    Raises KernelRefusedError on lengths that cannot be, so that garbage neither loops nor reads past its frame.
    """
    while start + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(buffer, start)
        if length < 4 or start + length > end:
            raise malformed(f"attribute of {length} bytes with {end - start} left", start)
        yield kind & NLA_TYPE_MASK, start + 4, start + length
        start += (length + 3) & ~3


def messages(buffer: Buffer, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Each message in buffer[:end] as (type, flags, its first byte, its end). Raises KernelRefusedError on garbage."""
    at = 0
    while at < end:
        if at + 16 > end:
            raise malformed(f"{end - at} bytes after the last message", at)
        length, kind, flags, _, _ = _HEADER.unpack_from(buffer, at)
        if length < 16 or at + length > end:
            raise malformed(f"message of {length} bytes with {end - at} left", at)
        if kind >= 16 and length < HEADERS:
            raise malformed(f"netfilter message of {length} bytes", at)
        yield kind, flags, at, at + length
        at += (length + 3) & ~3


def malformed(what: str, at: int) -> KernelRefusedError:
    """What a parser raises when the kernel's answer is not what uapi says."""
    return KernelRefusedError(f"netlink answer cannot be read: {what} at byte {at}; is this kernel newer than acctd?")


class Dump:
    """One complete dump: `buffer[:size]` is whole messages, without the final NLMSG_DONE.

    `uniform` is the resource id every received part began with (nf_tables: the low half of the ruleset's generation),
    None if they differ or nothing was received. The buffer is the socket's own: it lasts until the next request.
    """

    __slots__ = ("buffer", "size", "uniform")

    def __init__(self, buffer: bytearray, size: int, uniform: int | None) -> None:
        self.buffer = buffer
        self.size = size
        self.uniform = uniform


class NfnetlinkSocket:
    """One socket in the calling thread's network namespace; a context manager."""

    def __init__(self, endpoint: socket.socket | None = None) -> None:
        """`endpoint` is where a test puts its own kernel; it is closed with this object."""
        self._socket = endpoint or _open()
        self._sequence = int.from_bytes(os.urandom(3), "little")
        self._buffer = bytearray(4 * _ROOM)

    def dump(self, kind: int, family: int, request: bytes = b"") -> Dump | None:
        """All objects of one kind, consistently; None where the kernel answers ENOENT (no such table or set).

        `kind` is subsystem << 8 | message, `request` ready-made attributes. A dump that a change interrupted is taken
        again; KernelRefusedError if that never ends, or if the kernel refuses.
        """
        for _ in range(_ATTEMPTS):
            self._send(kind, family, NLM_F_REQUEST | NLM_F_DUMP, request)
            size, uniform, interrupted, error = self._receive_dump()
            if error == errno.ENOENT:
                return None
            if error == errno.EINTR:
                continue
            if error:
                raise _refusal("list", kind, error)
            if not interrupted:
                return Dump(self._buffer, size, uniform)
        raise KernelRefusedError(f"the netfilter ruleset changed during each of {_ATTEMPTS} dumps; try again later")

    def ask(self, kind: int, family: int, request: bytes = b"") -> bytes | None:
        """The one message that answers a GET, headers included; None on ENOENT."""
        self._send(kind, family, NLM_F_REQUEST, request)
        answer = self._receive_one()
        error = _error_of(answer)
        if error == errno.ENOENT:
            return None
        if error is not None:
            raise _refusal("get", kind, error)
        return answer

    def change(self, kind: int, family: int, request: bytes) -> bool:
        """Carry out one change; False if its object does not exist (ENOENT)."""
        self._send(kind, family, NLM_F_REQUEST | NLM_F_ACK, request)
        answer = self._receive_one()
        error = _error_of(answer)
        if error == errno.ENOENT:
            return False
        if error:
            raise _refusal("change", kind, error)
        return True

    def transaction(self, kind: int, family: int, request: bytes) -> int:
        """One change in a transaction of its own, as nf_tables wants it; the errno it was refused with, or 0."""
        begin, change, end = (self._sequence + 1) & 0xFFFFFFFF, (self._sequence + 2) & 0xFFFFFFFF, 0
        self._sequence = change
        subsystem = kind >> 8
        self._socket.send(
            _HEADER.pack(HEADERS, _BATCH_BEGIN, NLM_F_REQUEST, begin, 0)
            + _NFGENMSG.pack(0, 0, subsystem)
            + _HEADER.pack(HEADERS + len(request), kind, NLM_F_REQUEST | NLM_F_ACK, change, 0)
            + _NFGENMSG.pack(family, 0, 0)
            + request
            + _HEADER.pack(HEADERS, _BATCH_END, NLM_F_REQUEST, end, 0)
            + _NFGENMSG.pack(0, 0, subsystem)
        )
        return _error_of(self._receive_one()) or 0

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> "NfnetlinkSocket":
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _send(self, kind: int, family: int, flags: int, request: bytes) -> None:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        header = _HEADER.pack(HEADERS + len(request), kind, flags, self._sequence, 0)
        self._socket.send(header + _NFGENMSG.pack(family, 0, 0) + request)

    def _receive_one(self) -> bytes:
        while True:
            size = self._receive_at(0)
            if size >= HEADERS and _HEADER.unpack_from(self._buffer, 0)[3] == self._sequence:
                return bytes(memoryview(self._buffer)[:size])

    def _receive_dump(self) -> tuple[int, int | None, bool, int]:
        """Fill the buffer with one dump: size, uniform resource id, interrupted, errno.

        The kernel flags an interruption on the first message of the part after it, or on the final NLMSG_DONE: for
        the ruleset, whose generation it looks at once for each part, no other message can carry the flag.
        """
        at = 0
        interrupted = False
        uniform: int | None = None
        uneven = False
        while True:
            size = self._receive_at(at)
            if size < HEADERS:
                raise malformed(f"part of {size} bytes", at)
            _, kind, flags, sequence, _ = _HEADER.unpack_from(self._buffer, at)
            if sequence != self._sequence:
                continue  # the rest of a dump that an exception left unread
            interrupted |= bool(flags & NLM_F_DUMP_INTR)
            if kind in (NLMSG_DONE, NLMSG_ERROR):
                return at, uniform, interrupted, -struct.unpack_from("=i", self._buffer, at + 16)[0]
            resource = int.from_bytes(self._buffer[at + 18 : at + 20], "big")
            uneven |= uniform is not None and resource != uniform
            uniform = None if uneven else resource
            done = self._done_within(at, at + size)
            if done is not None:
                flags = _HEADER.unpack_from(self._buffer, done)[2]
                error = -struct.unpack_from("=i", self._buffer, done + 16)[0]
                return done, uniform, interrupted or bool(flags & NLM_F_DUMP_INTR), error
            at += size

    def _done_within(self, start: int, end: int) -> int | None:
        """Where NLMSG_DONE stands if the kernel appended it to a part with data; mostly it comes by itself."""
        tail = end - HEADERS
        length, kind, _, sequence, _ = _HEADER.unpack_from(self._buffer, tail)
        if (length, kind, sequence) != (HEADERS, NLMSG_DONE, self._sequence):
            return None
        part = bytes(self._buffer[start:end])
        return next((start + at for kind, _, at, _ in messages(part, len(part)) if kind == NLMSG_DONE), None)

    def _receive_at(self, at: int) -> int:
        """Receive one part behind what is already there."""
        if len(self._buffer) - at < _ROOM:
            self._buffer.extend(bytes(_STEP))
        try:
            with memoryview(self._buffer) as whole, whole[at:] as room:
                size = self._socket.recv_into(room, 0, socket.MSG_TRUNC)
        except BlockingIOError:
            raise KernelRefusedError(f"netfilter did not answer within {_SECONDS} s") from None
        if size > len(self._buffer) - at:
            raise malformed(f"part of {size} bytes, above the {_ROOM} a receive can carry,", at)
        return size


def _open() -> socket.socket:
    try:
        made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
    except OSError as e:
        raise UnavailableError(f"cannot open a netfilter netlink socket ({e.strerror}); load nfnetlink") from None
    try:
        made.bind((0, 0))
        # Not settimeout(): that costs a poll before every receive, and a dump is a hundred of them.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", _SECONDS, 0))
    except OSError:
        made.close()
        raise
    return made


def _error_of(answer: bytes) -> int | None:
    """The positive errno of an NLMSG_ERROR message (0 is an acknowledgement), None if it is no such message."""
    if _HEADER.unpack_from(answer, 0)[1] != NLMSG_ERROR:
        return None
    return -int(struct.unpack_from("=i", answer, 16)[0])


def _refusal(what: str, kind: int, error: int) -> KernelRefusedError | NotPermittedError:
    reason = f"cannot {what} netfilter objects (message {kind >> 8}/{kind & 0xFF}): {os.strerror(error)}"
    if error in (errno.EPERM, errno.EACCES):
        return NotPermittedError(f"{reason}; run as root")
    return KernelRefusedError(reason)
