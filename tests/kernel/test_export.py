"""A real agent, its spool and a real `acctd export` beside it: what leaves the node is what the ledger has, once."""

import grp
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from acctd import config as configuration
from acctd import spool
from acctd.errors import InUseError
from acctd.frames import EVENTS, RECORDS, SAMPLES, STREAMS, EventFrame, RecordFrame, Sample, decode
from acctd.ledger import FILE, Ledger
from acctd.spoolroom import SpoolRoom
from lab.topology import Topology
from tests.kernel.conftest import Node, make_node
from tests.kernel.served import Served

Sleeper = Callable[[], "subprocess.Popen[bytes]"]

_SINK = """
[json.out]
path = "{0}/out/log.jsonl"
streams = ["records", "events", "samples"]
"""


# Gives root up once all is imported: what this user may read of acctd itself is not the question here.
_AS_NOBODY = """
import os, sys
import acctd.cli.export, acctd.exporting, exporters.jsonlines
from acctd.cli.main import main
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
main(sys.argv[1:])
"""


@pytest.fixture
def exported(topology: Topology, tmp_path: Path) -> Iterator[Served]:
    """A node whose agent leaves all for one file, and ticks often."""
    for node in make_node(topology, tmp_path):
        configure(node, _SINK)
        (tmp_path / "out").mkdir()
        served = Served(node, None)  # type: ignore[arg-type]  # start() sets it
        served.start()
        yield served
        if served.process.poll() is None:
            for job in served.ok("List")["jobs"]:
                served.call("Finish", job=job["id"])
            assert served.stop() == 0


def configure(node: Node, more: str) -> None:
    directory = node.directory
    text = node.config.read_text().partition("poll_interval")[0].replace("[cgroup]", "poll_interval = 0.2\n[cgroup]", 1)
    if not hasattr(node, "_plain"):
        node.__dict__["_plain"] = text
    node.config.write_text(
        f'{node.__dict__["_plain"]}[export]\nspool_dir = "{directory}/spool"\npositions_dir = "{directory}/positions"\n'
        + more.format(directory)
    )


def spooled(served: Served, stream: str) -> list[Any]:
    """All frames of a stream."""
    frames = []
    for segment in spool.segments(served.node.directory / "spool" / stream):
        frames += [decode(line) for line in spool.content(segment).split(b"\n")[:-1]]
    return frames


def records(served: Served) -> list[RecordFrame]:
    return [frame for frame in spooled(served, RECORDS) if isinstance(frame, RecordFrame)]


def until(say: Callable[[], Any], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := say()):
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.02)
    return found


