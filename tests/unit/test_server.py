"""The protocol on a living socket, by varlink.org, and what becomes of peers that do not keep to it.

The daemon behind it is a stand-in with three methods: what the real ones do is tested elsewhere. Whose share is whose
needs peers of several users: tests/kernel/test_door.py.
"""

import asyncio
import json
import logging
import socket
from dataclasses import dataclass, field
from types import SimpleNamespace

import msgspec
import pytest

from acctd import server as module
from acctd import shares, varlink
from acctd.caller import Caller
from acctd.errors import NotFoundError
from acctd.server import Server

DEADLINE = 20.0


class Text(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: str


@dataclass
class News:
    number: int
    job: str


@dataclass
class StandIn:
    """Daemon, its news and methods in one."""

    cost: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(errors=0))
    asked: list = field(default_factory=list)
    watching: int = 0
    queue: asyncio.Queue = field(default_factory=asyncio.Queue)
    may_go_on: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def news(self):
        return self

    @property
    def table(self):
        return {"Echo": (Text, self.echo), "Slow": (Text, self.slow), "Break": (Text, self.break_down)}

    async def echo(self, caller, wanted):
        self.asked.append(wanted.text)
        if wanted.text == "nobody":
            raise NotFoundError("no open job 'nobody'")
        return {"text": wanted.text, "uid": caller.uid}

    async def slow(self, caller, wanted):
        await self.may_go_on.wait()
        return await self.echo(caller, wanted)

    async def break_down(self, caller, wanted):
        return {"text": wanted.text + 1}

    def may_see(self, caller, event):
        return event.job == "mine"

    async def watch(self):
        self.watching += 1
        try:
            while True:
                yield await self.queue.get()
        finally:
            self.watching -= 1


def call(method, **more):
    name = method if "." in method else f"{varlink.INTERFACE}.{method}"
    parameters = more.pop("parameters", {"text": more.pop("text", "x")})
    return json.dumps({"method": name, "parameters": parameters} | more).encode() + b"\0"


class Client:
    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    def send(self, *frames):
        self.writer.write(b"".join(frames))

    async def hear(self):
        """The next reply."""
        return json.loads((await asyncio.wait_for(self.reader.readuntil(b"\0"), DEADLINE))[:-1])

    async def hear_end(self):
        """All there is until the server hangs up."""
        return await asyncio.wait_for(self.reader.read(), DEADLINE)


@pytest.fixture
def play(tmp_path):
    """Runs `scene(stand_in, connect)` against a server."""

    async def run(scene):
        stand_in = StandIn()
        path = tmp_path / "s"
        server = await Server(stand_in, stand_in).listen(path)
        clients = []

        async def connect():
            clients.append(Client(*await asyncio.open_unix_connection(path)))
            return clients[-1]

        try:
            await scene(stand_in, connect)
        finally:
            for client in clients:
                client.writer.close()
            server.close()

    return lambda scene: asyncio.run(run(scene))


async def until(true):
    async with asyncio.timeout(DEADLINE):
        while not true():
            await asyncio.sleep(0.001)


def test_pipelined_calls_are_answered_in_order(play):
    async def scene(stand_in, connect):
        client = await connect()
        client.send(call("Slow", text="0"), *(call("Echo", text=str(n)) for n in range(1, 200)))
        await until(lambda: stand_in.may_go_on.set() is None)
        assert [(await client.hear())["parameters"]["text"] for _ in range(200)] == [str(n) for n in range(200)]

    play(scene)


def test_a_oneway_call_is_done_and_not_answered(play):
    async def scene(stand_in, connect):
        client = await connect()
        client.send(
            call("Echo", text="quiet", oneway=True),
            call("Echo", text="nobody", oneway=True),
            call("Break", oneway=True),
            call("Echo", parameters={"colour": 1}, oneway=True),
            call("Nonsense", oneway=True),
            call("org.example.Thing", oneway=True),
            call("Watch", parameters={}, oneway=True, more=True),
            call("Echo", text="loud"),
        )
        assert (await client.hear())["parameters"]["text"] == "loud"
        assert stand_in.asked == ["quiet", "nobody", "loud"]

    play(scene)


