"""Traffic at full speed through a job's pipe while the agent is killed, or its chains are taken away by others.

What the job was billed is held against the packets at the far side (lab/wire.py): equal where only the agent died.
Where the ruleset was flushed it is held against the packets on the job's pipe, as the far side then talks to the node
itself for a moment: less by what the events admit. `pytest -s` prints the figures of docs/nothing-lost.md.
"""

import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from acctd.ledger import FILE
from lab import traffic
from lab.wire import WireCounter
from tests.kernel.conftest import REPO, served
from tests.kernel.served import Served
from tests.kernel.test_network_exact import outer_end

__all__ = ["served"]  # a fixture

RESTARTS = 20
INTERNAL = "198.51.100.0/24"
PATIENCE = 30.0
BLOCK = 4_000_000  # payload bytes of one TCP connection
QUIET = 3_000_000  # payload bytes each way, once all is healed

# One that has more on its way than a CPU's backlog holds (1000 packets) loses some before the node counts them.
MODEST = "echo 4096 16384 262144 >/proc/sys/net/ipv4/tcp_wmem"

# Two threads, each with one connection after the other: one gives to the wan, one takes from campus. Told line by line:
# "go", "stop", or "once SIZE" for one connection each way; answers each line once it is so.
BUSY = """
import sys, threading
sys.path.insert(0, sys.argv[1])
from lab import traffic
from lab.traffic import PORT, give, take
traffic.TIMEOUT = 2.0  # a connection that breaks as nobody masquerades it any more is given up, and the next one made
block, ways, going, threads = int(sys.argv[2]), ((give, "203.0.113.2"), (take, "198.51.100.2")), [True], []

def work(way, host):
    while going[0]:
        try:
            way(host, PORT, block)
        except OSError as e:
            print(way.__name__, e, file=sys.stderr)

print("ready", flush=True)
for line in sys.stdin:
    word, _, size = line.strip().partition(" ")
    if word == "go":
        going[0] = True
        threads += [threading.Thread(target=work, args=way) for way in ways]
        for thread in threads:
            thread.start()
    elif word == "stop":
        going[0] = False
        while threads:
            threads.pop().join()
    else:
        for way, host in ways:
            way(host, PORT, int(size))
    print("done", flush=True)
"""


class Far(NamedTuple):
    """Counters at the far ends of both links, and at the node's end of the job's pipe."""

    campus: WireCounter
    wan: WireCounter
    pipe: WireCounter

    def seen(self) -> dict[str, tuple[int, int]]:
        """(bytes, packets) by the name of the rule that counts them."""
        campus, wan = self.campus.now(), self.wan.now()
        return {
            "IncomingInternal": campus.sent[4][:2],
            "OutgoingInternal": campus.received[4][:2],
            "IncomingExternal": wan.sent[4][:2],
            "OutgoingExternal": wan.received[4][:2],
        }

    def crossed(self) -> int:
        """Bytes that the pipe has passed, both ways."""
        pipe = self.pipe.now()
        return pipe.sent[4].bytes + pipe.received[4].bytes

    def stop(self) -> None:
        """Raises LostError if a packet was missed."""
        for counter in self:
            counter.stop()


class Busy(NamedTuple):
    """A job with traffic, and what both sides say of it."""

    served: Served
    far: Far
    tell: Callable[[str], None]

    def billed(self) -> dict[str, tuple[int, int]]:
        return rules(self.served.ok("Usage", job="busy")["job"])


