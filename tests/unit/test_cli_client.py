"""The client and `acctd events`, `acctd kill` against a scripted agent on a real socket: it does what no real one does
when asked to, such as to hang up in mid-answer."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from acctd import errors, varlink
from acctd.cli import acts
from acctd.cli.events import Log, line
from acctd.cli.main import main
from acctd.client import Client, Event, job
from acctd.errors import AcctdError, KernelRefusedError, UnavailableError, UsageError

Script = Callable[[dict[str, Any]], list[bytes | None]]
"""A call's answers, in pieces; None hangs up."""


class Scripted:
    """Listens, and answers every call as its script says."""

    def __init__(self, path: Path, script: Script) -> None:
        self.path, self.script = path, script
        self.calls: list[dict[str, Any]] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            if connection.recv(1, socket.MSG_PEEK) == b"":
                connection.close()
                if self.script is _END:
                    return
                continue
            self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
            self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        data = b""
        with connection:
            while received := connection.recv(1 << 16):
                *frames, data = (data + received).split(b"\0")
                for frame in frames:
                    call = json.loads(frame)
                    self.calls.append(call)
                    for piece in self.script(call):
                        if piece is None:
                            return
                        connection.sendall(piece)

    def close(self) -> None:
        self.script = _END
        socket.socket(socket.AF_UNIX).connect(str(self.path))
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        self._listener.close()


def _END(_: dict[str, Any]) -> list[bytes | None]:  # noqa: N802
    return [None]


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Callable[[Script], Scripted]]:
    made = []

    def start(script: Script) -> Scripted:
        made.append(Scripted(tmp_path / "s", script))
        return made[-1]

    yield start
    for agent in made:
        agent.close()


def ok(**parameters: Any) -> bytes:
    return varlink.reply(parameters)


def test_an_answer_in_pieces_and_two_calls_on_one_connection(scripted: Callable[[Script], Scripted]) -> None:
    agent = scripted(lambda call: [ok(said=call["parameters"])[:9], ok(said=call["parameters"])[9:]])
    with Client(agent.path) as client:
        assert client.call("Usage", job="a") == {"said": {"job": "a"}}
        assert client.call("List") == {"said": {}}
    assert [call["method"] for call in agent.calls] == ["org.acctd.Node.Usage", "org.acctd.Node.List"]


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AcctdError)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_comes_back_as_the_error_it_was(
    scripted: Callable[[Script], Scripted], kind: type[AcctdError]
) -> None:
    agent = scripted(lambda _: [varlink.refusal(kind("job 'x': no; try y"))])
    with Client(agent.path) as client, pytest.raises(AcctdError) as caught:
        client.call("Usage", job="x")
    assert str(caught.value) == "job 'x': no; try y"
    named = json.loads(varlink.refusal(kind("")).rstrip(b"\0"))["error"]
    # What the interface has no error for arrives as a failure.
    assert type(caught.value) is (AcctdError if named.endswith(".Failed") else kind)


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        ([varlink.failure(f"{varlink.SERVICE}.MethodNotFound", method="org.acctd.Node.X")], UnavailableError, "Node.X"),
        ([varlink.failure(f"{varlink.SERVICE}.InvalidParameter", parameter="job")], UsageError, "InvalidParameter job"),
        ([b'{"parameters": {"a"', None], UnavailableError, "hung up"),
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n\0"], UnavailableError, "no agent"),
        ([b"[1]\0"], UnavailableError, "no agent"),
        ([b"\xff\0"], UnavailableError, "no agent"),
        ([], UnavailableError, "does not answer in time"),
    ],
)
def test_what_is_no_answer_becomes_one_sentence(
    scripted: Callable[[Script], Scripted], answer: list[bytes | None], kind: type[AcctdError], said: str
) -> None:
    agent = scripted(lambda _: answer)
    with Client(agent.path, timeout=0.1) as client, pytest.raises(kind, match=said):
        client.call("X")


def test_no_agent_at_all(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"no agent answers at .*none \(No such file.*start acctd serve"):
        Client(tmp_path / "none")
    with pytest.raises(UnavailableError, match="too long"):
        Client(tmp_path / ("x" * 200))


def test_a_name_that_is_no_text_is_refused_before_it_is_sent(scripted: Callable[[Script], Scripted]) -> None:
    agent = scripted(lambda _: [ok()])
    with Client(agent.path) as client, pytest.raises(UsageError, match="no UTF-8"):
        client.call("Usage", job="\udcff")
    assert agent.calls == []


def test_an_answer_of_another_version() -> None:
    with pytest.raises(AcctdError, match="same version"):
        job({"id": 7})


# acctd events


