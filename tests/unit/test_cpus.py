"""Which cores a job gets for itself, on captured topologies and on made-up ones; that the ledger gives each once."""

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acctd.cgroup.cpus import (
    Core,
    choose,
    chooser,
    format_list,
    parse_list,
    read_allowed,
    read_topology,
)
from acctd.cgroup.layout import Hierarchy, Layout
from acctd.errors import ExhaustedError, UnavailableError
from acctd.kernel.cgroupfs import CgroupDir
from acctd.ledger import Ledger
from acctd.model import JobSpec, Limits, Owner
from acctd.rows import Place, decode_row, encode_row

REPO = Path(__file__).parents[2]
TREES = REPO / "fixtures" / "topology"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0", {0}), ("0-3,8\n", {0, 1, 2, 3, 8}), ("", set()), ("\n", set()), ("7,7,5-6", {5, 6, 7})],
)
def test_lists_are_read(text, numbers):
    assert parse_list(text) == numbers


@pytest.mark.parametrize("text", ["a", "0-", "-1", "3-1", "0,,1", "0 1", "0-9999999", "²", "9" * 5000])
def test_what_is_no_list_is_refused(text):
    with pytest.raises(ValueError, match=r"is no list|backwards"):
        parse_list(text)


@given(st.sets(st.integers(0, 500)))
def test_lists_are_written_as_they_are_read(numbers):
    assert parse_list(format_list(numbers)) == numbers
    assert not numbers or len(format_list(numbers)) <= len(",".join(map(str, numbers)))


def shown(cores):
    return [(format_list(core.cpus), core.package, core.node) for core in cores]


def test_a_machine_with_two_nodes():
    assert shown(read_topology(TREES / "numa")) == [
        *(("0-1", 0, 0), ("2-3", 0, 0), ("4-5", 0, 0), ("6-7", 0, 0)),
        *(("8-9", 1, 1), ("10-11", 1, 1), ("12-13", 1, 1), ("14-15", 1, 1)),
    ]


def test_an_offline_cpu_is_no_part_of_its_core():
    cores = read_topology(TREES / "odd")
    assert shown(cores)[:3] == [("0-1", 0, 0), ("2", 0, 0), ("4-5", 0, 0)]
    assert {core.node for core in cores} == {0, 1}, "node 2 has no CPUs"


def test_a_kernel_without_nodes():
    cores = read_topology(TREES / "no-nodes")
    assert {core.node for core in cores} == {0}
    # Sockets are still told apart.
    assert shown(choose(4, cores, [frozenset({0})])) == shown(cores[4:])


def test_a_host_whose_cpus_cannot_be_read(tmp_path):
    with pytest.raises(UnavailableError, match=r"cannot be read .*online.*; leave linear:N out"):
        read_topology(tmp_path)


def test_threads_that_are_numbered_far_apart_are_one_core(tmp_path):
    """As on most hosts that are no guests: the second threads come after all first ones."""
    for cpu in range(4):
        topology = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    (tmp_path / "sys/devices/system/cpu/online").write_text("0-3\n")
    assert shown(read_topology(tmp_path)) == [("0,2", -1, 0), ("1,3", -1, 0)]


# What is allowed


def v2_host(top, cpus="0-15", mems="0-1"):
    (top / "cpuset.cpus.effective").write_text(f"{cpus}\n")
    (top / "cpuset.mems.effective").write_text(f"{mems}\n")
    return v2_layout(top)


def v2_layout(top):
    return Layout((Hierarchy(CgroupDir(top), 2, ("cpuset",)),))


def test_a_base_that_is_not_there_yet_will_have_what_is_above_it(tmp_path):
    layout = v2_host(tmp_path)
    assert read_allowed(layout.of("cpuset"), "site/jobs") == (frozenset(range(16)), {0, 1})
    (tmp_path / "site" / "jobs").mkdir(parents=True)
    v2_host(tmp_path / "site", "4-7", "0")
    assert read_allowed(layout.of("cpuset"), "site/jobs") == ({4, 5, 6, 7}, {0})


def test_v1_tells_it_by_other_names(tmp_path):
    hierarchy = Hierarchy(CgroupDir(tmp_path), 1, ("cpuset",))
    (tmp_path / "cpuset.cpus").write_text("0-3\n")
    (tmp_path / "cpuset.mems").write_text("0\n")
    assert read_allowed(hierarchy, "jobs") == ({0, 1, 2, 3}, {0})
    (tmp_path / "cpuset.effective_cpus").write_text("0-2\n")
    # Fresh, and not yet given its parent's.
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "cpuset.cpus").write_text("\n")
    (tmp_path / "jobs" / "cpuset.mems").write_text("\n")
    assert read_allowed(hierarchy, "jobs") == ({0, 1, 2}, {0})