def test_more_on_a_method_that_does_not_stream_gives_one_reply_that_is_the_last(play):
    async def scene(stand_in, connect):
        client = await connect()
        client.send(call("Echo", more=True), call("Echo", text="2"))
        first, second = await client.hear(), await client.hear()
        assert (first["parameters"]["text"], second["parameters"]["text"]) == ("x", "2")
        assert "continues" not in first

    play(scene)


@pytest.mark.parametrize(
    ("frame", "error", "says"),
    [
        (call("Echo", text="nobody"), f"{varlink.INTERFACE}.NotFound", "no open job"),
        (call("Echo", parameters={}), f"{varlink.SERVICE}.InvalidParameter", "text"),
        (call("Echo", parameters=None), f"{varlink.SERVICE}.InvalidParameter", "text"),
        (call("Echo", parameters={"text": "a", "colour": 1}), f"{varlink.SERVICE}.InvalidParameter", "colour"),
        (call("Watch", parameters={"colour": 1}), f"{varlink.SERVICE}.InvalidParameter", "colour"),
        (call("Nonsense"), f"{varlink.SERVICE}.MethodNotFound", "org.acctd.Node.Nonsense"),
        (call("org.varlink.service.Nonsense"), f"{varlink.SERVICE}.MethodNotFound", "service.Nonsense"),
        (call("org.example.Thing"), f"{varlink.SERVICE}.InterfaceNotFound", "org.example"),
        (b'{"method":"","parameters":{}}\0', f"{varlink.SERVICE}.InterfaceNotFound", ""),
        (
            call("org.varlink.service.GetInterfaceDescription", parameters=None),
            f"{varlink.SERVICE}.InvalidParameter",
            "interface",
        ),
    ],
)
def test_a_call_that_cannot_be_is_refused_and_the_connection_goes_on(play, frame, error, says):
    async def scene(stand_in, connect):
        client = await connect()
        client.send(frame, call("Echo"))
        refused = await client.hear()
        assert refused["error"] == error
        assert says in json.dumps(refused["parameters"])
        assert (await client.hear())["parameters"]["text"] == "x"
        assert stand_in.cost.errors == 0

    play(scene)


def test_a_defect_answers_failed_is_counted_and_told_once_with_traceback(play, caplog):
    async def scene(stand_in, connect):
        client = await connect()
        for count in range(1, 4):
            client.send(call("Break"))
            refused = await client.hear()
            assert refused["error"] == f"{varlink.INTERFACE}.Failed"
            assert refused["parameters"]["message"].startswith("Break failed inside acctd (TypeError)")
            assert stand_in.cost.errors == count
        client.send(call("Echo"))
        assert "parameters" in await client.hear()

    play(scene)
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == 1
    assert "break_down" in caplog.text


def test_who_hangs_up_in_mid_answer_has_its_call_done_and_disturbs_nobody(play, caplog):
    async def scene(stand_in, connect):
        leaver, other = await connect(), await connect()
        leaver.send(call("Slow", text="left"))
        other.send(call("Echo"))
        await other.hear()  # so the agent has had the slow call too
        leaver.writer.transport.abort()
        stand_in.may_go_on.set()
        await until(lambda: "left" in stand_in.asked)
        other.send(call("Echo", text="2"))
        assert (await other.hear())["parameters"]["text"] == "2"
        assert stand_in.cost.errors == 0

    play(scene)
    assert caplog.records == []


def test_who_says_all_and_closes_its_half_is_answered(play):
    async def scene(stand_in, connect):
        client = await connect()
        client.send(call("Echo"), call("Echo", text="2"))
        client.writer.write_eof()
        assert (await client.hear_end()).count(b"\0") == 2

    play(scene)


def test_a_watch_tells_what_may_be_seen(play):
    async def scene(stand_in, connect):
        client = await connect()
        client.send(call("Watch", parameters={}, more=True))
        await until(lambda: stand_in.watching)
        for number, job in enumerate(("mine", "another's", "mine")):
            stand_in.queue.put_nowait(News(number, job))
        heard = [await client.hear(), await client.hear()]
        assert [(h["parameters"]["event"]["number"], h["continues"]) for h in heard] == [(0, True), (2, True)]

    play(scene)


