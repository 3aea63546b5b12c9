"""The captured cgroup trees, as copies a test may scribble on."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from acctd.kernel.cgroupfs import CgroupDir
from acctd.kernel.mountinfo import cgroup_mounts

TREES = Path(__file__).parents[2] / "fixtures" / "cgroupfs"


class Tree:
    """One captured host: `job("memory")` is the job's cgroup in that hierarchy, `job("")` in the unified one."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def job(self, controller: str) -> CgroupDir:
        mounts = cgroup_mounts(self.root)
        v1 = [mount for mount in mounts if controller in mount.controllers]
        (mount,) = v1 or [mount for mount in mounts if mount.version == 2]
        return CgroupDir(mount.mount, ("acctd", "job_42"))

    def path(self, controller: str, file: str) -> Path:
        return self.job(controller).path / file


@pytest.fixture
def tree(tmp_path: Path) -> Callable[[str], Tree]:
    """`tree("rhel7")`: a fresh copy of that captured host."""

    def copy(name: str) -> Tree:
        return Tree(Path(shutil.copytree(TREES / name, tmp_path / name)))

    return copy


class Vanishing:
    """Stands in for a kept descriptor: reads like it until `gone` is set, then as after ENODEV."""

    def __init__(self, file) -> None:
        self._file = file
        self.path = file.path
        self.gone = False

    def read(self) -> bytes | None:
        return None if self.gone else self._file.read()

    def close(self) -> None:
        self._file.close()


@pytest.fixture
def make_vanish():
    """`make_vanish(reader)` arranges for the reader's cgroup to go away; call what it returns for that to happen."""

    def arrange(reader) -> Callable[[], None]:
        files = [Vanishing(source.file) for source in reader._sources]
        for source, file in zip(reader._sources, files, strict=True):
            source.file = file

        def vanish() -> None:
            for file in files:
                file.gone = True

        return vanish

    return arrange


@pytest.fixture
def opened():
    """`opened(reader)` gives the reader back and closes it at the end of the test."""
    readers = []

    def keep(reader):
        readers.append(reader)
        return reader

    yield keep
    for reader in readers:
        reader.close()