def event(number: int, name: str | None = "j", text: str = "") -> dict[str, Any]:
    return {"number": number, "time": 0.0, "job": name, "uid": 0, "event": "e", "text": text}


def node(past: list[dict[str, Any]], lives: list[list[bytes | None]]) -> Script:
    """An agent with a ledger; each Watch gets the next of `lives`."""
    coming = iter(lives)

    def answer(call: dict[str, Any]) -> list[bytes | None]:
        if call["method"].endswith(".Watch"):
            return next(coming)
        wanted = call["parameters"]
        found = [e for e in past if e["number"] > wanted.get("since", 0) and wanted.get("job") in (None, e["job"])]
        limit = wanted.get("limit", 1000)
        return [ok(events=found[:limit] if "since" in wanted else found[-limit:])]

    return answer


def news(*numbers: int, name: str | None = "j") -> list[bytes | None]:
    return [varlink.reply({"event": event(number, name)}, continues=True) for number in numbers]


def followed(agent: Scripted, count: int, *, since: int | None = None, name: str | None = None) -> list[int]:
    found = Log(agent.path, name).follow(since, None)
    return [next(found).number for _ in range(count)]


def test_following_repeats_nothing_and_misses_nothing(scripted: Callable[[Script], Scripted]) -> None:
    # 1 to 3 are in the ledger at first, and 3 is told again. 4 and 5 are told to nobody; the ledger has them by then.
    past = [event(number) for number in (1, 2, 3)]
    later = [event(number) for number in (4, 5)]
    agent = scripted(node(past, [news(3, 6, 7)]))
    found = Log(agent.path, None).follow(0, None)
    assert [next(found).number for _ in range(3)] == [1, 2, 3]
    past += later
    assert [next(found).number for _ in range(4)] == [4, 5, 6, 7]
    found.close()  # type: ignore[attr-defined]  # a generator
    assert agent.calls[0]["method"].endswith(".Watch") or agent.calls[1]["method"].endswith(".Watch")


def test_following_one_job_leaves_others_out(scripted: Callable[[Script], Scripted]) -> None:
    past = [event(1), event(2, "other"), event(3)]
    agent = scripted(node(past, [[*news(4, name="other"), *news(5), *news(6, name=None), *news(7)]]))
    assert followed(agent, 4, name="j") == [1, 3, 5, 7]


def test_an_agent_that_starts_anew_is_waited_for(
    scripted: Callable[[Script], Scripted], capfd: pytest.CaptureFixture[str]
) -> None:
    past = [event(1)]
    agent = scripted(node(past, [[*news(2), None], news(5)]))
    found = Log(agent.path, None).follow(0, None)
    assert [next(found).number for _ in range(2)] == [1, 2]
    past += [event(2), event(3), event(4)]
    assert [next(found).number for _ in range(3)] == [3, 4, 5]
    found.close()  # type: ignore[attr-defined]
    assert capfd.readouterr().err.count("hung up") == 1


def test_more_than_an_answer_holds_is_asked_for(scripted: Callable[[Script], Scripted]) -> None:
    agent = scripted(node([event(number) for number in range(1, 2501)], []))
    assert [e.number for e in Log(agent.path, None).past(7)] == list(range(8, 2501))
    assert [e.number for e in Log(agent.path, None).past(7, 3)] == [8, 9, 10]
    assert [e.number for e in Log(agent.path, None).past(None, 3)] == [2498, 2499, 2500]


def test_a_line_is_one_line_whatever_the_text() -> None:
    text = line(Event(7, 0.0, None, None, "trouble", "a\nb\x1b[2J"))
    assert text.startswith("     7  19")
    assert text.endswith("  -             trouble     a?b?[2J")


# acctd kill


def test_survivors_are_named_and_the_highest_code_wins(
    scripted: Callable[[Script], Scripted], capfd: pytest.CaptureFixture[str]
) -> None:
    def answer(call: dict[str, Any]) -> list[bytes | None]:
        name = call["parameters"]["job"]
        if name == "gone":
            return [varlink.refusal(errors.NotFoundError("no open job 'gone'"))]
        return [ok(survivors=[7, 8] if name == "stuck" else [])]

    agent = scripted(answer)
    with pytest.raises(SystemExit) as left:
        main(["kill", "--socket", str(agent.path), "stuck", "gone", "fine", "stuck"])
    assert left.value.code == KernelRefusedError.exit_code
    said = capfd.readouterr().err.splitlines()
    assert said[0].startswith("acctd: job 'stuck': processes 7, 8 do not die")
    assert said[1:] == ["acctd: no open job 'gone'"]
    assert [call["parameters"]["job"] for call in agent.calls] == ["stuck", "gone", "fine"]
    assert {acts.kill.name, acts.suspend.name, acts.continue_.name} == {"kill", "suspend", "continue"}
