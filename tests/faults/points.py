"""The steps at which test_kill_serve.py has an agent die: by story, the functions, and which of their calls.

A step that is renamed in acctd has to be renamed here: an agent that does not die where it should fails its test.
"""

from typing import Any, NamedTuple

import pytest

from acctd.cgroup.layout import discover
from tests.faults.dying import Death

LEDGER, DAEMON, AGENT = "acctd.ledger:Ledger", "acctd.daemon:Daemon", "acctd.agent:Agent"
CGROUPS, DIR = "acctd.cgroup.driver:JobCgroups", "acctd.kernel.cgroupfs:CgroupDir"
NETNS, PIPE, HOST = "acctd.kernel.netns", "acctd.network.pipe", "acctd.network.host"
CHAINS = "{chains}"  # the back end's class

BACKENDS = ("nftables", "iptables")
EACH = tuple(range(1, len(discover().hierarchies) + 1))
"""Once for each hierarchy, of which every host has its own number."""
TABLES = (1, 2, 3, 4)
"""filter and nat of two IP versions, each a transaction of its own."""


class At(NamedTuple):
    """A function to die in: before some of its calls, and after some.

    Before is left out where nothing is done between the end of the function before and the beginning of this one.
    """

    name: str
    before: tuple[int, ...] = (1,)
    after: tuple[int, ...] = (1,)
    only: str | None = None  # with this back end


CREATE = [
    At(f"{DAEMON}.create"),
    At(f"{LEDGER}.open_job"),
    At(f"{AGENT}._refuse_what_is_taken", ()),
    At(f"{CGROUPS}.create"),
    At(f"{DIR}.make", (), tuple(range(1, 2 * len(EACH) + 1))),  # base and job
    At(f"{CGROUPS}._limit"),
    At(f"{CGROUPS}._count_block_io"),
    At(f"{DIR}.describe", (), EACH),
    At("acctd.scratch:make"),
    At(f"{HOST}:enable_forwarding", ()),
    At(f"{HOST}:keep_in"),
    At(f"{CHAINS}.add"),
    At("acctd.network.iptables:transact", (), TABLES, only="iptables"),
    At(f"{NETNS}:create"),
    At("acctd.kernel.libc:mount", (1,), ()),  # the name is a file, and nothing is mounted on it
    At("acctd.kernel.rtnetlink:RouteSocket.apply", (), (1, 2, 3, 4)),  # a link, addresses, routes
    At(f"{PIPE}:make"),
    At("acctd.agent:arm_block_counters"),
    At("acctd.readers:open_for"),
    At(f"{AGENT}.create", ()),
    At("acctd.guard:Guard.watch", (), (1,)),
    At("acctd.cgroup.memory:JobMemory.arm", (), (1,)),
    At("acctd.shortages:Shortages.listen", (), (1,)),
    At(f"{LEDGER}.made"),
    At("acctd.sentry:Sentry.guard"),
    At(f"{LEDGER}.add_event"),
]
ATTACH = [
    At(f"{DAEMON}.attach"),
    At(f"{LEDGER}.begin"),
    At(f"{CGROUPS}.attach"),
    At(f"{DIR}.write", (), EACH),
    At(f"{DAEMON}._watch_member"),
    At(f"{LEDGER}.add_event"),
]
ENDED = [At(f"{DAEMON}._member_ended"), At(f"{LEDGER}.set_terms"), At(f"{LEDGER}.add_event")]
POLL = [
    At(f"{DAEMON}._read_all"),
    At(f"{CHAINS}.read"),
    At(f"{AGENT}.take"),
    At("acctd.meter:Meter.feed", (), (1, 2, 3)),
    At(f"{LEDGER}.store"),
    At(f"{LEDGER}.seen"),
    At(f"{DAEMON}._housekeeping"),
    At(f"{CHAINS}.broken"),
    At("acctd.books:Books.catch_up"),
    At(f"{AGENT}.clear_up"),
]
UNDOING = [
    At(f"{AGENT}.dismantle"),
    At("acctd.scratch:Trash.take"),
    At("acctd.kernel.conntrack:forget", ()),
    At(f"{CHAINS}.remove", ()),
    At("acctd.network.iptables:transact", (), TABLES, only="iptables"),
    At(f"{HOST}:let_go", ()),
    At(f"{CGROUPS}.remove", ()),
    At(f"{DIR}.remove", (), (1,)),
    At(f"{LEDGER}.forget", ()),
]
REMOVED = [At(f"{DIR}.remove", (), EACH[1:])]
TAKING_PIPE = [
    At(f"{CGROUPS}.kill"),
    At(f"{AGENT}.take_pipe", ()),
    At(f"{PIPE}:_remove_link", ()),
    At(f"{NETNS}:remove", ()),
]
SIGNING = [
    At(f"{AGENT}.last_reading"),
    *TAKING_PIPE,
    At(f"{AGENT}.read_one", ()),
    At(f"{CHAINS}.read", ()),
    At(f"{AGENT}.record", ()),
    At(f"{LEDGER}.sign_off"),
    At("acctd.ledger:_digest"),  # in the transaction
    *UNDOING,
    At(f"{LEDGER}.add_event", ()),
]
FINISH = [At(f"{DAEMON}.finish"), *SIGNING, *REMOVED]
MENDING = [
    At(f"{CHAINS}.broken"),
    At(f"{CHAINS}.read", ()),
    At(f"{HOST}:keep_in", ()),
]
FLUSHED = [
    *MENDING,
    At(f"{CHAINS}.add"),
    At("acctd.network.iptables:transact", (), TABLES, only="iptables"),
    At("acctd.meter:Meter.rebase"),
    At(f"{LEDGER}.store"),
]
CUT_OFF = [
    *MENDING,
    At(f"{CHAINS}.mend"),
    At("acctd.network.iptables:transact", (), TABLES, only="iptables"),
    At(f"{LEDGER}.store"),
]
TOLD = [At(f"{LEDGER}.add_event")]

