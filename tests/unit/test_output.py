"""Files that commands write: all of it or what was there, and where it was said, whatever lies there."""

import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from acctd.cli.output import Output
from acctd.errors import AcctdError, NotFoundError, NotPermittedError


def alone(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_nothing_is_there_before_it_is_written(tmp_path: Path) -> None:
    target = tmp_path / "page"
    output = Output("--html", str(target))
    assert alone(tmp_path) == set(), "who is refused leaves no empty file"
    output.write("sm\u00f6r")
    assert target.read_bytes() == b"sm\xc3\xb6r"
    assert alone(tmp_path) == {"page"}


def test_a_new_file_has_the_modes_that_are_usual_and_a_private_one_is_its_owners(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        for name, private in (("open", False), ("private", True)):
            Output("--html", str(tmp_path / name), private=private).write("x")
    finally:
        os.umask(umask)
    assert (mode(tmp_path / "open"), mode(tmp_path / "private")) == (0o640, 0o600)


def test_a_file_that_is_there_keeps_its_mode_and_is_another_one(tmp_path: Path) -> None:
    target = tmp_path / "page"
    target.write_text("x" * 10_000)
    target.chmod(0o604)
    with target.open() as reader:
        Output("--html", str(target), private=True).write("new")
        assert len(reader.read()) == 10_000, "who reads the old one has all of it"
    assert (target.read_text(), mode(target)) == ("new", 0o604)


def test_the_old_file_stays_where_the_new_one_has_no_room(tmp_path: Path) -> None:
    target = tmp_path / "page"
    target.write_text("old")
    output = Output("--html", str(target))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(AcctdError, match=r"--html .*page: File too large"):
            output.write("x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_text() == "old"
    assert alone(tmp_path) == {"page"}


def test_a_link_stands_for_its_file(tmp_path: Path) -> None:
    target, link = tmp_path / "there" / "page", tmp_path / "link"
    target.parent.mkdir()
    link.symlink_to("there/page")
    for text in ("one", "two"):  # it dangles first
        Output("--html", str(link)).write(text)
        assert (link.is_symlink(), target.read_text()) == (True, text)


def test_a_link_where_anybody_may_have_laid_it_is_replaced(tmp_path: Path) -> None:
    precious, shared = tmp_path / "precious", tmp_path / "shared"
    precious.write_text("precious")
    precious.chmod(0o644)
    shared.mkdir()
    shared.chmod(0o1777)
    link = shared / "page"
    link.symlink_to(precious)
    Output("--html", str(link), private=True).write("new")
    assert precious.read_text() == "precious"
    assert (link.is_symlink(), link.read_text(), mode(link)) == (False, "new", 0o600)
    second = shared / "second"
    os.link(precious, second)
    Output("--html", str(second), private=True).write("new")
    assert (precious.read_text(), mode(second)) == ("precious", 0o600), "a name for a file that others may read"


def test_devices_pipes_and_standard_output_are_written_as_they_are(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    Output("--html", str(pipe)).write("through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    Output("--html", "/dev/null").write("x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(AcctdError, match="No space left"):
        Output("--html", "/dev/full").write("x")
    code = "import sys; from acctd.cli.output import Output; Output('--html', sys.argv[1]).write('page')"
    log = tmp_path / "log"
    for path in ("/dev/stdout", "/proc/self/fd/1", "-"):
        with log.open("ab") as stream:
            subprocess.run([sys.executable, "-c", code, path], stdout=stream, check=True, timeout=60)
    assert log.read_text() == "page" * 3, "added to what the shell opened"
    assert Path("/dev/stdout").is_symlink()


def test_bad_paths_are_known_at_once(tmp_path: Path) -> None:
    for path, error, words in (
        (tmp_path / "no" / "page", NotFoundError, "make its directory first"),
        (tmp_path, AcctdError, "Is a directory"),
        (f"{tmp_path}/page/", AcctdError, "Is a directory"),
        (tmp_path / ("x" * 300), AcctdError, "too long"),
        ("", NotFoundError, "No such file"),
        ("/proc/1/page", (NotFoundError, NotPermittedError), "/proc/1/page"),
    ):
        with pytest.raises(error, match=words):
            Output("--html", str(path))
    assert alone(tmp_path) == set()
