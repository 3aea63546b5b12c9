"""The protocol as bytes: calls out of frames however they are cut, and errors into frames."""

import json
import re

import pytest

from acctd import varlink
from acctd.errors import (
    AcctdError,
    ConfigError,
    ExhaustedError,
    InUseError,
    KernelRefusedError,
    LedgerError,
    NotFoundError,
    NotPermittedError,
    UnavailableError,
    UsageError,
)
from acctd.varlink import FRAME_LIMIT, READ, Call, Decoder, FrameError


def taken(decoder, data):
    decoder.push(data)
    return list(decoder.calls())


def test_a_call_has_its_parts_and_their_defaults():
    decoder = Decoder()
    assert taken(decoder, b'{"method":"a.B"}\0') == [Call("a.B")]
    full = b'{"method":"a.B","parameters":{"x":[1,null]},"more":true,"oneway":true}\0'
    assert taken(decoder, full) == [Call("a.B", {"x": [1, None]}, more=True, oneway=True)]
    assert taken(decoder, b'{"method":"a.B","parameters":null,"unheard-of":1}\0') == [Call("a.B", None)]


def test_calls_come_out_when_they_are_complete_and_in_order():
    decoder = Decoder()
    assert taken(decoder, b'{"meth') == []
    assert decoder.pending == 6
    assert taken(decoder, b'od":"a"}\0{"method":"b"}\0{"m') == [Call("a"), Call("b")]
    assert decoder.pending == 3
    assert taken(decoder, b'ethod":"c"}\0') == [Call("c")]
    assert decoder.pending == 0


@pytest.mark.parametrize(
    "frame",
    [b"", b"{", b"[]", b"null", b'"a"', b"{}", b'{"method":1}', b'{"method":null}', b'{"method":"a","more":1}',
     b'{"method":"a","parameters":[]}', b'{"method":"\xff"}', b'{"method":"a"} x', b"[" * 100_000],
)  # fmt: skip
def test_what_is_no_call_is_a_frame_error(frame):
    with pytest.raises(FrameError, match="not a varlink call"):
        taken(Decoder(), frame + b"\0")


def test_calls_before_a_bad_one_are_still_given():
    decoder = Decoder()
    decoder.push(b'{"method":"a"}\0bad\0')
    calls = decoder.calls()
    assert next(calls) == Call("a")
    with pytest.raises(FrameError):
        next(calls)


def test_a_message_of_the_limit_passes_and_one_byte_more_does_not():
    start, end = b'{"method":"', b'"}'
    for size, fits in ((FRAME_LIMIT, True), (FRAME_LIMIT + 1, False)):
        message = start + b"x" * (size - len(start) - len(end)) + end + b"\0"
        decoder = Decoder()
        found = []
        try:
            for at in range(0, len(message), READ):
                found += taken(decoder, message[at : at + READ])
        except FrameError as e:
            assert str(FRAME_LIMIT) in str(e)
            assert not fits
        assert len(found) == fits


def test_an_endless_message_is_refused_as_soon_as_it_is_too_long():
    decoder = Decoder(limit=100)
    assert taken(decoder, b"x" * 100) == []
    with pytest.raises(FrameError, match="more than 100 bytes"):
        taken(decoder, b"x")


def test_calls_that_nobody_takes_do_not_pile_up():
    decoder = Decoder(limit=100)
    pushed = 0
    with pytest.raises(FrameError, match="not answered yet"):
        while True:
            decoder.push(b'{"method":"a"}\0')
            pushed += 1
            assert pushed < READ
    assert decoder.pending <= 100 + READ


def test_a_reply_is_one_frame():
    assert varlink.reply({"a": 1}) == b'{"parameters":{"a":1}}\0'
    assert varlink.reply({}, continues=True) == b'{"parameters":{},"continues":true}\0'


@pytest.mark.parametrize(
    ("kind", "name"),
    [(UsageError, "UsageError"), (NotFoundError, "NotFound"), (NotPermittedError, "NotPermitted"),
     (InUseError, "InUse"), (ExhaustedError, "Exhausted"), (UnavailableError, "Unavailable"),
     (KernelRefusedError, "KernelRefused"), (LedgerError, "LedgerFailed"), (ConfigError, "ConfigError"),
     (AcctdError, "Failed")],
)  # fmt: skip
def test_each_error_has_its_name_in_the_interface(kind, name):
    frame = json.loads(varlink.refusal(kind("why")).rstrip(b"\0"))
    assert frame == {"error": f"{varlink.INTERFACE}.{name}", "parameters": {"message": "why"}}
    assert re.search(rf"^error {name} \(message: string\)$", varlink.DESCRIPTION, re.MULTILINE)