def rules(job: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(bytes, packets) of a job or a record, by rule."""
    packets = job["totals"]["network_packets"]
    return {rule: (count, packets[rule]) for rule, count in job["totals"]["network"].items()}


def until(condition: Callable[[], object]) -> bool:
    """Wait for it; whether it came true. Who has figures to show compares them afterwards."""
    deadline = time.monotonic() + PATIENCE
    while not (met := bool(condition())) and time.monotonic() < deadline:
        os.sched_yield()
    return met


@contextmanager
def busy(served: Served) -> Iterator[Busy]:
    """A job whose traffic is known at the far side, from before its first packet."""
    lab = served.node.topology
    with ExitStack() as stack:
        taps: list[WireCounter] = []
        for site in (lab.campus, lab.wan):
            lab.run(site, ["sh", "-c", MODEST])
            with lab.enter(site):
                stack.enter_context(traffic.Server())
            taps.append(stack.enter_context(WireCounter(functools.partial(lab.enter, site), site.dev)))
        served.ok("Create", job="busy", classes={"Internal": [INTERNAL]})
        outer = stack.enter_context(WireCounter(functools.partial(lab.enter, lab.node), outer_end(lab)))
        far = Far(taps[0], taps[1], outer)
        netns = served.node.directory / "run" / "netns" / "busy"
        script = f'{MODEST}; exec "$@"'
        child = subprocess.Popen(
            ["nsenter", f"--net={netns}", "sh", "-c", script, "sh", sys.executable, "-S", "-c", BUSY, REPO, str(BLOCK)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        stack.callback(child.wait)
        stack.callback(child.kill)
        assert child.stdin is not None
        assert child.stdout is not None
        stdin, stdout = stack.enter_context(child.stdin), stack.enter_context(child.stdout)
        assert stdout.readline() == "ready\n"
        served.ok("Attach", job="busy", pid=child.pid)

        def tell(line: str) -> None:
            stdin.write(f"{line}\n")
            stdin.flush()
            assert stdout.readline() == "done\n"

        yield Busy(served, far, tell)


def mended(served: Served) -> list[str]:
    """What the agent has said about repairs, one sentence each."""
    return [e["text"] for e in served.ok("Events", job="busy")["events"] if e["event"] == "mended"]


def bound(sentence: str) -> int:
    """How many bytes of the job can be missing in all, by the agent's own words."""
    match = re.search(r"at most (\d+) bytes", sentence)
    assert match, sentence
    return int(match[1])


def octets(counts: dict[str, tuple[int, int]]) -> int:
    return sum(count for count, _ in counts.values())


# Restarts


def after_a_while(served: Served, number: int) -> None:
    """Another moment of the agent's life each time: at rest, in a tick, in the middle of an answer."""
    if number % 3 == 1:
        served.ok("Snapshot")
    elif number % 3 == 2:
        with served.connect() as connection:
            for _ in range(number):
                connection.sendall(b'{"method": "org.acctd.Node.Usage", "parameters": {"job": "busy"}}\0')


def kill_one_on_its_way_up(served: Served) -> None:
    """Once it has written to the ledger; wherever it is by then."""
    node = served.node
    journal = node.directory / "state" / f"{FILE}-wal"
    before = journal.stat().st_mtime_ns
    rising = node.topology.popen(
        node.topology.node, node.argv("serve"), env=node.environ, stderr=subprocess.DEVNULL, text=True
    )
    assert until(lambda: journal.stat().st_mtime_ns != before)
    rising.kill()
    rising.wait()


def test_an_agent_killed_twenty_times_counts_every_byte(served: Served) -> None:
    with busy(served) as job:
        before = job.billed()
        job.tell("go")
        for number in range(RESTARTS):
            after_a_while(served, number)
            assert served.stop(signal.SIGKILL) == -signal.SIGKILL
            if number % 4 == 3:
                kill_one_on_its_way_up(served)
            served.start()
            now = job.billed()
            assert all(now[rule] >= before[rule] for rule in before)
            assert octets(now) > octets(before)
            before = now
        job.tell("stop")
        until(lambda: job.billed() == job.far.seen())
        record = served.ok("Finish", job="busy", exit_code=0)["record"]
        billed, seen = rules(record), job.far.seen()
        job.far.stop()
        said = [e["event"] for e in served.ok("Events", job="busy")["events"]]
    print(f"\n{RESTARTS} restarts: billed {billed}\n  far side {seen}")
    assert billed == seen
    assert octets(billed) > 2 * BLOCK
    assert record["notes"] == []
    # Those that were killed on their way up may have come so far, too.
    assert (said[:2], said[-1]) == (["created", "began"], "finished")
    assert said.count("adopted") >= RESTARTS
    assert set(said) <= {"created", "began", "adopted", "ended", "finished"}


# Flushes


DAMAGE = {
    "nftables": [
        ("ruleset flushed", "nft flush ruleset"),
        (
            "table deleted and made again, at zero",
            "(echo 'delete table inet acctd'; nft -s list table inet acctd) | nft -f -",
        ),
        ("ruleset flushed", "nft flush ruleset"),
        ("the job's rules flushed", "nft flush chain inet acctd JOB_busy"),
        ("ruleset flushed", "nft flush ruleset"),
        ("dispatch flushed", "nft 'flush map inet acctd incoming; flush map inet acctd outgoing'"),
        ("ruleset flushed", "nft flush ruleset"),
        ("ruleset flushed", "nft flush ruleset"),
    ],
    "iptables": [
        ("filter flushed", "iptables-legacy -w -F; ip6tables-legacy -w -F"),
        (
            "chain deleted and made again, at zero",
            "iptables-legacy-save -t filter >$RULES; iptables-legacy -w -F; iptables-legacy -w -X;"
            "iptables-legacy-restore -w <$RULES",
        ),
        ("filter and nat flushed", "iptables-legacy -w -F; ip6tables-legacy -w -F; iptables-legacy -w -t nat -F"),
        ("counters set to zero", "iptables-legacy -w -Z"),
        ("filter flushed", "iptables-legacy -w -F; ip6tables-legacy -w -F"),
        ("dispatch flushed", "iptables-legacy -w -F FORWARD"),
        ("filter flushed", "iptables-legacy -w -F; ip6tables-legacy -w -F"),
        ("filter flushed", "iptables-legacy -w -F; ip6tables-legacy -w -F"),
    ],
}
"""What a foreign program does, and how: at least five flushes each."""


def standing(job: Busy) -> tuple[int, int]:
    """Bytes billed, and bytes that crossed the pipe, once neither moves any more."""
    same, last = 0, (0, 0)

    def still() -> bool:
        nonlocal same, last
        now = octets(job.billed()), job.far.crossed()
        same, last = (same + 1 if now == last else 0), now
        return same >= 20

    assert until(still)
    return last


def check_directions(job: Busy) -> None:
    """Nothing is billed that did not cross the pipe.

    By direction, not by rule: a packet that is inside the rules while they are flushed may find its class empty, and is
    counted as External.
    """
    billed, pipe = job.billed(), job.far.pipe.now()
    for way, crossed in (("Incoming", pipe.sent[4]), ("Outgoing", pipe.received[4])):
        assert sum(count for rule, (count, _) in billed.items() if rule.startswith(way)) <= crossed.bytes


def test_what_a_flush_costs_is_what_its_event_admits(served: Served) -> None:
    """While nobody masquerades, the far side talks to the node itself; what is the job's crosses its pipe."""
    lab = served.node.topology
    backend = "nftables" if '"nftables"' in served.node.config.read_text() else "iptables"
    environ = {**os.environ, "RULES": str(served.node.directory / "rules")}
    # What the legacy tables tell nobody waits for a tick.
    assert served.stop() == 0
    served.node.config.write_text("poll_interval = 2\n" + served.node.config.read_text())
    served.start()
    with busy(served) as job:
        gone = crossed = 0
        for number, (what, script) in enumerate(DAMAGE[backend], 1):
            job.tell("go")
            assert until(lambda: job.far.crossed() > crossed + BLOCK)  # noqa: B023  # called at once
            began = time.time()
            lab.run(lab.node, ["sh", "-ec", script], capture_output=True, env=environ)
            assert until(lambda: len(mended(served)) >= number)  # noqa: B023
            job.tell("stop")
            event = served.ok("Events", job="busy")["events"][-1]
            before, (billed, crossed) = crossed, standing(job)
            print(
                f"\n{backend}: {what}: {crossed - billed - gone} of {crossed - before} bytes lost, healed "
                f"{1e3 * (event['time'] - began):.0f} ms after the command began; {event['text']}"
            )
            assert len(mended(served)) == number
            assert crossed - billed <= bound(event["text"])
            check_directions(job)
            gone = crossed - billed
        # All is healed: from here on it is exact again, once the far side has given up on what was cut off meanwhile.
        for _ in range(10):
            billed_before, seen_before = job.billed(), job.far.seen()
            job.tell(f"once {QUIET}")
            standing(job)
            seen, billed_now = job.far.seen(), job.billed()
            differ = {
                rule: (count, seen[rule])
                for rule, count in billed_now.items()
                if any(count[i] - billed_before[rule][i] != seen[rule][i] - seen_before[rule][i] for i in (0, 1))
            }
            if not differ:
                break
        job.far.stop()
        assert not differ
        assert octets(billed_now) > octets(billed_before) + 2 * QUIET
        record = served.ok("Finish", job="busy", exit_code=0)["record"]
        assert rules(record) == billed_now
        assert set(record["notes"]) == set(mended(served))
