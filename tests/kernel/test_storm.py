"""Many callers at once: each job has one record with what is its own, and nothing is left (the node checks)."""

import pytest

from acctd.ledger import FILE, Ledger
from bench.storm import MEANS, mistakes, storm, wanted
from tests.kernel.served import Served


@pytest.mark.parametrize("means", list(MEANS))
def test_a_storm_of_callers(served: Served, means: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", served.node.environ["PYTHONPATH"])  # for the callers' hooks
    jobs = wanted("storm", 128)
    over = storm(served.path, jobs, 16, means)
    assert {outcome.id for outcome in over.outcomes} == {job.id for job in jobs}
    with Ledger(served.node.directory / "state" / FILE) as ledger:
        assert mistakes(ledger, jobs, over.outcomes) == []
        assert len(ledger.records()) == len(jobs)
        assert ledger.open_jobs() == []
    assert served.ok("List") == {"jobs": []}


def test_a_wrong_record_would_be_seen(served: Served) -> None:
    jobs = wanted("storm", 3)
    over = storm(served.path, jobs, 2, "socket")
    other = wanted("other", 1)
    changed = [job._replace(exit_code=77) for job in jobs[:1]]
    with Ledger(served.node.directory / "state" / FILE) as ledger:
        assert mistakes(ledger, jobs, over.outcomes) == []
        assert len(mistakes(ledger, other, over.outcomes)) == 1
        assert "is recorded as" in mistakes(ledger, changed, over.outcomes)[0]
        assert "not what its caller was told" in mistakes(ledger, jobs, over.outcomes[1:])[0]
