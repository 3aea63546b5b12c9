"""The netlink parsers on captured dumps (Linux 6.18), on every truncation of them, and on garbage."""

import errno
import socket
import struct
import threading
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acctd.errors import KernelRefusedError, NotPermittedError
from acctd.kernel import conntrack, nfevents, nfnetlink, nftmessages, nftrules
from acctd.kernel.nfnetlink import NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR, NfnetlinkSocket, attribute, nested, text

CAPTURES = Path(__file__).parents[2] / "fixtures/netfilter"
RULES = (CAPTURES / "nft.getrule.acctd.bin").read_bytes()
ELEMENTS = (CAPTURES / "nft.getsetelem.outgoing.bin").read_bytes()
CONNECTIONS = (CAPTURES / "conntrack.get.bin").read_bytes()

# What `Nftables.read` said when RULES was captured: two jobs, the first with three classes and both families.
COUNTS = {
    "JOB_7.0": {
        "OutgoingStorage": (0, 0),
        "OutgoingCampus": (680, 5),
        "OutgoingExternal": (5140, 5),
        "IncomingStorage": (0, 0),
        "IncomingCampus": (128, 1),
        "IncomingExternal": (4112, 4),
    },
    "JOB_8.0": {"OutgoingExternal": (0, 0), "IncomingExternal": (0, 0)},
}
GETRULE, GETGEN, GETTABLE = 10 << 8 | 7, 10 << 8 | 16, 10 << 8 | 1
NEWTABLE, DELTABLE, NEWRULE, DELRULE, NEWGEN = (10 << 8 | n for n in (0, 2, 6, 8, 15))


def pair(octets, packets):
    return octets, packets


def parse(dump, known=None):
    rules, known = nftmessages.parse_rules(dump, len(dump), known)
    return nftrules.Layout(rules, len(dump), pair, 1).read(dump), known


def message(kind, payload, *, flags=0, sequence=0, resource=0):
    return (
        struct.pack("=IHHII", 20 + len(payload), kind, flags, sequence, 0)
        + struct.pack(">BBH", 1, 0, resource)
        + payload
    )


def rule(
    chain="JOB_1", comment="OutgoingX", octets=1, packets=2, *, backwards=False, kind=NEWRULE, handle=0,
    table="acctd", **header,
):  # fmt: skip
    """One rule as the kernel sends it, or with all its attributes in the opposite order."""

    def order(*parts):
        return b"".join(reversed(parts) if backwards else parts)

    values = order(attribute(1, struct.pack(">Q", octets)), attribute(2, struct.pack(">Q", packets)))
    counter = nested(1, order(attribute(1, b"counter\0"), nested(2, values)))
    verdict = nested(1, order(attribute(1, b"immediate\0"), nested(2, attribute(1, bytes(4)))))
    words = comment.encode() + b"\0"
    userdata = attribute(7, bytes([1, 2, 0, 0]) + bytes([0, len(words)]) + words)
    number = attribute(3, struct.pack(">Q", handle))
    parts = (text(1, table), text(2, chain), number, nested(4, counter, verdict), userdata)
    return message(kind, order(*parts), **header)


def test_a_captured_dump_is_read_as_nft_lists_it():
    assert parse(RULES)[0] == COUNTS


def test_what_was_seen_before_gives_the_same_and_follows_the_counters():
    _, known = parse(RULES)
    moved = rule() + RULES
    assert parse(moved, known)[0] == {**COUNTS, "JOB_1": {"OutgoingX": (1, 2)}}
    _, known = parse(moved)
    again = RULES + rule(octets=2**63, packets=7)
    assert parse(again, known)[0] == {**COUNTS, "JOB_1": {"OutgoingX": (2**63, 7)}}
    # Same chain and handle, another comment: a table made anew.
    assert parse(rule(comment="OutgoingY"), known)[0] == {"JOB_1": {"OutgoingY": (1, 2)}}


def test_order_of_attributes_means_nothing():
    dump = rule(backwards=True) + rule(octets=10, packets=20)
    expected = {"JOB_1": {"OutgoingX": (11, 22)}}
    counts, known = parse(dump)
    assert counts == expected
    assert parse(dump, known)[0] == expected


def test_a_comment_that_looks_like_a_counter():
    dump = rule(comment="counter") + rule(chain="counter", comment="x" * 100)
    counts, known = parse(dump)
    assert counts == {"JOB_1": {"counter": (1, 2)}, "counter": {"x" * 100: (1, 2)}}
    assert parse(dump, known)[0] == counts


def test_a_rule_without_counter_or_comment_is_left_out():
    bare = message(NEWRULE, text(1, "acctd") + text(2, "JOB_1"))
    assert parse(bare + rule(comment=""))[0] == {}
    rules, _ = nftmessages.parse_rules(bare + rule(), len(bare + rule()))
    shapes = nftrules.Layout(rules, len(bare + rule()), pair, 0x1F).shapes
    assert shapes["JOB_1"].comments == ("", "OutgoingX")
    assert shapes["JOB_1"].incarnation.startswith("1f.0.2.")


