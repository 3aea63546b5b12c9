"""acctd-hook chirp: tells the agent where a job's starter listens for Chirp. Loaded for this verb alone.

The starter has left that in a file of the job's directory, which is opened here, with the rights of whoever calls; the
agent opens no path of a user's. What the file holds is a secret: no error shows any of it. Standard library only.
"""

import os
import stat

from acctd import hookcall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from acctd.hook import Given

_EX_NOINPUT = 66
_FILE = ".chirp.config"
_VARIABLE = "_CONDOR_CHIRP_CONFIG"
_LARGEST = 1024  # bytes; an address, a port and a cookie


def run(given: "Given") -> int:
    """The verb. Raises HookError."""
    if len(given.words) > 1:
        raise hookcall.UsageError(f"say one FILE; it has {len(given.words)}")
    uid = os.geteuid()
    if uid == 0:
        # The environment may be a job's, and so is the directory: root reads nobody else's file into this job.
        if not given.words:
            raise hookcall.UsageError(f"as root, chirp needs FILE, the job's {_FILE}")
        uid = given.call("Entry", job=given.job)["uid"]
    path = given.words[0] if given.words else os.environ.get(_VARIABLE) or _FILE
    host, port, cookie = _read(path, uid)
    given.call("Chirp", job=given.job, host=host, port=port, cookie=cookie)
    return 0


def _read(path: str, uid: int) -> tuple[str, int, str]:
    """What a starter wrote: host, port, cookie. Raises HookError."""
    try:
        # A FIFO must not hold us up, nor a link lead elsewhere.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise hookcall.HookError(f"{path} is no plain file; name the job's {_FILE}", _EX_NOINPUT)
            if found.st_uid not in (0, uid):
                said = f"{path} belongs to uid {found.st_uid}; it must be uid {uid}'s, the job's owner, or root's"
                raise hookcall.HookError(said, hookcall.EX_NOPERM)
            text = os.read(fd, _LARGEST + 1)
        finally:
            os.close(fd)
    except (OSError, ValueError) as e:
        said = str(getattr(e, "strerror", None) or e)
        raise hookcall.HookError(f"{path} cannot be read: {said}; see {_VARIABLE}", _EX_NOINPUT) from None
    words = text.decode("ascii", "replace").split()
    if len(text) > _LARGEST or len(words) != 3 or not words[1].isdecimal() or len(words[1]) > 5:
        raise hookcall.UsageError(f"{path} does not hold ADDRESS PORT COOKIE, as a starter writes it")
    return words[0], int(words[1]), words[2]
