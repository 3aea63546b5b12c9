"""The Chirp proxy of HTCondor's starter, as far as delayed updates go: what requests do, and what they are answered.

Written to src/condor_chirp/PROTOCOL and to what src/condor_starter.V6.1/io_proxy_handler.cpp answers in HTCondor 25:
also where that is odd, as in a 0 for what it cannot parse. Needs classad2, HTCondor's own parser.
"""

import secrets
import socket
import string
import threading
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Literal

import classad2

LINE = 5120
NOT_AUTHENTICATED, NO_SUCH, TOO_BIG, INVALID, UNKNOWN = -1, -3, -5, -8, -127

Mood = Literal["willing", "silent", "babbling", "hanging up"]


def words(line: str) -> list[str]:
    """A request's words. A backslash takes the next character as it is, whatever that is."""
    found: list[str] = []
    word: str | None = None
    rest = iter(line)
    for character in rest:
        if character in " \t\n\v\f\r":
            if word is not None:
                found.append(word)
            word = None
        else:
            word = (word or "") + (next(rest, "") if character == "\\" else character)
    return [*found, word] if word is not None else found


class Starter:
    """One starter with one job; a context manager. `updates` is what the job's ad would get, expressions by name."""

    def __init__(self, *, names: int = 100, delayed: bool = True, mood: Mood = "willing") -> None:
        self.updates: dict[str, str] = {}
        self.requests: list[str] = []
        self.answers: list[int] = []
        self.connections = 0
        self.cookie = "".join(secrets.choice(string.ascii_lowercase) for _ in range(31))
        self.mood: Mood = mood
        self._names, self._delayed = names, delayed
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host, self.port = self._listener.getsockname()
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._listen, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> "Starter":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def config(self, path: Path) -> Path:
        """Write what a job's .chirp.config holds."""
        path.write_text(f"{self.host} {self.port} {self.cookie}\n")
        path.chmod(0o700)
        return path

    def evaluated(self) -> dict[str, object]:
        """The updates as a reader of the job's ad has them."""
        return {name: classad2.ExprTree(text).eval() for name, text in self.updates.items()}

    def close(self) -> None:
        """The starter has gone: nobody listens any more."""
        self._end(self._listener)
        for connection in self._open:
            self._end(connection)
        for thread in self._threads:
            thread.join()

    @staticmethod
    def _end(one: socket.socket) -> None:
        try:
            one.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other end has gone first
        one.close()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        known = False
        try:
            with connection, connection.makefile("rb") as file:
                while line := file.readline(LINE + 1):
                    if self.mood == "hanging up":
                        return
                    if self.mood == "babbling":
                        connection.sendall(b"220 mail.example.org ESMTP\r\n")
                        continue
                    if self.mood == "silent":
                        continue
                    if len(line) > LINE or not line.endswith(b"\n"):
                        connection.sendall(b"%d\n" % TOO_BIG)
                        return
                    text = line[:-1].decode()
                    self.requests.append(text)
                    if not known:
                        known = words(text) == ["cookie", self.cookie]
                        self._say(connection, 0 if known else NOT_AUTHENTICATED)
                    else:
                        self._request(connection, words(text))
        except OSError:
            return  # closed by close(), or by the client

    def _request(self, connection: socket.socket, said: list[str]) -> None:
        if self._delayed and said[:1] == ["set_job_attr_delayed"] and len(said) >= 3:
            self._say(connection, self._record(said[1], said[2]))
        elif self._delayed and said[:1] == ["get_job_attr_delayed"] and len(said) >= 2:
            text = {name.lower(): value for name, value in self.updates.items()}.get(said[1].lower())
            if text is None:
                self._say(connection, NO_SUCH)
            else:
                connection.sendall(b"%d\n%s" % (len(text.encode()), text.encode()))
        else:
            self._say(connection, INVALID)

    def _record(self, name: str, text: str) -> int:
        if len(text.encode()) > 993:
            return UNKNOWN
        try:
            tree = classad2.ExprTree(text)
        except classad2.ClassAdException:
            return 0
        if not fnmatchcase(name.lower(), "chirp*"):
            return 1
        if name not in self.updates and len(self.updates) >= self._names:
            return 1
        self.updates[name] = str(tree)
        return 0

    def _say(self, connection: socket.socket, answer: int) -> None:
        self.answers.append(answer)
        connection.sendall(b"%d\n" % answer)
