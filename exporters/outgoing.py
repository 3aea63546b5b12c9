"""Files for others to fetch, with every record of a ledger in just one: how far it was written, and writing on.

Whoever fetches a file removes it, so that it is not there says nothing. Therefore a file is first laid down whole under
a name that nobody fetches, then that is noted, then it is renamed: from then on it is out of our hands. After a kill in
between, what lies there under the first name was not fetched, and what does not was given away. A power cut in that
instant may bring a file back that was fetched already: it then comes a second time, under the same name. Knows no
format. The note is a small file for each directory, and lies apart from it.
"""

import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

import msgspec

from acctd.errors import AcctdError, LedgerError, NotFoundError, NotPermittedError
from acctd.ledger import Ledger, fits
from acctd.model import Record

BATCH = 1000
"""Records a file at most: as many as APEL's own client puts into a message."""

NOTES = "usage-records"
"""Where in state_dir the notes lie, one for each directory."""

_STAGED = ".acctd-"
"""What the first name of a file begins with: neither ssmsend nor a shell's `*` takes such names."""


class Batch(msgspec.Struct, frozen=True):
    """The records of one file."""

    first: int  # number of the first
    last: int
    digest: str  # the ledger's, of the last
    ended: float  # s since the epoch, of the last
    records: tuple[Record, ...]


class Pending(msgspec.Struct):
    """A file that was laid down and may have its name already."""

    folder: str  # in which it is to be; "" is the directory itself
    name: str
    directory: int  # inode of the directory: in another one, a missing file says nothing
    number: int
    digest: str
    records: int


class State(msgspec.Struct):
    """The note."""

    kind: str
    target: str  # the directory
    staged: str  # the first name of every file; other nodes that write to this directory have others
    number: int = 0  # of the last record that was written, or is not to be
    digest: str = ""  # the ledger's, of that record
    records: int = 0  # written, over all runs
    files: int = 0
    pending: Pending | None = None


