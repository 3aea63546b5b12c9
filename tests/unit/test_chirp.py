"""Chirp: requests as HTCondor's starter reads them, what it may answer, and when it is told what."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import classad2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from acctd import chirps, hook, hookcall, views
from acctd.chirps import Chirps
from acctd.errands import Errands
from acctd.errors import UsageError
from acctd.model import INT64_MAX
from acctd.rows import Account, OpenJob, Place, Proxy, Terms, decode_row, encode_row
from exporters import chirp
from lab.starter import Starter, words
from tests.unit.test_classad import RECORD

DEADLINE = 20.0


@pytest.fixture
def starter() -> Iterator[Starter]:
    with Starter() as made:
        yield made


def proxy(starter: Starter, **other: Any) -> Proxy:
    return replace(Proxy(starter.host, starter.port, starter.cookie), **other)


# Requests

VALUES = (
    st.integers(-INT64_MAX, INT64_MAX)
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=100)
)


@given(VALUES)
@example(INT64_MAX)
@example(-INT64_MAX)
@example(1e16)
@example(-0.0)
@example(5e-324)
@example("")
@example("\\")
@example('a "b"\\\n\tc\r\x7f\x1c\x85\u2028')
@example("\x011")
@example("Jürgen 🧪")
def test_every_value_reads_back(value: Any) -> None:
    line = chirp.update("ChirpX", value)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    command, name, text = words(line.decode()[:-1])
    assert (command, name) == ("set_job_attr_delayed", "ChirpX")
    read = classad2.ExprTree(text).eval()
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize("value", [INT64_MAX + 1, -INT64_MAX - 1, float("nan"), float("inf"), "a\0b"])
def test_what_a_classad_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises(UsageError, match="cannot be sent by Chirp"):
        chirp.update("ChirpX", value)


def test_half_a_surrogate_pair_is_replaced() -> None:
    assert chirp.update("ChirpX", "a\udcff") == 'set_job_attr_delayed ChirpX "a\ufffd"\n'.encode()


@pytest.mark.parametrize("name", ["Network", "Chirp", "chirpX", "Chirp X", "ChirpX\n", "ChirpÄ", "Chirp" + "x" * 201])
def test_a_name_that_no_starter_takes_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is no attribute for Chirp"):
        chirp.update(name, 1)


def test_a_value_has_at_most_993_bytes() -> None:
    assert chirp.update("ChirpX", "x" * 991)
    with pytest.raises(UsageError, match="ChirpX has 994 bytes; a value takes 993 at most"):
        chirp.update("ChirpX", "x" * 992)
    # All of it escaped: the longest line there can be is one that a starter takes.
    assert len(chirp.update("Chirp" + "x" * 200, " " * 991)) < 5120


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"host": "203.0.113.7"}, "host '203.0.113.7' is no address of this host"),
        ({"host": "localhost"}, "host 'localhost' is no address"),
        ({"host": "0.0.0.0"}, "is no address of this host"),  # noqa: S104  # refused
        ({"host": "::"}, "is no address of this host"),
        ({"host": "255.255.255.255"}, "is no address of this host"),
        ({"host": "224.0.0.1"}, "is no address of this host"),
        ({"host": ""}, "is no address of this host"),
        ({"host": "127.0.0.1\n"}, "is no address of this host"),
        ({"port": 1023}, "port 1023 is out of range; it takes 1024 to 65535"),
        ({"port": 65536}, "port 65536 is out of range"),
        ({"cookie": ""}, "cookie of 0 characters is none"),
        ({"cookie": "geheim\nset_job_attr X 1"}, "cookie of 23 characters is none"),
        ({"cookie": "x" * 65}, "cookie of 65 characters is none"),
    ],
)
def test_a_proxy_that_must_not_be_connected_to(change: dict[str, Any], said: str) -> None:
    good = Proxy("127.0.0.1", 9618, "geheim")
    assert chirp.checked(good) is good
    assert chirp.checked(replace(good, host="::1"))
    with pytest.raises(UsageError, match=said) as caught:
        chirp.checked(replace(good, **change))
    assert "geheim" not in str(caught.value)


def test_the_cookie_is_shown_to_nobody() -> None:
    """Nor does it leave the ledger, which is root's: what a cgroup carries, others can read."""
    terms = Terms(watcher="1", chirp=Proxy("127.0.0.1", 9618, "geheim"))
    assert "geheim" not in repr(terms)
    spec = SimpleNamespace(
        limits={}, owner={"uid": 1, "gid": 1, "name": "a"}, id="j", network="nat", classes=[], tags={}
    )
    row = OpenJob(1, "made", None, Place("b"), vars(spec), 0.0, "", 0, 0, "k", Account(), None, terms)  # type: ignore[arg-type]
    assert b"geheim" not in encode_row(row)
    assert decode_row(encode_row(row)).terms == Terms(watcher="1")


