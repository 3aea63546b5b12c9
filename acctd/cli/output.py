"""Files that a command is asked to write: opened before the job starts, so that a bad path costs no job."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from acctd.errors import AcctdError, NotFoundError, NotPermittedError


class Output:
    """One file to be written at the end; "-" is standard output."""

    def __init__(self, option: str, path: str) -> None:
        self._option, self._path = option, path
        with self._explained():
            self._stream: IO[str] = sys.stdout if path == "-" else open(path, "w", encoding="utf-8")

    def write(self, text: str) -> None:
        """Write all of it and close the file."""
        with self._explained():
            self._stream.write(text)
            self._stream.flush()
            if self._stream is not sys.stdout:
                os.fsync(self._stream.fileno()) if os.path.isfile(self._path) else None
                self._stream.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as e:
            raise NotFoundError(f"{self._option} {self._path}: {e.strerror}; make its directory first") from e
        except PermissionError as e:
            raise NotPermittedError(f"{self._option} {self._path}: {e.strerror}; choose another file") from e
        except OSError as e:
            raise AcctdError(f"{self._option} {self._path}: {e.strerror}; choose another file") from e