class Outgoing:
    """One directory that files of one kind are written into. Use as a context manager, one at a time.

    `place` names a file by its batch: folder ("" for none) and name, always the same for the same records.
    """

    def __init__(self, kind: str, target: Path, notes: Path, place: Callable[[Batch], tuple[str, str]]) -> None:
        """Raises NotFoundError or NotPermittedError where the directory cannot be used, AcctdError for a bad note."""
        self._target = target.resolve()
        self._place = place
        self.path = notes / f"{kind}-{hashlib.sha256(os.fsencode(self._target)).hexdigest()[:16]}.json"
        try:
            self._fd = os.open(self._target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as e:
            raise NotFoundError(f"there is no directory {target}; make it, or mount it") from e
        except OSError as e:
            raise NotPermittedError(f"the directory {target} cannot be used ({e.strerror}); choose another") from e
        self.state = State(kind, str(self._target), f"{_STAGED}{secrets.token_hex(8)}")
        with suppress(FileNotFoundError):
            try:
                self.state = _noted(self.path)
            except AcctdError:
                os.close(self._fd)
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def begin(self, book: Ledger, *, anew: bool = False) -> int:
        """Finish what a killed run left, and find where to go on: how many records were taken out unwritten.

        Raises LedgerError if the ledger is not the one that was written from; with `anew` its first record comes next.
        """
        self._finish()
        at, (number, digest) = self.state, book.anchor()
        if anew or not at.number:
            # Of one that was taken out itself the ledger cannot say any more whether it was this one.
            written = at.number if at.number < number else number if book.digest(at.number) == at.digest else 0
            self._note(number, digest)
            return number - written
        if at.number < number:
            raise LedgerError(
                f"records {at.number + 1} to {number} were taken out of the ledger before they were written to "
                f"{at.target}, and are in its archive only; go on without them with --anew"
            )
        if book.digest(at.number) != at.digest:
            raise LedgerError(
                f"the ledger {book.path} is not the one that was written to {at.target}: its record {at.number} is "
                "another; see which is the right one, and let a new one begin with --anew"
            )
        return 0

    def skip(self, number: int, digest: str) -> None:
        """No record up to this one is to be written."""
        self._note(number, digest)

    def put(self, batch: Batch, content: bytes) -> None:
        """Write a file. Raises AcctdError, and it is not there then, or will be at the next begin()."""
        folder, name = self._place(batch)
        try:
            self._lay_down(content)
            self.state.pending = Pending(
                *(folder, name, os.fstat(self._fd).st_ino, batch.last, batch.digest, len(batch.records))
            )
            self._store()
        except OSError as e:
            raise AcctdError(f"cannot write to {self._target} ({e.strerror}); see that the disk is not full") from e
        self._finish()

    def _finish(self) -> None:
        pending = self.state.pending
        if pending is None:
            return
        if os.fstat(self._fd).st_ino != pending.directory:
            raise AcctdError(
                f"{self._target} is another directory than when {pending.name} was written there; mount the right one, "
                f"or remove the note {self.path}, and all records are written again"
            )
        try:
            self._hand_over(pending)
        except OSError as e:
            raise AcctdError(
                f"cannot give {pending.name} its name in {self._target} ({e.strerror}); see its owner and mode"
            ) from e
        self.state.records += pending.records
        self.state.files += 1
        self._note(pending.number, pending.digest)

    def _hand_over(self, pending: Pending) -> None:
        while self._is_laid_down():
            folder = self._folder(pending.folder)
            try:
                os.rename(self.state.staged, pending.name, src_dir_fd=self._fd, dst_dir_fd=folder)
            except FileNotFoundError:
                pass  # the folder was empty, and a reader removed it: dirq does
            finally:
                self._release(folder)
        # Also where a killed run renamed it, who may not have come this far.
        folder = self._folder(pending.folder)
        os.fsync(folder)
        self._release(folder)
        os.fsync(self._fd)

    def _folder(self, name: str) -> int:
        """Open, made if need be."""
        if not name:
            return self._fd
        while True:
            with suppress(FileExistsError):
                os.mkdir(name, 0o750, dir_fd=self._fd)
            with suppress(FileNotFoundError):
                folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd)
                if os.fstat(folder).st_uid == os.geteuid() and not os.listdir(folder):
                    self._give_away(folder, stat.S_IMODE(os.fstat(self._fd).st_mode))
                return folder

    def _release(self, folder: int) -> None:
        if folder != self._fd:
            os.close(folder)

    def _lay_down(self, content: bytes) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.state.staged, dir_fd=self._fd)  # of a run that was killed before it noted it
        fd = os.open(self.state.staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self._fd)
        with open(fd, "wb") as stream:
            self._give_away(fd, 0o640)
            stream.write(content)
            stream.flush()
            os.fsync(fd)
        os.fsync(self._fd)

    def _is_laid_down(self) -> bool:
        try:
            os.stat(self.state.staged, dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def _give_away(self, fd: int, mode: int) -> None:
        """To whom the directory belongs, if root writes: else ssmsend, being another, could not lock and remove it."""
        above = os.fstat(self._fd)
        if os.geteuid() == 0:
            os.fchown(fd, above.st_uid, above.st_gid)
        os.fchmod(fd, mode)

    def _note(self, number: int, digest: str) -> None:
        self.state.number, self.state.digest, self.state.pending = number, digest, None
        try:
            self._store()
        except OSError as e:
            raise AcctdError(f"cannot write the note {self.path} ({e.strerror}); see that the disk is not full") from e

    def _store(self) -> None:
        """Replace the note. It is on stable storage then."""
        partial = self.path.with_suffix(".partial")
        with open(partial, "wb") as stream:
            stream.write(msgspec.json.encode(self.state))
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(self.path)
        fd = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def furthest_behind(notes: Path, book: Ledger) -> tuple[int, str] | None:
    """The last record that all directories have got that are written to, and which of them has no more.

    None where there is none. Raises AcctdError for a damaged note.
    """
    found = []
    for path in sorted(notes.glob("*.json")):
        state = _noted(path)
        is_ours = not state.number or book.digest(state.number) == state.digest or state.number < book.anchor()[0]
        found.append((state.number if is_ours else 0, f"{state.target} (noted in {path})"))
    return min(found, default=None)


def _noted(path: Path) -> State:
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise AcctdError(f"the note {path} is damaged ({e}); remove it, and all records are written again") from e


class Sent(msgspec.Struct):
    """What one run did."""

    records: int = 0
    files: int = 0
    families: int = 0  # left out: they are in their parents' records
    early: int = 0  # left out: they ended before `since`
    archived: int = 0  # were taken out of the ledger before anything was written


def send(
    book: Ledger,
    outgoing: Outgoing,
    encode: Callable[[Sequence[Record]], bytes],
    *,
    since: float | None = None,
    anew: bool = False,
    batch: int = BATCH,
    progress: Callable[[int, int], Callable[[int, int], None]] | None = None,
) -> Sent:
    """Write all records that were not yet, but for families and, with `since` (s since the epoch), those of before.

    `progress` is told how many there are, and what it gives is told, after each file, how many more are done. Raises
    AcctdError, also for a record that is not as it was signed.
    """
    done = Sent(archived=outgoing.begin(book, anew=anew))
    number, before, upto = outgoing.state.number, outgoing.state.digest, book.newest()[0]
    advance = progress(upto - number, 0) if progress is not None else lambda _more, _size: None
    while number < upto and (rows := book.records_after(number, min(batch, upto - number))):
        wanted = []
        for number, digest, body in rows:
            if not fits(before, body, digest):
                raise AcctdError(
                    f"record {number} of {book.path}, or the one before it, was altered after it was signed off; "
                    "restore the ledger"
                )
            before, record = digest, _decoded(number, body)
            if record.parent is not None:
                done.families += 1
            elif since is not None and record.started + record.wall_ns / 10**9 < since:
                done.early += 1
            else:
                wanted.append(record)
        if wanted:
            last = wanted[-1]
            written = Batch(rows[0][0], number, before, last.started + last.wall_ns / 10**9, tuple(wanted))
            outgoing.put(written, encode(wanted))
            done.records += len(wanted)
            done.files += 1
        else:
            outgoing.skip(number, before)
        advance(len(rows), 0)
    return done


def _decoded(number: int, body: bytes) -> Record:
    try:
        return msgspec.json.decode(body, type=Record)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise AcctdError(f"record {number} cannot be read ({e}); use the newer acctd that wrote it") from e
