"""What acctd-hook create and limit ask for: options as parameters of the agent's methods. Loaded for these two alone.

Standard library only. Looks at how a value is written; whether the job may have it is for the agent to say.
"""

from acctd import hookcall

TYPE_CHECKING = False
if TYPE_CHECKING:
    from acctd.hook import Given

_SIZES = ("memory", "memory-soft", "swap")
_NUMBERS = ("cpu-shares", "pids")
_REALS = ("cpus", "cpu-burst")
_TEXTS = ("cpuset", "memory-policy")
_NONE = "none"


def job(given: "Given") -> hookcall.Answer:
    """The parameters of Create. Raises UsageError."""
    return {
        "job": given.job,
        "user": given.one("user"),
        "network": given.one("network"),
        "limits": _limits(given, set()) or None,
        "classes": {name: networks.split(",") for name, networks in given.pairs("class").items()} or None,
        "tags": given.pairs("tag") or None,
        "parent": given.one("parent"),
        "watcher": given.number("watcher", 1),
        "interval": given.real("interval"),
        "oom": _oom(given) or None,
        "isolation": _isolation(given) or None,
        "requests": _requests(given) or None,
    }


def changed_limits(given: "Given") -> hookcall.Answer:
    """The limits of SetLimits; "none" takes one away. Raises UsageError."""
    known = (*_SIZES, *_NUMBERS, *_REALS, "cpuset")
    taken_away = {name for name in known if given.one(name) == _NONE}
    changed = _limits(given, taken_away) | {name.replace("-", "_"): None for name in taken_away}
    if not changed:
        raise hookcall.UsageError("limit changes nothing: name a limit, such as --memory 2G, or none to take it away")
    return changed


def _limits(given: "Given", but: set[str]) -> hookcall.Answer:
    found: hookcall.Answer = {}
    found |= {name: given.size(name) for name in _SIZES if name not in but}
    found |= {name: given.number(name) for name in _NUMBERS if name not in but}
    found |= {name: given.real(name) for name in _REALS if name not in but}
    found |= {name: given.one(name) for name in _TEXTS if name not in but}
    return {name.replace("-", "_"): value for name, value in found.items() if value is not None}


def _oom(given: "Given") -> hookcall.Answer:
    found = {"action": given.one("oom"), "ceiling": given.size("oom-ceiling"), "deadline": given.real("oom-deadline")}
    return {name: value for name, value in found.items() if value is not None}


def _isolation(given: "Given") -> hookcall.Answer:
    found: hookcall.Answer = {
        name.replace("-", "_"): True for name in ("pid-namespace", "no-new-privs") if name in given.options
    }
    if "scratch" in given.options:
        found["scratch"] = given.options["scratch"]
    if "chroot" in given.options:
        found["chroot"] = given.one("chroot")
    return found


def _requests(given: "Given") -> hookcall.Answer:
    """SYSTEM:NAME=VALUE,... by system and name."""
    found: dict[str, dict[str, str]] = {}
    for text in given.options.get("request", []):
        system, colon, rest = text.partition(":")
        for pair in rest.split(","):
            name, equals, value = pair.partition("=")
            if not (system and colon and name and equals):
                raise hookcall.UsageError(f"--request {text!r} is not SYSTEM:NAME=VALUE,...")
            found.setdefault(system, {})[name] = value
    return found