def test_a_dump_that_a_change_interrupted_is_refused():
    with pytest.raises(KernelRefusedError, match="interrupted"):
        parse(rule(flags=NLM_F_DUMP_INTR))


def test_verdict_map():
    assert sorted(nftmessages.parse_gotos(ELEMENTS, len(ELEMENTS))) == [("ac1", "JOB_7.0"), ("ac2", "JOB_8.0")]


def test_conntrack_entries_by_their_ends():
    v4, v6 = ip_address("198.51.100.2").packed, ip_address("2001:db8:1::2").packed
    found = conntrack.parse_entries(CONNECTIONS, len(CONNECTIONS), {v4, v6})
    assert sorted(entry.family for entry in found) == [socket.AF_INET, socket.AF_INET, socket.AF_INET6]
    assert all(len(entry.request) % 4 == 0 for entry in found)
    assert conntrack.parse_entries(CONNECTIONS, len(CONNECTIONS), {ip_address("192.0.2.1").packed})  # where one went to
    assert conntrack.parse_entries(CONNECTIONS, len(CONNECTIONS), {ip_address("192.0.2.250").packed}) == []


PARSERS = [
    (RULES, lambda dump: nftmessages.parse_rules(dump, len(dump))),
    (ELEMENTS, lambda dump: list(nftmessages.parse_gotos(dump, len(dump)))),
    (ELEMENTS, lambda dump: nftmessages.parse_bounds(dump, len(dump))),
    (CONNECTIONS, lambda dump: conntrack.parse_entries(dump, len(dump), {b"\0\0\0\0"})),
]


@pytest.mark.parametrize(("dump", "read"), PARSERS)
def test_a_truncated_dump_is_an_error_or_ends_between_messages(dump, read):
    whole = {end for _, _, _, end in nfnetlink.messages(dump, len(dump))}
    for size in range(1, len(dump)):
        if size in whole:
            read(dump[:size])
        else:
            with pytest.raises(KernelRefusedError, match="cannot be read"):
                read(dump[:size])


@pytest.mark.parametrize(("dump", "read"), PARSERS)
@given(data=st.data())
def test_garbage_gives_a_clear_error_or_nothing(dump, read, data):
    broken = bytearray(dump)
    for at in data.draw(st.lists(st.integers(0, len(dump) - 1), max_size=8)):
        broken[at] = data.draw(st.integers(0, 255))
    for text_of_it in (bytes(broken), data.draw(st.binary(max_size=200))):
        try:
            read(text_of_it)
        except KernelRefusedError as e:
            assert "cannot be read" in str(e)


class Kernel:
    """The other end of a socket: answers each request with the next script, a list of parts to send."""

    def __init__(self, *scripts):
        ours, self._end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.asked = []
        self._scripts = scripts
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        self.netlink = NfnetlinkSocket(ours)

    def _serve(self):
        with self._end:
            for script in self._scripts:
                request = self._end.recv(65536)
                if not request:
                    return
                _, kind, _, sequence, _ = struct.unpack_from("=IHHII", request)
                self.asked.append(kind)
                for part in script:
                    self._end.send(part(sequence))

    def __enter__(self):
        return self.netlink

    def __exit__(self, *_):
        self.netlink.close()
        self._thread.join()


def done(error=0, flags=0):
    return lambda sequence: struct.pack("=IHHIIi", 20, NLMSG_DONE, flags, sequence, 0, error)


def refusal(error):
    return lambda sequence: struct.pack("=IHHIIi", 36, NLMSG_ERROR, 0, sequence, 0, -error) + bytes(16)


def part(*rules):
    return lambda sequence: b"".join(rule(**words, sequence=sequence) for words in rules)


def test_parts_are_joined_and_a_done_at_the_tail_is_found():
    tail = lambda sequence: part({"resource": 5})(sequence) + done()(sequence)  # noqa: E731
    with Kernel([part({"resource": 5}), part({"resource": 5}), done()], [part({"resource": 5}), tail]) as netlink:
        for _ in range(2):
            dump = netlink.dump(GETRULE, 1)
            assert parse(bytes(dump.buffer[: dump.size]))[0] == {"JOB_1": {"OutgoingX": (2, 4)}}
            assert dump.uniform == 5


def test_a_dump_larger_than_the_buffer():
    parts = [part(*[{}] * 200)] * 20
    with Kernel([*parts, done()]) as netlink:
        dump = netlink.dump(GETRULE, 1)
        assert parse(bytes(dump.buffer[: dump.size]))[0] == {"JOB_1": {"OutgoingX": (4000, 8000)}}


