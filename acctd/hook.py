"""acctd-hook: what a starter calls. Talks to the agent over its socket; standard library only, so that it starts fast.

    acctd-hook [--socket PATH] VERB --job ID [OPTIONS]

`create` makes a job, `exec` enters it and becomes a command, `attach PID` puts a running process in, `usage` tells what
it has used, `signal N`, `suspend`, `continue` and `kill` act on all of its processes, `finish` reads for the last time
and prints the record. Without a job: `list`, `dump`, `snapshot`, `quit`. Imports nothing of the agent but helper.py,
which imports nothing either. Exit codes: docs/exit-codes.md.
"""

import json
import os
import socket
import sys

EXIT_USAGE, EXIT_UNAVAILABLE, EXIT_SOFTWARE = 64, 69, 70
_CODES = {
    "UsageError": 64, "NotFound": 66, "Unavailable": 69, "Failed": 70, "KernelRefused": 71, "InUse": 73,
    "Exhausted": 75, "NotPermitted": 77, "InvalidParameter": 64, "MethodNotFound": 69,
}  # fmt: skip
_DEFAULT_SOCKET = "/run/acctd/acctd.sock"
_TIMEOUT = 60.0  # s; a finish may wait 10 s for processes that do not want to die
_LIMITS = {"memory", "memory-soft", "swap", "cpus", "cpu-shares", "cpuset", "pids"}

USAGE = """\
usage: acctd-hook [--socket PATH] VERB --job ID [OPTIONS]
  create   [--user USER] [--network nat|host|none] [--class NAME=CIDR,...] [--tag KEY=VALUE] [--memory BYTES] ...
  exec     [--fail-open | --fail-closed] -- COMMAND...
  attach   PID
  usage    [--json]
  signal   NUMBER
  suspend | continue | kill
  finish   [--exit-code N | --exit-signal N] [--json]
  list | dump | snapshot | quit          (no job)"""


