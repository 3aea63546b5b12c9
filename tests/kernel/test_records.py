"""A job's record and limits by an agent in this process: the bodies that tests/vm runs on other cgroup layouts."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bodies import records
from tests.bodies.machine import Machine, machine
from tests.kernel.conftest import BASE, scrub
from tests.kernel.test_block_io import TOTAL, fresh_loop

_serial = itertools.count()


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Machine]:
    base = f"{BASE}{os.getpid()}-r{next(_serial)}"
    try:
        with machine(tmp_path, base) as made:
            yield made
    finally:
        scrub(base)


def test_a_complete_record(here: Machine) -> None:
    image = here.directory / "image"
    with image.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, TOTAL + (4 << 20))
    with fresh_loop(image) as loop:
        records.a_complete_record(here, Path(loop.path))


def test_limits_are_felt(here: Machine) -> None:
    records.limits_are_felt(here)


def test_a_family_lies_in_its_parent_and_is_counted_in_both(here: Machine) -> None:
    records.a_family_lies_in_its_parent_and_is_counted_in_both(here)


def test_nested_cgroups_of_the_job_are_counted_and_removed(here: Machine) -> None:
    records.nested_cgroups_of_the_job_are_counted_and_removed(here)


def test_what_forks_while_it_is_killed_dies(here: Machine) -> None:
    records.what_forks_while_it_is_killed_dies(here)