@contextmanager
def exporting(served: Served) -> Iterator["subprocess.Popen[bytes]"]:
    node = served.node
    process = node.topology.popen(node.topology.node, node.argv("export"), env=node.environ, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        assert process.wait(30) in (0, -signal.SIGKILL), process.stderr and process.stderr.read()
        if process.stderr:
            process.stderr.close()


def short_job(served: Served, sleeper: Sleeper, name: str) -> dict[str, Any]:
    """A job that lives for no tick; its record."""
    served.ok("Create", job=name, network="none", tags={"account": "cms"})
    process = sleeper()
    served.ok("Attach", job=name, pid=process.pid)
    process.kill()
    process.wait()
    record: dict[str, Any] = served.ok("Finish", job=name, exit_code=0)["record"]
    return record


def delivered(served: Served, kind: str) -> list[dict[str, Any]]:
    path = served.node.directory / "out" / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [frame for line in lines if (frame := json.loads(line))["kind"] == kind]


def test_a_living_job_is_sampled_and_a_short_one_has_its_record(exported: Served, sleeper: Sleeper) -> None:
    exported.ok("Create", job="long", network="none", limits={"memory": 64 << 20}, tags={"account": "atlas"})
    exported.ok("Attach", job="long", pid=sleeper().pid)
    record = short_job(exported, sleeper, "short")
    samples = until(lambda: [f for f in spooled(exported, SAMPLES) if isinstance(f, Sample)])
    assert {sample.job for sample in samples} == {"long"}
    assert samples[-1].limits["memory"] == 64 << 20
    assert samples[-1].tags == {"account": "atlas"}
    assert samples[-1].totals["pids"] == {"": 1}
    frames = until(lambda: records(exported))
    assert [frame.record().id for frame in frames] == ["short"]
    assert frames[0].record().totals == record["totals"]
    assert all(sample.time < frames[0].time for sample in samples if sample.job == "short")


def test_the_file_has_what_the_ledger_has(exported: Served, sleeper: Sleeper) -> None:
    with exporting(exported):
        for number in range(5):
            short_job(exported, sleeper, f"j{number}")
        until(lambda: len(delivered(exported, "record")) == 5)
        # Records go first.
        until(lambda: len([frame for frame in delivered(exported, "event") if frame["event"] == "finished"]) == 5)
    with Ledger(exported.node.directory / "state" / FILE) as ledger:
        rows, told = ledger.records_after(0, 100), ledger.events()
    found = delivered(exported, "record")
    assert [(frame["number"], frame["digest"]) for frame in found] == [(row[0], row[1]) for row in rows]
    assert [json.dumps(frame["body"]) for frame in found] == [json.dumps(json.loads(row[2])) for row in rows]
    sent = [frame["number"] for frame in delivered(exported, "event")]
    assert sent == sorted(set(sent))
    assert {event.number for event in told if event.event == "finished"} <= set(sent)


def test_agent_and_exporter_killed_at_any_time_lose_and_double_nothing(exported: Served, sleeper: Sleeper) -> None:
    for round_ in range(4):
        with exporting(exported) as exporter:
            for number in range(3):
                short_job(exported, sleeper, f"k{round_}.{number}")
            # Before the tick that would have told of them, or in it.
            time.sleep(0.1 * round_)
            exported.stop(signal.SIGKILL)
            exporter.kill()
        exported.start()
    with exporting(exported):
        until(lambda: len(delivered(exported, "record")) >= 12)
        short_job(exported, sleeper, "last")
        until(lambda: [frame for frame in delivered(exported, "record") if frame["body"]["id"] == "last"])
    names = [frame["body"]["id"] for frame in delivered(exported, "record")]
    assert sorted(names) == sorted([f"k{round_}.{number}" for round_ in range(4) for number in range(3)] + ["last"])
    numbers = [frame["number"] for frame in delivered(exported, "event")]
    with Ledger(exported.node.directory / "state" / FILE) as ledger:
        told = [event.number for event in ledger.events()]
    assert numbers == [number for number in told if numbers[0] <= number <= numbers[-1]]


def test_a_ledger_that_is_begun_anew_is_sent_whole(exported: Served, sleeper: Sleeper) -> None:
    short_job(exported, sleeper, "before")
    until(lambda: records(exported))
    exported.stop(signal.SIGKILL)
    for suffix in ("", "-wal", "-shm"):
        (exported.node.directory / "state" / f"{FILE}{suffix}").unlink(missing_ok=True)
    exported.start()
    short_job(exported, sleeper, "after")

    def names() -> list[str]:
        return [frame.record().id for frame in records(exported)]

    until(lambda: len(names()) == 2)
    assert names() == ["before", "after"]
    with Ledger(exported.node.directory / "state" / FILE) as ledger:
        wanted = [(event.number, event.time) for event in ledger.events()]

    def sent() -> list[tuple[int, float]]:
        return [(f.number, f.time) for f in spooled(exported, EVENTS) if isinstance(f, EventFrame)]

    # Numbered anew, and all there.
    until(lambda: sent()[-len(wanted) :] == wanted)
    assert {f.owner for f in spooled(exported, EVENTS) if isinstance(f, EventFrame) and f.job} == {"root"}


def test_an_older_copy_of_the_ledger_is_gone_on_from_where_both_agree(exported: Served, sleeper: Sleeper) -> None:
    state, copy = exported.node.directory / "state", exported.node.directory / "copy"
    for name in ("a0", "a1"):
        short_job(exported, sleeper, name)
    exported.stop()
    shutil.copytree(state, copy)
    exported.start()
    for name in ("b0", "b1"):
        short_job(exported, sleeper, name)
    until(lambda: len(records(exported)) == 4)
    exported.stop()
    shutil.rmtree(state)
    shutil.copytree(copy, state)
    exported.start()
    short_job(exported, sleeper, "c0")
    until(lambda: len(records(exported)) == 5)
    exported.ok("Snapshot")
    assert [frame.record().id for frame in records(exported)] == ["a0", "a1", "b0", "b1", "c0"]


def test_a_job_of_acctd_run_is_in_the_series_of_the_agent(exported: Served) -> None:
    record = exported.node.job("--id", "alone", "--network", "none", "--", "true")
    frames = until(lambda: records(exported))
    assert (frames[0].record().id, frames[0].record().totals) == ("alone", record["totals"])


def test_what_was_before_the_first_sink_is_not_sent(topology: Topology, tmp_path: Path, sleeper: Sleeper) -> None:
    for node in make_node(topology, tmp_path):
        served = Served(node, None)  # type: ignore[arg-type]
        served.start()
        short_job(served, sleeper, "old")
        assert not (tmp_path / "spool").exists(), "without a sink nothing is spooled"
        configure(node, _SINK)
        served.ok("Reload")
        short_job(served, sleeper, "new")
        frames = until(partial(records, served))
        assert [frame.record().id for frame in frames] == ["new"]
        assert served.stop() == 0


def test_a_spool_without_room_holds_up_nobody_and_catches_up(exported: Served, sleeper: Sleeper) -> None:
    mount = exported.node.directory / "spool"
    exported.stop()
    subprocess.run(["rm", "-rf", mount], check=True)
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=755", "spool", mount], check=True)
    try:
        exported.start()
        (mount / "filler").write_bytes(b"\0" * (mount.stat().st_blksize * 12))
        with open(mount / "more", "wb", buffering=0) as more, pytest.raises(OSError, match="No space"):
            while True:
                more.write(b"\0" * 4096)
        record = short_job(exported, sleeper, "full")
        assert record["state"] == "done"
        assert exported.ok("Snapshot")["seconds"] > 0
        said = until(lambda: [e for e in told(exported) if "cannot write to the spool" in e])
        assert len(said) < 5, "not at each tick"
        (mount / "more").unlink()
        (mount / "filler").unlink()
        frames = until(lambda: records(exported))
        assert [frame.record().id for frame in frames] == ["full"]
        assert exported.stop() == 0
    finally:
        subprocess.run(["umount", mount], check=True)


def told(served: Served) -> list[str]:
    with Ledger(served.node.directory / "state" / FILE) as ledger:
        return [event.text for event in ledger.events() if event.event == "trouble"]


def test_another_user_exports_and_can_change_nothing(topology: Topology, tmp_path: Path, sleeper: Sleeper) -> None:
    group = grp.getgrgid(65534).gr_name
    out = Path("/tmp") / f"acctd-out-{os.getpid()}"
    positions = Path("/tmp") / f"acctd-positions-{os.getpid()}"
    for node in make_node(topology, tmp_path):
        configure(node, f'group = "{group}"\n' + _SINK)
        text = node.config.read_text().replace(f"{tmp_path}/positions", str(positions))
        node.config.write_text(text.replace(f"{tmp_path}/out", str(out)).replace(f"{tmp_path}/spool", f"{out}.spool"))
        try:
            for directory in (out, positions):
                directory.mkdir()
                os.chown(directory, 65534, 65534)
            served = Served(node, None)  # type: ignore[arg-type]
            served.start()
            short_job(served, sleeper, "theirs")
            config = Path(f"{out}.toml")
            config.write_text(node.config.read_text())
            config.chmod(0o644)
            user = {"user": 65534, "group": 65534, "extra_groups": []}
            tried = subprocess.run(
                ["sh", "-c", f"cat {out}.spool/records/* >/dev/null && ! echo x >>{out}.spool/records/x"],
                **user, check=False, capture_output=True,
            )  # fmt: skip
            assert tried.returncode == 0, tried.stderr
            until(partial(_lines, Path(f"{out}.spool/records"), 2))
            done = node.python(_AS_NOBODY, "export", "--once", "--config", str(config))
            assert done.returncode == 0, done.stderr
            lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
            assert [line["body"]["id"] for line in lines if line["kind"] == "record"] == ["theirs"]
            assert served.stop() == 0
        finally:
            subprocess.run(["rm", "-rf", out, positions, f"{out}.spool", f"{out}.toml"], check=True)


def _lines(stream: Path, number: int) -> bool:
    return sum(len(spool.content(segment).splitlines()) for segment in spool.segments(stream)) == number


def test_metrics_are_served_while_the_job_lives_and_after_it(exported: Served, sleeper: Sleeper) -> None:
    node = exported.node
    path = node.directory / "m"
    configure(node, _SINK + f'[prometheus]\nlisten = "unix:{path}"\ngrace = 60\n')
    exported.ok("Reload")
    exported.ok("Create", job="seen", network="none")
    process = sleeper()
    exported.ok("Attach", job="seen", pid=process.pid)
    with exporting(exported):
        until(path.exists)
        line = until(lambda: [x for x in scraped(path) if x.startswith('acctd_job_pids{jobid="seen"}')])
        assert float(line[0].split()[1]) == 1
        process.kill()
        process.wait()
        record = exported.ok("Finish", job="seen", exit_code=0)["record"]
        wanted = f'acctd_job_cpu_user_seconds_total{{jobid="seen"}} {record["totals"]["cpu_user"][""] / 1e9}'
        until(lambda: wanted in scraped(path) and not [x for x in scraped(path) if "acctd_job_pids{" in x])


def scraped(path: Path) -> list[str]:
    with socket.socket(socket.AF_UNIX) as made:
        made.settimeout(20)
        made.connect(str(path))
        made.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        data = b""
        while received := made.recv(1 << 16):
            data += received
    return data.decode().splitlines()


def test_two_exporters_do_not_share_positions(exported: Served) -> None:
    with exporting(exported):
        until((exported.node.directory / "positions" / "out.json").exists)
        second = exported.node.acctd("export")
        assert second.returncode == 73
        assert "another acctd export keeps" in second.stderr


def test_without_a_sink_there_is_nothing_to_export(node: Node) -> None:
    done = node.acctd("export")
    assert (done.returncode, "has no sink" in done.stderr) == (64, True)


def test_sinks_says_how_they_stand(exported: Served, sleeper: Sleeper) -> None:
    short_job(exported, sleeper, "one")
    until(lambda: records(exported))
    before = exported.node.acctd("sinks")
    assert "acctd export has not begun it" in before.stdout
    assert exported.node.acctd("export", "--once").returncode == 0
    shown = json.loads(exported.node.acctd("sinks", "--json").stdout)
    assert shown["sinks"]["out"]["state"]["counts"]["sent"] >= len(delivered(exported, "record")) == 1
    assert set(shown["spool_bytes"]) == set(STREAMS)
    assert EVENTS in shown["sinks"]["out"]["state"]["positions"]
    row = exported.node.acctd("sinks").stdout.splitlines()[1].split()
    assert row[0] == "out"
    assert row[-1] == "-"


def test_doctor_tells_of_an_exporter_that_is_not_there_and_of_a_sink_in_trouble(exported: Served) -> None:
    assert re.search(r"note +acctd export +is not running", exported.node.acctd("doctor").stdout)
    (exported.node.directory / "out").rmdir()
    with exporting(exported):
        until(lambda: re.search(r"note +sink out +cannot write", exported.node.acctd("doctor").stdout))
        (exported.node.directory / "out").mkdir()
        until(lambda: re.search(r"ok +sink out +\d+ points sent, 0 refused", exported.node.acctd("doctor").stdout))
        assert "is not running" not in exported.node.acctd("doctor").stdout


def test_what_is_damaged_in_the_spool_or_the_ledger_costs_neither_agent_nor_others(
    exported: Served, sleeper: Sleeper
) -> None:
    for name in ("a", "b", "c"):
        short_job(exported, sleeper, name)
    until(lambda: len(records(exported)) == 3)
    exported.stop(signal.SIGKILL)
    # As a power cut leaves it: room without content.
    with open(spool.segments(exported.node.directory / "spool" / RECORDS)[-1].path, "ab") as segment:
        segment.write(b"\0" * 99 + b"\n\xff{\n")
    with closing(sqlite3.connect(exported.node.directory / "state" / FILE)) as book:
        book.execute("UPDATE record SET body = ? WHERE id = 'a'", (b'{"id":\n "torn',))
        book.commit()
    exported.start()
    short_job(exported, sleeper, "d")
    with exporting(exported):
        until(lambda: {frame["body"]["id"] for frame in delivered(exported, "record")} == {"a", "b", "c", "d"})
    assert len(delivered(exported, "record")) == 4
    quarantine = (exported.node.directory / "positions" / "out.quarantine").read_text().splitlines()
    assert len(quarantine) == 2


def test_a_spool_that_is_cleared_under_the_agent_is_made_again(exported: Served, sleeper: Sleeper) -> None:
    short_job(exported, sleeper, "before")
    until(lambda: len(records(exported)) == 1)
    subprocess.run(["rm", "-rf", exported.node.directory / "spool"], check=True)
    short_job(exported, sleeper, "after")
    assert [frame.record().id for frame in until(lambda: records(exported))] == ["after"]


def test_positions_of_a_stranger_keep_no_agent_from_its_start(exported: Served, sleeper: Sleeper) -> None:
    exported.stop()
    positions = exported.node.directory / "positions"
    positions.mkdir(exist_ok=True)
    (positions / "x.json").write_text('{"identity":"x","target":{"a":' + "[" * 9999)
    (positions / "y.json").write_text('{"identity":"y","positions":{"records":[' + "9" * 30 + ",0,0]}}")
    os.mkfifo(positions / "z.json")
    exported.start()
    short_job(exported, sleeper, "held")
    assert [frame.record().id for frame in until(lambda: records(exported))] == ["held"]
    assert exported.node.acctd("sinks").returncode == 0


def test_an_address_that_cannot_be_had_holds_up_no_sink(exported: Served, sleeper: Sleeper) -> None:
    configure(exported.node, _SINK + '[prometheus]\nlisten = "192.0.2.7:9735"\n')
    with exporting(exported) as exporter:
        short_job(exported, sleeper, "sent")
        until(lambda: delivered(exported, "record"))
        assert exporter.poll() is None


def test_a_reload_waits_for_no_sink_that_hangs(exported: Served, sleeper: Sleeper) -> None:
    node = exported.node
    with ExitStack() as stack:
        with node.topology.enter(node.topology.node):
            silent = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        hanging = f'[influxdb.h]\nurl = "{url}"\nversion = 1\ndatabase = "d"\ntimeout = 600\n'
        configure(node, _SINK + hanging)
        exported.ok("Reload")
        exporter = stack.enter_context(exporting(exported))
        short_job(exported, sleeper, "one")
        until(lambda: delivered(exported, "record"))
        configure(node, _SINK.replace('"samples"', "").replace(", ]", "]") + hanging)
        exporter.send_signal(signal.SIGHUP)
        short_job(exported, sleeper, "two")
        until(lambda: len(delivered(exported, "record")) == 2)
        assert exporter.poll() is None
        exporter.terminate()
        exporter.wait(30)  # its request may take 600 s
    assert [frame["body"]["id"] for frame in delivered(exported, "record")] == ["one", "two"]


def test_a_spool_is_one_agents(exported: Served) -> None:
    config = configuration.load(str(exported.node.config), {}).export
    with pytest.raises(InUseError, match="another agent writes the spool"):
        SpoolRoom(config)
