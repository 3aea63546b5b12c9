"""python-iptables, loaded late, quickly and without a trace in the environment.

Its import asks gcc, ld and ldconfig where the libraries are, 17 processes and more, unless told; so it is told here.
"""

import glob
import importlib
import importlib.util
import os
import re
import threading
from types import ModuleType

from acctd.errors import UnavailableError

# Debian and its kin; Red Hat and its kin; and where both keep them on an unmerged /usr.
EXTENSION_DIRS = ("/usr/lib/*-linux-gnu*/xtables", "/usr/lib64/xtables", "/lib/xtables", "/usr/lib/xtables")

_guard = threading.Lock()


def load() -> ModuleType:
    """The iptc module. Raises UnavailableError naming what to install."""
    with _guard:
        spec = importlib.util.find_spec("iptc")
        if spec is None or spec.origin is None:
            raise UnavailableError(
                "the iptables back end needs python-iptables, which is not installed; "
                "run pip install python-iptables, or set network.backend to nftables"
            )
        extensions = next((found for pattern in EXTENSION_DIRS for found in sorted(glob.glob(pattern))), None)
        if extensions is None:
            raise UnavailableError(
                "the iptables back end needs the extensions of xtables, found in none of "
                f"{', '.join(EXTENSION_DIRS)}; install the package iptables, or set network.backend to nftables"
            )
        # xtwrapper, python-iptables' own C part, lies beside the package.
        beside = os.path.dirname(os.path.dirname(spec.origin))
        told = {"XTABLES_LIBDIR": extensions, "IPTABLES_LIBDIR": f"{os.path.dirname(extensions)}:{beside}"}
        if version := _xtables_version(os.path.dirname(extensions)):
            told["PYTHON_IPTABLES_XTABLES_VERSION"] = version
        before = {name: os.environ.get(name) for name in told}
        os.environ.update({name: value for name, value in told.items() if before[name] is None})
        try:
            return importlib.import_module("iptc")
        except Exception as e:  # it fails with whatever the missing library made it trip over
            raise UnavailableError(
                f"python-iptables cannot be loaded ({type(e).__name__}: {e}); install the packages iptables and "
                "libip4tc2, libip6tc2, libxtables12 (iptables-libs on Red Hat), or set network.backend to nftables"
            ) from e
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]  # a job inherits the agent's environment


def _xtables_version(directory: str) -> str | None:
    """The 12 of libxtables.so.12; the plain libxtables.so is in the -dev package only."""
    found = (re.search(r"\.so\.(\d+)\Z", path) for path in sorted(glob.glob(f"{directory}/libxtables.so.*")))
    return next((match.group(1) for match in found if match), None)
