"""Files that a sink's settings name and that hold what no configuration may: a token, a password, an authority.

A name without a slash is a systemd credential. Read anew whenever asked, so that a new secret needs no restart; nothing
is kept, and no error shows what a file holds.
"""

import os
from collections.abc import Mapping

from acctd.errors import NotFoundError, NotPermittedError, UsageError

_CREDENTIALS = "CREDENTIALS_DIRECTORY"  # systemd.exec(5), LoadCredential=
_MOST = 65536  # bytes; what is longer is no secret


def locate(key: str, name: str, environ: Mapping[str, str]) -> str:
    """The path of a file that the setting `key` names. Raises NotFoundError for a credential where there is none."""
    if "/" in name:
        return name
    if _CREDENTIALS not in environ:
        raise NotFoundError(
            f"{key} {name!r} names a systemd credential and there is none; add LoadCredential={name}:/path to the "
            "unit, or give a path"
        )
    return os.path.join(environ[_CREDENTIALS], name)


def secret(key: str, name: str, environ: Mapping[str, str]) -> str:
    """A token or password: what the file holds, without the white space around it.

    Raises NotFoundError, NotPermittedError, and UsageError for what no header may hold.
    """
    path = locate(key, name, environ)
    try:
        with open(path, "rb") as stream:
            text = stream.read(_MOST + 1)
    except FileNotFoundError:
        raise NotFoundError(f"{key} {path} does not exist; write the secret into it") from None
    except PermissionError:
        raise NotPermittedError(f"{key} {path} may not be read by this user; see its owner and mode") from None
    except OSError as e:
        raise UsageError(f"{key} {path} cannot be read ({e.strerror}); it takes a text file") from None
    found = text.decode("ascii", errors="replace").strip()
    if not found or len(text) > _MOST or not found.isascii() or not found.isprintable():
        raise UsageError(f"{key} {path} holds no usable secret; it takes one line of printable ASCII")
    return found
