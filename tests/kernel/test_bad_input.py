"""What a user gets wrong: one clear sentence, the code that says what kind of trouble, and nothing left behind.

The codes are those of docs/exit-codes.md. That nothing is left is checked by the node fixture after every test.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from acctd.ledger import FILE, Ledger
from tests.kernel.conftest import Node

USAGE, NOINPUT, UNAVAILABLE, SOFTWARE, OSERR, CANTCREAT, IO, TEMPFAIL, NOPERM, CONFIG = (
    64,
    66,
    69,
    70,
    71,
    73,
    74,
    75,
    77,
    78,
)


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> str:
    """One sentence on stderr with all the words in it, nothing on stdout, and the code."""
    assert "Traceback" not in done.stderr
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert done.stderr.startswith("acctd: ")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("\n")
    assert len(done.stderr) < 600
    for word in words:
        assert word in done.stderr
    return done.stderr


def run(node: Node, *options: str) -> subprocess.CompletedProcess[str]:
    """A job that would show that it ran."""
    done = node.acctd("run", *options, "--", "touch", f"{node.directory}/ran")
    assert not (node.directory / "ran").exists()
    with Ledger(node.directory / "state" / FILE) as ledger:
        assert ledger.records() == []
    return done


def configure(node: Node, text: str) -> None:
    """One more line for a table of the configuration file."""
    table, line = text.split("\n")
    before = node.config.read_text()
    assert f"{table}\n" in before
    node.config.write_text(before.replace(f"{table}\n", f"{table}\n{line}\n"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--memory", "1"], ["memory 1 ", "out of range", "1048576"]),
        (["--memory", "-5"], ["memory '-5'"]),
        (["--memory", "12Q"], ["memory '12Q'", "512M"]),
        (["--memory", ""], ["memory ''"]),
        (["--memory", "nan"], ["memory 'nan'"]),
        (["--memory", "9999999P"], ["memory '9999999P'", "2^63-1"]),
        (["--memory-soft", "2Q"], ["memory_soft '2Q'"]),
        (["--memory", "10M", "--memory-soft", "20M"], ["memory_soft 20971520", "memory 10485760"]),
        (["--swap", "10M"], ["swap 10485760", "memory"]),
        (["--memory", "10M", "--swap", "-1"], ["swap '-1'"]),
        (["--cpus", "0"], ["cpus 0", "out of range"]),
        (["--cpus", "-1"], ["cpus -1", "out of range"]),
        (["--cpus", "nan"], ["--cpus 'nan'", "no number"]),
        (["--cpus", "inf"], ["--cpus 'inf'", "no number"]),
        (["--cpus", "two"], ["--cpus", "two"]),
        (["--cpu-shares", "1"], ["cpu_shares 1 "]),
        (["--cpu-shares", "1.5"], ["--cpu-shares", "1.5"]),
        (["--cpuset", "a"], ["cpuset 'a'"]),
        (["--cpuset", ""], ["cpuset ''"]),
        (["--pids", "0"], ["pids 0 ", "out of range"]),
        (["--pids", "99999999999"], ["pids 99999999999 "]),
    ],
)
def test_limits_of_nonsense(node: Node, options: list[str], words: list[str]) -> None:
    refused(run(node, *options), USAGE, *words)


@pytest.mark.parametrize("cpuset", ["99", "3-1", "0,4095", "99999999999"])
def test_cpus_this_host_does_not_have(node: Node, cpuset: str) -> None:
    refused(run(node, "--cpuset", cpuset), OSERR, "cpuset", cpuset)


def test_a_limit_below_what_is_in_use(node: Node) -> None:
    """A job starts with no usage, and one MiB is what starting takes: the kernel ends what outgrows its limit."""
    done = node.acctd("run", "-q", "--memory", "1M", "--", "python3", "-c", "x = bytearray(50 << 20)")
    assert done.returncode == 137
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "job",
    ["", "a/b", "/etc", "..", "../x", "a..b", "x" * 300, "two\nlines", "a b", "-x", ".hidden", "a\udcff", "é", "%s"],
)
def test_ids_that_name_no_job(node: Node, job: str) -> None:
    refused(run(node, f"--id={job}"), USAGE, "job id")


def test_an_id_in_use_and_the_job_that_has_it_goes_on(node: Node) -> None:
    argv = node.argv("run", "-q", "--id", "mine", "--", "sh", "-c", "echo up; read line; echo $line")
    child = node.topology.popen(
        node.topology.node, argv, env=node.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    refused(run(node, "--id", "mine"), CANTCREAT, "'mine'", "in use")
    assert child.communicate("still here\n", timeout=30)[0] == "still here\n"
    assert child.returncode == 0


def test_a_cgroup_in_use_by_an_agent_with_another_ledger(node: Node) -> None:
    """Same base, same id, other state: nobody's processes may be ended for that."""
    other = node.directory / "other.toml"
    other.write_text(node.config.read_text().replace("/state", "/state2").replace("/run", "/run2"))
    argv = node.argv(
        "run", "-q", "--network", "none", "--id", "mine", "--", "sh", "-c", "echo up; read line; echo $line"
    )
    child = node.topology.popen(
        node.topology.node, argv, env=node.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    refused(
        run(node, "--config", str(other), "--network", "none", "--id", "mine"), CANTCREAT, "job_mine exists already"
    )
    with Ledger(node.directory / "state2" / FILE) as ledger:
        assert ledger.open_jobs() == []
    assert child.communicate("still here\n", timeout=30)[0] == "still here\n"
    assert child.returncode == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--internal", "campus"], ["class Internal", "'campus'", "no CIDR"]),
        (["--internal", "10.0.0.1/8"], ["10.0.0.1/8", "host bits"]),
        (["--internal", "10.0.0.0/33"], ["10.0.0.0/33"]),
        (["--internal", ""], ["class Internal is empty"]),
        (["--internal", "10.0.0.0/8,10.1.0.0/16"], ["class Internal overlaps itself", "10.1.0.0/16", "10.0.0.0/8"]),
        (["--internal", "10.0.0.0/8", "--internal", "10.0.0.0/8"], ["class Internal overlaps itself"]),
        (["--class", "S3=192.0.2.0/24", "--class", "Lhc=192.0.2.0/24"], ["192.0.2.0/24", "S3", "Lhc"]),
        (["--class", "S3=192.0.2.0/24", "--class", "S3=198.51.100.0/24"], ["class S3 is given twice"]),
        (["--class", "S3"], ["class 'S3'", "NAME=CIDR"]),
        (["--class", "s3=192.0.2.0/24"], ["class name 's3'"]),
        (["--class", "S 3=192.0.2.0/24"], ["class name 'S 3'"]),
        (["--class", "External=192.0.2.0/24"], ["External"]),
        (["--class", "=192.0.2.0/24"], ["class name ''"]),
    ],
)
def test_destination_classes(node: Node, options: list[str], words: list[str]) -> None:
    refused(run(node, *options), USAGE, *words)