def test_a_watch_without_more_is_one_event_and_the_calls_behind_it_are_answered(play):
    async def scene(stand_in, connect):
        client = await connect()
        client.send(call("Watch", parameters={}), call("Echo", text="behind"))
        await until(lambda: stand_in.watching)
        client.send(call("Echo", text="later"))
        stand_in.queue.put_nowait(News(7, "mine"))
        heard = [await client.hear() for _ in range(3)]
        assert heard[0] == {"parameters": {"event": {"number": 7, "job": "mine"}}}
        assert [h["parameters"]["text"] for h in heard[1:]] == ["behind", "later"]
        await until(lambda: not stand_in.watching)

    play(scene)


def test_a_watcher_that_hangs_up_is_forgotten_at_once_and_not_at_the_next_event(play):
    async def scene(stand_in, connect):
        client = await connect()
        client.send(call("Watch", parameters={}, more=True))
        await until(lambda: stand_in.watching)
        client.writer.close()
        await until(lambda: not stand_in.watching)

    play(scene)


def test_a_watcher_that_keeps_sending_is_hung_up_on(play, caplog):
    async def scene(stand_in, connect):
        client = await connect()
        client.send(call("Watch", parameters={}, more=True))
        await until(lambda: stand_in.watching)
        client.send(call("Echo", text="y" * 1000) * 600)
        assert b"not answered yet" in await client.hear_end()
        await until(lambda: not stand_in.watching)

    play(scene)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "bad", [b"no json\0", b"[]\0", b'{"method":1}\0', b'{"method":"\xff"}\0', b"[" * 100_000 + b"\0", b"x" * 700_000]
)
def test_what_is_no_message_is_answered_and_ends_its_connection_alone(play, caplog, bad):
    async def scene(stand_in, connect):
        good = await connect()
        for _ in range(5):
            client = await connect()
            client.send(bad)
            assert b"InvalidParameter" in await client.hear_end()
        good.send(call("Echo"))
        assert "parameters" in await good.hear()
        assert stand_in.cost.errors == 0

    play(scene)
    assert len(caplog.records) == 1


def test_half_a_message_has_a_time_to_become_a_whole_one(play, caplog, monkeypatch):
    monkeypatch.setattr(module, "HALF", 0.2)

    async def scene(stand_in, connect):
        patient = await connect()
        for _ in range(3):
            client = await connect()
            client.send(call("Echo"), b'{"method":')
            assert "parameters" in await client.hear()
            assert b"a message of which 10 bytes came was not complete" in await client.hear_end()
        drip = await connect()  # a byte now and then does not win time
        with pytest.raises((ConnectionError, TimeoutError)):
            async with asyncio.timeout(DEADLINE):
                while True:
                    drip.send(b" ")
                    await drip.writer.drain()
                    await asyncio.sleep(0.02)
        patient.send(call("Echo"))
        assert "parameters" in await patient.hear()

    play(scene)
    assert len(caplog.records) == 1


def test_who_does_not_read_its_answers_is_dropped(play, caplog, monkeypatch):
    monkeypatch.setattr(module, "HALF", 0.2)

    async def scene(stand_in, connect):
        good = await connect()
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.setblocking(False)
            await asyncio.get_running_loop().sock_connect(deaf, good.writer.get_extra_info("peername"))
            with pytest.raises(ConnectionError):
                while True:  # reads nothing
                    await asyncio.wait_for(
                        asyncio.get_running_loop().sock_sendall(deaf, call("Echo", text="z" * 100_000)), DEADLINE
                    )
        good.send(call("Echo"))
        assert "parameters" in await good.hear()

    play(scene)
    assert ["was not read within" in record.getMessage() for record in caplog.records] == [True]


@pytest.fixture
def uids(monkeypatch):
    """The uid of each connection, in the order they come."""
    coming = []
    monkeypatch.setattr(module, "_caller", lambda _: Caller(1, coming.pop(0), 1, "1:1"))
    return coming


