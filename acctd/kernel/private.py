"""Directories that only root may change: where a root agent keeps names, sockets and money."""

import os
import stat
from pathlib import Path

from acctd.errors import AcctdError, NotPermittedError


def make(path: Path) -> None:
    """Make a directory and what it lies in, whatever the umask, and see that nobody else can put something into it.

    Raises NotPermittedError for one that another user owns or may write to, AcctdError for what cannot be made.
    """
    try:
        for level in reversed([path, *path.parents]):
            try:
                level.mkdir(mode=0o755)
            except FileExistsError:
                continue
            level.chmod(0o755)
        found = path.stat()
    except OSError as e:
        kind = NotPermittedError if isinstance(e, PermissionError) else AcctdError
        raise kind(f"cannot make the directory {path}: {e.filename}: {e.strerror}; choose another one") from e
    if not stat.S_ISDIR(found.st_mode):
        raise AcctdError(f"{path} is no directory; remove it or choose another one")
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise NotPermittedError(f"directory {path} can be changed by others than root; chown root and chmod go-w it")
