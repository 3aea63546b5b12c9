"""The configuration file: what is right becomes types, what is wrong is named with key, value and range."""

import re
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest
from click.testing import CliRunner

from acctd.cli.config import command as cli
from acctd.config import DEFAULT_FILE, AccessConfig, load, parse
from acctd.errors import ConfigError, NotFoundError
from acctd.model import Limits

EXAMPLE = Path(__file__).parents[2] / "docs/acctd.toml.example"


def mistakes(text):
    loaded, found = parse(text, "f")
    assert (loaded is None) == bool(found)
    return found


def good(text):
    loaded, found = parse(text, "f")
    assert loaded is not None, found
    return loaded


def test_an_empty_file_is_all_defaults():
    c = good("")
    assert (c.state_dir, c.socket, c.poll_interval) == (Path("/var/lib/acctd"), Path("/run/acctd/acctd.sock"), 10.0)
    assert c.cgroup.base == "acctd"
    assert c.cgroup.controllers == ("memory", "cpu", "cpuacct", "cpuset", "blkio", "freezer", "pids")
    assert (c.network.mode, c.network.backend) == ("nat", "auto")
    assert c.network.pool4 == IPv4Network("10.181.0.0/18")
    assert c.network.pool6 == IPv6Network("fd61:6363:7464::/112")
    assert [(k.name, len(k.networks)) for k in c.network.classes] == [("Internal", 4)]
    assert c.limits == Limits()
    assert c.access == AccessConfig(create=(), read=(), others="ps", jobs_per_user=100)


def test_the_example_is_the_default_in_every_key():
    assert parse(EXAMPLE.read_text(), None) == parse("", None)


def test_the_examples_commented_limits_are_right_too():
    text = re.sub(r"^# (\w+ = |\[)", r"\1", EXAMPLE.read_text(), flags=re.MULTILINE)
    loaded = good(text)
    assert loaded.limits == Limits(2 << 30, 1 << 30, 512 << 20, 1.0, 0.1, 1024, "0-3,8", 4096)
    assert loaded.oom.ceiling == 8 << 30 and loaded.oom.program == "/usr/local/sbin/on-oom"
    assert loaded.isolation.default.chroot == "el9"
    assert loaded.isolation.chroots["el9"].binds[2] == ("/etc/resolv.conf", "/etc/resolv.conf", True)


def test_every_key_is_taken():
    c = good(
        """
        state_dir = "/s"
        runtime_dir = "/r"
        poll_interval = 0.5
        [cgroup]
        base = "a/b"
        controllers = ["pids"]
        [network]
        mode = "none"
        pool4 = "10.0.0.0/8"
        pool6 = ""
        backend = "nftables"
        [network.classes]
        S3 = ["203.0.113.0/24", "2001:db8::/32"]
        [limits]
        memory = "2G"
        memory_soft = 1073741824
        [access]
        create = ["alice", "@batch", "carol@example.org"]
        others = "nothing"
        jobs_per_user = 7
        """
    )
    assert (c.state_dir, c.runtime_dir, c.socket) == (Path("/s"), Path("/r"), Path("/r/acctd.sock"))
    assert (c.poll_interval, c.cgroup.base, c.cgroup.controllers) == (0.5, "a/b", ("pids",))
    assert (c.network.mode, c.network.pool6, c.network.backend) == ("none", None, "nftables")
    assert [k.name for k in c.network.classes] == ["S3"]
    assert c.limits == Limits(memory=2 << 30, memory_soft=1 << 30)
    assert c.access.create == ("alice", "@batch", "carol@example.org")
    assert (c.access.others, c.access.jobs_per_user) == ("nothing", 7)


@pytest.mark.parametrize(
    ("user", "groups", "may"),
    [
        ("alice", [], True),
        ("bob", ["users", "batch"], True),
        ("bob", ["users"], False),
        ("bob", [], False),
        ("batch", [], False),  # a user who is called like the group
        ("@batch", [], False),
        ("bob", ["alice"], False),  # a group that is called like the user
    ],
)
def test_who_may_create_is_named_or_in_a_named_group(user, groups, may):
    assert good('[access]\ncreate = ["alice", "@batch"]').access.may_create(user, groups) is may


def test_nobody_may_create_by_default():
    assert not good("").access.may_create("alice", ["batch", "wheel"])


