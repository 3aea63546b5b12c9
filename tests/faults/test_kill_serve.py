"""`acctd serve` dies by SIGKILL at every step of making, entering, reading, mending, finishing and taking over a job.

What the starter does then is what any would do: it calls again. Afterwards the job has exactly one record, what that
says of network and disk is what a twin's says whose agent never died, and nothing is left in the kernel.
"""

import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from acctd.ledger import FILE, Ledger
from lab.topology import Topology
from lab.traffic import Server
from tests.faults.bed import BLOCK, Bed, network
from tests.faults.dying import Death
from tests.faults.nursery import Nursery
from tests.faults.points import HARMED, LIVING, NESTED, TAKEN_OVER, UNMENDED, points
from tests.kernel.conftest import make_node
from tests.kernel.test_block_io import Loop, fresh_loop

Totals = dict[str, dict[str, int]]


@pytest.fixture(scope="module")
def nursery(topology: Topology) -> Iterator[Nursery]:
    with topology.enter(topology.wan):
        server = Server()
    with server, Nursery(topology) as made:
        yield made


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    """A disk that nobody else reads."""
    image = tmp_path_factory.mktemp("disk") / "image"
    with image.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, BLOCK)
    with fresh_loop(image) as loop:
        yield loop


@pytest.fixture
def bed(
    request: pytest.FixtureRequest, topology: Topology, nursery: Nursery, disk: Loop, tmp_path: Any
) -> Iterator[Bed]:
    backend = request.param
    made = None
    try:
        for node in make_node(topology, tmp_path, backend=backend):
            with node.config.open("a") as config:
                # What is made and undone with a job beside what it is counted by: a scratch, and tasks that may wait.
                config.write(f'[isolation]\nscratch = ["/tmp"]\nscratch_dir = "{node.directory}/scratch"\n')
                # No thresholds: a thread registers those, and calls would be counted that are another's.
                config.write('[limits]\nmemory = "1G"\n[oom]\naction = "hold"\nthresholds = []\n')
            made = Bed(node, nursery, backend, disk)
            yield made
            made.end()
    except BaseException:
        if made is not None:
            made.clean()
        raise


Story = Callable[[Bed, str, str, Death | None], dict[str, Totals]]
_twins: dict[tuple[str, str], dict[str, Totals]] = {}


def twin(bed: Bed, story: Story, kind: str) -> dict[str, Totals]:
    """What the records say where no agent dies."""
    key = bed.backend, kind
    if key not in _twins:
        _twins[key] = story(bed, "twin", kind, None)
        bed.stop()
    return _twins[key]


def told(bed: Bed, *jobs: str) -> dict[str, Totals]:
    """What the only record of each job says that must not differ by a byte; by the job's name less its number."""
    found = {}
    with Ledger(bed.node.directory / "state" / FILE) as ledger:
        records = ledger.records()
        for record in records:
            assert ledger.record(record.id) == record
        for job in jobs:
            (totals,) = [record.totals for record in records if record.id == job]
            networks = {name: totals[name] for name in ("network", "network_packets") if name in totals}
            blocks = ("block_read", "block_reads", "block_write", "block_writes")
            disk = {name: {"": totals.get(name, {}).get(bed.disk.device, 0)} for name in blocks}
            found[job.partition("-")[2]] = networks | disk
    return found


def living(bed: Bed, name: str, kind: str, death: Death | None) -> dict[str, Totals]:
    """A job's life. The agent dies at one step of it."""
    job = f"{name}-job"

    def call(method: str, step: str, **parameters: Any) -> bool:
        if death is not None and step == kind:
            bed.dies(method, **parameters)
            return False
        bed.ok(method, **parameters)
        return True

    bed.start(death)
    if not call("Create", "create", job=job):
        bed.start()
        bed.create(job)
    worker = bed.worker(job)
    early = False
    if not call("Attach", "attach", job=job, pid=worker.pid):
        bed.second(worker)
        early = True
        bed.start()
        bed.ok("Attach", job=job, pid=worker.pid)
    used = worker.do("used")
    bed.first(worker)
    bed.read(worker, 4)
    worker.do("spin", 0.01)
    if death is not None and kind in ("lost", "corrupt"):
        bed.spoil_ledger(kind)
        bed.dies("Snapshot")
        bed.second(worker)
        early = True
        bed.start()
    if not call("Snapshot", "poll"):
        bed.second(worker)
        early = True
        bed.start()
    if not early:
        bed.second(worker)
    bed.read(worker, 1)
    used = worker.do("used") - used
    if death is not None and kind == "end":
        bed.arm()
        worker.end()
        bed.bury()
        bed.start()
    if not call("Finish", "finish", job=job, exit_code=0):
        bed.start()
    totals = bed.ok("Finish", job=job, exit_code=0)["record"]["totals"]
    assert totals["cpu_user"][""] + totals["cpu_system"][""] >= used
    return told(bed, job)


