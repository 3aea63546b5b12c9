"""What the agent tells of a job's samples: few enough, none that matters left out."""

from typing import Any

from acctd.pages import _few
from acctd.points import Point


def point(at: int, anon: int = 0, rules: int = 0) -> Point:
    known: dict[str, Any] = dict.fromkeys(Point.__struct_fields__, 0)
    return Point(**(known | {"at": at, "memory_anon": anon, "network": {f"OutgoingC{n}": at for n in range(rules)}}))


def test_a_few_samples_are_told_as_they_are() -> None:
    kept = [point(n * 10**9) for n in range(50)]
    assert _few(kept) == kept
    assert _few([]) == []


def test_of_many_the_peak_and_the_last_one_stay() -> None:
    kept = [point(n * 10**9, anon=n % 100) for n in range(100_000)]
    kept[77_777] = point(77_777 * 10**9, anon=10**6)
    few = _few(kept)
    assert len(few) <= 800
    assert kept[77_777] in few
    assert few[-1] == kept[-1]
    assert [each.at for each in few] == sorted({each.at for each in few})


def test_what_is_told_is_bounded_in_bytes() -> None:
    few = _few([point(n * 10**9, rules=130) for n in range(2_000)])
    assert 2 <= len(few) < 200