@pytest.mark.parametrize(
    ("tag", "words"),
    [("noequals", ["KEY=VALUE"]), ("1a=x", ["tag key '1a'"]), ("a-b=x", ["tag key 'a-b'"]), ("=x", ["tag key ''"]),
     ("Key=" + "x" * 4097, ["tag Key"]), ("Key=\udcff", ["tag Key", "UTF-8"])],
)  # fmt: skip
def test_tags(node: Node, tag: str, words: list[str]) -> None:
    refused(run(node, "--tag", tag), USAGE, *words)


def test_tags_that_a_classad_cannot_tell_apart(node: Node) -> None:
    refused(run(node, "--tag", "Project=x", "--tag", "PROJECT=y"), USAGE, "Project", "PROJECT")
    refused(run(node, "--tag", "Project=x", "--tag", "Project=y"), USAGE, "Project", "twice")


@pytest.mark.parametrize("user", ["no-such-user", "", "99999999999999999999", "424242", "²", "a\udcff", "-1"])
def test_a_user_who_does_not_exist(node: Node, user: str) -> None:
    refused(run(node, f"--user={user}"), NOINPUT, "user", "does not exist")


def test_an_exhausted_pool(node: Node) -> None:
    configure(node, '[network]\npool4 = "10.181.64.0/30"')
    argv = node.argv("run", "-q", "--", "sh", "-c", "echo up; read line")
    child = node.topology.popen(
        node.topology.node, argv, env=node.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    refused(run(node), TEMPFAIL, "pool is exhausted", "network.pool4")
    child.communicate("\n", timeout=30)
    assert child.returncode == 0
    assert node.acctd("run", "-q", "--", "true").returncode == 0


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [("no-such-command", 127, "not found"), ("/no/such/path", 127, "not found"), ("/etc/passwd", 126, "executable"),
     ("/tmp", 126, "cannot be executed"), ("/etc/passwd/x", 127, "not found"), ("", 127, "not found")],
)  # fmt: skip
def test_commands_that_cannot_start(node: Node, command: str, code: int, words: str) -> None:
    refused(node.acctd("run", "--id", "x", "--", command), code, f"command {command!r}", words)
    with Ledger(node.directory / "state" / FILE) as ledger:
        assert ledger.records() == []