@pytest.mark.parametrize(("bed", "kind", "death"), points(LIVING), indirect=["bed"])
def test_a_job_whose_agent_dies(bed: Bed, kind: str, death: Death) -> None:
    expected = twin(bed, living, "living")
    assert expected["job"]["block_reads"] == {"": 5}
    assert expected["job"]["network"] | network(1, 1)["network"] == expected["job"]["network"]
    assert expected["job"]["block_read"] == {"": 5 * BLOCK}
    assert living(bed, "victim", kind, death) == expected


def harmed(bed: Bed, name: str, kind: str, death: Death | None) -> dict[str, Totals]:
    """A job whose chain another program harms. The agent dies while it mends that."""
    job = f"{name}-job"
    harm, _, flowing = kind.partition(", ")
    bed.start(death)
    bed.ok("Create", job=job)
    worker = bed.worker(job)
    bed.ok("Attach", job=job, pid=worker.pid)
    bed.first(worker)
    bed.ok("Snapshot")
    if death is not None:
        bed.arm()
        bed.harm(harm)
        bed.dies("Snapshot")
        if flowing:
            bed.second(worker)
        bed.start()
    if death is None or not flowing:
        bed.second(worker)
    bed.ok("Finish", job=job, exit_code=0)
    return told(bed, job)


@pytest.mark.parametrize(("bed", "kind", "death"), points(HARMED), indirect=["bed"])
def test_a_job_whose_agent_dies_mending(bed: Bed, kind: str, death: Death) -> None:
    """What was read before the harm is kept; what comes after the mending is counted, also while no agent lives."""
    expected = twin(bed, harmed, "flush")
    assert expected["job"] == expected["job"] | network(1, 1)
    assert harmed(bed, "victim", kind, death) == expected


@pytest.mark.parametrize(("bed", "kind", "death"), points(UNMENDED), indirect=["bed"])
def test_what_flows_before_the_mending_is_lost_and_said(bed: Bed, kind: str, death: Death) -> None:
    expected = twin(bed, harmed, "flush")["job"]["network"]
    found = harmed(bed, "victim", kind, death)["job"]["network"]
    assert all(found[rule] <= expected[rule] for rule in expected)
    with Ledger(bed.node.directory / "state" / FILE) as ledger:
        said = re.findall(r"at most (\d+) bytes", " ".join(ledger.record("victim-job").notes))
    assert sum(expected.values()) - sum(found.values()) <= max(map(int, said), default=0)


def taken_over(bed: Bed, name: str, kind: str, death: Death | None) -> dict[str, Totals]:
    """A job whose agent is killed. The next one dies while it takes the job over, and a third one does it."""
    job = f"{name}-job"
    firsts = {
        "half": "acctd.network.pipe:make",
        "meant": "acctd.ledger:Ledger.begin",
        "closed": "acctd.ledger:Ledger.sign_off",
    }
    bed.start(Death(firsts[kind], "after") if kind in firsts else None)
    if kind == "half":
        bed.dies("Create", job=job)
        _next(bed, death)
        bed.create(job)
        assert bed.phases() == {job: "made"}
    else:
        bed.ok("Create", job=job)
    if kind == "made":
        bed.kill()
        _next(bed, death)
        assert bed.phases() == {job: "made"}
    worker = bed.worker(job)
    if kind == "meant":
        bed.dies("Attach", job=job, pid=worker.pid)
        _next(bed, death)
        assert bed.phases() == {job: "made"}
    bed.ok("Attach", job=job, pid=worker.pid)
    bed.first(worker)
    bed.read(worker, 5)
    if kind == "running":
        bed.kill()
        _next(bed, death, lambda: bed.second(worker))
    elif kind in ("lost", "corrupt"):
        bed.kill()
        bed.spoil_ledger(kind)
        _next(bed, death, lambda: bed.second(worker))
    else:
        bed.second(worker)
    if kind in ("flushed", "cut off"):
        bed.ok("Snapshot")
        bed.kill()
        bed.harm("flush" if kind == "flushed" else kind)
        _next(bed, death)
    if kind in ("ended", "ended, lost"):
        bed.kill()
        worker.end()
        if kind == "ended, lost":
            bed.spoil_ledger("lost")
        _next(bed, death)
    if kind == "closed":
        bed.dies("Finish", job=job, exit_code=0)
        _next(bed, death)
    bed.ok("Finish", job=job, exit_code=0)
    return told(bed, job)


