"""What the owner of a job is told when its memory ran out: one sentence a shortage, for its record and HTCondor's hold.

Pure functions of facts; opens nothing. It blames whose limit was reached and nobody else, and says what can be done.
MB are those of HTCondor and the kernel, 2^20 bytes.
"""

from acctd.policies import Shortage

_MB = 1 << 20

_KINDS = {"anon": "heap", "shmem": "shared", "file": "page cache", "kernel": "kernel", "sock": "sockets"}
"""What makes up the usage, in words that a user knows; swap comes on top."""

_GOES_ON = ("grown", "released", "undecided")
"""What is done to a job that waits at its limit, and so is not over it."""


def sentence(
    job: str,
    shortage: Shortage,
    *,
    own_limit: int | None = None,
    swap: int | None = None,
    raised_to: int | None = None,
    unseen: int = 0,
) -> str:
    """What happened to `job`, as one sentence; `shortage` is whole but for its text.

    `own_limit` is the job's own memory limit in bytes (None: it has none), told where another one was reached; `swap`
    the bytes of swap beside the limit that was; `raised_to` what that limit became; `unseen` the number of processes
    that there was no time to look at.
    """
    limit = "memory limit" if shortage.limit is None else f"memory limit of {_amount(shortage.limit)}"
    if swap:
        limit += f" and {_amount(swap)} of swap"
    went = "reached" if shortage.action in _GOES_ON else "went over"
    itself = "did not run out" if own_limit is None else f"stayed within its limit of {_amount(own_limit)}"
    facts = _facts(shortage, unseen)
    ended, whose = "was {}", "its"
    match shortage.level:
        case "job":
            cause = f"Job {job} {went} its {limit}{facts}"
            advice = "" if shortage.action == "grown" else "; submit it again with more memory"
        case "family":
            family = "A job" if shortage.whose is None else f"Job {shortage.whose}"
            cause = f"{family}, inside job {job}, {went} its own {limit}{facts}"
            advice = f"; job {job} itself {itself}"
        case "parent":
            parent = "A job" if shortage.whose is None else f"Job {shortage.whose}"
            cause = f"{parent}, which job {job} is inside of, {went} its {limit}{facts}"
            ended, whose = f"was {{}} with job {job} in it", f"job {job}'s"
            advice = f"; job {job} itself {itself}"
        case "host":
            cause = "The node itself ran out of memory"
            ended, whose = f"job {job} was {{}}", f"job {job}'s"
            fine = f"; the job {itself}{facts} and may be submitted again as it is"
            advice = f"; the job had no memory limit{facts}" if own_limit is None else fine
    return f"{cause}{_outcome(shortage, ended, whose, raised_to)}{advice}."


def _outcome(shortage: Shortage, ended: str, whose: str, raised_to: int | None) -> str:
    """What was done. `ended` takes the participle of it, `whose` are the processes that the kernel killed."""
    # Where nobody counted them (not every kernel does), nothing is said of whom it killed.
    killed = f"killed {f'{shortage.kills} of {whose} processes' if shortage.kills else 'to make room'}"
    match shortage.action:
        case "killed":
            return f" and {ended.format('ended')}"
        case "held":
            return f" and {ended.format('stopped, then ended')}"
        case "killed by the kernel":
            return f" and the kernel {killed}"
        case "grown":
            return f"; its limit was raised{'' if raised_to is None else f' to {_amount(raised_to)}'} and it goes on"
        case "released":
            time = "in time" if shortage.waited is None else f"within {shortage.waited:g} s"
            then = f" and {killed}" if shortage.kills else ""
            return f"; nobody decided {time}, so the kernel's own killer was let loose{then}"
        case "undecided":
            return "; before it was decided what to do, it ended or had another limit"
        case other:
            return f"; what was done: {clean(other)}"


def _facts(shortage: Shortage, unseen: int) -> str:
    """In parentheses: what was in use, of which kinds, and who had most of it; "" where nothing is known."""
    parts = []
    kinds = _kinds(shortage.memory or {})
    if shortage.usage is not None:
        parts.append(f"in use {_amount(shortage.usage)}{f': {kinds}' if kinds else ''}")
    elif kinds:
        parts.append(f"in use: {kinds}")
    if shortage.processes:
        first = shortage.processes[0]
        parts.append(f"largest: {clean(first.name)}, pid {first.pid}, {_amount(first.resident)}")
    if unseen:
        parts.append(f"processes not looked at: {unseen}")
    return f" ({'; '.join(parts)})" if parts else ""


def _kinds(memory: dict[str, int]) -> str:
    """The kinds that matter, a hundredth of the whole and more."""
    least = sum(memory.get(kind, 0) for kind in _KINDS) / 100
    shown = [
        f"{_amount(memory[kind])} {word}" for kind, word in _KINDS.items() if (n := memory.get(kind, 0)) and n >= least
    ]
    if memory.get("swap"):
        shown.append(f"{_amount(memory['swap'])} in swap")
    return ", ".join(shown)


def _amount(number: int) -> str:
    """Bytes in MB, to the nearest; in KB below one."""
    return f"{(number + _MB // 2) // _MB} MB" if number >= _MB else f"{-(-number // 1024)} KB"


def clean(text: str) -> str:
    """A name that somebody else chose, on one line: it may hold newlines and escape sequences."""
    return "".join(char if char.isprintable() else "?" for char in text)
