"""The loop all cgroup collectors share: pread every kept file, parse only what changed, reuse the rest.

An idle job's tick is then a pread and a comparison a file, and a busy one's touches only what changed. Knows no metric
and no file name.
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
        # Outlives a call that raises: what was parsed before the bad file must not be lost.
        self._changed: list[Readings] = []

    def changes(self) -> list[Readings]:
        """What changed since the last call, as one dict a file; the first call gives all there is.

        Raises MalformedFile for a known line that holds no number, KernelRefusedError for a read that fails.
        """
        for source in self._sources:
            text = source.file.read()
            if text != source.text:
                source.readings = source.parse(text, source.file.path) if text is not None else {}
                source.text = text
                self._changed.append(source.readings)
        changed, self._changed = self._changed, []
        return changed

    def read(self) -> Readings:
        """All that the kernel counts for this job now. Raises as changes() does."""
        self.changes()
        return self._merge()

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


class CombiningReader(Reader):
    """A reader of files that mean something together only: any change makes all of it new, by its own _merge()."""

    def changes(self) -> list[Readings]:
        """What changed since the last call: everything in one dict, or nothing."""
        return [self._merge()] if super().changes() else []

    def read(self) -> Readings:
        """All that the kernel counts for this job now. Raises as changes() does."""
        super().changes()
        return self._merge()


def present(directory: CgroupDir, parsers: Sequence[tuple[str, Parser]]) -> list[Source]:
    """A source for each of these files that the kernel has in `directory`."""
    sources = (Source(directory.counter(name), parse) for name, parse in parsers)
    return [source for source in sources if source.file.present]
