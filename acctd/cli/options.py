"""The options of a job's limits, for the commands that set them: acctd run and acctd limit."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args

import click

from acctd.errors import UsageError
from acctd.model import MemoryPolicy, parse_size

_Command = TypeVar("_Command", bound=Callable[..., Any])

_SIZES = ("memory", "memory_soft", "swap")
_WHOLE = ("cpu_shares", "pids")
_REAL = ("cpus", "cpu_burst")
NONE = "none"
"""What takes a limit away that is there."""

_OPTIONS = (
    ("--memory", "SIZE", "Hard memory limit, like 2G."),
    ("--memory-soft", "SIZE", "Soft memory limit: what the job keeps when memory runs short around it."),
    ("--swap", "SIZE", "Swap the job may use beside its memory."),
    ("--cpus", "N", "CPU quota in cores, like 1.5."),
    ("--cpu-burst", "S", "Seconds of CPU that unused quota may save up, to go beyond it."),
    ("--cpu-shares", "N", "Share of the CPUs under contention; 1024 is one ordinary job."),
    ("--cpuset", "LIST", "CPUs the job may run on, like 0-3,8; or linear:N, N cores for itself."),
    ("--pids", "N", "Processes and threads at most."),
)


def limit_options(command: _Command) -> _Command:
    """Adds an option for each limit; the command gets their texts by name, for limits_given()."""
    command = click.option(
        "--memory-policy",
        type=click.Choice(get_args(MemoryPolicy)),
        help="What becomes of --memory: the hard limit, the soft one, both as given, or only a line in the record.",
    )(command)
    for name, metavar, text in reversed(_OPTIONS):
        command = click.option(name, metavar=metavar, help=text)(command)
    return command


def limits_given(options: Mapping[str, str | None]) -> dict[str, object]:
    """The limits that were given, by name; None for one that is to be taken away. Raises UsageError."""
    return {name: _value(name, text) for name, text in options.items() if text is not None}


def _value(name: str, text: str) -> object:
    if text == NONE and name != "memory_policy":
        return None
    if name in _SIZES:
        return parse_size(name, text)
    if name in _WHOLE or name in _REAL:
        try:
            number = int(text) if name in _WHOLE else float(text)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
        example = "512" if name in _WHOLE else "1.5"
        raise UsageError(f"--{name.replace('_', '-')} {text!r} is no number; write it like {example}")
    return text
