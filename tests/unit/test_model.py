from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acctd.errors import UsageError
from acctd.model import (
    INT64_MAX,
    MEMORY_MIN,
    JobSpec,
    Limits,
    Owner,
    chain_name,
    check_classes,
    check_job_id,
    check_tag,
    parse_class,
    parse_size,
)

OWNER = Owner(uid=1000, gid=1000, name="ada")
IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._@:+\[\]-]{0,127}", fullmatch=True).filter(lambda job: ".." not in job)


@pytest.mark.parametrize("job", ["12.0", "42.3", "17_4", "12[3].server.domain", "a", "7", "x" * 128, "a:b@c+d-e", "9."])
def test_ids_of_the_batch_systems_pass(job):
    assert check_job_id(job) == job


@pytest.mark.parametrize(
    "job",
    ["", "a/b", "/", ".", "..", "a..b", "../x", ".a", "-a", "_a", "a b", "a\n", "\n", "a\0", "x" * 129, "x" * 300,
     "é", "a\ud800", "٣", "a*", "a;b", "$(id)", "[a]"],
)  # fmt: skip
def test_other_ids_do_not_and_the_sentence_stays_short(job):
    with pytest.raises(UsageError, match=r"\Ajob id ") as refusal:
        check_job_id(job)
    text = str(refusal.value)
    assert len(text) < 250
    assert "\n" not in text


def test_a_long_id_is_told_its_length():
    with pytest.raises(UsageError, match="300 characters"):
        check_job_id("x" * 300)


@given(IDS)
def test_a_chain_name_is_one_that_netfilter_takes(job):
    name = chain_name(job)
    assert name.startswith("JOB_")
    assert len(name) <= 28
    assert set(name) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.")


@given(IDS)
def test_no_id_is_another_ids_chain_name(job):
    """Who knows a long id could otherwise name a job after its shortened chain, and take it over."""
    forged = chain_name(job).removeprefix("JOB_")
    assert forged == job or chain_name(forged) != chain_name(job)


def test_ids_that_differ_in_special_characters_only_have_chains_of_their_own():
    assert len({chain_name(job) for job in ("a@b", "a:b", "a+b", "a_b", "a[b", "a-b")}) == 6


def test_long_ids_with_one_beginning_have_chains_of_their_own():
    assert chain_name("x" * 127 + "a") != chain_name("x" * 127 + "b")


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("512M", 512 << 20), ("1.5G", 3 << 29), ("2 GiB", 2 << 30), ("10kb", 10240), ("0", 0), ("0.5K", 512),
     (" 7P ", 7 << 50), ("1073741824", 1 << 30), (str(INT64_MAX), INT64_MAX), ("1.0000001K", 1024)],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size("memory", text) == size


@pytest.mark.parametrize(
    "text", ["", "-5", "12Q", "nan", "inf", "1e9", "0x10", "1,5G", ".5G", "1.", "G", "1 G G", "1\n2", "M1", "1Mi b"]
)
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match=r"memory .* is no size"):
        parse_size("memory", text)


@pytest.mark.parametrize("text", [str(INT64_MAX + 1), "8192P", "9" * 400])
def test_a_size_no_kernel_can_hold(text):
    with pytest.raises(UsageError, match="above 2\\^63-1"):
        parse_size("memory", text)


@given(st.integers(0, INT64_MAX))
def test_a_plain_number_of_bytes_is_exact(number):
    assert parse_size("memory", str(number)) == number


@given(st.text())
def test_no_text_is_a_crash(text):
    try:
        assert 0 <= parse_size("memory", text) <= INT64_MAX
    except UsageError:
        pass


@pytest.mark.parametrize(
    "limits",
    [{"memory": MEMORY_MIN - 1}, {"memory": 1}, {"memory": 0}, {"memory": -5}, {"memory": INT64_MAX + 1},
     {"memory_soft": 0}, {"memory": 1 << 30, "swap": -1}, {"cpus": 0}, {"cpus": -1}, {"cpus": float("nan")},
     {"cpus": float("inf")}, {"cpus": float("-inf")}, {"cpus": 1e-300}, {"cpus": 65537}, {"cpu_shares": 1},
     {"cpu_shares": 262145}, {"pids": 0}, {"pids": -1}, {"pids": 4194305}],
)  # fmt: skip
def test_limits_of_nonsense_name_the_field_and_the_range(limits):
    with pytest.raises(UsageError, match=rf"\A{list(limits)[-1]} \S+ is out of range; it takes \S+ to \S+ \w+\Z"):
        Limits(**limits)


@pytest.mark.parametrize("cpuset", ["", "a", "-1", "0-", "0,,1", "0 1", "0-3,", "0:2", "all", "0\n", "0-1-2"])
def test_what_is_no_cpu_list(cpuset):
    with pytest.raises(UsageError, match="is no CPU list"):
        Limits(cpuset=cpuset)


@pytest.mark.parametrize("cpuset", ["0", "0-3", "0,2,8-11", "1023"])
def test_cpu_lists(cpuset):
    assert Limits(cpuset=cpuset).cpuset == cpuset


