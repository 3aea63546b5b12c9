"""All lanes, several at a time: `python -m tests`, which is what `make test` runs.

Most of a lane is waiting, and much of it for one process at a time, so a second CPU stands idle. A lane is a pytest of
its own, as if it were alone, and as many run as there are CPUs; that they do not disturb one another is what each of
them promises anyway. Guests keep all CPUs busy by themselves: their lane
goes first, with no other beside it. What the first running one says is shown as it comes, what the others say when it
is their turn. What failed is said again at the end. Exits with 0 if every lane did.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

HERE = Path(__file__).parent
ALONE = "vm"
FIRST = (ALONE, "kernel", "faults/test_kill_serve.py", "faults")
"""The longest; the order of the others does not matter. The lane of a file's directory goes without the file."""


@dataclass
class Lane:
    """One directory of tests, or a file, and how its pytest is doing."""

    name: str
    process: subprocess.Popen[bytes]
    log: BinaryIO
    began: float
    seconds: float = 0.0

    @property
    def running(self) -> bool:
        if self.process.returncode is None and self.process.poll() is not None:
            self.seconds = time.monotonic() - self.began
        return self.process.returncode is None


def names() -> list[str]:
    """Every directory here with tests in it."""
    found = {path.parent.name for path in HERE.glob("*/test_*.py")}
    return [*FIRST, *sorted(found - set(FIRST))]


def start(name: str, scratch: Path) -> Lane:
    log = tempfile.TemporaryFile()
    colour = ["--color=yes"] if sys.stdout.isatty() else []
    without = [f"--ignore=tests/{other}" for other in FIRST if other.startswith(f"{name}/")]
    process = subprocess.Popen(
        # If we are killed, it is interrupted and clears up: prctl(2), PR_SET_PDEATHSIG. A shell's background would have
        # it ignore that. Unbuffered, to be seen as it comes.
        [
            *("env", "--default-signal=INT", "setpriv", "--pdeathsig", "INT"),
            *(sys.executable, "-u", "-m", "pytest", *colour, f"tests/{name}", *without),
            # A pytest that begins shuts /tmp/pytest-of-USER, and some tests have it open for an ordinary user.
            f"--basetemp={scratch}/{name.replace('/', '-')}",
        ],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd=HERE.parent,
    )
    return Lane(name, process, log, time.monotonic())


def said(lane: Lane, since: int) -> bytes:
    return os.pread(lane.log.fileno(), 1 << 24, since)


def failures(lane: Lane) -> list[str]:
    """The lines of pytest's summary that name what did not pass; what it said last, if it came to no summary."""
    text = re.sub(r"\x1b\[[\d;]*m", "", said(lane, 0).decode(errors="replace"))
    lines = text.rpartition("short test summary info")[2].splitlines()
    return [line for line in lines if line.startswith(("FAILED ", "ERROR "))] or lines[-3:]


def main() -> int:
    lanes: list[Lane] = []
    scratch = Path(tempfile.mkdtemp(prefix="acctd-tests-"))
    scratch.chmod(0o755)
    try:
        run(lanes, scratch)
    except KeyboardInterrupt:  # which the lanes have got, too
        print("\ninterrupted; waiting for the lanes to clear up")
        for lane in lanes:
            lane.process.wait()
    bad = [lane for lane in lanes if lane.process.returncode]
    for lane in bad:
        print(f"\n######## tests/{lane.name} did not pass", *failures(lane), sep="\n")
    print(f"\n{'lane':<28}seconds  pytest's exit status")
    for lane in lanes:
        print(f"{lane.name:<28}{lane.seconds:7.0f}  {lane.process.returncode}")
    if bad:
        print(f"What the tests left is in {scratch}")
        return 1
    shutil.rmtree(scratch)
    return 0


def run(lanes: list[Lane], scratch: Path) -> None:
    """Run all of them to their end; `lanes` has those that were begun."""
    cpus = os.cpu_count() or 1
    waiting = deque(names())
    shown, at = 0, 0  # the lane that is shown, and how much of it has been
    while waiting or shown < len(lanes):
        busy = sum([lane.running for lane in lanes])
        alone = any(lane.running and lane.name == ALONE for lane in lanes)
        while waiting and busy < cpus and not alone:
            lanes.append(start(waiting.popleft(), scratch))
            alone = lanes[-1].name == ALONE
            busy += 1
        lane = lanes[shown]
        running = lane.running
        if text := said(lane, at):
            if not at:
                print(f"\n######## tests/{lane.name}", flush=True)
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()
            at += len(text)
        elif not running:
            shown, at = shown + 1, 0
        else:
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
