"""The helper that becomes the command: bad calls, bad plans, commands that cannot start, and how little it loads."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HOOK = Path(__file__).parents[2] / "acctd" / "helper.py"
ARGV = [sys.executable, "-I", "-S", str(HOOK)]


def run(*arguments, **options):
    return subprocess.run([*ARGV, *arguments], capture_output=True, text=True, check=False, timeout=30, **options)


def launch(command, plan=None, pass_fds=(), **options):
    """The helper with a plan, and what it says on the status pipe."""
    plan_read, plan_write = os.pipe()
    status_read, status_write = os.pipe()
    whole = {
        "netns": None, "join": [], "uid": os.getuid(), "gid": os.getgid(), "groups": os.getgroups(), "blocked": [],
        "status": status_write, "isolation": None,
    } | (plan or {})  # fmt: skip
    os.set_inheritable(status_write, False)
    os.write(plan_write, json.dumps(whole).encode())
    os.close(plan_write)
    argv = [*ARGV, "exec", "--plan-fd", str(plan_read), "--", *command]
    with subprocess.Popen(
        argv,
        pass_fds=[plan_read, status_write, *pass_fds],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    ) as process:
        os.close(status_write)
        os.close(plan_read)
        with open(status_read) as status:
            lines = status.read().splitlines()
        said = "\n".join(line for line in lines if not line.startswith('{"started": '))
        assert len(lines) <= 2
        out, err = process.communicate(timeout=30)
    return process.returncode, out, err, said


@pytest.mark.parametrize(
    "arguments",
    [(), ("exec",), ("exec", "--plan-fd", "0", "--"), ("exec", "--plan-fd", "x", "--", "true"), ("--help",),
     ("exec", "--plan-fd", "-1", "--", "true"), ("exec", "--plan-fd", "0", "true", "x"),
     ("run", "--plan-fd", "0", "--", "true"), ("exec", "--plan-fd", "²", "--", "true")],
)  # fmt: skip
def test_a_call_it_does_not_know_is_one_sentence(arguments):
    done = run(*arguments, stdin=subprocess.DEVNULL)
    assert done.returncode == 64
    assert done.stderr.startswith("acctd helper: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("plan", ["", "{", "[]", "7", '"text"', "{}", '{"netns": null}', "\x00"])
def test_a_plan_that_is_none_is_one_sentence(plan):
    done = run("exec", "--plan-fd", "0", "--", "true", input=plan)
    assert (done.returncode, done.stderr.count("\n")) == (64, 1), done.stderr
    assert "no plan on descriptor 0" in done.stderr


def test_a_closed_descriptor_is_one_sentence():
    done = run("exec", "--plan-fd", "77", "--", "true")
    assert (done.returncode, done.stderr.count("\n")) == (64, 1)


def test_the_command_takes_its_place_without_a_word():
    code, out, err, said = launch(["sh", "-c", "echo $PPID; exit 9"])
    assert (code, err, said) == (9, "", "")
    assert out.strip() == str(os.getpid())


@pytest.mark.parametrize(
    ("command", "code"),
    [("/no/such", 127), ("no-such-command-anywhere", 127), ("/etc/passwd/x", 127), ("/", 126), ("/etc/passwd", 126),
     ("./", 126), ("", 127)],
)  # fmt: skip
def test_what_cannot_be_started_is_told_by_code_and_on_the_pipe(command, code):
    done, out, err, said = launch([command])
    assert (done, out, err) == (code, "", "")
    assert json.loads(said)["what"] == f"start {command}"


def test_a_file_that_is_no_program(tmp_path):
    path = tmp_path / "text"
    path.write_text("words\n")
    path.chmod(0o755)
    code, _, _, said = launch([str(path)])
    assert code == 126
    assert os.strerror(json.loads(said)["errno"]) == "Exec format error"


def test_a_missing_interpreter_is_not_found(tmp_path):
    path = tmp_path / "script"
    path.write_text("#!/no/such/interpreter\n")
    path.chmod(0o755)
    assert launch([str(path)])[0] == 127


def test_a_join_that_fails_starts_nothing():
    code, out, _, said = launch(["echo", "ran"], {"join": [[999, "/a/cgroup"]]})
    assert (code, out) == (125, "")
    assert json.loads(said) == {"what": "join /a/cgroup", "errno": errno.EBADF}


def test_a_namespace_that_is_none_starts_nothing():
    code, out, _, said = launch(["echo", "ran"], {"netns": 0}, stdin=subprocess.DEVNULL)
    assert (code, out) == (125, "")
    assert json.loads(said)["what"] == "enter the job's network"


def test_it_joins_before_it_gives_up_its_rights(tmp_path):
    joined = tmp_path / "cgroup.procs"
    joined.touch(mode=0o600)
    with open(joined, "wb") as door:
        plan = {"join": [[door.fileno(), "/a/cgroup"]], "uid": 65534, "gid": 65534, "groups": [65534]}
        code, out, _, said = launch(["id", "-u"], plan, pass_fds=[door.fileno()])
    assert (code, out, said) == (0, "65534\n", "")
    assert joined.read_text() == "0"


def test_the_command_inherits_no_descriptor_of_the_agents():
    code, out, _, _ = launch(["sh", "-c", "ls /proc/self/fd | wc -l"])
    assert (code, out.strip()) == (0, "4")  # 0, 1, 2 and the directory that ls itself has open


def test_signals_are_as_the_plan_says_and_none_is_ignored_for_pythons_sake():
    plan = {"blocked": [int(signal.SIGUSR1)]}
    _, out, _, _ = launch(["cat", "/proc/self/status"], plan)
    masks = {
        line.split(":")[0]: int(line.split()[1], 16)
        for line in out.splitlines()
        if line.startswith("Sig") and "/" not in line
    }
    assert masks["SigBlk"] == 1 << (signal.SIGUSR1 - 1)
    assert not masks["SigIgn"] & (1 << (signal.SIGPIPE - 1) | 1 << (signal.SIGXFSZ - 1))


def test_it_loads_little():
    """A job waits for every module; the heavy ones are named so that a new import is noticed here."""
    code = f"exec(compile(open({str(HOOK)!r}).read(), 'hook', 'exec'), {{'__name__': 'hook'}}); print(*sys.modules)"
    done = subprocess.run([*ARGV[:3], "-c", f"import sys; {code}"], capture_output=True, text=True, check=True)
    heavy = {"ctypes", "subprocess", "argparse", "pathlib", "logging", "typing", "socket", "acctd", "asyncio", "click"}
    assert "json" in done.stdout.split()
    assert not heavy & set(done.stdout.split())
