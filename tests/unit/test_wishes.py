"""What a caller wishes for, over what the configuration gives: pure, no kernel."""

import pytest

from acctd import wishes
from acctd.config import parse
from acctd.errors import NotPermittedError, UsageError
from acctd.model import Limits
from acctd.policies import Isolation, OomPolicy

G = 1 << 30


def config(text=""):
    loaded, mistakes = parse(text, "f")
    assert loaded is not None, mistakes
    return loaded


def test_what_is_wished_goes_before_a_request_and_that_before_the_configuration():
    defaults = Limits(memory=8 * G, pids=100, cpus=1.0)
    request = {"gridengine": {"m_mem_free": "2G", "h_vmem": "3G"}}
    assert wishes.limits(defaults, {"cpus": 2.0}, request) == Limits(3 * G, 2 * G, cpus=2.0, pids=100)
    assert wishes.limits(defaults, {"memory": 4 * G}, request).memory == 4 * G


def test_a_request_says_all_there_is_to_say_of_memory():
    """The configured policy is for the configured memory; with the request's soft limit it would be refused."""
    defaults = Limits(memory=8 * G, memory_policy="hard")
    got = wishes.limits(defaults, {}, {"gridengine": {"m_mem_free": "2G", "h_vmem": "3G"}})
    assert (got.memory_policy, got.hard, got.soft) == ("custom", 3 * G, 2 * G)
    assert wishes.limits(defaults, {}, {"gridengine": {"binding": "linear:2"}}).memory_policy == "hard"


def test_null_takes_a_limit_away():
    assert wishes.limits(Limits(memory=G, swap=0), {"memory": None, "swap": None}) == Limits()


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"memry": 1}, "limit 'memry' is unknown"),
        ({"memory": "2G"}, "limits: memory '2G' is not usable"),
        ({"memory_policy": "firm"}, "limits: "),
    ],
)
def test_a_wrong_limit_is_named(wanted, said):
    with pytest.raises(UsageError, match=said):
        wishes.limits(Limits(), wanted)


def test_a_policy_is_the_configured_one_with_what_is_wished():
    given = config('[oom]\naction = "hold"\ndeadline = 5\nceiling = "4G"\n')
    assert wishes.oom(given, {}, root=False) == OomPolicy("hold", 4 * G, deadline=5)
    assert wishes.oom(given, {"action": "grow", "ceiling": G}, root=False) == OomPolicy("grow", G, deadline=5)


def test_only_root_goes_beyond_the_configured_ceiling():
    given = config('[oom]\nceiling = "4G"\n')
    assert wishes.oom(given, {"action": "grow", "ceiling": 5 * G}, root=True).ceiling == 5 * G
    with pytest.raises(NotPermittedError, match=r"oom\.ceiling is 4294967296"):
        wishes.oom(given, {"action": "grow", "ceiling": 5 * G}, root=False)
    with pytest.raises(NotPermittedError, match=r"has no oom\.ceiling"):
        wishes.oom(config(), {"action": "grow", "ceiling": G}, root=False)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"action": "grow"}, "needs a ceiling"),
        ({"action": "exec"}, r"needs oom\.program"),
        ({"action": "pray"}, "oom"),
        ({"deadline": 0}, "deadline 0"),
        ({"thresholds": [90, 80]}, "do not rise"),
        ({"patience": 1}, "oom key 'patience' is unknown"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(wanted, said):
    with pytest.raises(UsageError, match=said):
        wishes.oom(config(), wanted, root=True)


def test_isolation_is_what_the_configuration_asks_of_all_and_what_the_job_asks_on_top():
    given = config(
        '[isolation]\nscratch = ["/tmp"]\nno_new_privs = true\nchroots.a = {root = "/a"}\nchroots.b = {root = "/b"}\n'
        'chroot = "a"\n'
    )
    assert wishes.isolation(given, {}) == Isolation(False, ("/tmp",), "a", True)
    asked = {"pid_namespace": True, "scratch": ["/tmp", "/var/tmp"], "chroot": "b", "no_new_privs": False}
    assert wishes.isolation(given, asked) == Isolation(True, ("/tmp", "/var/tmp"), "b", True)
    with pytest.raises(UsageError, match=r"chroot 'c' is no name in isolation\.chroots"):
        wishes.isolation(given, {"chroot": "c"})
    for paths, said in (
        (["/../etc"], "is not usable"),
        (["/proc"], "the kernel's own"),
        (["/var", "/var/tmp"], "lies inside '/var'"),
        ("/tmp", r"scratch '/tmp' is not usable: Expected `array`"),
    ):
        with pytest.raises(UsageError, match=said):
            wishes.isolation(given, {"scratch": paths})
    assert wishes.isolation(given, {"scratch": ["/dev/shm"]}).scratch == ("/tmp", "/dev/shm")  # a name


def test_a_network_by_its_name():
    assert wishes.network("nat") == "nat"
    with pytest.raises(UsageError, match="network 'wan' is none"):
        wishes.network("wan")
