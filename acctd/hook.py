"""acctd-hook: what a starter calls. Talks to the agent over its socket; standard library only, so that it starts fast.

One call of it is one call of the agent's; an `exec` is a few. The verbs have procd's names where procd has such an
operation. Imports nothing of the agent but hookcall.py, for `create` and `limit` hookwishes.py, for `monitor` and
`chirp` a module each, and for `exec` hookexec.py, enter.py and helper.py, which stand apart as it does. Pages:
docs/hook.md, docs/htcondor.md, docs/exit-codes.md.
"""

import os
import sys

from acctd import hookcall

_SOCKET = "/run/acctd/acctd.sock"
_EX_OSERR = 71


class Given:
    """What stands on the command line."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.words: list[str] = []
        self.options: dict[str, list[str]] = {}
        self.command: list[str] = []

    @property
    def job(self) -> str:
        """The job that is meant."""
        return self.options["job"][0]

    def one(self, name: str) -> str | None:
        """An option's value, or None."""
        return self.options[name][0] if name in self.options else None

    def number(self, name: str, low: int = 0, high: int = (1 << 63) - 1) -> int | None:
        """An option's value as a number, or None."""
        text = self.one(name)
        return None if text is None else _number(name, text, low, high)

    def real(self, name: str) -> float | None:
        """An option's value as a number above 0, or None."""
        text = self.one(name)
        if text is None:
            return None
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if 0 < value < 1e9:
            return value
        raise hookcall.UsageError(f"{name} {text!r} is no number above 0")

    def size(self, name: str) -> int | None:
        """An option's value in bytes, or None; K, M, G and T stand for powers of 1024."""
        text = self.one(name)
        if text is None:
            return None
        power = "KMGT".find(text[-1:].upper()) + 1 if text else 0
        return int(_number(name, text[:-1] if power else text) << 10 * power)

    def word(self, what: str) -> str:
        """The only word."""
        if len(self.words) != 1:
            raise hookcall.UsageError(f"say one {what}; it has {len(self.words)}")
        return self.words[0]

    def pairs(self, name: str) -> dict[str, str]:
        """KEY=VALUE of an option that may be given several times."""
        found = {}
        for text in self.options.get(name, []):
            key, equals, value = text.partition("=")
            if not equals or not key:
                raise hookcall.UsageError(f"--{name} {text!r} is not KEY=VALUE")
            found[key] = value
        return found

    def call(self, method: str, **parameters: object) -> hookcall.Answer:
        """One call of the agent's; parameters that are None are left out. Raises HookError."""
        return hookcall.call(
            self.path, method, **{name: value for name, value in parameters.items() if value is not None}
        )


def main() -> None:
    """Entry point."""
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except hookcall.HookError as e:
        sys.stderr.write(f"acctd-hook: {e}\n")
        code = e.code
    except BrokenPipeError:
        code = 141  # as after SIGPIPE; what is left in the buffer goes nowhere, in silence
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


def run(argv: list[str]) -> int:
    """One call; its exit code. Raises HookError."""
    given = Given(os.environ.get("ACCTD_SOCKET") or _SOCKET)
    rest = list(argv)
    while rest and rest[0].startswith("-"):
        argument = rest.pop(0)
        if argument in ("-h", "--help"):
            sys.stdout.write(_help())
            return 0
        name, equals, value = argument.partition("=")
        if name != "--socket":
            raise hookcall.UsageError(f"option {name} is unknown before the verb; see acctd-hook --help")
        if not equals and not rest:
            raise hookcall.UsageError("option --socket needs a value, PATH")
        given.path = value if equals else rest.pop(0)
    if not rest:
        raise hookcall.UsageError("which verb? acctd-hook --help names them")
    verb = rest.pop(0)
    if verb not in _VERBS:
        raise hookcall.UsageError(f"verb {verb!r} is none; it is one of {', '.join(_VERBS)}")
    act, words, _, options = _VERBS[verb]
    if not _take(given, verb, options, rest):
        sys.stdout.write(_help_of(verb))
        return 0
    if "job" in options and "job" not in given.options:
        raise hookcall.UsageError(f"{verb} needs --job ID")
    if given.words and not words:
        raise hookcall.UsageError(f"{verb} takes no word such as {given.words[0]!r}; see acctd-hook {verb} --help")
    return act(given)