# What is sent of a record


def test_what_a_job_gets_of_its_record() -> None:
    sent = chirp.attributes(RECORD)
    assert sent == {
        "ChirpAcctdJobId": "12.0",
        "ChirpAcctdCpuThrottled": 77,
        "ChirpBlockReadKbytes": 2,
        "ChirpBlockWriteKbytes": 0,
        "ChirpBlockReads": 5,
        "ChirpBlockWrites": 9,
        "ChirpNetworkIncomingExternal": 500_000,
        "ChirpNetworkIncomingInternal": 1_500_000,
        "ChirpNetworkOutgoingInternal": 7,
        "ChirpNetworkInputMb": 2.0,
        "ChirpNetworkOutputMb": 0.000007,
    }


def test_of_many_rules_the_same_ones_are_sent_each_time() -> None:
    """A starter takes 100 names in its life; half of them are left to the job."""
    many = {f"OutgoingC{n:02}": n for n in range(64)}
    few = replace(RECORD, totals={"network": many})
    more = replace(RECORD, totals=RECORD.totals | {"network": many, "nfs_read": {"/x": 1}, "nfs_write": {"/x": 2}})
    rules = [{name for name in chirp.attributes(record) if "OutgoingC" in name} for record in (few, more)]
    assert rules[0] == rules[1]
    assert len(chirp.attributes(more)) <= chirp.OURS
    assert len(rules[0]) >= 30


# A conversation


def test_a_starter_takes_what_is_sent(starter: Starter) -> None:
    ad: dict[str, Any] = {"ChirpN": 5, "ChirpF": 0.25, "ChirpT": 'a "b"\\ \n', "ChirpB": True}
    assert asyncio.run(chirp.send(proxy(starter), ad, DEADLINE)) == []
    assert starter.evaluated() == ad
    assert starter.requests[0] == f"cookie {starter.cookie}"
    assert starter.answers == [0] * 5
    assert starter.connections == 1


def test_what_it_does_not_let_through_is_named() -> None:
    with Starter(names=2) as starter:
        assert asyncio.run(chirp.send(proxy(starter), {"ChirpA": 1, "ChirpB": 2, "ChirpC": 3}, DEADLINE)) == ["ChirpC"]
        assert starter.evaluated() == {"ChirpA": 1, "ChirpB": 2}


def test_more_names_than_a_starter_takes_are_not_begun(starter: Starter) -> None:
    with pytest.raises(UsageError, match="101 attributes are too many"):
        asyncio.run(chirp.send(proxy(starter), {f"ChirpA{n}": n for n in range(101)}, DEADLINE))
    assert starter.connections == 0


def failing(starter: Starter, patience: float = DEADLINE, **other: Any) -> chirp.ChirpError:
    with pytest.raises(chirp.ChirpError) as caught:
        asyncio.run(chirp.send(proxy(starter, **other), {"ChirpA": 1}, patience))
    assert starter.cookie not in str(caught.value)
    return caught.value


def test_a_wrong_cookie_is_final(starter: Starter) -> None:
    error = failing(starter, cookie="wrong")
    assert (error.final, starter.requests) == (True, ["cookie wrong"])
    assert "does not know the cookie" in str(error)


def test_a_starter_without_delayed_updates_is_final() -> None:
    with Starter(delayed=False) as starter:
        error = failing(starter)
    assert error.final
    assert "takes no delayed updates; see ENABLE_CHIRP_DELAYED" in str(error)


def test_a_starter_that_is_gone_is_final(starter: Starter) -> None:
    starter.close()
    error = failing(starter)
    assert error.final
    assert "cannot be reached" in str(error)


