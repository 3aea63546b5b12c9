import msgspec
from hypothesis import given
from hypothesis import strategies as st

from acctd.meter import Meter, Stored, add
from acctd.metrics import BLOCK_READ_BYTES, CPU_SYSTEM, CPU_USER, MEMORY_ANON, MEMORY_ANON_PEAK, NETWORK_BYTES

USER = (CPU_USER, "")


def test_a_counter_that_comes_back_lower_adds_only_what_it_gains_from_there():
    """Whether it was reset or forgot a part cannot be told: nothing is counted that may have been counted before."""
    meter = Meter()
    for value in (5, 5, 9):
        meter.feed({USER: value})
    assert meter.totals[USER] == 9
    for value in (2, 4):
        meter.feed({USER: value})
    assert meter.totals[USER] == 11
    for value in (0, 1):
        meter.feed({USER: value})
    assert meter.totals[USER] == 12


def test_a_counter_known_to_begin_anew_adds_all_it_counts():
    meter = Meter()
    meter.feed({USER: 9, (CPU_SYSTEM, ""): 5})
    meter.rebase([CPU_USER])
    meter.feed({USER: 4, (CPU_SYSTEM, ""): 6})
    assert meter.totals == {USER: 13, (CPU_SYSTEM, ""): 6}
    meter.rebase([CPU_USER])
    meter.feed({USER: 20})
    assert meter.totals[USER] == 33


def test_states_are_added_by_name_and_label():
    assert add({"network": {"A": 1}}, {}, {"network": {"A": 2, "B": 3}, "cpu_user": {"": 1}}) == {
        "network": {"A": 3, "B": 3},
        "cpu_user": {"": 1},
    }


def test_a_peak_keeps_its_highest_and_a_gauge_its_last():
    meter = Meter()
    for value in (0, 7, 3):
        meter.feed({(MEMORY_ANON, ""): value})
    assert meter.totals == {(MEMORY_ANON, ""): 3, (MEMORY_ANON_PEAK, ""): 7}


def test_a_zero_is_a_reading_and_an_absence_is_none():
    meter = Meter()
    meter.feed({USER: 0, (MEMORY_ANON_PEAK, ""): 0})
    assert meter.published() == {"cpu_user": {"": 0}, "memory_anon_peak": {"": 0}}
    meter.feed({})
    assert meter.published() == {"cpu_user": {"": 0}, "memory_anon_peak": {"": 0}}


def test_labels_are_set_back_apart():
    meter = Meter()
    meter.feed({(NETWORK_BYTES, "A"): 10, (NETWORK_BYTES, "B"): 20})
    meter.feed({(NETWORK_BYTES, "A"): 1, (NETWORK_BYTES, "B"): 21})
    assert meter.published() == {"network": {"A": 10, "B": 21}}


def test_a_record_holds_no_gauge_and_the_ledger_does():
    meter = Meter()
    meter.feed({(MEMORY_ANON, ""): 3, USER: 1})
    assert meter.published() == {"memory_anon_peak": {"": 3}, "cpu_user": {"": 1}}
    assert meter.now() == {"memory_anon": {"": 3}, "memory_anon_peak": {"": 3}, "cpu_user": {"": 1}}


def test_metrics_of_another_version_are_dropped():
    tomorrow = {"of_tomorrow": {"": 5}}
    meter = Meter.restore(Stored({"cpu_user": {"": 1}} | tomorrow, tomorrow))
    assert meter.stored() == Stored({"cpu_user": {"": 1}}, {})


def test_last_is_what_the_kernel_stood_at_not_the_total():
    meter = Meter()
    meter.feed({USER: 100, (CPU_SYSTEM, ""): 7, (BLOCK_READ_BYTES, "8:0"): 1})
    meter.feed({USER: 30})
    assert meter.last((CPU_USER, CPU_SYSTEM)) == {USER: 30, (CPU_SYSTEM, ""): 7}


# A life of a counter: how much it grows between two readings, or what befalls it.
LIVES = st.lists(st.one_of(st.integers(0, 1000), st.sampled_from(["set back", "made anew", "restart"])))


@given(LIVES)
def test_totals_never_go_back_and_survive_restarts_at_any_reading(life):
    """Against a plain sum of what can be known to have been counted."""
    meter, counter, total, seen = Meter(), 0, 0, 0
    for event in life:
        before = meter.totals.get(USER, 0)
        if event == "set back":
            counter //= 2
        elif event == "made anew":
            counter = seen = 0
            meter.rebase([CPU_USER])
        elif event == "restart":
            meter = Meter.restore(msgspec.json.decode(msgspec.json.encode(meter.stored()), type=Stored))
        else:
            counter += event
            total += max(0, counter - seen)
            seen = counter
            meter.feed({USER: counter})
            assert meter.totals[USER] == total
            assert meter.last((CPU_USER,)) == {USER: counter}
        assert meter.totals.get(USER, 0) >= before


@given(LIVES, st.integers(1, 3))
def test_reading_twice_counts_once(life, times):
    once, often, counter = Meter(), Meter(), 0
    for event in life:
        counter = counter + event if isinstance(event, int) else counter // 2 if event == "set back" else counter
        once.feed({USER: counter})
        for _ in range(times):
            often.feed({USER: counter})
    assert once.totals == often.totals