REPLACING = [At("acctd.ledgers:move_aside"), At("pathlib:Path.rename"), At("acctd.ledgers:replaced", ())]
LOST = [At("acctd.ledgers:restored"), At(f"{LEDGER}.copy_to"), *REPLACING]
CORRUPT = [At("acctd.ledgers:begun_anew"), At(f"{LEDGER}.reinstate"), *REPLACING]
CLAIM = [At("acctd.recovery:sweep_sentinels"), At("acctd.recovery:_reinstate"), At(f"{LEDGER}.claim")]
ADOPT = [
    *CLAIM,
    At("acctd.readers:open_for", ()),
    At(f"{DAEMON}._adopt", ()),
    At(f"{LEDGER}.add_event", ()),
    At(f"{DAEMON}._keep_watch", ()),
    At(f"{AGENT}.read_one", ()),
    At(f"{CHAINS}.read", ()),
    At("acctd.sentry:Sentry.guard", ()),
    At(f"{CHAINS}.broken", ()),
    At(f"{LEDGER}.store", ()),
]
ORPHAN = [
    At("acctd.recovery:orphans"),
    At("acctd.recovery:decode_row", ()),
    At("acctd.recovery:_as_found", ()),
    At(f"{LEDGER}.reinstate", ()),
]
TO_PARENT = At("acctd.agent:add", ())  # in memory, where it is held
PASSING_ON = [
    At(f"{LEDGER}.sign_off"),
    At("acctd.ledger:_digest"),  # in the transaction
    TO_PARENT,
    At(f"{AGENT}.dismantle", ()),
    At(f"{CGROUPS}.remove", ()),
    At(f"{DIR}.remove", (), EACH),
    At(f"{LEDGER}.forget", ()),
    At(f"{LEDGER}.add_event", ()),
]
ONE_BY_ONE = [
    At(name, (), (1, 2, 3))
    for name in (f"{LEDGER}.sign_off", f"{CHAINS}.remove", f"{CGROUPS}.remove", f"{LEDGER}.forget")
]
"""For two families and the job around them, which end one after the other."""

