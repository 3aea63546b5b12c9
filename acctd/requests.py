"""What a batch system's job asked for, in that system's own words, as acctd's limits: Grid Engine, Slurm, HTCondor.

Pure, floor 0: whoever starts a job passes on what it was given, and nothing here asks a batch system. What each word
becomes is tabled in docs/limits.md. A word that is not known is an error and not left out: a job whose limit was lost
on the way would run without one. Sources: Grid Engine's sge_types(5), complex(5), submit(1); Slurm's sbatch(1),
cgroup.conf(5); HTCondor's manual ("Configuration Macros", cgroups) and its condor_starter.
"""

import re
from collections.abc import Callable, Mapping
from typing import get_args

from acctd.errors import UsageError
from acctd.model import INT64_MAX, MEMORY_MIN, Limits, MemoryPolicy

SHARES = 1024
"""cpu_shares for each core asked for, where a system asks for a share and not for cores of its own."""

_SHARES_MAX, _COUNT_MAX = 262144, 99999

_Asked = dict[str, str]

# sge_types(5), memory_specifier: lower case counts in thousands. The manual has whole decimal, hexadecimal and octal
# numbers; a decimal fraction, as qsub takes it, too.
_GRIDENGINE_SIZE = re.compile(
    r"(?:0[xX]([0-9a-fA-F]{1,16})|0([0-7]{1,22})|(\d{1,19}(?:\.\d{1,9})?))([kKmMgGtT]?)\Z", re.ASCII
)
_GRIDENGINE_UNIT: dict[str, int] = {"": 1, **{u: 1000 ** (i + 1) for i, u in enumerate("kmgt")}}
_GRIDENGINE_UNIT |= {u: 1024 ** (i + 1) for i, u in enumerate("KMGT")}

_SIZE = re.compile(r"(\d{1,19}(?:\.\d{1,9})?) ?([KMGT]?)B?\Z", re.ASCII | re.IGNORECASE)
_PERCENT = re.compile(r"(\d{1,6}(?:\.\d{1,6})?)%?\Z", re.ASCII)
_COUNT = re.compile(r"[1-9]\d{0,4}\Z", re.ASCII)
_BINDING = re.compile(r"(?:set )?linear:([1-9]\d{0,4})\Z", re.ASCII)
_TRUTH = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}


def limits_from(system: str, requests: Mapping[str, str]) -> Limits:
    """The limits that stand for a request: `system` is gridengine, slurm or htcondor.

    Names are those of the system, with or without dashes in front; HTCondor's and cgroup.conf's in any case. Sizes
    become bytes, for the job on this node. Raises UsageError naming the word and its value.
    """
    if system not in _SYSTEMS:
        raise UsageError(f"request system {system!r} is unknown; it is one of {', '.join(_SYSTEMS)}")
    names, translate = _SYSTEMS[system]
    known = {_folded(name): name for name in names}
    asked: _Asked = {}
    for key, value in requests.items():
        name = known.get(_folded(key))
        if name is None:
            raise UsageError(f"{system} request {key} {value!r} is not known; it is one of {', '.join(names)}")
        if name in asked:
            raise UsageError(f"{system} request {name} is given twice, {asked[name]!r} and {value!r}; leave one out")
        asked[name] = value.strip()
    return translate(asked)


def _gridengine(asked: _Asked) -> Limits:
    """binding -> cores of its own, m_mem_free -> soft limit, h_vmem -> hard limit; both of the latter are per slot."""
    slots = _count(asked, "slots") or 1
    soft, hard = (_each(asked, name, _gridengine_size, slots) for name in ("m_mem_free", "h_vmem"))
    cpuset = None
    if (binding := asked.get("binding")) is not None:
        if (match := _BINDING.match(binding)) is None:
            raise UsageError(f"binding {binding!r} cannot be had; write it like linear:4, a number of cores")
        cpuset = f"linear:{match[1]}"
    if soft is not None and hard is not None and soft > hard:
        raise UsageError(
            f"m_mem_free {asked['m_mem_free']!r} is above h_vmem {asked['h_vmem']!r}; the soft limit must be the lower"
        )
    if hard is None and soft is not None:
        return Limits(memory=soft, memory_policy="soft", cpuset=cpuset)
    return Limits(memory=hard, memory_soft=soft, cpuset=cpuset)