def _take(given: Given, verb: str, known: tuple[str, ...], arguments: list[str]) -> bool:
    """Take the arguments after the verb apart; False where help is wanted."""
    while arguments:
        argument = arguments.pop(0)
        if argument == "--":
            given.command = arguments
            return True
        if argument in ("-h", "--help"):
            return False
        if not argument.startswith("--"):
            given.words.append(argument)
            continue
        name, equals, value = argument[2:].partition("=")
        if name not in (*known, "socket"):
            raise hookcall.UsageError(f"option --{name} is unknown to {verb}; see acctd-hook {verb} --help")
        what, _ = _OPTIONS[name]
        if not what:
            if equals:
                raise hookcall.UsageError(f"option --{name} takes no value")
        elif not equals:
            if not arguments or arguments[0].startswith("--"):
                raise hookcall.UsageError(f"option --{name} needs a value, {what}")
            value = arguments.pop(0)
        if name == "socket":
            given.path = value
        elif name in given.options and name not in _SEVERAL:
            raise hookcall.UsageError(f"option --{name} is given twice; {verb} takes one")
        else:
            given.options.setdefault(name, []).append(value)
    return True


def _print(value: object) -> int:
    sys.stdout.write(hookcall.to_json(value, "") + "\n")
    return 0


def _number(what: str, text: str, low: int = 0, high: int = (1 << 63) - 1) -> int:
    if text.isascii() and text.isdecimal() and len(text) < 20 and low <= int(text) <= high:
        return int(text)
    raise hookcall.UsageError(f"{what} {text!r} is no number from {low} to {high}")


# Verbs


def _create(given: Given) -> int:
    from acctd import hookwishes  # only here: the other verbs need none of it

    return _print(given.call("Create", **hookwishes.job(given)))


def _limit(given: Given) -> int:
    from acctd import hookwishes

    changed = hookwishes.changed_limits(given)
    return _print(given.call("SetLimits", job=given.job, limits=changed, reclaim="reclaim" in given.options)["limits"])


def _register(given: Given) -> int:
    if "pid" not in given.options:
        raise hookcall.UsageError("register needs --pid PID, the family's root; $$ for the calling shell")
    made = given.call(
        "Register", job=given.job, pid=given.number("pid", 1), tags=given.pairs("tag") or None,
        parent=given.one("parent"), watcher=given.number("watcher", 1),
        interval=given.real("interval"),
    )  # fmt: skip
    return _print(made)


def _track(given: Given) -> int:
    ways = given.options.keys() & {"pid", "environment", "login", "group"}
    if len(ways) != 1:
        raise hookcall.UsageError("track needs one of --pid, --environment, --login and --group")
    if "pid" in ways:
        given.call("Attach", job=given.job, pid=given.number("pid", 1))
        return 0
    if "environment" in ways:
        given.pairs("environment")
    found = given.call(
        "Track", job=given.job, environment=given.one("environment"), login=given.one("login"),
        group=given.number("group", 1, (1 << 32) - 2),
    )  # fmt: skip
    sys.stdout.write("".join(f"{pid}\n" for pid in found["pids"]))
    return 0


def _attach(given: Given) -> int:
    given.call("Attach", job=given.job, pid=_number("pid", given.word("PID"), 1))
    return 0


