"""NFS by job and mount, against the kernel's own server on this machine.

The server needs no package: what rpc.mountd and exportfs would tell the kernel is written into its caches by hand.
Jobs are told apart by where they mount: /run/nfs/own in each one's own mount namespace.
"""

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from acctd import readers
from acctd.job import Job, boottime
from acctd.metrics import NFS
from collectors.nfs import NfsHost
from exporters.classad import record_ad
from tests.vm.inside.conftest import Machine

MIB = 1 << 20
EXPORT = Path("/run/nfs/export")
OWN = Path("/run/nfs/own")
HOST = Path("/run/nfs/host")
_OPTIONS = "vers=4.2,addr=127.0.0.1,clientaddr=127.0.0.1"
_NFSD = Path("/proc/fs/nfsd")
_DEADLINE = 90.0

# The id mapping of the export: no squashing, any port, no subtree check, the pseudo root, asynchronous.
# include/uapi/linux/nfsd/export.h
_FLAGS = 0x0002 | 0x0400 | 0x2000 | 0x0010


def mount(directory: str, *options: str, at: Path = OWN) -> str:
    """A shell command. -i: by the system call alone, which needs no mount.nfs."""
    return f"mount -i -t nfs4 -o {','.join((_OPTIONS, *options))} 127.0.0.1:/{directory} {at}"


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    """The kernel's NFS server, on the empty disk."""
    for module in ("nfsd", "nfsv4"):
        subprocess.run(["modprobe", module], check=True)
    for directory in (EXPORT, OWN, HOST, Path("/var/lib/nfs/v4recovery")):
        directory.mkdir(parents=True)
    subprocess.run(["mkfs.ext4", "-q", "-F", "/dev/vda"], check=True)
    subprocess.run(["mount", "/dev/vda", EXPORT], check=True)
    if not _NFSD.joinpath("threads").exists():
        subprocess.run(["mount", "-t", "nfsd", "nfsd", _NFSD], check=True)
    until = int(time.time()) + 100_000
    for cache, line in (
        ("auth.unix.ip", f"nfsd 127.0.0.1 {until} lab"),
        ("nfsd.export", f"lab {EXPORT} {until} {_FLAGS} 65534 65534 0"),
        ("nfsd.fh", f"lab 1 \\x00000000 {until} {EXPORT}"),
    ):
        Path("/proc/net/rpc", cache, "channel").write_text(f"{line}\n")
    # Version 3 would need rpcbind.
    _NFSD.joinpath("versions").write_text("-3 +4 +4.1 +4.2\n")
    _NFSD.joinpath("portlist").write_text("tcp 2049\n")
    _NFSD.joinpath("threads").write_text("2\n")
    _NFSD.joinpath("v4_end_grace").write_text("Y\n")
    yield
    _NFSD.joinpath("threads").write_text("0\n")
    subprocess.run(["umount", EXPORT], check=True)


@pytest.fixture
def exported(server: None, tmp_path: Path) -> Callable[[str], Path]:
    """A fresh exported directory of a name; the server's view of it."""

    def make(name: str) -> Path:
        directory = EXPORT / name
        directory.mkdir()
        return directory

    return make


@pytest.fixture(autouse=True)
def no_mount_left(server: None) -> Iterator[None]:
    yield
    subprocess.run(["umount", HOST], check=False, capture_output=True)
    wait_until(lambda: not superblocks(), "NFS mounts are left")


def superblocks() -> list[str]:
    """The devices that the NFS client has."""
    lines = Path("/proc/fs/nfsfs/volumes").read_text().splitlines()[1:]
    return [line.split()[3] for line in lines]


def wait_until(met: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + _DEADLINE
    while not met():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)


class Stepped:
    """A job whose shell does one step after the other, in a mount namespace of its own."""

    def __init__(self, machine: Machine, name: str, parent: Job | None = None) -> None:
        self.machine, self.name = machine, name
        self.job = machine.create(name, parent=parent)
        self._orders, self._answers = machine.directory / f"{name}.orders", machine.directory / f"{name}.answers"
        for path in (self._orders, self._answers):
            os.mkfifo(path)
        script = f'while read -r step; do eval "$step" && echo done; done <{self._orders} >{self._answers}'
        self.process = machine.start(
            self.job, "unshare", "--mount", "--propagation", "private", "sh", "-c", f"exec 2>&1; {script}"
        )
        self._out = open(self._orders, "w")
        self._in = open(self._answers)

    def do(self, step: str) -> None:
        self.begin(step)
        said = self._in.readline()
        assert said == "done\n", f"{step}: {said}"

    def begin(self, step: str) -> None:
        self._out.write(f"{step}\n")
        self._out.flush()

    def poll(self) -> None:
        self.machine.agent.poll([self.job])

    def end(self) -> dict[str, dict[str, int]]:
        """Let it end by itself; its totals of NFS."""
        self._out.close()
        code = self.process.wait()
        return self.finish(code)

    def finish(self, code: int) -> dict[str, dict[str, int]]:
        for stream in (self._out, self._in):
            stream.close()
        self.record = self.machine.finish(self.job, code)
        return {metric.name: self.record.totals[metric.name] for metric in NFS if metric.name in self.record.totals}