def _slurm(asked: _Asked) -> Limits:
    """--mem or --mem-per-cpu -> hard limit; cpus -> shares, or cores of its own under ConstrainCores."""
    tasks, each = _count(asked, "ntasks-per-node"), _count(asked, "cpus-per-task")
    cpus = (tasks or 1) * (each or 1)
    if "mem" in asked and "mem-per-cpu" in asked:
        raise UsageError(
            f"mem {asked['mem']!r} and mem-per-cpu {asked['mem-per-cpu']!r} exclude each other; choose one"
        )
    memory = _each(asked, "mem", _megabytes, 1)
    if memory is None:
        memory = _each(asked, "mem-per-cpu", _megabytes, cpus)
    cpuset = shares = None
    if tasks is not None or each is not None:
        if _truth(asked, "ConstrainCores"):
            if cpus > _COUNT_MAX:
                raise UsageError(f"cpus-per-task {each} x ntasks-per-node {tasks} is above {_COUNT_MAX}; ask for less")
            cpuset = f"linear:{cpus}"
        else:
            shares = min(cpus * SHARES, _SHARES_MAX)
    if memory is None:
        return Limits(cpuset=cpuset, cpu_shares=shares)
    if _truth(asked, "ConstrainRAMSpace") is False:
        return Limits(memory=memory, memory_policy="none", cpuset=cpuset, cpu_shares=shares)
    hard = _part(asked, "AllowedRAMSpace", memory, 100)
    swap = _part(asked, "AllowedSwapSpace", memory, 0) if _truth(asked, "ConstrainSwapSpace") else None
    if hard < MEMORY_MIN:
        raise UsageError(f"AllowedRAMSpace {asked['AllowedRAMSpace']!r} leaves {hard} bytes; raise it")
    soft = memory if hard > memory else None  # what it was promised, when it may have more
    policy: MemoryPolicy = "hard" if soft is None else "custom"
    return Limits(hard, soft, swap, cpuset=cpuset, cpu_shares=shares, memory_policy=policy)


def _htcondor(asked: _Asked) -> Limits:
    """RequestMemory -> a limit by CGROUP_MEMORY_LIMIT_POLICY; RequestCpus -> shares."""
    cpus = _count(asked, "RequestCpus")
    shares = min(cpus * SHARES, _SHARES_MAX) if cpus is not None else None
    memory = _each(asked, "RequestMemory", _megabytes, 1)
    named = asked.get("CGROUP_MEMORY_LIMIT_POLICY", "hard")
    policy = next((each for each in get_args(MemoryPolicy) if each == named.lower()), None)
    if policy is None:
        raise UsageError(
            f"CGROUP_MEMORY_LIMIT_POLICY {named!r} is none; it is one of {', '.join(get_args(MemoryPolicy))}"
        )
    soft = None
    if policy == "custom":
        for name in ("CGROUP_HARD_MEMORY_LIMIT_EXPR", "CGROUP_SOFT_MEMORY_LIMIT_EXPR"):
            if name not in asked:
                raise UsageError(f"CGROUP_MEMORY_LIMIT_POLICY {named!r} needs {name}, in megabytes; give it")
        memory = _each(asked, "CGROUP_HARD_MEMORY_LIMIT_EXPR", _megabytes, 1)
        soft = _each(asked, "CGROUP_SOFT_MEMORY_LIMIT_EXPR", _megabytes, 1)
    swap = 0 if _truth(asked, "DISABLE_SWAP_FOR_JOB") else None
    if swap is not None and memory is None:
        raise UsageError(
            f"DISABLE_SWAP_FOR_JOB {asked['DISABLE_SWAP_FOR_JOB']!r} needs a memory limit; give RequestMemory too"
        )
    if memory is not None and soft is not None and soft > memory:
        raise UsageError(
            f"CGROUP_SOFT_MEMORY_LIMIT_EXPR {asked['CGROUP_SOFT_MEMORY_LIMIT_EXPR']!r} is above "
            f"CGROUP_HARD_MEMORY_LIMIT_EXPR {asked['CGROUP_HARD_MEMORY_LIMIT_EXPR']!r}; the soft one must be the lower"
        )
    return Limits(memory, soft, swap, cpu_shares=shares, memory_policy=policy if memory is not None else "custom")


