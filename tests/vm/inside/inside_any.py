"""What holds on every cgroup layout: by the bodies that tests/kernel runs on its host's own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bodies import cgroups, records
from tests.bodies.cgroups import Place
from tests.bodies.machine import Machine
from tests.vm.inside.conftest import BASE

DISK = Path("/dev/vda")


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place(BASE)
    yield made
    made.close()


def test_directories_are_marked_and_hold_what_is_started(place: Place) -> None:
    cgroups.directories_are_marked_and_hold_what_is_started(place)


def test_the_base_goes_with_the_last_job(place: Place) -> None:
    cgroups.the_base_goes_with_the_last_job(place)


def test_a_base_that_an_admin_made_stays(place: Place) -> None:
    cgroups.a_base_that_an_admin_made_stays(place)


def test_limits_reach_the_kernel(place: Place) -> None:
    cgroups.limits_reach_the_kernel(place, "1")


@pytest.mark.parametrize("cpuset", ["99", "3-1"])
def test_a_limit_that_the_kernel_refuses_leaves_nothing(place: Place, cpuset: str) -> None:
    cgroups.a_limit_that_the_kernel_refuses_leaves_nothing(place, cpuset)


def test_cpus_outside_the_bases_are_refused(place: Place) -> None:
    cgroups.cpus_outside_the_bases_are_refused(place)


def test_an_existing_cgroup_is_in_use_and_is_left_alone(place: Place) -> None:
    cgroups.an_existing_cgroup_is_in_use_and_is_left_alone(place)


def test_a_name_taken_in_one_hierarchy_only_is_in_use(place: Place) -> None:
    cgroups.a_name_taken_in_one_hierarchy_only_is_in_use(place)


def test_of_many_that_make_one_job_at_once_one_gets_it(place: Place) -> None:
    cgroups.of_many_that_make_one_job_at_once_one_gets_it(place, rounds=5)


def test_cgroups_that_the_job_made_itself_go_with_what_is_inside(place: Place) -> None:
    cgroups.cgroups_that_the_job_made_itself_go_with_what_is_inside(place)


def test_a_complete_record(machine: Machine) -> None:
    records.a_complete_record(machine, DISK)


def test_limits_are_felt(machine: Machine) -> None:
    records.limits_are_felt(machine)


def test_a_family_lies_in_its_parent_and_is_counted_in_both(machine: Machine) -> None:
    records.a_family_lies_in_its_parent_and_is_counted_in_both(machine)


def test_nested_cgroups_of_the_job_are_counted_and_removed(machine: Machine) -> None:
    records.nested_cgroups_of_the_job_are_counted_and_removed(machine)


def test_what_forks_while_it_is_killed_dies(machine: Machine) -> None:
    records.what_forks_while_it_is_killed_dies(machine)
