"""`acctd show` on a terminal: how a job went, in a line each; and nothing of it anywhere else."""

import os
import pty
import re
import subprocess
import sys
import traceback
from collections.abc import Callable

from acctd.cli.main import main
from tests.kernel.served import Served
from tests.kernel.test_admin import COLOUR, NOBODY, Terminal, bare, busy, let_in, on_terminal

__all__ = ["busy", "on_terminal"]

BLOCKS = re.compile("[▁-█]")
HEADING = "in the course of"


def quick(served: Served) -> None:
    """Samples every fifth of a second."""
    served.node.config.write_text("poll_interval = 0.2\n" + served.node.config.read_text())
    served.ok("Reload")


def shown(on_terminal: Callable[..., Terminal], *arguments: str, **environ: str) -> str:
    terminal = on_terminal("show", *arguments, **environ)
    assert terminal.wait() == 0
    return terminal.seen


def plotted(on_terminal: Callable[..., Terminal]) -> list[str]:
    """The lines of job 42.0, once enough samples are kept."""
    for _ in range(300):
        lines = bare(shown(on_terminal, "42.0")).splitlines()
        for number, line in enumerate(lines):
            if line.startswith(f"  {HEADING}") and len(BLOCKS.findall(lines[number + 1])) > 8:
                return lines[number:]
    raise AssertionError(lines)


def test_a_living_job_and_its_record_are_plotted_on_a_terminal(
    served: Served, busy: subprocess.Popen[str], on_terminal: Callable[..., Terminal]
) -> None:
    quick(served)
    lines = plotted(on_terminal)
    assert re.fullmatch(r"    memory +min +\S+  max +\S+  now +\S+  [▁-█]+", lines[1])
    assert re.fullmatch(r"    cores +min +\d\.\d\d  max +\d\.\d\d  now +\d\.\d\d  [▁-█]+", lines[2])
    assert max(map(len, lines)) <= 80
    busy.kill()
    busy.wait()
    served.ok("Finish", job="42.0")
    ended = bare(shown(on_terminal, "42.0"))
    assert HEADING in ended
    assert re.search(r"    memory +min +\S+  max +\S+  last +\S+  [▁-█]+", ended)


def test_no_plot_where_none_can_be_seen(
    served: Served, busy: subprocess.Popen[str], on_terminal: Callable[..., Terminal]
) -> None:
    quick(served)
    plotted(on_terminal)
    assert COLOUR.search(shown(on_terminal, "42.0"))
    for arguments, environ in (((), {"NO_COLOR": "1"}), (("--no-color",), {})):
        plain = shown(on_terminal, *arguments, "42.0", **environ)
        assert BLOCKS.search(plain)
        assert "\x1b" not in plain
    for environ in ({"TERM": "dumb"}, {"PYTHONIOENCODING": "ascii"}):
        assert HEADING not in shown(on_terminal, "42.0", **environ)
    for form in ("--json", "--classad"):
        assert HEADING not in shown(on_terminal, "42.0", form)
    piped = served.node.acctd("show", "42.0").stdout
    assert HEADING not in piped
    assert "\x1b" not in piped
    assert piped.isascii()


def test_samples_that_are_damaged_keep_back_nothing_else(
    served: Served, busy: subprocess.Popen[str], on_terminal: Callable[..., Terminal]
) -> None:
    quick(served)
    plotted(on_terminal)
    served.ok("Finish", job="42.0")
    assert served.stop() == 0
    for path in (served.node.directory / "state").glob("samples.sqlite*"):
        path.write_bytes(b"no database" * 1000)
    seen = bare(shown(on_terminal, "42.0"))
    assert "job 42.0 of root" in seen
    assert "acctd: samples" in seen
    assert HEADING not in seen


def test_an_owner_sees_the_plots_of_a_living_job(served: Served, on_terminal: Callable[..., Terminal]) -> None:
    quick(served)
    let_in(served)
    # What it had before it was attached is not the job's; of a job that does nothing few samples are kept.
    uses = 'read -r line; kept=$(head -c 3000000 /dev/zero | tr "\\0" a); while :; do :; done'
    own = subprocess.Popen(["sh", "-c", uses], user=NOBODY.pw_uid, stdin=subprocess.PIPE)
    assert own.stdin is not None
    try:
        served.ok("Create", job="42.0", network="none", user="nobody")
        served.ok("Attach", job="42.0", pid=own.pid)
        own.stdin.write(b"\n")
        own.stdin.flush()
        plotted(on_terminal)  # samples are kept
        socket = {"ACCTD_SOCKET": str(served.path), "TERM": "xterm-256color"}
        seen = bare(on_terminal_as_nobody("show", "42.0", **socket))
        assert re.search(r"    memory +min +\S+  max +\S+  now +\S+  [▁-█]+", seen), seen
    finally:
        own.kill()
        own.communicate()


def on_terminal_as_nobody(*arguments: str, **environ: str) -> str:
    """All that acctd writes to a terminal, as an ordinary user, in a child that needs no file of root's."""
    pid, fd = pty.fork()
    if pid == 0:
        told = as_nobody_here(*arguments, **environ)
        os._exit(told)
    seen = b""
    while True:
        try:
            data = os.read(fd, 1 << 16)
        except OSError:
            break  # EIO: it has ended
        if not data:
            break
        seen += data
    os.close(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, seen
    return seen.decode()


def as_nobody_here(*arguments: str, **environ: str) -> int:
    """Become an ordinary user for good, and do what the command does."""
    try:
        os.setgroups([])
        os.setresgid(NOBODY.pw_gid, NOBODY.pw_gid, NOBODY.pw_gid)
        os.setresuid(NOBODY.pw_uid, NOBODY.pw_uid, NOBODY.pw_uid)
        os.environ.update(environ)
        os.environ.pop("NO_COLOR", None)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        main([*arguments])
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 0
    except BaseException:
        traceback.print_exc()  # to the terminal, which is read; this child must not go on as a test run
        return 99
    return 0


def test_bars_of_top_are_blocks_where_these_can_be_seen(
    served: Served, busy: subprocess.Popen[str], on_terminal: Callable[..., Terminal]
) -> None:
    top = on_terminal("top", "--interval", "0.3", TERM="xterm-256color")
    top.until_shown(r"42\.0 +root +1 +\d+  \[[█▏▎▍▌▋▊▉]")
    top.type("q")
    assert top.wait() == 0
    for environ in ({"TERM": "linux"}, {"PYTHONIOENCODING": "ascii"}):
        top = on_terminal("top", "--interval", "0.3", **environ)
        seen = top.until_shown(r"42\.0 +root +1 +\d+  \[\|")
        top.type("q")
        assert top.wait() == 0
        assert not BLOCKS.search(seen + top.seen)