def _usage(given: Given) -> int:
    if len(given.options.keys() & {"json", "classad"}) > 1:
        raise hookcall.UsageError("usage prints --classad or --json, not both")
    answer = given.call("Usage", job=given.job)
    if "json" in given.options:
        return _print(answer["job"])
    sys.stdout.write(answer["classad"] if "classad" in given.options else _usage_text(answer["job"]))
    return 0


def _usage_text(job: hookcall.Answer) -> str:
    """What procd_ctl GET_USAGE prints, in its words, without a line for what is unknown; then what we have more."""
    totals: dict[str, dict[str, int]] = job["totals"]

    def total(*names: str) -> int | None:
        known = [sum(totals[name].values()) for name in names if name in totals]
        return sum(known) if known else None

    def kib(value: int | None) -> int | None:
        return None if value is None else -(-value // 1024)

    user, system, wall = total("cpu_user"), total("cpu_system"), job["wall_ns"]
    both = None if user is None or system is None or wall <= 0 else f"{100 * (user + system) / wall:f}"
    lines: list[tuple[str, object]] = [
        ("Number of Processes", len(job["pids"])),
        ("User CPU Time (s)", None if user is None else f"{user / 1e9:.6f}"),
        ("System CPU Time (s)", None if system is None else f"{system / 1e9:.6f}"),
        ("CPU Percentage (%)", both),
        ("Maximum Image Size (KB)", kib(total("memory_peak"))),
        ("Total Image Size(KB)", kib(total("memory_resident", "memory_file", "memory_kernel"))),
        ("Bytes read from block devices (KB)", kib(total("block_read"))),
        ("Bytes written to block devices (KB)", kib(total("block_write"))),
        ("Resident Set Size (KB)", kib(total("memory_resident"))),
        ("Maximum Resident Set Size (KB)", kib(total("memory_resident_peak"))),
    ]
    lines += [(f"Network {rule} Bytes", count) for rule, count in sorted(totals.get("network", {}).items())]
    return "".join(f"{name}: {value}\n" for name, value in lines if value is not None)


def _signal(given: Given) -> int:
    given.call("Signal", job=given.job, signal=_number("signal", given.word("NUMBER"), 1, 64))
    return 0


def _suspend(given: Given) -> int:
    given.call("Suspend", job=given.job)
    return 0


def _continue(given: Given) -> int:
    given.call("Continue", job=given.job)
    return 0


def _kill(given: Given) -> int:
    survivors = given.call("Kill", job=given.job)["survivors"]
    if survivors:
        pids = ", ".join(map(str, survivors))
        raise hookcall.HookError(f"processes {pids} do not die on SIGKILL; see their state in ps", _EX_OSERR)
    return 0


def _finish(given: Given) -> int:
    code, number = given.number("exit-code", 0, 255), given.number("exit-signal", 1, 64)
    if code is not None and number is not None:
        raise hookcall.UsageError("a job ends by --exit-code or by --exit-signal, not by both")
    return _account(given, given.call("Finish", job=given.job, exit_code=code, exit_signal=number))


def _unregister(given: Given) -> int:
    return _account(given, given.call("Unregister", job=given.job))


def _account(given: Given, answer: hookcall.Answer) -> int:
    """Print a signed-off record."""
    if "json" in given.options:
        return _print(answer["record"])
    sys.stdout.write(answer["classad"])
    return 0


def _list(given: Given) -> int:
    for job in given.call("List")["jobs"]:
        parent = job.get("parent") or "-"
        sys.stdout.write(f"{job['id']} {job['owner']} {job['phase']} {len(job['pids'])} {parent}\n")
    return 0


def _dump(given: Given) -> int:
    return _print(given.call("List")["jobs"])


def _snapshot(given: Given) -> int:
    given.call("Snapshot")
    return 0


def _quit(given: Given) -> int:
    given.call("Quit")
    return 0


def _monitor(given: Given) -> int:
    from acctd import hookmonitor

    return hookmonitor.run(given)


def _chirp(given: Given) -> int:
    from acctd import hookchirp

    return hookchirp.run(given)


def _exec(given: Given) -> int:
    if not given.command:
        raise hookcall.UsageError("exec needs a command, after --")
    if {"fail-open", "fail-closed"} <= given.options.keys():
        raise hookcall.UsageError("exec takes --fail-open or --fail-closed, not both")
    from acctd import hookexec  # only here: the other verbs need none of it

    return hookexec.run(
        given.path, given.job, given.command, user=given.one("user"), fail_open="fail-open" in given.options
    )


# What is known: options, verbs, and the help made of them

_LIMITS = (
    "memory", "memory-soft", "swap", "memory-policy", "cpus", "cpu-burst", "cpu-shares", "cpuset", "pids",
)  # fmt: skip
_ISOLATION = ("pid-namespace", "scratch", "chroot", "no-new-privs")
_OOM = ("oom", "oom-ceiling", "oom-deadline")
_SEVERAL = {"tag", "class", "scratch", "request", "slot"}

# What stands for the value ("": a flag), and what it means.
_OPTIONS = {
    "job": ("ID", "which job"),
    "socket": ("PATH", f"the agent's socket; else $ACCTD_SOCKET, else {_SOCKET}"),
    "parent": ("ID", "make it a family inside that job"),
    "pid": ("PID", "a running process"),
    "watcher": ("PID", "give the job up when this process ends"),
    "interval": ("S", "read it at least every S seconds"),
    "tag": ("KEY=VALUE", "for the record; may be given several times"),
    "user": ("USER", "the job's owner, a name or number"),
    "network": ("MODE", "nat (own pipe), host, none or parent"),
    "class": ("NAME=CIDR,...", "count what goes there by itself; may be given several times"),
    "memory": ("BYTES", "hard limit; K, M, G and T are powers of 1024, as in all sizes"),
    "memory-soft": ("BYTES", "what it is squeezed to when the host runs short of memory"),
    "swap": ("BYTES", "limit of swap, beside the memory"),
    "cpus": ("N", "cores, such as 1.5"),
    "cpu-burst": ("S", "s of CPU that unused quota may save up, to go beyond it"),
    "cpu-shares": ("N", "weight among busy jobs; 1024 is one ordinary job"),
    "cpuset": ("LIST", "CPUs it may run on, such as 0-3,8; or linear:N, N cores for itself"),
    "pids": ("N", "limit of processes and threads"),
    "memory-policy": ("POLICY", "what becomes of --memory: hard, soft, custom (both as given) or none"),
    "request": ("SYSTEM:NAME=VALUE,...", "limits in the words of gridengine, slurm or htcondor"),
    "reclaim": ("", "where more is in use, have the kernel make room first"),
    "oom": ("ACTION", "when the memory runs out: kernel, kill, hold, grow or exec"),
    "oom-ceiling": ("BYTES", "how far grow may raise the limit"),
    "oom-deadline": ("S", "how long its processes wait at most for a decision"),
    "pid-namespace": ("", "its processes see each other and no others"),
    "scratch": ("DIR", "make this directory the job's own, gone with it; may be given several times"),
    "chroot": ("NAME", "a root directory of the configuration"),
    "no-new-privs": ("", "no set-user-id program gives it rights"),
    "environment": ("NAME=VALUE", "processes that carry this in their environment"),
    "login": ("USER", "processes of this user"),
    "group": ("GID", "processes with this supplementary group"),
    "fail-open": ("", "where no agent answers, start the command unaccounted and put that on record"),
    "fail-closed": ("", "where no agent answers, do not start it; the default"),
    "exit-code": ("N", "how the job's main process ended"),
    "exit-signal": ("N", "the signal that ended it"),
    "json": ("", "all of it, as JSON"),
    "classad": ("", "as a ClassAd"),
    "state": ("PATH", "the file that keeps what was reported"),
    "metrics": ("LIST", "SUM:NAME,PEAK:NAME,...; names as in usage --classad"),
    "slot": ("NAME", "report this slot from the start, or several: slot1_1-64; may be given several times"),
}  # fmt: skip

# What does it, the words it takes, what it does, its options.
_VERBS = {
    "create": (
        _create, "", "Make a job's cgroups and pipe. Prints what a launcher needs, as JSON.",
        (
            "job", "user", "network", "class", "tag", "parent", "watcher", "interval", *_LIMITS, "request", *_OOM,
            *_ISOLATION,
        ),
    ),
    "limit": (
        _limit, "", "Change the limits of a job that is there; those not named stay. Prints them all, as JSON.",
        ("job", *_LIMITS, "reclaim"),
    ),
    "exec": (
        _exec, "-- COMMAND...", "Enter a job: its pipe and its cgroups, as its owner; then become the command.",
        ("job", "fail-open", "fail-closed", "user"),
    ),
    "attach": (_attach, "PID", "Put a running process, and what it starts from now on, into a job.", ("job",)),
    "register": (
        _register, "", "Take a running process and its descendants as a new family. Prints what was made, as JSON.",
        ("job", "pid", "parent", "watcher", "interval", "tag"),
    ),
    "track": (
        _track, "", "Put a process into a job; or all, now and later, that share a mark. Prints the pids found.",
        ("job", "pid", "environment", "login", "group"),
    ),
    "unregister": (
        _unregister, "", "End a family but not its processes, which go on in its parent. Prints its record.",
        ("job", "json"),
    ),
    "usage": (_usage, "", "What a job has used, read now; in procd_ctl's words.", ("job", "classad", "json")),
    "signal": (_signal, "NUMBER", "Send a signal to every process of a job.", ("job",)),
    "suspend": (_suspend, "", "Stop every process of a job.", ("job",)),
    "continue": (_continue, "", "Let a suspended job go on.", ("job",)),
    "kill": (_kill, "", "End every process of a job. The job stays until it is finished.", ("job",)),
    "finish": (
        _finish, "", "End what is left, read for the last time, print the record. Twice is fine.",
        ("job", "exit-code", "exit-signal", "json"),
    ),
    "list": (_list, "", "One line a job: id, owner, phase, processes, parent.", ()),
    "dump": (_dump, "", "All that is known of every job, as JSON.", ()),
    "chirp": (
        _chirp, "[FILE]", "Tell a job's starter by Chirp what the job uses. FILE, its .chirp.config, holds where.",
        ("job",),
    ),
    "monitor": (
        _monitor, "", "What the jobs of each slot have used since the last report, for condor_startd's cron.",
        ("state", "metrics", "slot"),
    ),
    "snapshot": (_snapshot, "", "Read all jobs now.", ()),
    "quit": (_quit, "", "Stop the agent. Jobs go on.", ()),
}  # fmt: skip


def _help() -> str:
    lines = ["usage: acctd-hook [--socket PATH] VERB [--job ID] [OPTIONS]", ""]
    lines += [f"  {verb:<11}{about}" for verb, (_, _, about, _) in _VERBS.items()]
    lines += ["", "acctd-hook VERB --help tells a verb's options. Exit codes: 0 done; 64 the call makes no sense;"]
    lines += ["66 no such job; 69 no agent answers; 71 the kernel refused; 73 taken; 75 try later; 77 not permitted."]
    return "\n".join(lines) + "\n"


def _help_of(verb: str) -> str:
    _, words, about, options = _VERBS[verb]
    job = " --job ID" if "job" in options else ""
    more = " [OPTIONS]" if set(options) - {"job"} else ""
    lines = [f"usage: acctd-hook {verb}{job}{more}{' ' if words else ''}{words}", "", about, ""]
    for name in (*options, "socket"):
        what, meaning = _OPTIONS[name]
        option = f"--{name} {what}".rstrip()
        lines.append(f"  {option:<24} {meaning}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
