"""Where the ticks of an axis stand and what they say: round numbers in the unit that a person would choose.

Pure arithmetic. For plots only: nothing here is near money, so floats will do.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_DECIMAL = ("", "k", "M", "G", "T", "P", "E")

_SECOND = 10**9
_MINUTE, _HOUR, _DAY = 60 * _SECOND, 3600 * _SECOND, 86400 * _SECOND

_STEPS = (
    *(10**power * digit for power in range(9) for digit in (1, 2, 5)),
    *(_SECOND * n for n in (1, 2, 5, 10, 15, 30)),
    *(_MINUTE * n for n in (1, 2, 5, 10, 15, 30)),
    *(_HOUR * n for n in (1, 2, 3, 6, 12)),
    *(_DAY * n for n in (1, 2, 7, 14, 28, 56, 112, 365, 730, 1825, 3650)),
)
"""ns between two ticks of a time axis."""

_LEAST = 1e-6
"""Of a plain axis; less than that is drawn at its foot."""


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis from 0 to `top`, which is the last tick, or as far as there are values."""

    top: float
    ticks: tuple[tuple[float, str], ...]  # where, and what is written there
    unit: str = ""  # written once, beside the axis


def bytes_scale(highest: float, ticks: int = 5) -> Scale:
    """Memory: powers of two, in KiB, MiB, GiB."""
    highest = max(highest, 1024.0)
    step = 2.0 ** math.ceil(math.log2(highest / ticks))
    power = min(int(math.log2(step * ticks) // 10), len(_BINARY) - 1)
    return _scale(highest, step, 1024.0**power, _BINARY[power])


def decimal_scale(highest: float, unit: str, ticks: int = 5) -> Scale:
    """Rates: 1, 2 or 5 times a power of ten; B/s become kB/s, MB/s, GB/s."""
    highest = max(highest, 1.0)
    step = _round(highest / ticks)
    power = min(int(math.log10(highest) // 3), len(_DECIMAL) - 1)
    return _scale(highest, step, 1000.0**power, _DECIMAL[power] + unit)


def plain_scale(highest: float, unit: str, ticks: int = 5) -> Scale:
    """Cores, hours: small numbers, with as many decimals as the step has."""
    highest = max(highest, _LEAST) if highest > 0 else 1.0
    return _scale(highest, _round(highest / ticks), 1.0, unit)


def _round(step: float) -> float:
    """The next above of 1, 2, 5, 10, 20, ..."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= step * (1 - 1e-9))


def _scale(highest: float, step: float, factor: float, unit: str) -> Scale:
    count = max(1, math.ceil(highest / step - 1e-9))
    places = max(0, -math.floor(math.log10(step / factor) + 1e-9)) if step < factor else 0
    if abs(step / factor * 10**places - round(step / factor * 10**places)) > 1e-6:  # a quarter of a GiB
        places = 2
    ticks = tuple((n * step, _number(n * step / factor, places)) for n in range(count + 1))
    return Scale(count * step, ticks, unit)


def _number(value: float, places: int) -> str:
    if value == 0:
        return "0"
    return f"{value:,.{places}f}"


def time_scale(length_ns: int, ticks: int = 6) -> Scale:
    """Time since a start; the axis ends where the time does."""
    length = max(length_ns, 1)
    step = next((step for step in _STEPS if length / step <= ticks), _STEPS[-1])
    if step < _SECOND:
        factor, unit = next((f, u) for f, u in ((10**6, "ms"), (10**3, "us"), (1, "ns")) if step >= f)
    else:
        steps = ((_DAY, "days"), (_HOUR, "hours"), (_MINUTE, "minutes"), (_SECOND, "seconds"))
        factor, unit = next((f, u) for f, u in steps if step >= f and step % f == 0)
    count = length // step
    return Scale(length, tuple((n * step, f"{n * step // factor:,}") for n in range(count + 1)), unit)


def size(number: float) -> str:
    """A size in memory as a person says it: 1.5 GiB."""
    return _said(number, 1024.0, _BINARY)


def decimal(number: float, unit: str) -> str:
    """A size on a wire or disk, or a rate of it, as a person says it: 1.5 GB, 20 MB/s."""
    return _said(number, 1000.0, tuple(prefix + unit for prefix in _DECIMAL))


def _said(number: float, base: float, units: Sequence[str]) -> str:
    value, power = float(number), 0
    while value >= base - 0.05 and power < len(units) - 1:
        value, power = value / base, power + 1
    text = f"{value:.0f}" if power == 0 or value >= 100 else f"{value:.1f}".removesuffix(".0")
    return f"{text} {units[power]}"


def duration(ns: float) -> str:
    """A span of time in its two largest units: 5 ms, 3.2 s, 2 min 5 s, 3 h 20 min, 12 d 4 h."""
    if ns <= 0:
        return "0 s"
    if ns < _MINUTE:
        factor, unit = next((f, u) for f, u in ((1e9, "s"), (1e6, "ms"), (1e3, "us")) if ns >= f or u == "us")
        return f"{few(ns / factor, 0)} {unit}"
    for large, small, names in ((_DAY, _HOUR, "d h"), (_HOUR, _MINUTE, "h min"), (_MINUTE, _SECOND, "min s")):
        if ns >= large:
            first, second = names.split()
            whole, rest = divmod(int(ns) // small, large // small)
            return f"{whole} {first} {rest} {second}" if rest else f"{whole} {first}"
    raise AssertionError  # a minute and more is one of those


def few(number: float, least: float = 0.01) -> str:
    """A number in three digits or more, and never with an exponent; of one below `least` only that it is."""
    if 0 < number < least:
        return f"less than {least:g}"
    places = 2 - math.floor(math.log10(number)) if number > 0 else 0
    text = f"{number:,.{max(0, min(places, 12))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def in_cores(number: float) -> str:
    """So many of them: 1 core, 2.5 cores."""
    text = few(number)
    return f"{text} core" if text == "1" else f"{text} cores"


def counted(number: int, one: str, many: str = "") -> str:
    """So many of them: 1 job, 2 jobs. `many`: where it is not the word and an s."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def mebibytes(text: str) -> str:
    """A sentence of a record's with HTCondor's MB, which are 2^20 bytes, as the rest of a page writes them."""
    return re.sub(r"(?<=\d )([KM])B\b", r"\1iB", text)


def amount(number: float) -> str:
    """A number of hours: two decimals, and of less than a tenth three digits, wherever they begin."""
    if 0 < number < 0.1:
        places = 2 - math.floor(math.log10(number))
        return f"{number:.{min(places, 12)}f}"
    return f"{number:,.2f}"


def stamp(epoch: float, zone: tzinfo) -> str:
    """A moment as a label: 2026-11-21 10:55:45 UTC."""
    return datetime.fromtimestamp(epoch, zone).strftime("%Y-%m-%d %H:%M:%S %Z")