def test_a_users_share_is_one_users(play, uids, caplog, monkeypatch):
    monkeypatch.setattr(module, "PER_USER", 2)
    uids += [5, 5, 5, 5, 6, 0, 0, 0]

    async def scene(stand_in, connect):
        refused = []
        for uid in uids.copy():
            client = await connect()
            client.send(call("Echo"))
            reply = await client.hear()
            if "error" in reply:
                refused.append((uid, reply["error"].rpartition(".")[2], reply["parameters"]["message"]))
        assert refused == [(5, "Exhausted", "2 connections of uid 5 are open already; close some")] * 2

    play(scene)
    assert len(caplog.records) == 1


def test_where_all_is_full_the_idlest_of_the_biggest_makes_room(play, uids, caplog, monkeypatch):
    monkeypatch.setattr(shares, "CONNECTIONS", 3)
    uids += [4, 5, 5, 6, 0]

    async def scene(stand_in, connect):
        clients = []
        for _ in range(5):
            clients.append(await connect())
            clients[-1].send(call("Echo"))
            assert "parameters" in await clients[-1].hear()
        assert b"made room for another" in await clients[1].hear_end()
        for index in (0, 2, 3, 4):
            clients[index].send(call("Echo"))
            assert "parameters" in await clients[index].hear()

    play(scene)
    assert len(caplog.records) == 1


def test_where_all_are_busy_nobody_is_cut_off(play, uids, monkeypatch):
    monkeypatch.setattr(shares, "CONNECTIONS", 2)
    uids += [4, 5, 6, 0]

    async def scene(stand_in, connect):
        busy = [await connect(), await connect()]
        for client in busy:
            client.send(call("Slow"), call("Watch", parameters={}, more=True))
        stand_in.may_go_on.set()
        await until(lambda: stand_in.watching == 2)
        refused, root = await connect(), await connect()
        assert (await refused.hear())["error"].endswith(".Exhausted")
        root.send(call("Echo"))
        assert "parameters" in await root.hear()
        for client in busy:
            assert "parameters" in await client.hear()
        assert stand_in.watching == 2

    play(scene)


def test_one_user_watches_a_bounded_number_of_times(play, uids, caplog):
    uids += [5] * (shares.WATCHES_PER_USER + 2) + [6]

    async def scene(stand_in, connect):
        watchers = [await connect() for _ in range(shares.WATCHES_PER_USER)]
        for client in watchers:
            client.send(call("Watch", parameters={}, more=True))
        await until(lambda: stand_in.watching == shares.WATCHES_PER_USER)
        for _ in range(2):
            client = await connect()
            client.send(call("Watch", parameters={}, more=True), call("Echo"))
            assert (await client.hear())["error"].endswith(".Exhausted")
            assert "parameters" in await client.hear()
        other = await connect()
        other.send(call("Watch", parameters={}, more=True))
        await until(lambda: stand_in.watching == shares.WATCHES_PER_USER + 1)

    play(scene)
    assert len(caplog.records) == 1


def test_an_idle_user_is_told_and_closed_and_root_may_be_silent(play, uids, caplog, monkeypatch):
    monkeypatch.setattr(module, "IDLE", 0.2)
    uids += [0, 5]

    async def scene(stand_in, connect):
        root, user = await connect(), await connect()
        user.send(call("Echo"))
        assert "parameters" in await user.hear()
        assert b"no call for" in await user.hear_end()
        root.send(call("Echo"))
        assert "parameters" in await root.hear()

    play(scene)
    assert caplog.records == []


def test_half_messages_of_one_user_are_kept_up_to_a_bound(play, uids, caplog, monkeypatch):
    monkeypatch.setattr(shares, "HELD_PER_USER", 500_000)
    uids += [5] * 5 + [6]

    async def scene(stand_in, connect):
        hoarders = [await connect() for _ in range(5)]
        for client in hoarders:
            client.send(b"x" * 200_000)
        ends = [asyncio.create_task(client.hear_end()) for client in hoarders]
        done, kept = await asyncio.wait(ends, timeout=DEADLINE, return_when=asyncio.FIRST_COMPLETED)
        assert all(b"half messages and unread answers of uid 5" in task.result() for task in done)
        other = await connect()
        other.send(call("Echo"))
        assert "parameters" in await other.hear()
        assert kept
        for task in kept:
            task.cancel()

    play(scene)
    assert len(caplog.records) == 1
