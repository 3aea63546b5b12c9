"""What commands write: to standard output, to standard error, to files they are asked for. Always UTF-8.

A file's place is tried before the job starts, so that a bad path costs no job, and written at the end. What cannot be
written becomes one sentence; what cannot even be said is dropped, since no job and no exit status may hang on it.
"""

import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    """One file to be written at the end; "-" is standard output.

    A regular file is written beside its place and renamed: until then, and where that fails, what was there stays.
    Devices and pipes are written straight, and so is a file whose directory or owner forbids another in its place.
    """

    def __init__(self, option: str, path: str, *, private: bool = False) -> None:
        """`private`: a new file is its owner's alone; one that is there keeps owner and mode. Raises AcctdError."""
        self._option, self._path = option, path
        self._stream: BinaryIO | None = None
        self._place: _Place | None = None
        self._in_place = False
        with self._explained():
            if path == "-":
                self._stream = _stdout()
            elif (place := _place(path, private=private)) is not None and place.may_be_renamed():
                self._place = place
            else:
                self._in_place = place is not None
                # Not truncated yet: a job that is refused leaves what was there.
                self._stream = open(path, "ab")

    def write(self, text: str) -> None:
        """Write all of it and close the file. Raises AcctdError."""
        data = text.encode(errors="replace")
        with self._explained():
            if self._place is not None:
                self._place.write(data)
            elif self._stream is not None:
                if self._in_place:
                    self._stream.truncate(0)
                self._stream.write(data)
                self._stream.flush()
                if self._in_place:
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


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a regular file is or will be. The directory is held: what is mounted or moved meanwhile changes nothing."""

    directory: int  # descriptor
    name: str
    mode: int  # of a new file, before the umask
    there: os.stat_result | None  # the file whose owner and mode stay

    def may_be_renamed(self) -> bool:
        """Try, so that a bad path is known at once. False: not to be renamed, but perhaps to be written as it is."""
        try:
            os.unlink(self._beside(b""), dir_fd=self.directory)
        except PermissionError:
            if self.there is None:
                raise
            return False
        return True

    def write(self, data: bytes) -> None:
        """All of it, on the disk, under the name."""
        beside = self._beside(data)
        try:
            os.rename(beside, self.name, src_dir_fd=self.directory, dst_dir_fd=self.directory)
        except OSError as e:
            os.unlink(beside, dir_fd=self.directory)
            if e.errno != errno.EBUSY:
                raise
            # Something is mounted there, as a container's files are: it takes bytes, but no other file.
            flags = os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(self.name, flags, dir_fd=self.directory), "wb") as stream:
                stream.write(data)

    def _beside(self, data: bytes) -> str:
        """A new file's name, with owner and mode as they shall be. None is left where that fails."""
        name = f".acctd-{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        made = os.open(name, flags, 0o600 if self.there is not None else self.mode, dir_fd=self.directory)
        try:
            with os.fdopen(made, "wb") as stream:
                if self.there is not None:
                    os.fchown(made, self.there.st_uid, self.there.st_gid)
                    os.fchmod(made, self.there.st_mode & 0o777)
                stream.write(data)
                stream.flush()
                os.fsync(made)
        except OSError:
            os.unlink(name, dir_fd=self.directory)
            raise
        return name


def _place(path: str, *, private: bool) -> _Place | None:
    """None for what is no regular file, and for standard output by another name.

    A symbolic link stands for its file, but not where anybody may have laid it: there it is replaced.
    Likewise a file of somebody else's there does not tell who may read a new one (proc_sys_fs(5), protected_regular).
    """
    directory, name = os.path.split(path)
    found, link = _stat(path), os.path.islink(path)
    if name in ("", ".", "..") or (found is not None and not stat.S_ISREG(found.st_mode)):
        return None
    if link and not _is_anybodys(directory):
        if os.path.realpath(directory).split("/")[1] in ("dev", "proc"):
            return None
        directory, name = os.path.split(os.path.realpath(path))
        link = False
    held = os.open(directory or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if _is_anybodys(directory):
        there = os.stat(name, dir_fd=held, follow_symlinks=False) if found is not None or link else None
        if there is not None and os.geteuid() not in (0, there.st_uid, os.stat(held).st_uid):
            raise PermissionError(errno.EPERM, "It is somebody else's")
        if found is not None and (link or found.st_uid != os.geteuid() or found.st_nlink > 1):
            found = None
    return _Place(held, name, 0o600 if private else 0o666, found)


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _is_anybodys(directory: str) -> bool:
    """Whether it is like /tmp, where all may write and each removes own files only."""
    return os.stat(directory or ".").st_mode & (stat.S_ISVTX | stat.S_IWOTH) == stat.S_ISVTX | stat.S_IWOTH


def _stdout() -> BinaryIO:
    if sys.stdout is None:
        raise AcctdError("standard output is closed; give it a place to go")
    return sys.stdout.buffer


def _leave_quietly() -> NoReturn:
    # Python flushes standard output once more at exit, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    raise SystemExit(EXIT_PIPE)
