"""What commands write: to standard output, to standard error, to files they are asked for. Always UTF-8.

A file is opened before the job starts, so that a bad path costs no job, and written at the end. What cannot be written
becomes one sentence; what cannot even be said is dropped, since no job and no exit status may hang on it.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NoReturn

from acctd.errors import AcctdError, NotFoundError, NotPermittedError

EXIT_PIPE = 141  # as a shell has it for a program that SIGPIPE ended


def emit(text: str) -> None:
    """One text and a newline to standard output, at once. Ends the program if nobody reads it."""
    try:
        _stdout().write(f"{text}\n".encode(errors="replace"))
        _stdout().flush()
    except BrokenPipeError:
        _leave_quietly()
    except OSError as e:
        raise AcctdError(f"cannot write to standard output: {e.strerror}; see where it goes") from e


def say(text: str) -> None:
    """One line to standard error, if there is anybody to hear it."""
    if sys.stderr is None:
        return
    try:
        os.write(sys.stderr.fileno(), f"{text}\n".encode(errors="replace"))
    except OSError:
        return  # full, or its reader is gone: the record has what matters


class Output:
    """One file to be written at the end; "-" is standard output."""

    def __init__(self, option: str, path: str) -> None:
        self._option, self._path = option, path
        with self._explained():
            # Not truncated yet: a job that is refused leaves what was there.
            self._stream: BinaryIO = _stdout() if path == "-" else open(path, "ab")

    def write(self, text: str) -> None:
        """Write all of it and close the file."""
        with self._explained():
            regular = self._path != "-" and os.path.isfile(self._path)
            if regular:
                self._stream.truncate(0)
            self._stream.write(text.encode(errors="replace"))
            self._stream.flush()
            if regular:
                os.fsync(self._stream.fileno())
            if self._path != "-":
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


def _stdout() -> BinaryIO:
    if sys.stdout is None:
        raise AcctdError("standard output is closed; give it a place to go")
    return sys.stdout.buffer


def _leave_quietly() -> NoReturn:
    # Python flushes standard output once more at exit, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    raise SystemExit(EXIT_PIPE)
