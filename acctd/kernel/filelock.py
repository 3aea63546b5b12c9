"""One file lock, waited for with patience: a holder that hangs must not hang whoever comes after it. man 2 flock."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from acctd.errors import ExhaustedError, KernelRefusedError, NotPermittedError


@contextmanager
def held(path: str, *, shared: bool = False, patience: float) -> Iterator[None]:
    """Hold the lock on a file, which is made if need be. Raises ExhaustedError after `patience` seconds.

    Raises NotPermittedError or KernelRefusedError for a file that cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        refusal = NotPermittedError if e.errno in (errno.EACCES, errno.EPERM) else KernelRefusedError
        raise refusal(f"cannot open the lock {path}: {e.strerror}; run as root") from e
    try:
        # Asked for again and again rather than waited for.
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    waited = f" for more than {patience:g} s" if patience else ""
                    raise ExhaustedError(f"another program holds {path}{waited}; find it with `fuser {path}`") from None
                time.sleep(0.0005)
        yield
    finally:
        os.close(fd)