def test_a_host_that_tells_nothing_is_named(tmp_path):
    with pytest.raises(UnavailableError, match="does not tell its CPUs"):
        read_allowed(Hierarchy(CgroupDir(tmp_path), 2, ("cpuset",)), "jobs")
    with pytest.raises(UnavailableError, match="no cpuset controller"):
        chooser(1, Layout((Hierarchy(CgroupDir(tmp_path), 2, ("memory",)),)), "jobs")


def test_cores_come_with_their_memory(tmp_path):
    choose_of = chooser(3, v2_host(tmp_path), "jobs", TREES / "numa")
    assert choose_of([]) == ("0-5", "0")
    assert choose_of(["0-5"]) == ("8-13", "1")
    assert choose_of(["0-5", "8-11"]) == ("6-7,12-15", "0-1")


def test_a_node_without_memory_takes_the_bases(tmp_path):
    choose_of = chooser(4, v2_host(tmp_path, "0-2,4-15", "0,2"), "jobs", TREES / "odd")
    assert choose_of([]) == ("0-2,4-7", "0")
    assert choose_of(["2"]) == ("8-15", "")
    assert chooser(5, v2_host(tmp_path, "0-2,4-15", "0,2"), "jobs", TREES / "odd")([]) == ("0-2,4-9", "0")


def test_only_what_the_base_allows_counts(tmp_path):
    layout = v2_host(tmp_path, "1-3,8", "0-1")
    assert chooser(2, layout, "jobs", TREES / "numa")([]) == ("1-3", "0")
    assert chooser(3, layout, "jobs", TREES / "numa")([]) == ("1-3,8", "0-1")
    with pytest.raises(UnavailableError, match=r"cpuset linear:4 is more than there is: jobs here have 3 cores"):
        chooser(4, layout, "jobs", TREES / "numa")


# Choosing


def single(*nodes):
    """Cores of one thread, as many on each node as given."""
    places = [node for node, size in enumerate(nodes) for _ in range(size)]
    return [Core(frozenset({cpu}), node, node) for cpu, node in enumerate(places)]


def chosen(count, cores, *taken):
    return format_list(cpu for core in choose(count, cores, [parse_list(text) for text in taken]) for cpu in core.cpus)


def test_the_fullest_node_that_has_room():
    assert chosen(2, single(4, 4), "4-5") == "6-7"
    assert chosen(3, single(4, 4), "4-5") == "0-2"


def test_as_few_nodes_as_will_do():
    """And what is left over goes to the fullest again."""
    assert chosen(5, single(4, 4, 4), "0", "4-6") == "7-11"
    assert chosen(6, single(4, 4, 4), "0", "5-7") == "1-2,8-11"


def test_side_by_side_in_the_smallest_gap():
    assert chosen(2, single(8), "2,5") == "0-1"
    assert chosen(2, single(10), "4", "7") == "5-6"
    assert chosen(3, single(6), "1") == "2-4"
    assert chosen(4, single(8), "2", "6") == "3-5,7"


def test_too_few_are_free():
    with pytest.raises(ExhaustedError) as e:
        chosen(3, single(2, 2), "0", "2", "17")
    assert str(e.value) == (
        "cpuset linear:3 asks for more cores than are free: 2 of 4 are, 2 jobs have the others; "
        "try again when one has finished"
    )
    with pytest.raises(ExhaustedError, match="0 of 1 are, 1 job has the others"):
        chosen(1, single(1), "0")


def test_half_a_core_taken_is_a_core_taken():
    cores = read_topology(TREES / "numa")
    assert chosen(1, cores, "1") == "2-3"


@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.data())
def test_no_choice_is_better(sizes, data):
    cores = single(*sizes)
    taken = data.draw(st.sets(st.integers(0, len(cores) - 1)))
    count = data.draw(st.integers(1, len(cores)))
    free = [core for core in cores if not core.cpus & taken]
    if len(free) < count:
        with pytest.raises(ExhaustedError):
            choose(count, cores, [frozenset({cpu}) for cpu in taken])
        return
    found = choose(count, cores, [frozenset({cpu}) for cpu in taken])
    assert len(set(found)) == count
    assert set(found) <= set(free)

    def nodes(some):
        return {core.node for core in some}

    def runs(some):
        return format_list(cpu for core in some for cpu in core.cpus).count(",")

    others = list(combinations(free, count))
    fewest = min(len(nodes(other)) for other in others)
    assert len(nodes(found)) == fewest
    if fewest == 1:
        (node,) = nodes(found)
        room = {each: sum(core.node == each for core in free) for each in nodes(free)}
        assert room[node] == min(size for size in room.values() if size >= count)
        assert runs(found) == min(runs(other) for other in others if nodes(other) == {node})