WRONG = [
    ("pool_interval = 3", "pool_interval is no key of acctd; did you mean poll_interval?"),
    ("[network]\npol4 = ''", "network.pol4 is no key of acctd; did you mean network.pool4?"),
    ("[cgroup]\nzzz = 1", "cgroup.zzz is no key of acctd; known here: base, controllers"),
    ("[limit]\nmemory = 1", "limit is no key of acctd; did you mean limits?"),
    ("poll_interval = 0", "poll_interval 0 is not usable; it takes 0.1 to 3600 seconds"),
    ("poll_interval = 3600.1", "poll_interval 3600.1 is not usable; it takes 0.1 to 3600 seconds"),
    ("poll_interval = nan", "poll_interval nan is not usable; it takes 0.1 to 3600 seconds"),
    ("poll_interval = '10'", "poll_interval '10' is not usable; it takes 0.1 to 3600 seconds"),
    ("poll_interval = true", "poll_interval True is not usable; it takes 0.1 to 3600 seconds"),
    ("state_dir = 'var'", "state_dir 'var' is not usable; it takes an absolute path"),
    ("state_dir = 3", "state_dir 3 is not usable; it takes text"),
    (f"socket = '/{'x' * 107}'", "has 108 bytes; a socket's path takes 107 at most"),
    ("network = 3", "network 3 is not usable; it takes a table, written [network]"),
    ("[cgroup]\nbase = '../x'", "cgroup.base: cgroup path '../x': '..' cannot be a directory name"),
    ("[cgroup]\nbase = ''", "cgroup.base: cgroup path ''"),
    ("[cgroup]\ncontrollers = ['mem']", "'mem' is no controller; known are memory, cpu, cpuacct, cpuset, blkio, "),
    ("[cgroup]\ncontrollers = ['pids', 'pids']", "cgroup.controllers has 'pids' 2 times; once is enough"),
    ("[cgroup]\ncontrollers = []", "cgroup.controllers [] counts nothing; it takes at least one"),
    ("[cgroup]\ncontrollers = 'pids'", "cgroup.controllers 'pids' is not usable; it takes a list of names"),
    ("[network]\nmode = 'bridge'", 'network.mode \'bridge\' is not usable; it takes "nat", "host" or "none"'),
    ("[network]\nbackend = 'nft'", 'network.backend \'nft\' is not usable; it takes "auto", "iptables" or'),
    ("[network]\npool4 = '10.0.0.0/7'", "10.0.0.0/7 has host bits|takes an IPv4 network with a prefix of /8 to /30"),
    ("[network]\npool4 = '10.0.0.0/31'", "network.pool4 '10.0.0.0/31' is out of range; it takes an IPv4 network"),
    ("[network]\npool4 = '10.0.0.1/24'", "has host bits set"),
    ("[network]\npool4 = 'fd00::/112'", "network.pool4 'fd00::/112' is not usable"),
    ("[samples]\nmax = '1M'", "samples.max '1M' is too small; it takes 4M at least, or 0 to keep none"),
    ("[samples]\nmax = -1", "samples.max -1 is out of range; it takes 0 to"),
    ("[samples]\nmax = 'much'", "samples.max 'much' is no size; write it like 512M or 2G"),
    ("[samples]\nfull = -1", "samples.full -1 is not usable; it takes a number of seconds"),
    ("[samples]\nfull = 100\nminutes = 60", "samples.minutes 60 is below samples.full 100"),
    ("[network]\npool4 = ''", "network.pool4 '' is not usable"),
    (
        "[network]\npool6 = 'fd00::/63'",
        "network.pool6 'fd00::/63' is out of range; it takes an IPv6 network with a prefix",
    ),
    ("[network.classes]\ninternal = ['10.0.0.0/8']", "network.classes: class name 'internal' is not usable"),
    ("[network.classes]\nExternal = ['10.0.0.0/8']", "this name stands for whatever no class contains"),
    ("[network.classes]\nA = []", "network.classes: class A is empty"),
    ("[network.classes]\nA = ['10.0.0.0/33']", "network.classes: class A: '10.0.0.0/33' is no CIDR network"),
    ("[network.classes]\nA = ['10.0.0.0/8']\nB = ['10.0.0.0/8']", "is in class A and in class B; choose one"),
    ("[network.classes]\nA = '10.0.0.0/8'", "network.classes {'A': '10.0.0.0/8'} is not usable; it takes a table NAME"),
    ("[limits]\nmemory = '2X'", "limits.memory '2X' is no size; write it like 512M or 2G"),
    ("[limits]\nmemory = 1", "limits.memory 1 is out of range; it takes 1048576 to"),
    ("[limits]\nmemory = 2.5", "limits.memory 2.5 is not usable; it takes a size such as"),
    ("[limits]\nswap = '1G'", "limits.swap 1073741824 needs a memory limit"),
    ("[limits]\nmemory = '1G'\nmemory_soft = '2G'", "limits.memory_soft 2147483648 is above memory"),
    ("[limits]\ncpus = 0", "limits.cpus 0.0 is out of range; it takes 0.01 to 65536 cores"),
    ("[limits]\ncpuset = 'a'", "limits.cpuset 'a' is no CPU list"),
    ("[limits]\npids = true", "limits.pids True is not usable; it takes a whole number"),
    ("[access]\ncreate = 'alice'", "access.create 'alice' is not usable; it takes a list of user names and @groups"),
    ("[access]\ncreate = ['']", "access.create '' is neither a user nor a group; write a name, or @NAME for a group"),
    ("[access]\ncreate = ['@']", "access.create '@' is neither"),
    ("[access]\ncreate = ['@@a']", "access.create '@@a' is neither"),
    ("[access]\ncreate = ['a b']", "access.create 'a b' is neither"),
    ('[access]\ncreate = ["a\\n"]', "access.create 'a\\n' is neither"),
    ("[access]\ncreate = ['a:b']", "access.create 'a:b' is neither"),
    ("[access]\ncreate = ['a', 'a']", "access.create has 'a' 2 times; once is enough"),
    ("[access]\nothers = 'all'", 'access.others \'all\' is not usable; it takes "ps" or "nothing"'),
    ("[access]\njobs_per_user = 0", "access.jobs_per_user 0 is not usable; it takes a whole number, 1 to 100000"),
    ("[access]\njobs_per_user = 1.5", "access.jobs_per_user 1.5 is not usable; it takes a whole number"),
    ("[acess]\nothers = 'ps'", "acess is no key of acctd; did you mean access?"),
    ("a = ", "this is no TOML: Invalid value (at end of document)"),
]


