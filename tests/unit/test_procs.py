"""Facts from /proc and /sys: identities of processes, disks, and which devices lie on others."""

import os
from pathlib import Path

from acctd.kernel import procs


def test_an_identity_is_of_this_process_alone() -> None:
    own = procs.identity(os.getpid())
    assert procs.is_alive(own)
    assert not procs.is_alive(own + "1")  # the same pid, another start
    assert not procs.is_alive("4194304:1")
    assert not procs.is_alive(f"{os.getpid()}:")


def test_disks_are_whole_devices_that_hold_something(tmp_path: Path) -> None:
    for name, size, dev in (("sda", "100", "8:0"), ("loop0", "0", "7:0"), ("nvme0n1", "5", "259:0")):
        entry = tmp_path / "sys/block" / name
        entry.mkdir(parents=True)
        (entry / "size").write_text(f"{size}\n")
        (entry / "dev").write_text(f"{dev}\n")
    (tmp_path / "sys/block/sda/diskseq").write_text("9\n")
    assert procs.disks(tmp_path) == {"8:0": "9", "259:0": ""}


def test_what_lies_on_others(tmp_path: Path) -> None:
    block = tmp_path / "sys/dev/block"
    for device in ("8:0", "253:0", "7:0", "7:1"):
        (block / device / "slaves").mkdir(parents=True)
    (block / "253:0/slaves/sda").mkdir()
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(
        "27 1 254:0 / / rw - ext4 /dev/vda rw\n30 27 0:25 / /dev/shm rw - tmpfs tmpfs rw\n"
    )
    for loop, backing in (("7:0", "/images/a (deleted)"), ("7:1", "/dev/shm/b")):
        (block / loop / "loop").mkdir()
        (block / loop / "loop/backing_file").write_text(f"{backing}\n")
    lies = {device: procs.lies_on_others(device, tmp_path) for device in ("8:0", "253:0", "7:0", "7:1", "9:9")}
    assert lies == {"8:0": False, "253:0": True, "7:0": True, "7:1": False, "9:9": False}