def test_an_interrupted_dump_is_taken_again():
    scripts = [
        [part({}), part({"flags": NLM_F_DUMP_INTR}), done()],
        [part({}), done(flags=NLM_F_DUMP_INTR)],
        [part({}), done(error=-errno.EINTR)],
        [part({"octets": 9}), done()],
    ]
    with Kernel(*scripts) as netlink:
        dump = netlink.dump(GETRULE, 1)
        assert parse(bytes(dump.buffer[: dump.size]))[0] == {"JOB_1": {"OutgoingX": (9, 2)}}
    with Kernel(*[[done(flags=NLM_F_DUMP_INTR)]] * 20) as netlink, pytest.raises(KernelRefusedError, match="20 dumps"):
        netlink.dump(GETRULE, 1)


def test_what_the_kernel_refuses():
    with Kernel([refusal(errno.ENOENT)], [refusal(errno.EPERM)], [refusal(errno.EINVAL)]) as netlink:
        assert netlink.dump(GETRULE, 1) is None
        with pytest.raises(NotPermittedError, match="run as root"):
            netlink.dump(GETRULE, 1)
        with pytest.raises(KernelRefusedError, match=r"10/7.*Invalid argument"):
            netlink.dump(GETRULE, 1)


def test_the_rest_of_an_older_dump_is_skipped():
    stale = lambda sequence: rule(sequence=sequence - 1)  # noqa: E731
    with Kernel([stale, part({}), done()]) as netlink:
        dump = netlink.dump(GETRULE, 1)
        assert parse(bytes(dump.buffer[: dump.size]))[0] == {"JOB_1": {"OutgoingX": (1, 2)}}


def generation(number):
    parts = attribute(1, struct.pack(">I", number)) + attribute(2, struct.pack(">I", 77))
    return lambda sequence: message(NEWGEN, parts, sequence=sequence)


def table(handle, generation=0, kind=NEWTABLE):
    parts = text(1, "acctd") + attribute(2, bytes(4)) + attribute(4, struct.pack(">Q", handle))
    return lambda sequence: message(kind, parts, sequence=sequence, resource=generation)


def test_a_remembered_layout_holds_for_its_generation_alone():
    one, other = {"resource": 1}, {"resource": 2}
    scripts = [
        [generation(0x10001)], [table(3, 1)], [part(one, {**one, "comment": "IncomingX"}), done()],
        [generation(0x10001)], [part({**one, "octets": 5}, {**one, "comment": "IncomingX"}), done()],
        # Of the same size, after a change.
        [generation(0x10002)], [table(3, 2)], [part({**other, "comment": "IncomingX"}, other), done()],
        # The change comes between the question and the dump.
        [generation(0x10002)], [part({"resource": 3}, {"resource": 3, "comment": "IncomingX"}), done()],
        [generation(0x10003)], [table(3, 3)], [part({"resource": 3}, {"resource": 3, "comment": "IncomingX"}), done()],
        [generation(0x10004)], [refusal(errno.ENOENT)],
    ]  # fmt: skip
    kernel = Kernel(*scripts)
    with kernel as netlink:
        reader = nftrules.TableReader("acctd", pair, netlink)
        assert reader.read()[0] == {"JOB_1": {"OutgoingX": (1, 2), "IncomingX": (1, 2)}}
        assert reader.read()[0] == {"JOB_1": {"OutgoingX": (5, 2), "IncomingX": (1, 2)}}
        assert list(reader.read()[0]["JOB_1"]) == ["IncomingX", "OutgoingX"]
        assert list(reader.read()[0]["JOB_1"]) == ["OutgoingX", "IncomingX"]
        assert reader.read() == ({}, {})
    new = [GETGEN, GETTABLE, GETRULE]
    assert kernel.asked == [*new, GETGEN, GETRULE, *new, GETGEN, GETRULE, *new, GETGEN, GETTABLE]


def test_rules_are_never_taken_for_those_of_another_table():
    """A new table's rules have the handles of the old one's: a table made anew around the dump is noticed."""
    scripts = [
        [generation(1)], [table(3, 1)],
        [part({"resource": 2, "handle": 9}), done()], [table(4, 2)],
        [part({"resource": 2, "handle": 9}), done()],
        # Other things change all the time, the table does not: no reason to ask again and again.
        [generation(5)], [table(4, 5)], [part({"resource": 6, "handle": 9}), done()], [table(4, 7)],
    ]  # fmt: skip
    with Kernel(*scripts) as netlink:
        reader = nftrules.TableReader("acctd", pair, netlink)
        assert reader.read()[1]["JOB_1"].incarnation.startswith("4.9.1.")
        assert reader.read()[1]["JOB_1"].incarnation.startswith("4.9.1.")
    endless = [[generation(1)], [table(1, 1)]]
    for number in range(20):
        endless += [[part({"resource": 50 + number}), done()], [table(2 + number, 100 + number)]]
    with Kernel(*endless) as netlink, pytest.raises(KernelRefusedError, match="anew during each of 20"):
        nftrules.TableReader("acctd", pair, netlink).read()


