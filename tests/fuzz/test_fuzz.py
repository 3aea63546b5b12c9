"""Every target of targets.py on its seeds, on seeds that were tampered with, and on bytes out of nowhere.

fuzz_atheris.py goes on where this ends: the same targets, guided by coverage, for as long as one likes.
"""

import asyncio
import socket
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from acctd.network import resolver
from tests.fuzz.targets import SEEDS, TARGETS

EXAMPLES = 300


@st.composite
def tampered(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed with a few pieces cut out, doubled, or replaced."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 40)))
        piece = draw(st.one_of(st.binary(max_size=12), st.just(data[start:end] * 2), st.sampled_from(TOKENS)))
        data = data[:start] + piece + data[end:]
    return data


TOKENS = [
    b"\0", b"\n", b"\r", b"\x0b", b"\x1c", b"\xc2\x85", b"\xe2\x80\xa8", b"\xff", b"\xed\xa0\x80", b"\\", b'"', b")",
    b" - ", b"-1", b"18446744073709551616", b"9" * 5000, b"1e999", b"max", b"\\u0000", b"\\ud800", b"[" * 2000, b"::",
    b"..", b"/", "\N{ARABIC-INDIC DIGIT FOUR}".encode(), "\N{SUPERSCRIPT TWO}".encode(),
]  # fmt: skip


@pytest.mark.parametrize("name", TARGETS)
def test_no_bytes_make_it_fail(name: str) -> None:
    target = TARGETS[name]
    for seed in SEEDS[target]:
        target(seed)

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(tampered(SEEDS[target]), st.binary(max_size=300)))
    def play(data: bytes) -> None:
        target(data)

    play()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=2000), min_size=1, max_size=5))
def test_the_relay_passes_any_datagram_both_ways(queries: list[bytes]) -> None:
    """On loopback, with a server that answers what it was asked: nothing is parsed, so nothing can trip it."""

    async def ask() -> None:
        loop = asyncio.get_running_loop()
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as inside,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as job,
        ):
            for each in (server, inside, job):
                each.bind(("127.0.0.1", 0))
                each.setblocking(False)
            with mock.patch.object(resolver, "PORT", server.getsockname()[1]):
                relay = loop.create_task(
                    resolver._serve_udp(resolver.ip_address("127.0.0.1"), inside, asyncio.Semaphore(8))
                )
                for query in queries:
                    await loop.sock_sendto(job, query, inside.getsockname())
                    asked, client = await asyncio.wait_for(loop.sock_recvfrom(server, 65535), 20)
                    assert asked == query
                    await loop.sock_sendto(server, asked[::-1], client)
                    assert await asyncio.wait_for(loop.sock_recv(job, 65535), 20) == query[::-1]
                relay.cancel()

    asyncio.run(ask())
