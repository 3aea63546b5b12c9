"""`acctd report` on a node: jobs that ran, one that runs, by root and by others."""

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import acctd.cli.report  # noqa: F401  # what an ordinary user cannot load is loaded before
from acctd import varlink
from tests.kernel.conftest import Node
from tests.kernel.served import Served
from tests.kernel.test_admin import as_nobody, let_in
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
    tariff = node.directory / "tariff.toml"
    tariff.write_text(TARIFF)
    text = report(node, "busy", "--tariff", str(tariff))
    shown = Reader(text)
    assert {"Memory by kind", "CPU in cores"} <= set(shown.of("title"))
    assert f"{record['totals']['cpu_user']['']:,} ns" in text
    amounts = [float(text) for text in shown.of("td") if re.fullmatch(r"\d+\.\d\d", text)]
    used = sum(record["totals"][name][""] for name in ("cpu_user", "cpu_system"))
    assert round(used / 3.6e12 * 1000, 2) in amounts
    assert "busy" in report(node, "--node", "--tariff", str(tariff))
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
    while "Memory by kind" not in (page := asked("mine")[1]):
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


def test_the_file_is_the_readers_own(node: Node, tmp_path: Path) -> None:
    node.job("--id", "there", "--network", "none", "--", "true")
    target = tmp_path / "page.html"
    target.write_text("x" * 1_000_000)
    done = node.acctd("report", "there", "--html", str(target))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert target.read_text().endswith("</html>\n")