LIVING = {
    "create": CREATE,
    "attach": ATTACH,
    "poll": POLL,
    "lost": LOST,
    "corrupt": CORRUPT,
    "end": ENDED,
    "finish": FINISH,
}
HARMED = {
    "flush": FLUSHED + TOLD,
    "cut off": CUT_OFF + TOLD,
    "flush, flowing": [At(f"{CHAINS}.add", ()), *TOLD],
    "cut off, flowing": [At(f"{CHAINS}.mend", ()), *TOLD],
}
UNMENDED = {"flush, flowing": [*MENDING, At(f"{CHAINS}.add", (1,), ())], "cut off, flowing": MENDING}
TAKEN_OVER = {
    "half": [*CLAIM, At(f"{AGENT}.abandon"), *TAKING_PIPE, *UNDOING, *REMOVED],
    "made": [At(f"{LEDGER}.claim"), At("acctd.readers:open_for"), At(f"{DAEMON}._adopt")],
    "meant": [At("acctd.recovery:_ran"), At(f"{LEDGER}.made"), At(f"{DAEMON}._adopt")],
    "running": ADOPT,
    "flushed": FLUSHED,
    "cut off": CUT_OFF,
    "ended": [*CLAIM, At(f"{AGENT}.finish"), *SIGNING],
    "closed": [At(f"{LEDGER}.claim"), At(f"{CGROUPS}.kill"), At(f"{AGENT}.take_pipe"), *UNDOING],
    "lost": [*ORPHAN, At(f"{LEDGER}.claim"), At(f"{DAEMON}._adopt"), At(f"{LEDGER}.store")],
    "ended, lost": [*ORPHAN, At(f"{LEDGER}.claim"), At(f"{LEDGER}.sign_off"), At(f"{LEDGER}.forget")],
    "corrupt": [At("acctd.ledgers:move_aside"), *ORPHAN, At(f"{LEDGER}.claim"), At(f"{LEDGER}.store")],
}
NESTED = {
    "first": [
        At(f"{AGENT}.expect_families"),
        At(f"{LEDGER}.set_terms"),
        At(f"{LEDGER}.open_job"),
        At(f"{LEDGER}.made"),
    ],
    "step": PASSING_ON,
    "all": [At(f"{DAEMON}.finish", (1,), (1, 2, 3)), *ONE_BY_ONE],
    "unregister": [At(f"{CGROUPS}.fold_into"), At(f"{DIR}.write", (), EACH), *PASSING_ON],
    # It has its record before its parent is held.
    "step ended": [At(f"{LEDGER}.claim"), *(each for each in PASSING_ON if each is not TO_PARENT)],
    "all ended": [At(f"{LEDGER}.claim", (1,), (1, 2, 3)), *ONE_BY_ONE],
}


def points(steps: dict[str, list[At]]) -> list[Any]:
    """Back end, kind of story, death; for every point of these steps."""
    found = []
    for backend in BACKENDS:
        for kind, each in steps.items():
            for at in each:
                calls = [("before", number) for number in at.before] + [("after", number) for number in at.after]
                if at.only not in (None, backend):
                    continue
                if at.name.startswith(DIR) and backend != BACKENDS[0]:
                    calls = calls[:1]  # a directory does not know of it
                for when, number in calls:
                    which = f"-{number}" if number > 1 else ""
                    name = f"{backend}-{kind}-{at.name.rpartition(':')[2].replace(CHAINS, 'Chains')}-{when}{which}"
                    found.append(pytest.param(backend, kind, Death(at.name, when, number), id=name))
    return found
