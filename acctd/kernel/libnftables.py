"""libnftables through ctypes: one JSON request is one nf_tables transaction.

Knows the library, not what acctd puts into netfilter. A context opens its netlink socket when it is made and stays in
the network namespace its thread was in at that moment, whatever setns() does afterwards; it belongs to one thread at a
time. Docs: libnftables(3), libnftables-json(5).
"""

import ctypes
import json
from types import TracebackType
from typing import Any

from acctd.errors import KernelRefusedError, UnavailableError

_OUTPUT_JSON = 1 << 4  # nftables/libnftables.h; also makes the library expect JSON as input

Command = dict[str, Any]
"""One command of libnftables-json(5), such as {"add": {"table": {"family": "inet", "name": "acctd"}}}."""


class Libnftables:
    """One context of libnftables.so.1 in the calling thread's network namespace; a context manager."""

    def __init__(self) -> None:
        self._lib = _load()
        context = self._lib.nft_ctx_new(0)
        if not context:
            raise UnavailableError("libnftables gave no context; is the kernel built with nf_tables?")
        self._context: int | None = context
        self._lib.nft_ctx_output_set_flags(context, _OUTPUT_JSON)
        self._lib.nft_ctx_buffer_output(context)
        self._lib.nft_ctx_buffer_error(context)

    def run(self, commands: list[Command]) -> None:
        """Carry out all commands or none. Raises KernelRefusedError with the library's own words."""
        if self._context is None:
            raise KernelRefusedError("this libnftables context is closed; make a new one")
        text = json.dumps({"nftables": commands}, separators=(",", ":")).encode()
        refused = self._lib.nft_run_cmd_from_buffer(self._context, text)
        # Both buffers start afresh with the next command, and fetching them is what empties them.
        self._lib.nft_ctx_get_output_buffer(self._context)
        words = (self._lib.nft_ctx_get_error_buffer(self._context) or b"").decode(errors="replace")
        if refused:
            raise KernelRefusedError(f"nftables refused a change: {_one_sentence(words)}")

    def close(self) -> None:
        """Give the context and its socket back; the ruleset stays."""
        if self._context is not None:
            self._lib.nft_ctx_free(self._context)
            self._context = None

    def __enter__(self) -> "Libnftables":
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


# The error buffer holds, for each failing command, its message and a quote of the (JSON) input with markers below it:
#   internal:0:0-0: Error: Could not process rule: No such file or directory
#   <blank>
#   <blank>
def _one_sentence(words: str) -> str:
    """The messages alone, each once, in order."""
    messages = []
    for line in words.splitlines():
        _, found, message = line.partition("Error: ")
        if found and message not in messages:
            messages.append(message)
    return "; ".join(messages) or " ".join(words.split()) or "no reason given"


def _load() -> ctypes.CDLL:
    try:
        lib = ctypes.CDLL("libnftables.so.1")
    except OSError as e:
        raise UnavailableError(f"cannot load libnftables.so.1 ({e}); install libnftables1") from None
    lib.nft_ctx_new.restype = ctypes.c_void_p
    lib.nft_ctx_new.argtypes = [ctypes.c_uint32]
    lib.nft_ctx_output_set_flags.restype = None
    lib.nft_ctx_output_set_flags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
    for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
        function = getattr(lib, name)
        function.restype = ctypes.c_char_p
        function.argtypes = [ctypes.c_void_p]
    for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error"):
        function = getattr(lib, name)
        function.restype = ctypes.c_int
        function.argtypes = [ctypes.c_void_p]
    lib.nft_run_cmd_from_buffer.restype = ctypes.c_int
    lib.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    lib.nft_ctx_free.restype = None
    lib.nft_ctx_free.argtypes = [ctypes.c_void_p]
    return lib