def made(table, *rules):
    """The incarnation of JOB_1 with these rules, and what of it the last part, its content, does not say."""
    dump = b"".join(rules)
    parsed, _ = nftmessages.parse_rules(dump, len(dump))
    incarnation = nftrules.Layout(parsed, len(dump), pair, table).shapes["JOB_1"].incarnation
    return incarnation, incarnation.rpartition(".")[0]


def test_an_incarnation_tells_every_making_apart():
    def three(table=3, handles=(7, 8, 9), **words):
        return made(table, *(rule(handle=handle, **words) for handle in handles))[0]

    others = [three(4), three(3, (7, 8)), three(3, (8, 9)), three(3, (7, 8, 10)), three(3, (7, 9, 10))]
    others += [three(3, (7, 8, 9, 10)), three(comment="OutgoingY"), three(backwards=True)]
    assert three() not in others
    assert three() == three(octets=1 << 40, packets=5) == three(kind=NEWRULE, flags=0)


OURS, THEIRS = 77, 78


class Events:
    """A watch and the sending end of its queue."""

    def __init__(self, *handles):
        self._end, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.setblocking(False)
        self._kernel = Kernel(*[[table(handle) if handle else refusal(errno.ENOENT)] for handle in handles])
        self.watch = nfevents.Watch("acctd", pair, {OURS}, theirs, self._kernel.netlink)

    def drain(self):
        """(changed, deleted, lost), the incarnations without their content: see `made`."""
        changed, deleted, lost = self.watch.drain()
        return changed, {(chain, which.rpartition(".")[0]): counts for (chain, which), counts in deleted.items()}, lost

    def say(self, *messages):
        self._end.send(b"".join(messages))

    def commit(self, *messages, by=THEIRS):
        number = attribute(1, bytes(4)) + attribute(2, struct.pack(">I", by))
        self.say(*messages, message(NEWGEN, number))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.watch.close()
        self._end.close()
        self._kernel.__exit__()


def gone(**words):
    return rule(kind=DELRULE, **words)


def test_what_was_deleted_is_added_up_by_chain_and_comment():
    with Events(3) as events:
        events.commit(gone(handle=1), gone(handle=2, octets=10, packets=20), gone(handle=4, comment="IncomingX"))
        events.commit(gone(chain="JOB_2", handle=7))
        assert events.drain() == (
            True,
            {
                ("JOB_1", "3.4.3"): {"OutgoingX": (11, 22), "IncomingX": (1, 2)},
                ("JOB_2", "3.7.1"): {"OutgoingX": (1, 2)},
            },
            False,
        )
        assert events.drain() == (False, {}, False)


def test_a_transaction_counts_once_it_has_ended_whatever_parts_it_comes_in():
    with Events(3) as events:
        events.say(gone(handle=1))
        events.say(gone(handle=2))
        assert events.drain() == (False, {}, False)
        events.commit()
        assert events.drain()[1] == {("JOB_1", "3.2.2"): {"OutgoingX": (2, 4)}}


def test_own_transactions_and_other_tables_are_no_news():
    with Events(3) as events:
        events.commit(gone(handle=1), by=OURS)
        events.commit(gone(handle=1, table="acctd2"), rule(table="acct", comment="acctd"))
        events.commit(message(DELRULE, text(1, "acctd")).replace(b"\x01\0\0\0", b"\x02\0\0\0", 1))  # ip acctd
        events.commit(rule(handle=2), by=OURS)
        assert events.drain() == (False, {}, False)


def test_each_table_of_the_name_has_its_own_incarnations():
    with Events(0) as events:
        events.commit(table(5)(0), rule(handle=2), by=OURS)
        # Flushed and loaded anew in one transaction, then once more.
        events.commit(gone(handle=2), table(5, kind=DELTABLE)(0), table(6)(0), rule(handle=2))
        events.commit(gone(handle=2, octets=9))
        assert events.drain()[1] == {
            ("JOB_1", "5.2.1"): {"OutgoingX": (1, 2)},
            ("JOB_1", "6.2.1"): {"OutgoingX": (9, 2)},
        }


def test_after_a_loss_nothing_of_the_queue_is_believed():
    with Events(3, 8) as events:
        events.say(gone(handle=1))
        events.say(bytes((1 << 17) + 1))  # larger than any receive: what did not fit is lost
        events.commit(gone(handle=2))
        assert events.drain() == (False, {}, True)
        events.commit(gone(handle=2))
        assert events.drain() == (True, {("JOB_1", "8.2.1"): {"OutgoingX": (1, 2)}}, False)
