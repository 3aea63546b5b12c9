"""What the parsers share: the error for a file that cannot be read, numbers, and "name value" files.

Pure functions of bytes; nothing here opens a file or knows what any file is called.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache

from acctd.errors import AcctdError
from acctd.metrics import Metric, Readings

Parser = Callable[[bytes, str], Readings]
"""bytes of a file, its path for the error -> readings. Raises MalformedFile."""

_DIGITS = 20  # 2^64-1 has twenty: no kernel counter is longer, and int() of a huge text is no cheap refusal


class MalformedFile(AcctdError):  # noqa: N818 - it names what is wrong with the file, as FileNotFound does
    """A kernel file that acctd knows holds something it cannot read."""

    def __init__(self, path: str, line: bytes) -> None:
        shown = line if len(line) <= 80 else line[:77] + b"..."
        super().__init__(f"{path}: cannot read {shown!r}; this kernel writes the file in a way acctd does not know")


def number(value: bytes, path: str, line: bytes) -> int:
    """A counter's decimal value. "max", a sign, blanks or nothing raise MalformedFile naming path and line."""
    if value.isdigit() and len(value) <= _DIGITS:
        return int(value)
    raise MalformedFile(path, line)


def parse_number(text: bytes, path: str) -> int:
    """A file that holds one number, such as memory.failcnt: b"54\\n" is 54."""
    value = text.removesuffix(b"\n")
    if value.isdigit() and len(value) <= _DIGITS:  # as number() does: a busy job's tick comes here five times
        return int(value)
    raise MalformedFile(path, text)


def parse_stat(text: bytes, path: str, names: Sequence[bytes]) -> dict[bytes, int]:
    """The wanted lines of a "name value" file such as memory.stat or cpu.stat; a line that is not there is absent."""
    values: dict[bytes, int] = {}
    for line in text.split(b"\n"):
        name, _, value = line.partition(b" ")
        if name in names:
            values[name] = number(value, path, line)
    return values


class StatLines:
    """`parse_stat` for a file that is read again and again: it remembers where the wanted lines stand.

    memory.stat has forty lines and four are wanted; taking those by position costs a fraction of parsing all. The name
    at each position is checked; the file is searched anew once one does not fit or the number of lines differs. One is
    enough for the same file of all jobs: a kernel writes it in one way, and what jobs share stays in the CPU's cache.
    """

    __slots__ = ("_count", "_names", "_places")

    def __init__(self, names: Sequence[bytes]) -> None:
        self._names = tuple(names)
        self._count = -1  # lines of the file the places are true for
        self._places: list[tuple[int, bytes, int, bytes]] = []  # line number, b"name ", its length, b"name"

    def take(self, text: bytes, path: str) -> dict[bytes, int]:
        """The same as `parse_stat(text, path, names)`, of a file whose lines change nothing but values."""
        lines = text.split(b"\n")
        if len(lines) != self._count:
            return self._learn(text, lines, path)
        values: dict[bytes, int] = {}
        for place, prefix, length, name in self._places:
            line = lines[place]
            if not line.startswith(prefix):
                return self._learn(text, lines, path)
            value = line[length:]
            if not value.isdigit() or len(value) > _DIGITS:
                raise MalformedFile(path, line)
            values[name] = int(value)
        return values

    def _learn(self, text: bytes, lines: list[bytes], path: str) -> dict[bytes, int]:
        values = parse_stat(text, path, self._names)
        found = {line.partition(b" ")[0]: place for place, line in enumerate(lines)}
        self._places = [(found[name], name + b" ", len(name) + 1, name) for name in self._names if name in values]
        self._count = len(lines)
        return values


def named(metrics: Mapping[bytes, Metric]) -> Parser:
    """A parser for a "name value" file where each wanted line is a metric as it stands."""
    lines = StatLines(tuple(metrics))
    keys = {name: (metric, "") for name, metric in metrics.items()}
    return lambda text, path: {keys[name]: value for name, value in lines.take(text, path).items()}


# memory.failcnt, and many more:
#   54
@cache
def single(metric: Metric) -> Parser:
    """A parser for a file whose one number is this metric."""
    key = (metric, "")
    none = {key: 0}  # one for all jobs: most of these files hold a zero for most of a job's life

    def parse(text: bytes, path: str) -> Readings:
        return none if text == b"0\n" else {key: parse_number(text, path)}

    return parse