def write(size: int, to: str, *, block: int = MIB, direct: bool = True) -> str:
    flags = " oflag=direct" if direct else ""
    return f"dd if=/dev/zero of={OWN}/{to} bs={block} count={size // block}{flags} status=none"


def read(name: str, *, direct: bool = False) -> str:
    return f"dd if={OWN}/{name} of=/dev/null bs={MIB}{' iflag=direct' if direct else ''} status=none"


def test_two_own_mounts_and_a_shared_one(machine: Machine, exported: Callable[[str], Path]) -> None:
    for name in ("a", "b", "common"):
        exported(name)
    odd = os.urandom(1_000_003)
    (EXPORT / "b" / "odd").write_bytes(odd)
    subprocess.run(["sh", "-c", mount("common", at=HOST)], check=True)
    a, b, c = (Stepped(machine, name) for name in "abc")
    a.do(mount("a", "nosharecache"))
    b.do(mount("b", "nosharecache"))
    c.do(mount("common"))  # finds the host's superblock
    for job in (a, b, c):
        job.poll()
    a.do(write(8 * MIB, "direct"))
    b.do(read("odd"))
    b.do(read("odd"))  # out of its cache
    b.do(f"{write(1_000_000, 'buffered', block=1000, direct=False)}; mkdir {OWN}/d; ls {OWN} >/dev/null")
    c.do(write(2 * MIB, "shared"))
    a.poll()
    a.do(read("direct", direct=True))
    a.do(write(MIB, "more"))
    # None of them is read again while it lives: all that follows the last poll is in what is read after its end.
    of_a, of_b, of_c = a.end(), b.end(), c.end()

    label = str(OWN)
    size = 131_072  # rsize and wsize of a server with 1 GiB
    assert of_a["nfs_write"] == {label: 9 * MIB}
    assert of_a["nfs_read"] == {label: 8 * MIB}
    assert of_a["nfs_writes"] == {label: 9 * MIB // size}
    # A direct read asks the server also at the end of the file, where there is nothing: one MiB more of requests.
    assert of_a["nfs_reads"] == {label: 9 * MIB // size}
    # Two files made, one opened again, and each closed; what the mounting itself asked.
    assert of_a["nfs_operations"][label] > 18 * MIB // size + 6
    assert 0 < of_a["nfs_server_time"][label] <= of_a["nfs_time"][label]
    assert of_b["nfs_read"] == {label: len(odd)}  # to the byte, though its cache is of pages
    assert of_b["nfs_write"] == {label: 1_000_000}
    assert of_b["nfs_writes"] == {label: -(-1_000_000 // size)}
    assert of_c == {}
    assert record_ad(a.record)["AcctdNfsWrite"] == 9 * MIB
    assert "AcctdNfsWrite" not in record_ad(c.record)
    assert not [note for job in (a, b, c) for note in job.record.notes]


def test_what_was_there_before_the_job_is_counted_from_its_beginning(
    machine: Machine, exported: Callable[[str], Path]
) -> None:
    exported("before")
    orders = machine.fifo("orders")
    script = f"{mount('before', 'nosharecache')}; {write(4 * MIB, 'prolog')}; . {orders}"
    process = subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sh", "-c", script])
    mine = Path(f"/proc/{process.pid}/mountstats")
    # More than a second old, so that its whole seconds tell that it is.
    wait_until(lambda: any(int(age) >= 2 for age in _ages(mine.read_text())), "it was not mounted")
    wait_until(lambda: str(4 * MIB) in mine.read_text(), "the prolog did not write")
    job = machine.create("late")
    job.cgroups.attach(process.pid)
    machine.agent.begin(job, boottime())
    orders.write_text(write(3 * MIB, "payload"))
    record = machine.finish(job, process.wait())
    assert record.totals["nfs_write"] == {str(OWN): 3 * MIB}
    assert record.totals["nfs_read"] == {str(OWN): 0}


def test_a_mount_that_two_jobs_share_is_neither_ones_from_then_on(
    machine: Machine, exported: Callable[[str], Path]
) -> None:
    exported("shared")
    first, second = Stepped(machine, "first"), Stepped(machine, "second")
    first.do(mount("shared"))
    first.do(write(2 * MIB, "alone"))
    first.poll()
    second.do(mount("shared"))  # the same superblock
    for job in (second, first):
        job.poll()
    first.do(write(MIB, "both"))
    second.do(write(MIB, "both2"))
    of_second, of_first = second.end(), first.end()
    assert of_first["nfs_write"] == {str(OWN): 2 * MIB}
    assert of_second == {}
    assert any("shared with job second" in note for note in first.record.notes)
    assert any("shared with job first" in note for note in second.record.notes)


def test_a_family_counts_its_own_mounts_and_hands_them_on(machine: Machine, exported: Callable[[str], Path]) -> None:
    exported("outer")
    exported("inner")
    outer = Stepped(machine, "outer")
    outer.do(mount("outer", "nosharecache"))
    inner = Stepped(machine, "inner", parent=outer.job)
    inner.do(mount("inner", "nosharecache"))
    for job in (outer, inner):
        job.poll()
    outer.do(write(2 * MIB, "o"))
    inner.do(write(MIB, "i"))
    assert inner.end()["nfs_write"] == {str(OWN): MIB}
    assert outer.end()["nfs_write"] == {str(OWN): 3 * MIB}


def test_a_mount_again_at_the_same_place_adds_up(machine: Machine, exported: Callable[[str], Path]) -> None:
    exported("again")
    job = Stepped(machine, "again")
    for round_ in (3, 2):
        job.do(mount("again", "nosharecache"))
        job.do(write(round_ * MIB, f"f{round_}"))
        job.poll()
        job.do(f"umount {OWN}")
        job.poll()
    assert job.end()["nfs_write"] == {str(OWN): 5 * MIB}


def test_an_agent_that_comes_back_goes_on(machine: Machine, exported: Callable[[str], Path]) -> None:
    exported("restart")
    job = Stepped(machine, "restart")
    job.do(mount("restart", "nosharecache"))
    job.do(write(2 * MIB, "one"))
    job.poll()
    # As a new agent would hold it: nothing of the old reader is left but the totals.
    for reader in job.job.readers:
        reader.close()
    job.job.readers.clear()
    machine.agent.nfs.close()
    machine.agent.nfs = NfsHost()
    readers.open_for(job.job, machine.agent.nfs)
    job.do(write(MIB, "two"))
    job.poll()
    assert job.end()["nfs_write"] == {str(OWN): 3 * MIB}


def test_a_server_that_does_not_answer_holds_up_nobody(machine: Machine, exported: Callable[[str], Path]) -> None:
    """Unmounting writes what is dirty and waits for the server: a process of its own does that."""
    exported("dead")
    job = Stepped(machine, "dead")
    job.do(mount("dead", "nosharecache"))
    # Dirty pages that no close() flushes: they come by a mapping, which outlives its descriptor. A process that still
    # had the file open would itself wait for the server at its end.
    holder = (
        "import mmap, os, signal; fd = os.open('%s', os.O_RDWR | os.O_CREAT); os.ftruncate(fd, 1 << 20); "
        "m = mmap.mmap(fd, 1 << 20); os.close(fd); m[:] = b'x' * (1 << 20); m.close(); "
        "print('done', flush=True); signal.pause()"
    ) % (OWN / "mapped")
    job.do(f'python3 -c "{holder}"')
    job.poll()
    subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
    late = threading.Event()

    def answer() -> None:
        late.set()
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)

    watchdog = threading.Timer(_DEADLINE, answer)
    watchdog.start()
    try:
        job.process.kill()
        job.process.wait()
        totals = job.finish(-9)
        held = superblocks()
    finally:
        watchdog.cancel()
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    assert not late.is_set()
    assert totals["nfs_operations"][str(OWN)] > 0
    assert held  # still being unmounted
    wait_until(lambda: not superblocks(), "it was never unmounted")
    assert (EXPORT / "dead" / "mapped").read_bytes() == b"x" * MIB


def _ages(text: str) -> list[str]:
    return [line.split()[1] for line in text.splitlines() if line.startswith("\tage:")]
