"""Records as APEL's individual job records, the message that ssmsend carries to a grid's accounting server. Pure.

The format is APEL-individual-job-message v0.3: https://wiki.egi.eu/wiki/APEL/MessageFormat
Lines `Key: value`, after each record a line `%%`. It has no escape: a line break in a value would begin a line of its
own, `%%` would end the record, and ssmsend gives up on a message with a character that is not ASCII. So these are
written as in a URL: %0A, %25%25, %C3%A9. One record that the server refuses takes the whole message with it; therefore
nothing is written that its parser or its columns would not take.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from acctd.errors import UsageError
from acctd.model import Record
from exporters.jobfacts import JobFacts, percent

HEADER = "APEL-individual-job-message: v0.3"

TEXT_MOST, DESCRIPTION_MOST = 255, 100
"""Characters that the server's columns hold; longer text is cut off there."""

_BENCHMARKS = {"si2k": "Si2k", "hepspec": "HEPSPEC", "hepscore23": "HEPscore23"}
_NOTHING = ("", "none", "null")
"""What means to the server that there is no value, in any case."""
_UNSAFE = re.compile(r"[^\x20-\x7e]|%(?=%|[^\x20-\x7e])|(?<=%)%")  # also a % that would come to stand before another


@dataclass(frozen=True, slots=True)
class Benchmark:
    """How fast a core of this node is, by which sites are made comparable."""

    type: str
    value: Decimal  # a core, three decimals at most

    @classmethod
    def parse(cls, text: str) -> "Benchmark":
        """TYPE=VALUE, like HEPscore23=12.5."""
        name, _, number = text.partition("=")
        known = ", ".join(_BENCHMARKS.values())
        if (kind := _BENCHMARKS.get(name.strip().lower())) is None:
            raise UsageError(f"--benchmark {text!r}: {name!r} is none that APEL knows; it takes {known}")
        try:
            value = Decimal(number.strip())
        except InvalidOperation:
            value = Decimal("NaN")
        if not (value.is_finite() and 0 < value < 10**7) or value != round(value, 3):
            raise UsageError(
                f"--benchmark {text!r}: {number!r} must be above 0 and below 10000000, with three decimals at most"
            )
        return cls(kind, value)


def check_site(site: str) -> str:
    """The site's name, if a server can know it: it must not be changed by any escape."""
    if site.lower() in _NOTHING or len(site) > TEXT_MOST or site != site.strip() or _UNSAFE.search(site):
        raise UsageError(f"--site {site!r} is no name of a site; write it as in GOCDB, in printable ASCII")
    return site


def message(records: Iterable[Record], *, site: str, benchmark: Benchmark) -> bytes:
    """One message. APEL 2.5 loads no record without a benchmark. Raises what JobFacts.of() does."""
    return "".join([f"{HEADER}\n", *(_lines(JobFacts.of(record), site, benchmark) for record in records)]).encode()


def _lines(job: JobFacts, site: str, benchmark: Benchmark) -> str:
    start, wall = job.started_us // 10**6, _seconds(job.wall_ns)
    fields: list[tuple[str, str | int | None]] = [
        ("Site", site),
        ("SubmitHost", job.submit_host),
        ("MachineName", job.node),
        ("Queue", job.queue),
        # With the node: the server keeps one record a site, id and end, and the parts of a parallel job end together.
        ("LocalJobId", f"{job.id}@{job.node}"),
        ("LocalUserId", job.owner),
        ("GlobalUserName", job.user),
        ("FQAN", job.fqan),
        ("VO", job.vo),
        ("WallDuration", wall),
        ("CpuDuration", _seconds(job.cpu_ns)),
        ("Processors", job.cores),
        ("NodeCount", 1),
        ("StartTime", start),
        ("EndTime", start + wall),
        ("InfrastructureDescription", _text(f"acctd-{job.scheduler}" if job.scheduler else "acctd", DESCRIPTION_MOST)),
        ("InfrastructureType", "grid" if job.on_a_grid else "local"),
        ("MemoryReal", _kib(job.resident)),
        ("MemoryVirtual", _kib(job.charged)),
        ("ServiceLevelType", benchmark.type),
        ("ServiceLevel", f"{benchmark.value:f}"),
    ]
    return "".join(f"{key}: {text}\n" for key, value in fields if (text := _text(value))) + "%%\n"


def _text(value: str | int | None, most: int = TEXT_MOST) -> str:
    return "" if value is None else percent(str(value).strip(), _UNSAFE)[:most].strip()


def _seconds(ns: int) -> int:
    """Rounded to the nearest, a half up."""
    return (ns + 5 * 10**8) // 10**9


def _kib(size: int | None) -> int | None:
    """Rounded up."""
    return None if size is None else -(-size // 1024)
