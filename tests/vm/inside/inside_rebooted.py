"""The node was switched off with a job open: what the first agent after that makes of it.

The second boot of the guest of inside_systemd.py, which has left the agent's state directory among the results.
"""

import json
import shutil
from collections.abc import Iterator

import pytest

from tests.vm.guest import RESULTS
from tests.vm.inside.inside_systemd import DATAGRAM
from tests.vm.inside.service import install, run, said


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Not the whole machine's as in the other guests: systemd changes it too."""
    yield


def test_a_job_that_a_power_cut_ended_is_closed_with_its_last_totals() -> None:
    install()
    shutil.copytree(f"{RESULTS}/state", "/var/lib/acctd", dirs_exist_ok=True)
    run("systemctl", "enable", "--now", "acctd.service")
    assert run("acctd-hook", "list") == ""
    record = json.loads(run("acctd-hook", "finish", "--job", "last", "--json"))
    assert record["state"] == "lost"
    assert record["totals"]["network"]["OutgoingExternal"] == 3 * DATAGRAM
    assert any("rebooted" in note for note in record["notes"]), record["notes"]
    assert said("job last finished")