def test_limits_are_held_against_each_other():
    with pytest.raises(UsageError, match="memory_soft 3145728 is above memory 2097152"):
        Limits(memory=2 << 20, memory_soft=3 << 20)
    with pytest.raises(UsageError, match="swap 5 needs a memory limit"):
        Limits(swap=5)
    assert Limits(memory=2 << 20, memory_soft=2 << 20, swap=0).swap == 0
    assert Limits(memory_soft=2 << 20).memory is None


@pytest.mark.parametrize(
    "cidr",
    ["", "campus", "10.0.0.0/33", "10.0.0.1/8", "10.0.0.0/-1", "10.0.0/8", "fd00::1/8", "::/129", "10.0.0.0/8/9", "*"],
)
def test_what_is_no_network(cidr):
    with pytest.raises(UsageError, match=r"class Campus: .* is no CIDR network .*; write it like 10\.0\.0\.0/8"):
        parse_class("Campus", [cidr])


@pytest.mark.parametrize("name", ["", "campus", "1A", "A-B", "A B", "É", "A" * 33, "A\n", "A/B"])
def test_what_is_no_class_name(name):
    with pytest.raises(UsageError, match=r"class name .* is not usable"):
        parse_class(name, ["10.0.0.0/8"])


@pytest.mark.parametrize("name", ["External", "EXTERNAL", "EXternal"])
def test_the_remainders_name_is_taken_in_any_case(name):
    with pytest.raises(UsageError, match="stands for whatever no class contains"):
        parse_class(name, ["10.0.0.0/8"])


@pytest.mark.parametrize(
    "cidrs",
    [["10.0.0.0/8", "10.1.0.0/16"], ["10.1.0.0/16", "10.0.0.0/8"], ["10.0.0.0/8", "10.0.0.0/8"],
     ["fd00::/8", "10.0.0.0/8", "fd00:1::/32"], ["0.0.0.0/0", "255.255.255.255"],
     ["10.0.0.0/8", "10.0.0.0/30", "11.0.0.0/8"]],
)  # fmt: skip
def test_a_class_that_overlaps_itself(cidrs):
    with pytest.raises(UsageError, match=r"class Campus overlaps itself: .* lies inside .*; drop one of them"):
        parse_class("Campus", cidrs)


@given(st.lists(st.integers(0, 2**32 - 1).flatmap(lambda n: st.integers(0, 32).map(lambda p: (n >> p << p, 32 - p)))))
def test_overlap_is_found_as_by_asking_every_pair(pairs):
    networks = [ip_network(pair) for pair in pairs]
    overlaps = any(a.overlaps(b) for i, a in enumerate(networks) for b in networks[:i])
    try:
        cls = parse_class("A", [str(n) for n in networks] or ["fd00::/8"])
    except UsageError:
        assert overlaps
    else:
        assert not overlaps
        assert len(cls.networks) == max(1, len(networks))


def test_versions_do_not_overlap_each_other():
    assert len(parse_class("All", ["0.0.0.0/0", "::/0"]).networks) == 2


def test_classes_may_nest_but_not_share_a_network_or_a_name():
    outer, inner = parse_class("Outer", ["10.0.0.0/8"]), parse_class("Inner", ["10.1.0.0/16"])
    check_classes((outer, inner))
    with pytest.raises(UsageError, match=r"10\.0\.0\.0/8 is in class Outer and in class Other"):
        check_classes((outer, parse_class("Other", ["10.0.0.0/8"])))
    with pytest.raises(UsageError, match="class OUTER is given twice"):
        check_classes((outer, parse_class("OUTER", ["11.0.0.0/8"])))


def test_an_empty_class():
    with pytest.raises(UsageError, match="class Campus is empty"):
        parse_class("Campus", [])


@pytest.mark.parametrize("key", ["", "1a", "a-b", "a b", "a=b", "é", "x" * 65, "a\n"])
def test_tag_keys_that_are_no_attribute(key):
    with pytest.raises(UsageError, match="tag key"):
        check_tag(key, "x")


@pytest.mark.parametrize("value", ["a\0b", "x" * 4097, "not utf-8: \udcff"])
def test_tag_values_that_no_record_can_hold(value):
    with pytest.raises(UsageError, match=r"\Atag Key "):
        check_tag("Key", value)


@pytest.mark.parametrize("value", ["", 'a "quoted" \\ thing', "two\nlines", "x" * 4096, "naïve 日本"])
def test_tag_values_may_be_odd(value):
    check_tag("Key", value)


def test_a_spec_checks_all_its_parts():
    with pytest.raises(UsageError, match="job id"):
        JobSpec("a/b", OWNER)
    with pytest.raises(UsageError, match="tag key"):
        JobSpec("a", OWNER, tags={"": "x"})
    with pytest.raises(UsageError, match="Project and PROJECT differ in case only"):
        JobSpec("a", OWNER, tags={"Project": "x", "PROJECT": "y"})
