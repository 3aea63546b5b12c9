"""`acctd report` on a node: jobs that ran, one that runs, by root and by others."""

import json
import os
import re
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import acctd.cli.report  # noqa: F401  # what an ordinary user cannot load is loaded before
from acctd import tariff, varlink
from acctd.cli.output import Output
from acctd.errors import NotPermittedError
from tests.kernel.conftest import Node
from tests.kernel.served import Served
from tests.kernel.test_admin import NOBODY, as_nobody, let_in
from tests.unit.test_report_page import Reader

TARIFF = """
name = "site"
currency = "EUR"
[[period]]
valid_from = 2020-01-01
[[period.item]]
name = "CPU"
meter = "cpu"
unit = "core-hour"
price = 1000
"""

BUSY = """
import time
end = time.monotonic() + 1.5
held = []
while time.monotonic() < end:
    held.append(bytearray(1 << 20))
    sum(range(300_000))
"""


ASK = """
import socket, sys
made = socket.socket(socket.AF_UNIX)
made.connect(sys.argv[1])
made.sendall(sys.argv[2].encode() + bytes(1))
data = b""
while not data.endswith(bytes(1)):
    data += made.recv(65536)
sys.stdout.write(data[:-1].decode())
"""


def nobody_calls(served: Served, method: str, **parameters: object) -> dict[str, Any]:
    """An ordinary user's call, with no client of ours."""
    request = json.dumps({"method": f"{varlink.INTERFACE}.{method}", "parameters": parameters})
    person = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    argv = [*person, "/usr/bin/python3", "-c", ASK, str(served.path), request]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def report(node: Node, *arguments: str) -> str:
    done = node.acctd("report", *arguments, "--html", "-")
    assert done.returncode == 0, done.stderr
    Reader(done.stdout)
    return done.stdout


def test_a_job_that_ran_for_some_readings(node: Node) -> None:
    node.config.write_text(f"poll_interval = 0.2\n{node.config.read_text()}")
    record = node.job("--id", "busy", "--memory", "1G", "--network", "none", "--", "python3", "-c", BUSY)
    prices = node.directory / "tariff.toml"
    prices.write_text(TARIFF)
    text = report(node, "busy", "--tariff", str(prices))
    shown = Reader(text)
    assert {"Memory by kind", "CPU in cores"} <= set(shown.of("title"))
    assert f"{record['totals']['cpu_user']['']:,} ns" in text
    amounts = [float(text) for text in shown.of("td") if re.fullmatch(r"\d+\.\d\d", text)]
    used = sum(record["totals"][name][""] for name in ("cpu_user", "cpu_system"))
    assert round(used / 3.6e12 * 1000, 2) in amounts
    assert "busy" in report(node, "--node", "--tariff", str(prices))
    assert "1: 1 ended well" in report(node, "--user", "root")


def test_a_job_of_some_ms(node: Node) -> None:
    node.job("--id", "short", "--network", "none", "--", "true")
    assert "too short for advice" in report(node, "short")


def test_bad_questions(node: Node) -> None:
    node.job("--id", "there", "--network", "none", "--", "true")
    target = node.directory / "page.html"
    for arguments, code, words in (
        (["never-was"], 66, "never-was"),
        ([], 64, "one of JOB, --user NAME and --node"),
        (["there", "--node"], 64, "one of JOB"),
        (["there", "--since", "2026-01"], 64, "--since"),
        (["--node", "--since", "yesterday"], 64, "'yesterday' is no time"),
        (["there", "--tariff", "/nowhere.toml"], 66, "/nowhere.toml"),
    ):
        done = node.acctd("report", *arguments, "--html", str(target))
        assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
        assert words in done.stderr
    assert not target.exists()
    done = node.acctd("report", "there", "--html", str(node.directory / "no" / "page.html"))
    assert done.returncode == 66


