"""What a caller wishes for a job, as it came over the socket or a command line, over the configuration's defaults.

Everything becomes a type of model.py or policies.py here, or a UsageError that names the field and the value. Who may
have more than the configuration gives everybody is decided in methods.py, but for the ceiling of a growing limit.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar, cast, get_args, get_type_hints

import msgspec

from acctd.config import Config
from acctd.errors import NotPermittedError, UsageError
from acctd.model import Limits, NetworkMode
from acctd.policies import Isolation, OomPolicy
from acctd.requests import limits_from

_T = TypeVar("_T", Limits, OomPolicy, Isolation)


def limits(
    defaults: Limits, wanted: Mapping[str, Any], requests: Mapping[str, Mapping[str, str]] | None = None
) -> Limits:
    """The configured limits, those of a batch system's request over them, and over both the wanted ones."""
    for system, asked in (requests or {}).items():
        defaults = _over(defaults, _set(limits_from(system, asked)), "limit", "limits")
    return _over(defaults, wanted, "limit", "limits")


def oom(config: Config, wanted: Mapping[str, Any], *, root: bool) -> OomPolicy:
    """What is done out of memory. Only root lets a limit grow beyond the configured ceiling."""
    policy = _over(config.oom.default, wanted, "oom key", "oom")
    if policy.action == "exec" and config.oom.program is None:
        raise UsageError("oom action exec needs oom.program in the configuration, what decides then; set it there")
    ceiling = config.oom.ceiling
    if not root and policy.ceiling is None:
        policy = replace(policy, ceiling=ceiling)  # also for what a program answers
    elif not root and policy.ceiling is not None and (ceiling is None or policy.ceiling > ceiling):
        most = "the configuration has no oom.ceiling" if ceiling is None else f"oom.ceiling is {ceiling}"
        raise NotPermittedError(f"oom ceiling {policy.ceiling} is only for root to ask for: {most}; ask for less")
    return policy


def isolation(config: Config, wanted: Mapping[str, Any]) -> Isolation:
    """How far the job is shut in: what it asks for, and what the configuration asks of all."""
    asked, default = _over(Isolation(), wanted, "isolation key", "isolation"), config.isolation.default
    if asked.chroot is not None and asked.chroot not in config.isolation.chroots:
        known = ", ".join(config.isolation.chroots) or "there is none"
        raise UsageError(f"chroot {asked.chroot!r} is no name in isolation.chroots of the configuration ({known})")
    return Isolation(
        pid_namespace=asked.pid_namespace or default.pid_namespace,
        scratch=tuple(dict.fromkeys((*default.scratch, *asked.scratch))),
        chroot=asked.chroot or default.chroot,
        no_new_privs=asked.no_new_privs or default.no_new_privs,
    )


def network(mode: str) -> NetworkMode:
    """A network mode by its name."""
    if mode not in get_args(NetworkMode):
        raise UsageError(f"network {mode!r} is none; it is one of {', '.join(get_args(NetworkMode))}")
    return cast(NetworkMode, mode)


def _over(defaults: _T, wanted: Mapping[str, Any], what: str, table: str) -> _T:
    known = {field.name: getattr(defaults, field.name) for field in fields(defaults)}
    for name in wanted:
        if name not in known:
            raise UsageError(f"{what} {name!r} is unknown; it is one of {', '.join(known)}")
    types = get_type_hints(type(defaults))
    given: dict[str, Any] = {}
    for name, value in wanted.items():
        try:
            given[name] = msgspec.convert(value, types[name])
        except msgspec.ValidationError as e:
            raise UsageError(f"{table}: {name} {_shown(value)} is not usable: {e}") from None
    return type(defaults)(**{**known, **given})


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _set(limits: Limits) -> dict[str, Any]:
    """Those that are set. What is said of memory is said as a whole: a policy alone means another thing elsewhere."""
    memory = {name: getattr(limits, name) for name in ("memory", "memory_soft", "swap", "memory_policy")}
    found = memory if limits.memory is not None or limits.memory_soft is not None else {}
    others = {field.name: getattr(limits, field.name) for field in fields(Limits) if field.name not in memory}
    return found | {name: value for name, value in others.items() if value is not None}