def _next(bed: Bed, death: Death | None, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Two agents, one after the other, the first of which does not come to serve."""
    assert not bed.start(death, at_once=True), f"the agent lived through {death}: {bed.log}"
    meanwhile()
    bed.start()


@pytest.mark.parametrize(("bed", "kind", "death"), points(TAKEN_OVER), indirect=["bed"])
def test_a_job_whose_next_agent_dies(bed: Bed, kind: str, death: Death) -> None:
    expected = twin(bed, living, "living")
    assert taken_over(bed, "victim", kind, death) == expected


def nested(bed: Bed, name: str, kind: str, death: Death | None) -> dict[str, Totals]:
    """A job, a family in it and one in that. The agent dies as the first is made, or as one or all are finished."""
    jobs = pilot, payload, step = [f"{name}-{level}" for level in ("pilot", "payload", "step")]
    unregister, together = kind == "unregister", kind in ("all", "all ended")
    while_down = kind in ("step ended", "all ended")
    bed.start(None if while_down else death)
    network = "parent" if unregister else "nat"
    bed.ok("Create", job=pilot)
    workers = {pilot: bed.worker(pilot)}
    bed.ok("Attach", job=pilot, pid=workers[pilot].pid)
    bed.read(workers[pilot], 1)
    if death is not None and kind == "first":
        bed.dies("Create", job=payload, parent=pilot, network=network)
        bed.read(workers[pilot], 1)
        bed.start()
        if payload not in bed.phases():
            bed.ok("Create", job=payload, parent=pilot, network=network)
    else:
        bed.read(workers[pilot], 1)
        bed.ok("Create", job=payload, parent=pilot, network=network)
    bed.ok("Create", job=step, parent=payload, network=network)
    for job in (payload, step):
        workers[job] = bed.worker(pilot if unregister else job)
        bed.ok("Attach", job=job, pid=workers[job].pid)
        bed.read(workers[job], 2)
    for worker in workers.values():
        bed.first(worker)
    # An unregistered one goes on in its parent, and a job whose families have ended goes on too.
    late = [] if together else [step, payload, pilot] if unregister else [payload, pilot]
    for job in jobs:
        if job not in late:
            bed.second(workers[job])
    ending: dict[str, Any] = {} if unregister else {"exit_code": 0}
    if death is not None and while_down:
        bed.kill()
        for job in jobs if together else [step]:
            workers[job].end()
        _next(bed, death)
    elif death is not None and kind != "first":
        bed.dies("Unregister" if unregister else "Finish", job=pilot if together else step, **ending)
        bed.start()
    bed.ok("Unregister" if unregister else "Finish", job=step, **ending)
    for job in late:
        bed.second(workers[job])
        bed.read(workers[job], 1)
    bed.ok("Finish", job=payload, exit_code=0)
    bed.ok("Finish", job=pilot, exit_code=0)
    return told(bed, *jobs)


@pytest.mark.parametrize(("bed", "kind", "death"), points(NESTED), indirect=["bed"])
def test_a_family_whose_agent_dies(bed: Bed, kind: str, death: Death) -> None:
    """What is used inside a job is in its record exactly once."""
    life = {"first": "step", "step ended": "step", "all ended": "all"}.get(kind, kind)
    expected = twin(bed, nested, life)
    assert nested(bed, "victim", kind, death) == expected
    reads = {"step": (2, 5, 8), "all": (2, 4, 6), "unregister": (2, 6, 9)}[life]
    levels = [expected[level] for level in ("step", "payload", "pilot")]
    assert all(
        level["block_reads"] == {"": n} for level, n in zip(levels, reads, strict=True) if "block_reads" in level
    )
    assert levels[2] == levels[2] | network(3, 3)