def test_a_starter_that_hangs_is_left(starter: Starter) -> None:
    starter.mood = "silent"
    error = failing(starter, patience=0.1)
    assert not error.final
    assert "does not answer within 0.1 s" in str(error)


def test_a_starter_that_hangs_up_may_be_tried_again(starter: Starter) -> None:
    starter.mood = "hanging up"
    assert not failing(starter).final


def test_what_does_not_speak_chirp_is_told_one_line_only(starter: Starter) -> None:
    starter.mood = "babbling"
    error = failing(starter)
    assert error.final
    assert "does not speak Chirp" in str(error)


def test_an_answer_without_end_is_cut() -> None:
    async def scene() -> None:
        async def babble(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"7" * 100_000)
            await writer.drain()

        server = await asyncio.start_server(babble, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(chirp.ChirpError, match="is none"):
            await chirp.send(Proxy("127.0.0.1", port, "c"), {"ChirpA": 1}, DEADLINE)
        server.close()

    asyncio.run(scene())


# When


class Scene:
    """Chirps with everything about it but the agent itself."""

    def __init__(self) -> None:
        self.troubles: list[str] = []
        self.jobs: dict[str, Any] = {}
        self.terms: list[Terms] = []
        self.errands = Errands(lambda _, error: self.troubles.append(str(error)))
        news = SimpleNamespace(trouble=lambda _, error: self.troubles.append(str(error)))
        agent = SimpleNamespace(read_one=lambda _: None)
        self.chirps = Chirps(agent, self.jobs, news, self.errands, self._set_terms)  # type: ignore[arg-type]

    def job(self, terms: Terms | None = None) -> Any:
        spec = SimpleNamespace(id="12.0")
        made = SimpleNamespace(spec=spec, row=SimpleNamespace(seq=0, terms=terms or Terms()))
        self.jobs["12.0"] = made
        return made

    def _set_terms(self, job: Any, terms: Terms) -> None:
        job.row.terms = terms
        self.terms.append(terms)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Scene], Awaitable[None]]], None]:
    counted = iter(range(1, 10_000))

    def interim(jobs: Any, job: Any) -> Any:
        return replace(RECORD, totals={"network": {"OutgoingExternal": next(counted)}})

    monkeypatch.setattr(views, "interim", interim)

    def run(scene: Callable[[Scene], Awaitable[None]]) -> None:
        async def begin() -> None:
            made = Scene()
            await asyncio.wait_for(scene(made), DEADLINE)
            made.errands.close()

        asyncio.run(begin())

    return run


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.005)


NAME = "ChirpNetworkOutgoingExternal"


def test_a_job_is_told_of_again_and_again(play: Any, monkeypatch: pytest.MonkeyPatch, starter: Starter) -> None:
    monkeypatch.setattr(chirps, "INTERVAL", 0.01)

    async def scene(made: Scene) -> None:
        made.chirps.take(made.job(), proxy(starter))
        await until(lambda: starter.updates.get(NAME) == "3")

    play(scene)


def test_the_next_agent_goes_on(play: Any, monkeypatch: pytest.MonkeyPatch, starter: Starter) -> None:
    monkeypatch.setattr(chirps, "INTERVAL", 0.01)

    async def scene(made: Scene) -> None:
        made.chirps.open(made.job())  # without a starter: nothing
        made.chirps.open(made.job(Terms(chirp=proxy(starter))))
        await until(lambda: NAME in starter.updates)
        assert made.troubles == []

    play(scene)


def test_another_starter_takes_the_place_of_the_first(
    play: Any, monkeypatch: pytest.MonkeyPatch, starter: Starter
) -> None:
    monkeypatch.setattr(chirps, "INTERVAL", 0.01)

    async def scene(made: Scene) -> None:
        job = made.job()
        with Starter() as other:
            for _ in range(50):
                made.chirps.take(job, proxy(starter))
            await until(lambda: NAME in starter.updates)
            for _ in range(50):
                made.chirps.take(job, proxy(other))
            await until(lambda: other.connections > 0)
            before = starter.connections
            assert len(asyncio.all_tasks()) <= 2 + 2  # ours, one of the job's, and what that waits for
            told = other.connections
            await until(lambda: other.connections > told + 3)
            assert starter.connections == before

    play(scene)


