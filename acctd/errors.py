"""The errors that reach a user: one sentence each, and an exit code that says what kind of trouble it is.

The codes are those of sysexits.h, so that they differ from what ordinary commands return and a starter can tell
acctd's own trouble from the job's. Nothing here formats or prints; the CLI does.
"""


class AcctdError(Exception):
    """Something acctd could not do. `str()` is one sentence naming the field, the value and what to do."""

    exit_code = 70  # EX_SOFTWARE


class UsageError(AcctdError):
    """The request makes no sense as it stands: a bad id, a limit of nonsense, a class that is no CIDR."""

    exit_code = 64  # EX_USAGE


class NotFoundError(AcctdError):
    """The named job, user or file does not exist."""

    exit_code = 66  # EX_NOINPUT


class UnavailableError(AcctdError):
    """This host lacks what the request needs: netfilter, a controller, a namespace type."""

    exit_code = 69  # EX_UNAVAILABLE


class KernelRefusedError(AcctdError):
    """The kernel said no to a change; the message names the path and the data."""

    exit_code = 71  # EX_OSERR


class InUseError(AcctdError):
    """The id is taken by a living job."""

    exit_code = 73  # EX_CANTCREAT


class LedgerError(AcctdError):
    """The ledger cannot be read or written: a full disk, or a file that is no longer whole (`corrupt`)."""

    exit_code = 74  # EX_IOERR

    def __init__(self, message: str, *, corrupt: bool = False) -> None:
        super().__init__(message)
        self.corrupt = corrupt


class ExhaustedError(AcctdError):
    """Nothing is free at the moment: no address in the pool. Trying later may help."""

    exit_code = 75  # EX_TEMPFAIL


class NotPermittedError(AcctdError):
    """The caller may not do this."""

    exit_code = 77  # EX_NOPERM


class ConfigError(AcctdError):
    """The configuration file is wrong; the message names the key, the value and the allowed range."""

    exit_code = 78  # EX_CONFIG