def test_a_living_job_and_an_ordinary_user(served: Served, sleeper: Callable[[], subprocess.Popen[bytes]]) -> None:
    node = served.node
    node.config.write_text(f"poll_interval = 0.2\n{node.config.read_text()}")
    served.ok("Reload")
    served.ok("Create", job="mine", user="nobody", network="none", limits={"memory": 64 << 20})
    served.ok("Create", job="roots", network="none")
    unbegun = node.acctd("report", "mine", "--html", "-")
    assert (unbegun.returncode, "has not begun" in unbegun.stderr) == (66, True)
    for job in ("mine", "roots"):
        served.ok("Attach", job=job, pid=sleeper().pid)
    assert "still running" in report(node, "mine")

    let_in(served)
    environ = {"ACCTD_SOCKET": str(served.path)}

    def asked(*arguments: str) -> tuple[int, str, str]:
        return as_nobody("report", *arguments, "--html", "-", **environ)

    code, page, complaint = asked("mine")
    assert (code, complaint) == (0, "")
    assert "still running" in page
    assert asked("roots")[0] == 66
    began = {job["id"]: job["started"] for job in served.ok("List")["jobs"]}
    deadline = time.monotonic() + 30
    while served.ok("Usage", job="mine")["job"]["wall_ns"] < 1e9:  # five readings
        assert time.monotonic() < deadline
    served.ok("Finish", job="mine", exit_code=0)
    while "CPU in cores" not in (page := asked("mine")[1]):
        assert time.monotonic() < deadline, "samples of a job that has ended are kept"
    assert "done, exit 0" in page
    assert len(nobody_calls(served, "Samples", job="mine", started=began["mine"])["parameters"]["samples"]) >= 2
    for job, started in (("roots", began["roots"]), ("mine", began["mine"] + 1), ("never-was", 0.0)):
        refused = nobody_calls(served, "Samples", job=job, started=started)
        assert refused["error"].endswith(".NotFound"), refused
    assert served.ok("Samples", job="roots", started=began["roots"])["samples"] is not None
    assert "Jobs of nobody" in asked("--user", "nobody")[1]
    for others in (["--node"], ["--user", "root"]):
        code, page, complaint = asked(*others)
        assert (code, page, complaint.count("\n")) == (77, "", 1)
        assert "root" in complaint
    with tempfile.TemporaryDirectory(dir="/tmp") as made:  # pytest's directories are root's alone
        own = Path(made, "own")
        own.mkdir()
        os.chown(own, NOBODY.pw_uid, NOBODY.pw_gid)
        Path(made).chmod(0o711)
        code, _, _ = as_nobody("report", "--node", "--html", str(own / "page.html"), **environ)
        assert (code, list(own.iterdir())) == (77, []), "who is refused leaves no empty file"

        closed = Path(made, "closed")
        closed.mkdir(mode=0o700)
        (closed / "tariff.toml").write_text(TARIFF)
        Path(made, "acctd.toml").write_text(f'[bill]\ntariff = "{closed}/tariff.toml"\n')
        code, page, complaint = asked("mine", "--config", f"{made}/acctd.toml")
        assert (code, "The bill" in page) == (0, False)
        assert complaint.count("\n") == 1
        assert "may not be read by this user" in complaint
        Path(made, "tariff.toml").write_text(TARIFF)
        tariff.load(f"{made}/tariff.toml")  # with whatever that loads: the child may not
        code, page, complaint = asked("mine", "--tariff", f"{made}/tariff.toml")
        assert complaint == ""
        assert (code, "only your own jobs are seen" in page) == (0, True), "its tiers are of own jobs alone"


def test_files_that_only_their_own_inode_may_be_written_of(node: Node) -> None:
    """In a directory that its writer may not change, and where something is mounted on the file."""
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        Path(made).chmod(0o755)
        given = Path(made, "given.html")
        given.write_text("x" * 10_000)
        os.chown(given, NOBODY.pw_uid, NOBODY.pw_gid)
        shared = Path(made, "shared")
        shared.mkdir()
        shared.chmod(0o1777)
        (shared / "roots.html").write_text("root's")
        (shared / "roots.html").chmod(0o666)
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                os.setgroups([])
                os.setresgid(NOBODY.pw_gid, NOBODY.pw_gid, NOBODY.pw_gid)
                os.setresuid(NOBODY.pw_uid, NOBODY.pw_uid, NOBODY.pw_uid)
                Output("--html", str(given)).write("in place")
                try:
                    Output("--html", str(shared / "roots.html"))
                except NotPermittedError:
                    code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert given.read_text() == "in place"
        assert (shared / "roots.html").read_text() == "root's"

        node.job("--id", "there", "--network", "none", "--", "true")
        below, above = Path(made, "below.html"), Path(made, "above.html")
        below.write_text("x" * 1_000_000)
        above.write_text("")
        subprocess.run(["mount", "--bind", str(below), str(above)], check=True, timeout=60)
        try:
            done = node.acctd("report", "there", "--html", str(above))
        finally:
            subprocess.run(["umount", str(above)], check=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert below.read_text().endswith("</html>\n")
        assert sorted(path.name for path in Path(made).iterdir()) == [
            "above.html",
            "below.html",
            "given.html",
            "shared",
        ]


def test_the_file_is_the_readers_own(node: Node, tmp_path: Path) -> None:
    node.job("--id", "there", "--network", "none", "--", "true")
    target = tmp_path / "page.html"
    target.write_text("x" * 1_000_000)
    done = node.acctd("report", "there", "--html", str(target))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert target.read_text().endswith("</html>\n")
    new = tmp_path / "new.html"
    assert node.acctd("report", "--node", "--html", str(new)).returncode == 0
    assert stat.S_IMODE(new.stat().st_mode) == 0o600, "what the ledger has, others may not read"