def test_a_dead_starter_is_told_of_once_and_given_up(
    play: Any, monkeypatch: pytest.MonkeyPatch, starter: Starter
) -> None:
    monkeypatch.setattr(chirps, "INTERVAL", 0.01)
    starter.close()

    async def scene(made: Scene) -> None:
        job = made.job()
        made.chirps.take(job, proxy(starter))
        await until(lambda: job.row.terms.chirp is None)
        await until(lambda: len(asyncio.all_tasks()) == 2)  # nothing goes on
        assert len(made.troubles) == 1
        made.chirps.finish(job, RECORD)
        await made.chirps.settled(job)
        assert len(made.troubles) == 1

    play(scene)


def test_the_last_word_is_the_records(play: Any, starter: Starter) -> None:
    async def scene(made: Scene) -> None:
        job = made.job()
        made.chirps.take(job, proxy(starter))
        await until(lambda: NAME in starter.updates)
        made.errands.drop(job)
        del made.jobs["12.0"]
        made.chirps.finish(job, replace(RECORD, totals={"network": {"OutgoingExternal": 10**15}}))
        await made.chirps.settled(job)
        assert starter.updates[NAME] == str(10**15)
        await made.chirps.settled(job)  # long since

    play(scene)


def test_whoever_finishes_a_job_waits_for_no_starter_that_hangs(
    play: Any, monkeypatch: pytest.MonkeyPatch, starter: Starter
) -> None:
    monkeypatch.setattr(chirps, "_LAST_PATIENCE", 0.05)
    starter.mood = "silent"

    async def scene(made: Scene) -> None:
        job = made.job(Terms(chirp=proxy(starter)))
        made.chirps.finish(job, RECORD)
        await made.chirps.settled(job)
        assert "does not answer within 0.05 s" in made.troubles[0]
        made.chirps.finish(job, RECORD)
        made.errands.close()  # the agent stops before it has begun: nobody sets what is waited for
        monkeypatch.setattr(chirps, "_LAST_PATIENCE", -0.95)
        await made.chirps.settled(job)

    play(scene)


def test_names_that_are_not_let_through_are_told(play: Any) -> None:
    async def scene(made: Scene) -> None:
        with Starter(names=1) as starter:
            made.chirps.take(made.job(), proxy(starter))
            await until(lambda: made.troubles != [])
        assert made.troubles[0].startswith("its starter does not let through what is sent by Chirp: ChirpNetwork")

    play(scene)


# The hook's side


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    made: list[tuple[str, dict[str, Any]]] = []

    def call(path: str, method: str, **parameters: Any) -> dict[str, Any]:
        made.append((method, parameters))
        return {"uid": os.geteuid()}

    monkeypatch.setattr(hookcall, "call", call)
    return made


def test_the_hook_reads_what_the_starter_wrote(
    calls: list[tuple[str, dict[str, Any]]], tmp_path: Path, starter: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = starter.config(tmp_path / ".chirp.config")
    wanted = ("Chirp", {"job": "7", "host": starter.host, "port": starter.port, "cookie": starter.cookie})
    assert hook.run(["chirp", "--job", "7", str(path)]) == 0
    assert calls[-1] == wanted
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() or 4711)  # what is root's may be read, too
    monkeypatch.setenv("_CONDOR_CHIRP_CONFIG", str(path))
    assert hook.run(["chirp", "--job", "7"]) == 0
    monkeypatch.delenv("_CONDOR_CHIRP_CONFIG")
    monkeypatch.chdir(tmp_path)
    assert hook.run(["chirp", "--job", "7"]) == 0
    assert calls[-2:] == [wanted, wanted]


SECRET = "root:$6$geheim:19000"  # noqa: S105  # nobody's


