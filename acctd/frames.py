"""What the agent leaves for the exporters: one JSON object a line, each of a kind that its first key names.

Pure data and its encoding; spool.py keeps the lines and knows nothing of what is in them. A line carries all that an
exporter needs to name and tag it, because nothing else reaches an exporter. Unknown keys are skipped, so that an
exporter reads what a newer agent wrote.
"""

from collections.abc import Mapping

import msgspec

from acctd.meter import State
from acctd.metrics import LIMITS
from acctd.model import Limits, Record

SAMPLES, EVENTS, RECORDS = STREAMS = ("samples", "events", "records")
"""The streams of the spool. The oldest samples go first where it is full, then events, records never."""


class Sample(msgspec.Struct, frozen=True, tag="sample", tag_field="kind", omit_defaults=True):
    """A living job as of one reading, the families inside it included. In the stream of samples."""

    time: int  # ns since the epoch; no two samples of an agent have the same
    job: str
    owner: str
    uid: int
    started: float  # s since the epoch
    network: str
    totals: State  # gauges included
    parent: str | None = None  # the job whose totals include these
    tags: dict[str, str] = {}
    limits: dict[str, float | int] = {}  # of metrics.LIMITS those it has
    stacked: tuple[str, ...] = ()  # devices whose I/O is counted again under the device they lie on


class AgentSample(msgspec.Struct, frozen=True, tag="agent", tag_field="kind"):
    """What the agent itself costs, cost.Cost.published() and the spool's own numbers. In the stream of samples."""

    time: int
    interval: float  # s between two ticks: how soon the next is to be expected
    version: str
    numbers: dict[str, float]


class EventFrame(msgspec.Struct, frozen=True, tag="event", tag_field="kind", omit_defaults=True):
    """One of the ledger's events; rows.Event. In the stream of events."""

    number: int  # the ledger's; rises, not without gaps
    time: float  # s since the epoch
    event: str
    text: str
    job: str | None = None  # None: the agent itself
    uid: int | None = None
    # Of a job that the agent knew when it wrote this:
    owner: str | None = None
    parent: str | None = None
    scheduler: str | None = None  # its tag


class RecordFrame(msgspec.Struct, frozen=True, tag="record", tag_field="kind"):
    """One of the ledger's records, as it was signed. In the stream of records."""

    number: int  # the ledger's
    digest: str  # the ledger's; no two records have the same
    time: int  # ns since the epoch, when this line was written: later than all samples of the job
    body: msgspec.Raw  # JSON of model.Record, byte for byte as signed

    def record(self) -> Record:
        """Raises msgspec.DecodeError for what no agent has written."""
        return msgspec.json.decode(self.body, type=Record)


class Mark(msgspec.Struct, frozen=True, tag="mark", tag_field="kind"):
    """How far a ledger had come when export from it began: what is older is not sent. In events and records."""

    number: int
    digest: str = ""  # of that record
    time: float = 0.0  # of that event, s since the epoch


Frame = Sample | AgentSample | EventFrame | RecordFrame | Mark

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Frame)


def encode(frame: Frame) -> bytes:
    """One line, without its newline."""
    return _encoder.encode(frame)


def decode(line: bytes) -> Frame:
    """The reverse. Raises msgspec.DecodeError for what encode() did not write."""
    frame: Frame = _decoder.decode(line)
    return frame


def tag(tags: Mapping[str, str], name: str) -> str | None:
    """A job's tag in any case, as ClassAds have it: `account` and `scheduler` mean something to exporters."""
    return next((value for key, value in tags.items() if key.lower() == name), None)


def limits_of(limits: Limits) -> dict[str, float | int]:
    """Those that are published and that a job has, as a Sample holds them."""
    return {name: value for name in LIMITS if (value := getattr(limits, name)) is not None}
