"""Out of memory, by the bodies that tests/kernel runs on its host: here on v2 and on v1 with joined controllers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bodies import oom, pressure
from tests.bodies.living import Living
from tests.vm.inside.conftest import BASE

DISK = Path("/dev/vda")


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Living]:
    """One for all: it takes an emulated CPU a second to start one."""
    made = Living(tmp_path_factory.mktemp("living"), BASE)
    yield made
    made.close()


@pytest.fixture
def living(agent: Living) -> Iterator[Living]:
    agent.configure()
    yield agent
    agent.clear()


@pytest.mark.parametrize("field", oom.few(), ids=lambda field: oom.named(*field))
def test_the_matrix(living: Living, field: tuple[oom.Policy, oom.Shape]) -> None:
    print(f"\n{oom.play(living, *field).row(oom.version())}")


@pytest.mark.parametrize("action", ["kernel", "hold"])
def test_page_cache_is_no_shortage(living: Living, action: str) -> None:
    pressure.page_cache_is_no_shortage(living, DISK, action)


def test_thresholds_are_told_once(living: Living) -> None:
    pressure.thresholds_are_told_once(living)


def test_one_call_takes_more_than_a_step(living: Living) -> None:
    pressure.one_call_takes_more_than_a_step(living)


def test_a_raised_limit_ends_a_shortage(living: Living) -> None:
    pressure.a_raised_limit_ends_a_shortage(living)


def test_a_suspended_job_runs_out_when_it_goes_on(living: Living) -> None:
    pressure.a_suspended_job_runs_out_when_it_goes_on(living)


def test_two_at_a_time(living: Living) -> None:
    pressure.many_at_a_time(living, 2)


def test_a_waiting_job_is_dealt_with_by_the_next_agent(living: Living) -> None:
    pressure.a_waiting_job_is_dealt_with_by_the_next_agent(living)


def test_the_node_runs_out(living: Living) -> None:
    pressure.the_node_runs_out(living)
