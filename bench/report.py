"""How the benchmarks speak: figures into medians, medians into a Markdown table, and one line on the machine."""

import os
import platform
import statistics
from collections.abc import Sequence


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def p90(values: Sequence[float]) -> float:
    """The value that nine of ten do not exceed."""
    return sorted(values)[-(-len(values) * 9 // 10) - 1]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median and, in parentheses, the 90th percentile."""
    return f"{median(values):.{digits}f} ({p90(values):.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, aligned to be read as it is: the first column is text, the others are numbers."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in cells]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def machine() -> str:
    """What the figures were seen on, and how busy it was: a ratio taken under load is worth less."""
    return (
        f"{len(os.sched_getaffinity(0))} CPUs ({_model()}), Linux {platform.release()}, "
        f"Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}"
    )


def _model() -> str:
    with open("/proc/cpuinfo") as lines:
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
