"""A small file system in memory that can be filled to its last byte, for whoever is to run out of disk. Needs root."""

import contextlib
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self


class SmallDisk:
    """Use as a context manager; a tmpfs is mounted at `path`, which is made, and gone at the end."""

    def __init__(self, path: Path, size: str) -> None:
        """`size` as mount(8) has it, like 256m."""
        self.path, self._size = path, size

    def __enter__(self) -> Self:
        self.path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={self._size}", "none", self.path], check=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        # Detached at once, whoever may still have a file open.
        subprocess.run(["umount", "--lazy", self.path], check=True)

    def fill(self) -> None:
        """To the last byte."""
        fd = os.open(self.path / "filler", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
        try:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        os.write(fd, bytes(size))
        finally:
            os.close(fd)

    def free(self) -> None:
        """As before."""
        (self.path / "filler").unlink()