# In the ledger


def open_job(ledger, name, cores=None, parent=None):
    spec = JobSpec(name, Owner(0, 0, "root"), Limits(cpuset="linear:1"))
    return ledger.open_job(
        spec, Place("acctd"), slots=None, boot_id="b", boot_ns=0, keeper="1:2", parent=parent, cores=cores
    )


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger") as opened:
        yield opened


@pytest.fixture
def one(tmp_path):
    """linear:1 on a host of two cores."""
    (tmp_path / "cgroup").mkdir()
    return chooser(1, v2_host(tmp_path / "cgroup", "0,2", "0"), "acctd", TREES / "numa")


def test_a_core_is_given_once_and_again_when_it_is_free(ledger, one):
    first, second = open_job(ledger, "a", one), open_job(ledger, "b", one)
    assert (first.place.cpus, second.place.cpus, first.place.mems) == ("0", "2", "0")
    with pytest.raises(ExhaustedError, match="0 of 2 are, 2 jobs have the others"):
        open_job(ledger, "c", one)
    assert [row.spec.id for row in ledger.open_jobs()] == ["a", "b"]
    ledger.forget(first.seq)
    assert open_job(ledger, "c", one).place.cpus == "0"


def test_a_job_that_asks_for_none_holds_none(ledger, one):
    assert open_job(ledger, "a").place.cpus == ""
    assert open_job(ledger, "b", one).place.cpus == "0"


def test_a_family_takes_from_those_above_it_and_not_from_others(ledger, one):
    parent = open_job(ledger, "parent", one)
    family = open_job(ledger, "family", lambda taken: (repr(taken), ""), parent.seq)
    assert family.place.cpus == "[]"
    ledger.forget(family.seq)
    family = open_job(ledger, "family", lambda taken: one([*taken, "2"]), parent.seq)
    assert family.place.cpus == "0"
    inner = open_job(ledger, "inner", lambda taken: (repr(taken), ""), family.seq)
    assert inner.place.cpus == "[]", "neither its parent's nor those of its parent's parent"
    ledger.forget(inner.seq)
    beside = open_job(ledger, "beside", lambda taken: (repr(taken), ""), parent.seq)
    assert beside.place.cpus == "['0']", "its sister's"
    ledger.forget(beside.seq)
    other = open_job(ledger, "other", lambda taken: (repr(taken), ""))
    assert other.place.cpus == "['0', '0']", "the parent's and the family's"


def test_the_cores_come_back_with_a_job_that_a_new_ledger_does_not_know(ledger, one, tmp_path):
    lost = encode_row(open_job(ledger, "a", one))
    with Ledger(tmp_path / "new") as new:
        assert new.reinstate(decode_row(lost)).place == Place("acctd", cpus="0", mems="0")
        assert open_job(new, "b", one).place.cpus == "2"


def test_processes_that_ask_at_once_get_different_cores(tmp_path):
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from acctd.cgroup.cpus import chooser\n"
        "from acctd.ledger import Ledger\n"
        "from tests.unit.test_cpus import TREES, open_job, v2_layout\n"
        "name, top, path = sys.argv[1:]\n"
        "with Ledger(Path(path)) as ledger:\n"
        "    cores = chooser(1, v2_layout(Path(top)), 'acctd', TREES / 'numa')\n"
        "    for turn in range(2): open_job(ledger, f'{name}{turn}', cores)\n"
    )
    v2_host(tmp_path)
    argv = [sys.executable, "-c", code]
    asking = [
        subprocess.Popen([*argv, name, tmp_path, tmp_path / "ledger"], cwd=REPO, stderr=subprocess.PIPE, text=True)
        for name in "abcd"
    ]
    assert [each.communicate(timeout=120)[1] for each in asking] == [""] * 4
    with Ledger(tmp_path / "ledger") as ledger:
        held = sorted(row.place.cpus for row in ledger.open_jobs())
    assert held == sorted(f"{cpu}-{cpu + 1}" for cpu in range(0, 16, 2))