def test_a_command_the_owner_may_not_execute(node: Node) -> None:
    script = node.directory / "private"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o700)
    refused(node.acctd("run", "--user", "nobody", "--", str(script)), 126, "Permission denied", "owner")


@pytest.mark.parametrize("arguments", [["run"], ["run", "--"], ["run", "-q", "--id", "x"]])
def test_no_command(node: Node, arguments: list[str]) -> None:
    refused(node.acctd(*arguments), USAGE, "COMMAND")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["run", "--memroy", "1G", "--", "true"], "--memroy"), (["run", "--network", "bridge", "--", "true"], "bridge"),
     (["run", "--memory"], "--memory"), (["walk"], "walk"), (["ls", "--limit", "0"], "--limit"), (["show"], "JOB"),
     (["show", "a", "b"], "b"), (["--verbose"], "--verbose"), (["config", "chekc"], "chekc")],
)  # fmt: skip
def test_options_and_subcommands_that_are_none(node: Node, arguments: list[str], word: str) -> None:
    refused(node.acctd(*arguments), USAGE, word)


@pytest.mark.parametrize("option", ["--json", "--classad"])
def test_a_file_that_cannot_be_written(node: Node, option: str) -> None:
    refused(run(node, option, f"{node.directory}/no/such"), NOINPUT, option, f"{node.directory}/no/such")
    refused(run(node, option, str(node.directory)), SOFTWARE, option, "directory")
    refused(run(node, option, f"{node.config}/below"), SOFTWARE, option)
    refused(run(node, option, ""), NOINPUT, option)


def test_a_file_on_a_full_device_is_one_sentence_and_the_record_is_kept(node: Node) -> None:
    done = node.acctd("run", "-q", "--id", "full", "--json", "/dev/full", "--", "true")
    refused(done, SOFTWARE, "--json /dev/full", "No space left")
    assert node.acctd("show", "full").returncode == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('[cgroup]\ncontrollers = ["memory", "disk"]', ["cgroup.controllers 'disk'", "memory, cpu"]),
        ("[cgroup]\ncontrollers = []", ["cgroup.controllers"]),
        ("[cgroup]\nbsae = 1", ["cgroup.bsae", "cgroup.base"]),
        ("[cgroup]\ncontrollers = 7", ["cgroup.controllers 7"]),
        ('[network]\npool4 = "10.0.0.0/31"', ["network.pool4", "10.0.0.0/31", "/30"]),
        ('[network]\npool4 = "fd00::/64"', ["network.pool4"]),
        ('[network]\npool6 = "fd00::/128"', ["network.pool6"]),
        ('[network]\nmode = "bridge"', ["network.mode", "bridge"]),
        ('[network]\nclasses = {Internal = ["10.0.0.0/8", "10.1.0.0/16"]}', ["network.classes", "overlaps itself"]),
        ("[network]\nclasses = {Internal = []}", ["network.classes", "Internal is empty"]),
        ("[network]\ncolour = 1", ["network.colour"]),
        ("[network]\n= broken", ["TOML"]),
    ],
)
def test_a_mistake_in_the_configuration(node: Node, line: str, words: list[str]) -> None:
    configure(node, line)
    refused(run(node), CONFIG, str(node.config), *words)


@pytest.mark.parametrize("base", ["../up", "/abs", "a//b", ""])
def test_a_base_that_leaves_the_hierarchy(node: Node, base: str) -> None:
    node.config.write_text(node.config.read_text().replace(f'"{node.base}"', f'"{base}"'))
    refused(run(node), CONFIG, "cgroup.base")


def test_a_configuration_file_that_is_not_there(node: Node) -> None:
    refused(run(node, "--config", f"{node.directory}/none.toml"), NOINPUT, f"{node.directory}/none.toml")
    refused(run(node, "--config", str(node.directory)), CONFIG, "directory")