_SYSTEMS: dict[str, tuple[tuple[str, ...], Callable[[_Asked], Limits]]] = {
    "gridengine": (("m_mem_free", "h_vmem", "binding", "slots"), _gridengine),
    "slurm": (
        ("mem", "mem-per-cpu", "cpus-per-task", "ntasks-per-node", "ConstrainCores", "ConstrainRAMSpace",
         "AllowedRAMSpace", "ConstrainSwapSpace", "AllowedSwapSpace"),
        _slurm,
    ),
    "htcondor": (
        ("RequestMemory", "RequestCpus", "CGROUP_MEMORY_LIMIT_POLICY", "DISABLE_SWAP_FOR_JOB",
         "CGROUP_HARD_MEMORY_LIMIT_EXPR", "CGROUP_SOFT_MEMORY_LIMIT_EXPR"),
        _htcondor,
    ),
}  # fmt: skip


def _folded(name: str) -> str:
    """--mem-per-cpu and mem-per-cpu, RequestMemory and request_memory are one."""
    return name.replace("-", "").replace("_", "").lower()


def _each(asked: _Asked, name: str, parse: Callable[[str, str], int | None], times: int) -> int | None:
    """A size in bytes, so many times; None where it is not asked for, or means that there is to be no limit."""
    if name not in asked or (size := parse(name, asked[name])) is None:
        return None
    if not MEMORY_MIN <= size * times <= INT64_MAX:
        by = f" x {times}" if times > 1 else ""
        raise UsageError(f"{name} {asked[name]!r}{by} is out of range; it takes {MEMORY_MIN} to {INT64_MAX} bytes")
    return size * times


def _gridengine_size(name: str, text: str) -> int | None:
    if text.upper() == "INFINITY":
        return None
    match = _GRIDENGINE_SIZE.match(text)
    if match is None:
        raise UsageError(f"{name} {text!r} is no size; write it like 2G (of 1024) or 2g (of 1000), or INFINITY")
    hexadecimal, octal, decimal, unit = match.groups()
    if decimal is None:
        number = int(hexadecimal, 16) if hexadecimal else int(octal, 8)
        return number * _GRIDENGINE_UNIT[unit]
    return _scaled(decimal, _GRIDENGINE_UNIT[unit])


def _megabytes(name: str, text: str) -> int | None:
    """Slurm's and HTCondor's: megabytes of 1024 x 1024 unless there is a suffix. 0 is all of the node's."""
    match = _SIZE.match(text)
    if match is None:
        raise UsageError(f"{name} {text!r} is no size; write it like 2048, in megabytes, or 2G")
    number, unit = match.groups()
    return _scaled(number, 1 << 10 * "_KMGT".index(unit.upper() or "M")) or None


def _scaled(number: str, unit: int) -> int:
    whole, _, fraction = number.partition(".")
    return int(whole) * unit + (int(fraction) * unit // 10 ** len(fraction) if fraction else 0)


def _count(asked: _Asked, name: str) -> int | None:
    if name not in asked:
        return None
    if not _COUNT.match(asked[name]):
        raise UsageError(f"{name} {asked[name]!r} is no count; it takes 1 to {_COUNT_MAX}")
    return int(asked[name])


def _part(asked: _Asked, name: str, whole: int, default: int) -> int:
    """A percentage of a size, rounded down."""
    match = _PERCENT.match(asked.get(name, str(default)))
    if match is None:
        raise UsageError(f"{name} {asked[name]!r} is no percentage; write it like 110 or 99.5")
    part = whole * _scaled(match[1], 10**6) // 10**8
    if part > INT64_MAX:
        raise UsageError(f"{name} {asked[name]!r} of {whole} bytes is above 2^63-1 bytes; lower it")
    return part


def _truth(asked: _Asked, name: str) -> bool | None:
    if name not in asked:
        return None
    if (value := _TRUTH.get(asked[name].lower())) is None:
        raise UsageError(f"{name} {asked[name]!r} is neither yes nor no; write one of them")
    return value