class HookError(Exception):
    """One sentence for the caller, and the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def main() -> None:
    """Entry point."""
    try:
        sys.exit(run(sys.argv[1:]))
    except HookError as e:
        sys.stderr.write(f"acctd-hook: {e}\n")
        sys.exit(e.code)


def run(argv: list[str]) -> int:
    """One call; its exit code. Raises HookError."""
    path, rest = os.environ.get("ACCTD_SOCKET") or _DEFAULT_SOCKET, argv
    if rest[:1] == ["--socket"] and len(rest) > 1:
        path, rest = rest[1], rest[2:]
    if not rest or rest[0] in ("-h", "--help"):
        sys.stdout.write(USAGE + "\n")
        return 0 if rest else EXIT_USAGE
    verb, (words, options, command) = rest[0], _split(rest[1:])
    act = _VERBS.get(verb)
    if act is None:
        raise HookError(f"verb {verb!r} is none; it is one of {', '.join(_VERBS)}", EXIT_USAGE)
    return int(act(path, words, options, command))


def _split(arguments: list[str]) -> tuple[list[str], dict[str, list[str]], list[str]]:
    """Words, options with their values, and what follows "--"."""
    words: list[str] = []
    options: dict[str, list[str]] = {}
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            return words, options, list(rest)
        if not argument.startswith("--"):
            words.append(argument)
        elif argument in ("--json", "--fail-open", "--fail-closed"):
            options[argument[2:]] = []
        else:
            name, equals, value = argument[2:].partition("=")
            found = value if equals else next(rest, None)
            if found is None:
                raise HookError(f"option --{name} needs a value", EXIT_USAGE)
            options.setdefault(name, []).append(found)
    return words, options, []


def call(path: str, method: str, **parameters: object) -> dict:  # type: ignore[type-arg]  # JSON as it came
    """One varlink call. Raises HookError, EXIT_UNAVAILABLE where no agent answers."""
    request = {"method": f"org.acctd.Node.{method}", "parameters": parameters}
    try:
        with socket.socket(socket.AF_UNIX) as agent:
            agent.settimeout(_TIMEOUT)
            agent.connect(path)
            agent.sendall(json.dumps(request).encode() + b"\0")
            data = b""
            while not data.endswith(b"\0"):
                received = agent.recv(1 << 16)
                if not received:
                    raise HookError(f"the agent at {path} hung up; see its log", EXIT_UNAVAILABLE)
                data += received
    except OSError as e:
        reason = e.strerror or str(e)
        raise HookError(f"no agent answers at {path} ({reason}); start acctd serve", EXIT_UNAVAILABLE) from None
    reply = json.loads(data[:-1])
    if "error" in reply:
        name = reply["error"].rpartition(".")[2]
        said = reply["parameters"].get("message") or f"{name}: {reply['parameters'].get('parameter', '')}"
        raise HookError(said, _CODES.get(name, EXIT_SOFTWARE))
    return dict(reply["parameters"])


def _job(options: dict[str, list[str]]) -> str:
    if len(options.get("job", [])) != 1:
        raise HookError("say which job with --job ID", EXIT_USAGE)
    return options["job"][0]


def _limit(name: str, text: str) -> object:
    if name == "cpuset":
        return text
    if name != "cpus":
        return _number(name, text)
    try:
        return float(text)
    except ValueError:
        raise HookError(f"cpus {text!r} is no number", EXIT_USAGE) from None


def _number(what: str, text: str) -> int:
    if not text.isascii() or not text.lstrip("-").isdecimal():
        raise HookError(f"{what} {text!r} is no number", EXIT_USAGE)
    return int(text)


def _pairs(options: dict[str, list[str]], name: str) -> dict[str, str]:
    found = {}
    for text in options.get(name, []):
        key, equals, value = text.partition("=")
        if not equals:
            raise HookError(f"--{name} {text!r} is not KEY=VALUE", EXIT_USAGE)
        found[key] = value
    return found


def _create(path: str, _words: list[str], options: dict[str, list[str]], _command: list[str]) -> int:
    limits: dict[str, object] = {}
    for name in _LIMITS & options.keys():
        limits[name.replace("-", "_")] = _limit(name, options[name][-1])
    unknown = options.keys() - _LIMITS - {"job", "user", "network", "class", "tag"}
    if unknown:
        raise HookError(f"option --{min(unknown)} is unknown to create; see --help", EXIT_USAGE)
    wanted = {"job": _job(options), "limits": limits, "tags": _pairs(options, "tag")}
    wanted["classes"] = {name: cidrs.split(",") for name, cidrs in _pairs(options, "class").items()}
    for name in ("user", "network"):
        if name in options:
            wanted[name] = options[name][-1]
    _print(call(path, "Create", **wanted))
    return 0


def _exec(path: str, _words: list[str], options: dict[str, list[str]], command: list[str]) -> int:
    if not command:
        raise HookError("exec needs a command after --", EXIT_USAGE)
    from acctd import helper  # only here: the other verbs need none of it

    job = _job(options)
    try:
        entry = call(path, "Entry", job=job)
    except HookError as e:
        if e.code != EXIT_UNAVAILABLE or "fail-open" not in options:
            raise
        sys.stderr.write(f"acctd-hook: {e}; job {job} starts unaccounted, as --fail-open asks\n")
        return helper.become(command)
    try:
        if entry["netns"] is not None:
            with open(entry["netns"], "rb") as namespace:
                helper.enter_network(namespace.fileno())
    except OSError as e:
        raise HookError(f"cannot enter the network of job {job}: {e.strerror}; run as root", 77) from None
    # Last before we give up our rights, so that little of Python's own doing is billed.
    call(path, "Attach", job=job)
    if os.geteuid() == 0:
        os.setgroups(entry["groups"])
        os.setresgid(entry["gid"], entry["gid"], entry["gid"])
        os.setresuid(entry["uid"], entry["uid"], entry["uid"])
        if entry["uid"] != 0:
            os.environ.update(entry["environment"])
    code = helper.become(command)
    sys.stderr.write(f"acctd-hook: command {command[0]!r} cannot be started; check its name, PATH and rights\n")
    return code


def _attach(path: str, words: list[str], options: dict[str, list[str]], _command: list[str]) -> int:
    if len(words) != 1:
        raise HookError("attach needs one pid", EXIT_USAGE)
    call(path, "Attach", job=_job(options), pid=_number("pid", words[0]))
    return 0


def _usage(path: str, _words: list[str], options: dict[str, list[str]], _command: list[str]) -> int:
    job = call(path, "Usage", job=_job(options))["job"]
    if "json" in options:
        _print(job)
        return 0
    totals = job["totals"]

    def total(name: str) -> int:
        return sum(totals.get(name, {}).values())

    # condor_procd's procd_ctl says it in these words.
    lines = [
        f"Number of Processes: {len(job['pids'])}",
        f"User CPU Time (s): {total('cpu_user') / 1e9:.6f}",
        f"System CPU Time (s): {total('cpu_system') / 1e9:.6f}",
        f"Maximum Image Size (KB): {-(-total('memory_peak') // 1024)}",
        f"Total Resident Set Size (KB): {-(-total('memory_resident') // 1024)}",
        f"Block Read Bytes: {total('block_read')}",
        f"Block Write Bytes: {total('block_write')}",
    ]
    lines += [f"Network {rule} Bytes: {count}" for rule, count in sorted(totals.get("network", {}).items())]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _signal(path: str, words: list[str], options: dict[str, list[str]], _command: list[str]) -> int:
    if len(words) != 1:
        raise HookError("signal needs one number", EXIT_USAGE)
    call(path, "Signal", job=_job(options), signal=_number("signal", words[0]))
    return 0


def _finish(path: str, _words: list[str], options: dict[str, list[str]], _command: list[str]) -> int:
    ending = {}
    for option, name in (("exit-code", "exit_code"), ("exit-signal", "exit_signal")):
        if option in options:
            ending[name] = _number(option, options[option][-1])
    answer = call(path, "Finish", job=_job(options), **ending)
    if "json" in options:
        _print(answer["record"])
    else:
        sys.stdout.write(answer["classad"])
    return 0


def _plain(method: str):  # type: ignore[no-untyped-def]  # a maker of verbs
    def act(path: str, _words: list[str], options: dict[str, list[str]], _command: list[str]) -> int:
        answer = call(path, method, job=_job(options))
        if answer.get("survivors"):
            raise HookError(f"processes {answer['survivors']} do not die on SIGKILL; see their state", 71)
        return 0

    return act


def _list(path: str, _words: list[str], _options: dict[str, list[str]], _command: list[str]) -> int:
    for job in call(path, "List")["jobs"]:
        sys.stdout.write(f"{job['id']} {job['owner']} {job['phase']} {len(job['pids'])}\n")
    return 0


def _dump(path: str, _words: list[str], _options: dict[str, list[str]], _command: list[str]) -> int:
    _print(call(path, "List")["jobs"])
    return 0


def _node(method: str):  # type: ignore[no-untyped-def]  # a maker of verbs
    def act(path: str, _words: list[str], _options: dict[str, list[str]], _command: list[str]) -> int:
        call(path, method)
        return 0

    return act


def _print(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


_VERBS = {
    "create": _create, "exec": _exec, "attach": _attach, "usage": _usage, "signal": _signal,
    "suspend": _plain("Suspend"), "continue": _plain("Continue"), "kill": _plain("Kill"), "finish": _finish,
    "list": _list, "dump": _dump, "snapshot": _node("Snapshot"), "quit": _node("Quit"),
}  # fmt: skip


if __name__ == "__main__":
    main()