@pytest.mark.parametrize(("text", "sentence"), WRONG)
def test_a_mistake_is_one_sentence_that_names_key_value_and_range(text, sentence):
    found = mistakes(text)
    assert len(found) == 1, found
    assert any(part in found[0] for part in sentence.split("|")), found
    assert "\n" not in found[0]


def test_all_mistakes_are_found_at_once():
    text = "poll_interval = 0\nx = 1\n[limits]\npids = 0\ncpus = 0\nmemory = 'a'\n[network]\npool4 = 'b'\n"
    assert [line.split(" ")[0] for line in mistakes(text)] == [
        "poll_interval", "x", "network.pool4", "limits.memory", "limits.cpus", "limits.pids",
    ]  # fmt: skip


def test_the_named_file_goes_before_the_environments(tmp_path):
    (tmp_path / "a").write_text("poll_interval = 1")
    (tmp_path / "b").write_text("poll_interval = 2")
    environ = {"ACCTD_CONFIG": f"{tmp_path}/b"}
    assert load(f"{tmp_path}/a", environ).poll_interval == 1
    assert load(None, environ).poll_interval == 2
    assert load(None, environ).file == f"{tmp_path}/b"


def test_a_named_file_must_exist(tmp_path):
    with pytest.raises(NotFoundError, match="nowhere' does not exist"):
        load(f"{tmp_path}/nowhere", {})
    with pytest.raises(NotFoundError, match="gone' does not exist"):
        load(None, {"ACCTD_CONFIG": f"{tmp_path}/gone"})


@pytest.mark.skipif(Path(DEFAULT_FILE).exists(), reason="this host has a configuration of its own")
def test_the_default_file_need_not_exist():
    assert load(None, {}).file is None


def test_load_tells_the_first_mistake_and_how_many_more(tmp_path):
    (tmp_path / "a").write_text("poll_interval = 0\nx = 1\n")
    with pytest.raises(ConfigError, match=r"/a: poll_interval 0 .* seconds \(1 more: see acctd config check\)"):
        load(f"{tmp_path}/a", {})


@pytest.mark.parametrize(
    ("content", "sentence"), [(b"a = '\xff'", "byte 5 is no UTF-8"), (None, "this is a directory")]
)
def test_what_cannot_be_a_configuration_says_so(tmp_path, content, sentence):
    path = tmp_path
    if content is not None:
        path = tmp_path / "a"
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=sentence):
        load(str(path), {})


def test_config_check_prints_ok_or_every_mistake(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("")
    result = CliRunner().invoke(cli, ["check", "--config", str(path)])
    assert (result.exit_code, result.output) == (0, f"{path}: ok\n")
    path.write_text("x = 1\npoll_interval = 0\n")
    result = CliRunner().invoke(cli, ["check"], env={"ACCTD_CONFIG": str(path)})
    assert result.exit_code == 78
    assert [line.split(": ")[1].split(" ")[0] for line in result.output.splitlines()] == ["x", "poll_interval"]


def test_two_sinks_of_one_name_or_one_file_are_refused():
    files = '[json.a]\npath = "/x/y"\n[json.b]\npath = "/x//y"\n'
    text = f'{files}[influxdb.a]\nurl = "http://h"\nversion = 1\ndatabase = "d"\n'
    _, mistakes = parse(text, None)
    assert mistakes == [
        "influxdb.a and json.a have one name; rename one",
        "json.a.path and json.b.path are one file; choose another",
    ]
