"""Packed files as streams (gzip, RFC 1952): what could be unpacked is given before what is wrong with the rest is said.

gzip.GzipFile throws away what it has when the end of a file is damaged. Knows nothing of records.
"""

import io
import zlib
from typing import BinaryIO

MAGIC = b"\x1f\x8b"

TORN = (EOFError, zlib.error)
"""What a file that is not whole raises."""

_CHUNK = 2**16
_TRAILER = 8  # bytes: CRC and length. They go in by themselves, so that a wrong one takes no content along
_GZIP_ALONE = 16 + zlib.MAX_WBITS


class Unpacked(io.RawIOBase):
    """The content of one file, which is closed with this. Reading raises what TORN has."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._rest, self._more = stream, b"", True
        self._inflate = zlib.decompressobj(_GZIP_ALONE)
        self._between = False  # a member has ended: zeros may follow, another member, or nothing

    def readable(self) -> bool:
        return True

    def readinto(self, target: "memoryview") -> int:  # type: ignore[override]  # what BufferedReader gives
        """At least a byte, or 0 at the end."""
        while True:
            if self._more and len(self._rest) <= _TRAILER:
                read = self._stream.read(_CHUNK)
                self._rest, self._more = self._rest + read, bool(read)
            if self._between:
                self._rest = self._rest.lstrip(b"\0")
                if not self._rest and self._more:
                    continue
                if not self._rest:
                    return 0
                self._inflate, self._between = zlib.decompressobj(_GZIP_ALONE), False
            if not self._rest:
                raise EOFError("it ends too early")
            whole = len(self._rest) - _TRAILER
            now, later = (self._rest, b"") if whole <= 0 else (self._rest[:whole], self._rest[whole:])
            found = self._inflate.decompress(now, len(target))
            self._rest = (self._inflate.unused_data or self._inflate.unconsumed_tail) + later
            self._between = self._inflate.eof
            if found:
                target[: len(found)] = found
                return len(found)

    def close(self) -> None:
        super().close()
        self._stream.close()


def skip(stream: BinaryIO, number: int) -> None:
    """Read past so many bytes."""
    while number > 0 and (text := stream.read(min(number, 2**20))):
        number -= len(text)
