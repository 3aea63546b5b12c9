"""The targets of targets.py under atheris, which looks for inputs that reach new code.

    python -m tests.fuzz.fuzz_atheris -runs=200000            all targets, one after the other
    python -m tests.fuzz.fuzz_atheris -runs=200000 frames     one of them; other options are libFuzzer's

Not part of any test lane: atheris has wheels for some Pythons only and is not among acctd's dependencies. Prints cases
tried and failures a target; an input that fails is kept where libFuzzer says. Exit code 1 if there was a failure.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> int:
    """Every target named, else all, each in a process of its own: libFuzzer ends the process it runs in."""
    from tests.fuzz.targets import TARGETS

    options = [word for word in sys.argv[1:] if word.startswith("-")]
    names = [word for word in sys.argv[1:] if not word.startswith("-")] or list(TARGETS)
    failed = 0
    print(f"{'target':<16}{'cases':>10}{'failures':>10}", flush=True)
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:  # libFuzzer leaves without cleaning up
            done = subprocess.run(
                [sys.executable, "-m", "tests.fuzz.fuzz_atheris", "--target", name, *options],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
                env={**os.environ, "TMPDIR": scratch},
            )  # fmt: skip
        tried = re.findall(r"^(?:Done |#)(\d+)", done.stdout, re.MULTILINE)
        print(f"{name:<16}{tried[-1] if tried else 0:>10}{int(done.returncode != 0):>10}", flush=True)
        if done.returncode:
            failed += 1
            print(done.stdout[-4000:], flush=True)
    return 1 if failed else 0


def run_one(name: str, options: list[str]) -> None:
    """Fuzz one target; libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["acctd", "collectors", "exporters"]):
        from tests.fuzz.targets import SEEDS, TARGETS
    target = TARGETS[name]
    corpus = Path(tempfile.mkdtemp())
    for number, seed in enumerate(SEEDS[target]):
        (corpus / str(number)).write_bytes(seed)
    atheris.Setup([sys.argv[0], *options, str(corpus)], target)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--target"]:
        run_one(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