def test_a_limit_whose_controller_is_not_wanted(node: Node) -> None:
    configure(node, '[cgroup]\ncontrollers = ["cpu", "cpuacct", "freezer"]')
    refused(run(node, "--pids", "5"), UNAVAILABLE, "pids cannot be limited", "no pids controller")


def test_a_state_directory_that_is_none(node: Node) -> None:
    (node.directory / "file").write_text("")
    node.config.write_text(node.config.read_text().replace(f"{node.directory}/state", f"{node.directory}/file/state"))
    refused(node.acctd("run", "--", "true"), SOFTWARE, f"{node.directory}/file/state")


def test_a_ledger_that_is_garbage(node: Node) -> None:
    path = node.directory / "other"
    path.mkdir()
    (path / FILE).write_bytes(b"no database" * 1000)
    node.config.write_text(node.config.read_text().replace(f"{node.directory}/state", str(path)))
    for arguments in (["run", "--", "true"], ["ls"], ["show", "x"]):
        refused(node.acctd(*arguments), IO, str(path / FILE))


@pytest.fixture
def open_way(node: Node) -> Iterator[Node]:
    """A configuration that any user may read, with a state directory of that user's own."""
    with tempfile.TemporaryDirectory(prefix="acctdtest-") as place:
        os.chmod(place, 0o755)  # noqa: S103  # that is the point
        own = Path(place, "own")
        own.mkdir()
        os.chown(own, 65534, 65534)
        config = Path(place, "acctd.toml")
        config.write_text(node.config.read_text().replace(str(node.directory), str(own)))
        yield replace(node, config=config)


def test_no_root(open_way: Node) -> None:
    node = open_way
    # The modules are loaded as root: nobody may not be able to read the place where the tests are.
    script = (
        "import os, sys, acctd.cli.run; from acctd.cli.main import main; "
        "os.setgroups([]); os.setresgid(*[65534] * 3); os.setresuid(*[65534] * 3); main(sys.argv[1:])"
    )
    argv = [sys.executable, "-c", script]
    options: dict[str, Any] = {"env": node.environ, "capture_output": True, "text": True, "check": False, "cwd": "/"}
    done = node.topology.run(node.topology.node, [*argv, "run", "--", "true"], **options)
    refused(done, NOPERM, "root")
    done = node.topology.run(
        node.topology.node, [*argv, "run", "--user", "nobody", "--memory", "1G", "--", "true"], **options
    )
    refused(done, NOPERM, "root")


def hidden(node: Node, pattern: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """acctd on a node where the libraries that match are nothing; seen by this one process alone."""
    libraries = sorted(str(path.resolve()) for path in Path("/usr/lib").glob(pattern))
    assert libraries
    script = f'for library in {" ".join(libraries)}; do mount --bind /dev/null "$library"; done; exec "$@"'
    argv = ["unshare", "--mount", "sh", "-ec", script, "sh", *node.argv(*arguments)]
    return node.topology.run(
        node.topology.node, argv, check=False, text=True, capture_output=True, env=node.environ, timeout=60
    )


def test_no_libnftables(node: Node) -> None:
    node.config.write_text(node.config.read_text().replace('"auto"', '"nftables"'))
    refused(hidden(node, "*/libnftables.so.1*", "run", "--", "true"), UNAVAILABLE, "libnftables")


def test_no_iptables_libraries(node: Node) -> None:
    node.config.write_text(node.config.read_text().replace('"auto"', '"iptables"'))
    refused(hidden(node, "*/libxtables.so.12*", "run", "--", "true"), UNAVAILABLE, "install")


def test_no_netfilter_at_all(node: Node) -> None:
    done = hidden(node, "*/lib*tables.so.1*", "run", "--", "true")
    refused(done, UNAVAILABLE, "no netfilter back end works here", "nftables", "iptables", "--network host")
    assert hidden(node, "*/lib*tables.so.1*", "run", "-q", "--network", "none", "--", "true").returncode == 0


def test_a_refused_job_costs_no_id_and_no_lease(node: Node) -> None:
    """What was refused is as if it had never been asked for."""
    for _ in range(3):
        refused(run(node, "--cpuset", "99"), OSERR)
        refused(node.acctd("run", "--", "/no/such"), 127)
    path = node.directory / "record"
    assert node.acctd("run", "-q", "--id", "same", "--json", str(path), "--", "true").returncode == 0
    assert json.loads(path.read_text())["id"] == "same"
