"""Who has how much of the door, and trouble that is told once."""

import logging

import pytest

from acctd.shares import (
    CONNECTIONS,
    HELD_PER_USER,
    PER_USER,
    WATCHES,
    WATCHES_PER_USER,
    Once,
    Share,
    Shares,
)


def test_users_fill_the_door_and_root_does_not():
    shares = Shares()
    root = shares.of(0)
    for _ in range(CONNECTIONS + 1):
        shares.enter(root)
    assert not shares.is_full
    users = [shares.of(1000 + n) for n in range(CONNECTIONS // PER_USER)]
    for share in users:
        for _ in range(PER_USER):
            assert not shares.is_full
            shares.enter(share)
    assert shares.is_full
    shares.leave(users[0])
    assert not shares.is_full


def test_a_user_is_one_share_until_the_last_connection_is_gone():
    shares = Shares()
    first = shares.of(7)
    shares.enter(first)
    assert shares.of(7) is first
    shares.enter(shares.of(7))
    assert first.connections == 2
    shares.leave(first)
    assert shares.of(7) is first
    shares.leave(first)
    assert shares.of(7) is not first


def test_watches_are_bounded_for_a_user_and_for_all_users():
    shares = Shares()
    granted = []
    for uid in range(1, WATCHES):
        share = Share(uid)
        while shares.watch(share):
            granted.append(share)
        assert share.watches <= WATCHES_PER_USER
        if len(granted) == WATCHES:
            break
    assert len(granted) == WATCHES
    assert not shares.watch(Share(9999))
    assert all(shares.watch(Share(0)) for _ in range(WATCHES))
    shares.unwatch(granted.pop())
    assert shares.watch(Share(9999))


@pytest.mark.parametrize(
    ("uid", "held", "own", "too_much"),
    [(5, HELD_PER_USER, 0, False), (5, HELD_PER_USER + 1, 0, True), (5, HELD_PER_USER + 1, 1, False),
     (0, HELD_PER_USER * 9, 0, False)],
)  # fmt: skip
def test_what_is_kept_for_a_user_is_bounded(uid, held, own, too_much):
    assert Share(uid, held=held).is_too_much(own) is too_much


def test_trouble_is_told_once_a_kind_and_again_after_a_calm_minute(caplog):
    now = 100.0
    once = Once(logging.getLogger("told"), clock=lambda: now)
    for _ in range(1000):
        once.tell("a", "first")
        now += 59.0
    once.tell("b", "another")
    now += 61.0
    once.tell("a", "second")
    now += 61.0
    once.tell("a", "third")
    assert [record.getMessage() for record in caplog.records] == [
        "first", "another", "second (999 of the kind were not told after the last one)", "third",
    ]  # fmt: skip
    assert {record.levelname for record in caplog.records} == {"WARNING"}


def test_a_defect_is_told_with_its_traceback(caplog):
    once = Once(logging.getLogger("told"))
    for _ in range(3):
        once.tell("a", "broken", ZeroDivisionError("why"))
    assert [(r.levelname, r.exc_info is not None) for r in caplog.records] == [("ERROR", True)]
