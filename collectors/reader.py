"""The loop all cgroup collectors share: pread every kept file, parse only what changed, reuse the rest.

An idle job's tick is then a pread and a comparison a file. Knows no metric and no file name.
"""

from collections.abc import Sequence

from acctd.kernel.cgroupfs import CgroupDir, CounterFile
from acctd.metrics import Readings
from collectors.parse import Parser


class Source:
    """One kept counter file, how to parse it, and what it last held."""

    __slots__ = ("file", "parse", "readings", "text")

    def __init__(self, file: CounterFile, parse: Parser) -> None:
        self.file = file
        self.parse = parse
        self.text: bytes | None = None
        self.readings: Readings = {}


class Reader:
    """The base of every collector that reads files of a cgroup. The caller closes it."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = tuple(sources)
        self._readings: Readings = {}
        self._dirty = False  # outlives a read that raises: what was parsed before the bad file must not be lost

    def read(self) -> Readings:
        """What the kernel counts for this job now; the same object as last time if nothing changed.

        Raises MalformedFile for a known line that holds no number, KernelRefusedError for a read that fails.
        """
        for source in self._sources:
            text = source.file.read()
            if text != source.text:
                source.readings = source.parse(text, source.file.path) if text is not None else {}
                source.text = text
                self._dirty = True
        if self._dirty:
            self._readings = self._merge()
            self._dirty = False
        return self._readings

    def close(self) -> None:
        """Give the descriptors back; a later read() finds nothing."""
        for source in self._sources:
            source.file.close()

    def _merge(self) -> Readings:
        """All sources' readings as one new dict."""
        merged: Readings = {}
        for source in self._sources:
            merged.update(source.readings)
        return merged


def present(directory: CgroupDir, parsers: Sequence[tuple[str, Parser]]) -> list[Source]:
    """A source for each of these files that the kernel has in `directory`."""
    sources = (Source(directory.counter(name), parse) for name, parse in parsers)
    return [source for source in sources if source.file.present]
