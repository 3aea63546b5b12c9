"""A job's scratch: directories that are its own, empty at first and gone with it.

    SCRATCH_DIR/              root's, 0711
      ID.XXXXXXXX/            one job's, root's, 0711
        0/ 1/ ...             one a directory that it asked for, the owner's, 0700
      .trash/                 root's, 0700: what waits to be removed

Makes and removes; where they are mounted is for isolate.py. What a job leaves behind may be anything: links, a tree as
deep as the disk allows, millions of files. It is renamed into the trash, which is one step, and removed from there by
a thread, because to unlink one large file can take the kernel seconds. The trash is emptied whoever filled it, so what
a dead acctd left in there goes too.
"""

import errno
import itertools
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from acctd.errors import KernelRefusedError
from acctd.kernel import private
from acctd.model import Owner

_TRASH = ".trash"
_AT_ONCE = 1000  # names held in memory


def choose(base: Path, job: str) -> str:
    """Where a job's scratch is to be: a path that no other has. Nothing is made, so that the intent can come first."""
    return str(base / f"{job}.{secrets.token_hex(4)}")


def entries(place: str, wanted: Sequence[str]) -> list[tuple[Path, str]]:
    """Each directory of the job's own, and the one that it stands for."""
    return [(Path(place, str(number)), target) for number, target in enumerate(wanted)]


def make(place: str, owner: Owner, count: int) -> None:
    """Make the scratch of one job. Raises KernelRefusedError, and as private.make() for the place of all scratch."""
    path = Path(place)
    try:
        private.make(path.parent)
        path.parent.chmod(0o711)
        # mkdir goes by the umask, chmod does not.
        path.mkdir(0o700)
        for number in range(count):
            own = path / str(number)
            own.mkdir(0o700)
            os.chown(own, owner.uid, owner.gid)
        path.chmod(0o711)
    except OSError as e:
        raise KernelRefusedError(f"cannot make scratch {e.filename}: {e.strerror}; see isolation.scratch_dir") from e


class Trash:
    """What becomes of scratch that nobody needs any more."""

    def __init__(self, tell: Callable[[str], None], *, wait: bool) -> None:
        """`wait`: take() returns when all is gone. Else a thread sees to it, and `tell` hears of what does not go."""
        self._tell, self._wait = tell, wait
        self._lock = threading.Lock()
        self._wanted: set[Path] = set()  # what is to be looked through
        self._busy = False
        self._given_up: set[tuple[Path, str]] = set()

    def take(self, place: str) -> None:
        """Have a job's scratch removed. On return it is out of the way; nothing there is fine.

        Raises KernelRefusedError.
        """
        path = Path(place)
        trash = path.parent / _TRASH
        try:
            if not os.path.lexists(path) and not os.path.lexists(trash / path.name):
                return
            private.make(path.parent)
            if not os.path.lexists(trash):
                private.make(trash)
            with _directory(trash) as top:
                try:
                    os.rename(path, path.name, dst_dir_fd=top)
                except FileNotFoundError:
                    pass  # an acctd that was killed got as far as that
                if self._wait:
                    _dispose(top, path.name)
            if not self._wait:
                self.empty(path.parent)
        except OSError as e:
            where = path if os.path.lexists(path) else trash / path.name
            raise KernelRefusedError(f"scratch {where} cannot be removed: {e.strerror}; remove it by hand") from e

    def empty(self, base: Path) -> None:
        """Have a thread remove what lies in the trash, as an acctd that was killed may have left it."""
        with self._lock:
            self._wanted.add(base / _TRASH)
            if self._busy:
                return
            self._busy = True
        # A daemon thread: an agent that stops does not wait for it, and the next one goes on.
        threading.Thread(target=self._run, name="scratch removal", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._busy = False
                    return
                trash = self._wanted.pop()
            try:
                self._empty(trash)
            except FileNotFoundError:
                continue  # no job ever had scratch there
            except OSError as e:
                self._tell(f"scratch in {trash} cannot be removed: {e.strerror}; remove it by hand")

    def _empty(self, trash: Path) -> None:
        with _directory(trash) as top:
            while found := _some(top, lambda name: (trash, name) not in self._given_up):
                for name, _ in found:
                    try:
                        _dispose(top, name)
                    except OSError as e:
                        self._given_up.add((trash, name))
                        self._tell(f"scratch {trash}/{name} cannot be removed: {e.strerror}; remove it by hand")


def _dispose(trash: int, name: str) -> None:
    """Remove one job's scratch. All directories in it are moved to its top first, so that no tree is too deep."""
    try:
        with _directory(name, trash) as top:
            while found := _some(top):
                for inner, is_directory in found:
                    if is_directory:
                        _flatten(top, inner)
                    else:
                        _forgiving(os.unlink, inner, top)
    except FileNotFoundError:
        return  # another acctd was faster
    except NotADirectoryError:
        _forgiving(os.unlink, name, trash)  # nothing of ours; what it may lead to is not touched
    else:
        _forgiving(os.rmdir, name, trash)


def _flatten(top: int, name: str) -> None:
    """Remove a directory at the top; those in it that are not empty come to lie beside it."""
    with _directory(name, top) as place:
        while found := _some(place):
            for inner, is_directory in found:
                if is_directory:
                    _remove_directory(top, place, inner)
                else:
                    _forgiving(os.unlink, inner, place)
    _forgiving(os.rmdir, name, top)


def _remove_directory(top: int, place: int, name: str) -> None:
    try:
        _forgiving(os.rmdir, name, place)
    except OSError as e:
        if e.errno != errno.ENOTEMPTY:
            raise
        with _directory(name, place):
            os.rename(name, secrets.token_hex(8), src_dir_fd=place, dst_dir_fd=top)


@contextmanager
def _directory(path: Path | str, place: int | None = None) -> Iterator[int]:
    """Open a directory, and no link to one. From here on it is ours: whoever has it open makes nothing in it any more.

    With that no right over other users' files is needed but CAP_CHOWN, and CAP_DAC_READ_SEARCH to look.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=place)
    try:
        os.fchown(fd, os.geteuid(), os.getegid())
        os.fchmod(fd, 0o700)
        yield fd
    finally:
        os.close(fd)


def _some(place: int, wanted: Callable[[str], bool] = lambda _: True) -> list[tuple[str, bool]]:
    """The next entries of a directory, and whether each is a directory itself; none where there are no more."""
    with os.scandir(place) as entries:
        found = ((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
        return list(itertools.islice((each for each in found if wanted(each[0])), _AT_ONCE))


def _forgiving(act: Callable[..., None], name: str, place: int) -> None:
    """Remove a name that may have gone by itself, or by another acctd."""
    try:
        act(name, dir_fd=place)
    except FileNotFoundError:
        return