@pytest.mark.parametrize(
    ("make", "code", "said"),
    [
        (lambda path: path.write_text(SECRET), 64, "does not hold ADDRESS PORT COOKIE"),
        (lambda path: path.write_text(f"127.0.0.1 many {SECRET}"), 64, "does not hold"),
        (lambda path: path.write_text(f"127.0.0.1 9618 {SECRET} and more"), 64, "does not hold"),
        (lambda path: path.write_text(f"127.0.0.1 9618 {'x' * 1100}"), 64, "does not hold"),
        (lambda path: path.write_bytes(b"\xff\0\xff 1 2 3"), 64, "does not hold"),
        (lambda path: os.mkfifo(path), 66, "is no plain file"),
        (lambda path: path.mkdir(), 66, "is no plain file"),
        (lambda path: path.symlink_to("/etc/hostname"), 66, "cannot be read"),
        (lambda _: None, 66, "cannot be read: No such file"),
    ],
)
def test_what_no_starter_wrote_is_not_read_out(
    calls: list[tuple[str, dict[str, Any]]], tmp_path: Path, make: Callable[[Path], Any], code: int, said: str
) -> None:
    path = tmp_path / "config"
    make(path)
    with pytest.raises(hookcall.HookError, match=said) as caught:
        hook.run(["chirp", "--job", "7", str(path)])
    assert caught.value.code == code
    assert "geheim" not in str(caught.value)
    assert "Chirp" not in [method for method, _ in calls]


def test_another_users_file_is_not_taken(
    calls: list[tuple[str, dict[str, Any]]], tmp_path: Path, starter: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = starter.config(tmp_path / "config")
    if os.getuid() == 0:
        os.chown(path, 4712, 4712)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(hookcall.HookError, match=r"belongs to uid .*; it must be uid 4711's") as caught:
        hook.run(["chirp", "--job", "7", str(path)])
    assert caught.value.code == 77


def test_root_takes_no_file_from_its_environment(
    calls: list[tuple[str, dict[str, Any]]], tmp_path: Path, starter: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_CONDOR_CHIRP_CONFIG", str(starter.config(tmp_path / "config")))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(hookcall.UsageError, match="as root, chirp needs FILE"):
        hook.run(["chirp", "--job", "7"])
    with pytest.raises(hookcall.UsageError, match="say one FILE; it has 2"):
        hook.run(["chirp", "--job", "7", "a", "b"])
    assert calls == []


def test_the_stand_in_reads_words_as_a_starter_does() -> None:
    assert words(
        r"a  b\ c \\d	e\
f "
    ) == ["a", "b c", "\\d", "e\nf"]
    with Starter() as starter, socket.create_connection((starter.host, starter.port)) as client:
        client.settimeout(DEADLINE)
        file = client.makefile("rwb", buffering=0)
        for request, answer in (
            (b"set_job_attr_delayed ChirpA 1", b"-1"), (b"cookie wrong", b"-1"),
            (f"cookie {starter.cookie}".encode(), b"0"),
            (b"set_job_attr_delayed ChirpA 1 + 1", b"0"), (b"set_job_attr_delayed Other 1", b"1"),
            (b"set_job_attr_delayed ChirpA )", b"0"), (b"open /etc/passwd r 0", b"-8"),
            (b"get_job_attr_delayed ChirpB", b"-3"), (b"set_job_attr_delayed ChirpA " + b"1" * 994, b"-127"),
        ):  # fmt: skip
            file.write(request + b"\n")
            assert file.readline().strip() == answer, request
        assert starter.updates == {"ChirpA": "1"}
        file.write(b"x" * 6000)
        assert file.readline() == b"-5\n"


def test_a_starter_that_hangs_is_tried_less_and_less_often(
    play: Any, monkeypatch: pytest.MonkeyPatch, starter: Starter
) -> None:
    monkeypatch.setattr(chirps, "INTERVAL", 0.01)
    monkeypatch.setattr(chirps, "_LONGEST", 0.04)
    monkeypatch.setattr(chirps, "_PATIENCE", 0.005)
    starter.mood = "silent"
    waited: list[float] = []
    wait_for = asyncio.wait_for

    async def noted(awaitable: Any, timeout: float) -> Any:
        waited.append(timeout)
        return await wait_for(awaitable, timeout)

    async def scene(made: Scene) -> None:
        monkeypatch.setattr(chirps.asyncio, "wait_for", noted)  # type: ignore[attr-defined]
        made.chirps.take(made.job(), proxy(starter))
        await until(lambda: len(waited) >= 5)
        starter.mood = "willing"
        await until(lambda: waited[-1] == 0.01 and NAME in starter.updates)

    play(scene)
    assert waited[:5] == [0.0, 0.01, 0.02, 0.04, 0.04]
