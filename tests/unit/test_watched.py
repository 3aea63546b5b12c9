"""What is known of one job that is listened to, without a kernel."""

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from acctd.watched import _WAKING, Watched

LIMIT = 1 << 30


def watched(usage: int, changed: float) -> Watched:
    job: Any = SimpleNamespace(spec=SimpleNamespace(limits=SimpleNamespace(hard=LIMIT)))
    memory: Any = SimpleNamespace(usage=lambda: usage)
    return Watched(job, memory, cast("Any", None), changed=changed)


@pytest.mark.parametrize(
    ("usage", "since", "waking"),
    [
        (LIMIT // 2, 0.0, True),  # the limit was raised, and who waited has not run since
        (LIMIT, 0.0, False),  # it is at its new limit already
        (LIMIT // 2, _WAKING + 1, False),  # whatever it waits for, it is not for its turn on a CPU
        (LIMIT // 2, float("inf"), False),  # its limit never changed
    ],
)
def test_who_was_just_woken_by_a_higher_limit_does_not_wait(usage: int, since: float, waking: bool) -> None:
    assert watched(usage, time.monotonic() - since).is_waking() is waking
