import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from acctd.metrics import MEMORY_PEAK
from collectors.parse import MalformedFile, StatLines, parse_number, parse_stat, single

NAMES = (b"a", b"total_rss", b"z")
VALUES = st.integers(0, 10**6).map(lambda n: b" %d" % n) | st.sampled_from([b"", b" max", b" -1", b" 1 2"])
LINES = st.permutations([*NAMES, b"other", b"total_rss_huge", b""]).flatmap(
    lambda names: st.tuples(*(VALUES.map(lambda value, name=name: name + value) for name in names)).map(b"\n".join)
)


def outcome(parse, *args):
    """What a parser gives, or that it raised the one error it may (which of two bad lines it names is its choice)."""
    try:
        return parse(*args)
    except MalformedFile:
        return MalformedFile


@pytest.mark.parametrize(
    "text", [b"", b"\n", b"max\n", b"-1\n", b"+1\n", b" 1\n", b"1_0\n", b"1\n\n", b"1 2\n", b"9" * 21]
)
def test_only_a_plain_number_is_a_number(text):
    with pytest.raises(MalformedFile, match=r"/x/memory\.failcnt: cannot read"):
        parse_number(text, "/x/memory.failcnt")


def test_the_largest_counter_fits():
    assert parse_number(b"18446744073709551615\n", "") == 2**64 - 1
    assert single(MEMORY_PEAK)(b"7\n", "") == {(MEMORY_PEAK, ""): 7}


def test_a_long_line_is_shortened_in_the_error():
    assert len(str(MalformedFile("/x", b"n " + b"x" * 5000))) < 200


@given(st.binary())
def test_no_bytes_raise_anything_else_from_a_number(text):
    outcome(parse_number, text, "x")


# A kernel prints the same lines for as long as it runs; here they even change places.
@given(st.lists(LINES, min_size=1, max_size=4))
@example([b"a 1\nother 5\nz 3\n", b"other 5\na 1\nz 3\n"])
@example([b"a 1\nz 3\n", b"a 1\n"])
@example([b"a 1\n", b"a max\n"])
@example([b"other 1\n", b"other 1\na 1\n"])
def test_lines_by_position_are_the_lines_by_name(texts):
    lines = StatLines(NAMES)
    for text in texts:
        assert outcome(lines.take, text, "x") == outcome(parse_stat, text, "x", NAMES)


@given(st.lists(st.binary(), max_size=3))
def test_no_bytes_raise_anything_else_from_lines_by_position(texts):
    lines = StatLines(NAMES)
    for text in texts:
        outcome(lines.take, text, "x")
