"""Secrets from files and from systemd's credentials, and what is said where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from acctd.errors import AcctdError, NotFoundError, NotPermittedError, UsageError
from exporters.secretfile import locate, secret

KEY = "influxdb.site.token_file"


@pytest.mark.parametrize("content", [b"token", b"token\n", b" \ttoken\r\n\n"])
def test_a_file_and_a_credential(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "word"
    path.write_bytes(content)
    assert secret(KEY, str(path), {}) == "token"
    assert secret(KEY, "word", {"CREDENTIALS_DIRECTORY": str(tmp_path)}) == "token"
    path.write_text("another")
    assert secret(KEY, str(path), {}) == "another"


def test_where_a_name_leads() -> None:
    environ = {"CREDENTIALS_DIRECTORY": "/run/credentials/x"}
    assert locate(KEY, "word", environ) == "/run/credentials/x/word"
    assert locate(KEY, "/etc/word", environ) == locate(KEY, "/etc/word", {}) == "/etc/word"
    with pytest.raises(NotFoundError, match=rf"^{KEY} 'word' names a systemd credential .* LoadCredential=word:/path"):
        locate(KEY, "word", {})


@pytest.mark.parametrize(
    "content", [b"", b" \n", b"two\nlines", b"a\0b", b"a\x1bb", "wört".encode(), b"\xff", b"s3cr3t" * 11000]
)
def test_what_no_header_may_hold(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "word"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=rf"^{KEY} {path} holds no usable secret; it takes one line") as caught:
        secret(KEY, str(path), {})
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("none", NotFoundError, "does not exist; write the secret into it"),
        (".", UsageError, r"cannot be read \(Is a directory\); it takes a text file"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, kind: type[AcctdError], said: str) -> None:
    with pytest.raises(kind, match=rf"^{KEY} {tmp_path / name} {said}"):
        secret(KEY, str(tmp_path / name), {})


def test_another_users_file(tmp_path: Path) -> None:
    path = tmp_path / "word"
    path.write_text("token")
    path.chmod(0)
    if os.geteuid() != 0:
        with pytest.raises(NotPermittedError, match="may not be read by this user; see its owner and mode"):
            secret(KEY, str(path), {})
        return
    # Root reads everything: as somebody else, who may not even look into the directory.
    code = (
        "import os, sys; from exporters.secretfile import secret; from acctd.errors import NotPermittedError\n"
        "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "try: secret('key', sys.argv[1], {})\nexcept NotPermittedError as e: print(e)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, timeout=60,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout == f"key {path} may not be read by this user; see its owner and mode\n"
