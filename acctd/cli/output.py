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
            # Not truncated yet: a job that is refused leaves what was there.
            self._stream: IO[str] = sys.stdout if path == "-" else open(path, "a", encoding="utf-8")

    def write(self, text: str) -> None:
        """Write all of it and close the file."""
        with self._explained():
            regular = self._stream is not sys.stdout and os.path.isfile(self._path)
            if regular:
                self._stream.truncate(0)
            self._stream.write(text)
            self._stream.flush()
            if regular:
                os.fsync(self._stream.fileno())
            if self._stream is not sys.stdout:
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
