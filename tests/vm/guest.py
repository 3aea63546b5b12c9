"""A guest machine with a kernel of its own: where acctd meets cgroup layouts that this host does not have.

QEMU in software emulation, a stock Debian kernel, and the host's root file system, read-only below a RAM overlay: the
repository and its virtualenv are there as they are, and nothing a guest does outlives it but the files it writes to
its results directory. The kernel is fetched by apt (which checks its signature) into a cache outside the repository.

    python -m tests.vm.guest v2 -- COMMAND...      # run a command in a guest, see its output, exit as it did
"""

import fcntl
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).parents[2]
CACHE = Path(os.environ.get("ACCTD_VM_CACHE") or Path.home() / ".cache" / "acctd-vm")
RESULTS = "/run/acctd-vm"
"""Where the guest sees its results directory."""

_V1 = "mount -t tmpfs cgroup /sys/fs/cgroup; cd /sys/fs/cgroup"
LAYOUTS = {
    "v2": "mount -t cgroup2 cgroup2 /sys/fs/cgroup",
    # As RHEL 7, Debian 10 and others mount v1: some controllers in pairs, no cgroup2 beside them.
    "joined": f"{_V1}; for set in cpu,cpuacct memory cpuset blkio freezer pids; do "
    "mkdir $set && mount -t cgroup -o $set cgroup $set; done",
    "single": f"{_V1}; mkdir all; mount -t cgroup -o cpu,cpuacct,memory,cpuset,blkio,freezer,pids cgroup all",
    # Some controllers on v2, the rest on v1: the kernel allows any division.
    "divided": f"{_V1}; for set in cpu,cpuacct cpuset freezer; do mkdir $set && mount -t cgroup -o $set cgroup $set; "
    "done; mkdir unified; mount -t cgroup2 cgroup2 unified",
    # v2 too, on another machine.
    "numa": "mount -t cgroup2 cgroup2 /sys/fs/cgroup",
}
"""How a guest mounts its cgroups before the command starts."""

_TWO_CPUS = ("-m", "1G", "-smp", "2")
_MACHINES = {
    # Two sockets of two cores, each with half of the memory.
    "numa": (
        "-m", "1G", "-smp", "4,sockets=2,cores=2,threads=1",
        "-object", "memory-backend-ram,id=m0,size=512M", "-numa", "node,nodeid=0,cpus=0-1,memdev=m0",
        "-object", "memory-backend-ram,id=m1,size=512M", "-numa", "node,nodeid=1,cpus=2-3,memdev=m1",
    ),
}  # fmt: skip
"""What a guest has for CPUs and memory, where that is not two CPUs."""

SYSTEMD = "systemd"
"""The layout of a guest whose first process is systemd, which mounts cgroups by itself (v2) and runs the command as a
service."""

_SYSTEMD = "/lib/systemd/systemd"
_MODULES = ("virtio_pci", "9p", "9pnet_virtio", "overlay", "virtio_blk")

# Runs from the initramfs. Everything is by busybox; modules come in the order that their dependencies need.
_INIT = """#!/busybox sh
/busybox mkdir -p /bin /proc /sys /dev /host /ram /new
/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
while read module; do insmod "/modules/$module" || echo "acctd-vm: $module does not load"; done </modules/order
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro host /host
mount -t tmpfs ram /ram; mkdir /ram/upper /ram/work
mount -t overlay -o lowerdir=/host,upperdir=/ram/upper,workdir=/ram/work root /new
mount -t proc proc /new/proc; mount -t sysfs sysfs /new/sys; mount -t devtmpfs dev /new/dev
mkdir -p /new/dev/pts /new/dev/shm; mount -t devpts devpts /new/dev/pts; mount -t tmpfs shm /new/dev/shm
mount -t tmpfs run /new/run; mkdir -p /new/run/acctd-vm /new/run/tmp
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000 results /new/run/acctd-vm
mkdir -p "/new/lib/modules/$(uname -r)"
mount --bind "/host$acctd_modules" "/new/lib/modules/$(uname -r)"
ifconfig lo up
exec switch_root /new /bin/sh /run/acctd-vm/main
"""


class GuestError(RuntimeError):
    """A guest that could not be made, did not start, or did not come to its end."""


def runnable_here() -> str | None:
    """None where guests must run; elsewhere the reason why they cannot."""
    if platform.machine() != "x86_64":
        return f"the guest's kernel is for x86_64, this machine is {platform.machine()}"
    if shutil.which("apt-get") is None:
        return "the guest's kernel comes from a Debian archive, and this host has no apt-get"
    return None


@dataclass(frozen=True, slots=True)
class Kernel:
    """What a guest boots from."""

    version: str
    image: Path
    modules: Path
    initramfs: Path


def prepare() -> Kernel:
    """Fetch and unpack the kernel and build the initramfs, unless that was done before. Raises GuestError."""
    for program in ("qemu-system-x86_64", "depmod", "busybox"):
        if shutil.which(program) is None:
            raise GuestError(f"{program} is missing; install qemu-system-x86, kmod and busybox-static")
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _unpacked() or _fetch()


def run(layout: str, command: Sequence[str], results: Path, *, disk_mib: int = 64, timeout: float = 300) -> int:
    """Boot a guest, run a command as root in the repository's directory, power off; returns the command's status.

    `results` is shared with the guest, as RESULTS: its `output` holds what the command printed, its `console` what the
    kernel did. An empty disk is at /dev/vda.
    """
    kernel = prepare()
    if layout == SYSTEMD and not Path(_SYSTEMD).exists():
        raise GuestError(f"{_SYSTEMD} is missing; install systemd")
    results.mkdir(parents=True, exist_ok=True)
    (results / "status").unlink(missing_ok=True)
    (results / "main").write_text(_main(layout, command))
    disk = results / "disk"
    with open(disk, "wb") as image:
        image.truncate(disk_mib << 20)
    qemu = [
        # Dies with whoever started it: an interrupted test run leaves no machine behind.
        "setpriv", "--pdeathsig", "KILL", "--",
        # One emulating thread for both CPUs: with one each, atomic instructions cost so much that all takes longer.
        "qemu-system-x86_64", "-accel", "tcg,thread=single,tb-size=512", "-cpu", "Nehalem",
        *_MACHINES.get(layout, _TWO_CPUS),
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-nic", "none",
        "-serial", f"file:{results}/console",
        "-kernel", str(kernel.image), "-initrd", str(kernel.initramfs),
        # Mitigations cost an emulated CPU a third of its time and protect nobody here.
        "-append", "console=ttyS0 quiet panic=-1 mitigations=off nokaslr cryptomgr.notests random.trust_cpu=on "
        f"rdinit=/init acctd_modules={kernel.modules}",
        "-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
        "-virtfs", f"local,path={results},mount_tag=results,security_model=none",
        "-drive", f"file={disk},format=raw,if=virtio,cache=unsafe",
    ]  # fmt: skip
    try:
        done = subprocess.run(qemu, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise GuestError(f"the guest did not end within {timeout:.0f} s\n{_tail(results)}") from None
    finally:
        disk.unlink()
    status = results / "status"
    if done.returncode or not status.exists():
        raise GuestError(f"the guest broke off (qemu: {done.returncode} {done.stderr.strip()})\n{_tail(results)}")
    return int(status.read_text())


def _main(layout: str, command: Sequence[str]) -> str:
    """What the guest's first process does: set the layout up, run the command, say how it ended, power off."""
    environment = (
        "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8\n"
        f"export TMPDIR=/run/tmp PYTHONPATH={shlex.quote(str(REPO))}\n"
    )
    run = (
        f"cd {shlex.quote(str(REPO))}\n"
        f"{shlex.join(command)} </dev/null >{RESULTS}/output 2>&1\n"
        f"echo $? >{RESULTS}/status\n"
        "busybox poweroff -f\n"
    )
    if layout != SYSTEMD:
        return f"{environment}({LAYOUTS[layout]}) || echo 'acctd-vm: cgroups not mounted'\n{run}"
    units = "/run/systemd/system"
    return (
        # Nothing of what this host would start at boot: no generator, no enabled unit, no udev. What is left of the
        # real thing is the manager, the journal, and the targets that units order themselves by. And nothing of an
        # acctd that was used here.
        "for empty in /etc/systemd/system /lib/systemd/system-generators /lib/systemd/system/sysinit.target.wants "
        "/etc/acctd /var/lib/acctd\ndo mkdir -p $empty; mount -t tmpfs empty $empty; done\n"
        f"mkdir -p {units}\n"
        f"cat >{units}/acctd-vm.service <<'END'\n{_UNIT}END\n"
        f"cat >/run/acctd-vm-command <<'END'\n{environment}{run}END\n"
        f"exec {_SYSTEMD} --unit=acctd-vm.service --show-status=no\n"
    )


_UNIT = """\
[Unit]
Requires=systemd-journald.service
After=systemd-journald.service

[Service]
Type=oneshot
ExecStart=sh /run/acctd-vm-command
TimeoutStartSec=infinity
"""


def _tail(results: Path) -> str:
    """The last lines of what is known, for whoever has to find out."""
    parts = []
    for name in ("output", "console"):
        path = results / name
        if path.exists():
            lines = path.read_text(errors="replace").splitlines()[-25:]
            parts.append(f"--- {name}\n" + "\n".join(lines))
    return "\n".join(parts)


def _unpacked() -> Kernel | None:
    for image in sorted(CACHE.glob("kernel/boot/vmlinuz-*")):
        version = image.name.removeprefix("vmlinuz-")
        kernel = Kernel(version, image, CACHE / "kernel/lib/modules" / version, _initramfs_path(version))
        if kernel.initramfs.exists():
            return kernel
    return None


def _initramfs_path(version: str) -> Path:
    # Named after its content too: a changed script makes a new one.
    digest = sum((index + 1) * byte for index, byte in enumerate(_INIT.encode())) % 2**32
    return CACHE / f"initramfs-{version}-{digest:08x}"


def _fetch() -> Kernel:
    if not list(CACHE.glob("kernel/boot/vmlinuz-*")):
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            unpacked = Path(scratch, "kernel")
            _download(Path(scratch))
            for package in Path(scratch).glob("*.deb"):
                _call(["dpkg-deb", "-x", str(package), str(unpacked)])
            for image in unpacked.glob("boot/vmlinuz-*"):
                _call(["depmod", "-b", str(unpacked), image.name.removeprefix("vmlinuz-")])
            # Whole or not at all: a broken-off run leaves no half kernel.
            shutil.rmtree(CACHE / "kernel", ignore_errors=True)
            unpacked.rename(CACHE / "kernel")
    for image in CACHE.glob("kernel/boot/vmlinuz-*"):
        version = image.name.removeprefix("vmlinuz-")
        path = _initramfs_path(version)
        half = path.with_suffix(".half")
        half.write_bytes(_initramfs(version))
        half.rename(path)
    kernel = _unpacked()
    if kernel is None:
        raise GuestError(f"the kernel package holds no boot/vmlinuz-*; look into {CACHE}/kernel")
    return kernel


def _download(directory: Path) -> None:
    """The image that Debian's linux-image-amd64 stands for; with a fresh index if the present one does not do."""
    for attempt in (1, 2):
        listed = subprocess.run(
            ["apt-cache", "depends", "--important", "linux-image-amd64"], capture_output=True, text=True, check=False
        )
        names = [word for word in listed.stdout.split() if word.startswith("linux-image-") and word[12].isdigit()]
        if names:
            done = subprocess.run(
                ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", names[0]], cwd=directory, check=False
            )
            if done.returncode == 0:
                return
        if attempt == 1:
            _call(["apt-get", "update", "-qq"])
    raise GuestError("apt offers no kernel: 'apt-get download' of what linux-image-amd64 depends on failed")


def _call(argv: Sequence[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise GuestError(f"{shlex.join(argv)}: {done.stderr.strip()}")
    return done.stdout


def _initramfs(version: str) -> bytes:
    """busybox, the modules that reach the host's files, and _INIT, as a cpio archive (newc)."""
    order: list[Path] = []
    for name in _MODULES:
        listed = _call(["modprobe", "--show-depends", "-d", str(CACHE / "kernel"), "-S", version, name])
        for line in listed.splitlines():
            kind, _, path = line.partition(" ")
            if kind == "insmod" and Path(path.strip()) not in order:
                order.append(Path(path.strip()))
    busybox = shutil.which("busybox")
    if busybox is None:
        raise GuestError("busybox is missing; install busybox-static")
    members = [("busybox", 0o100755, Path(busybox).read_bytes()), ("init", 0o100755, _INIT.encode())]
    members += [("modules", 0o040755, b"")]
    members += [(f"modules/{path.name}", 0o100644, path.read_bytes()) for path in order]
    members += [("modules/order", 0o100644, "".join(f"{path.name}\n" for path in order).encode())]
    return b"".join(_cpio(*member) for member in members) + _cpio("TRAILER!!!", 0, b"")


# driver-api/early-userspace/buffer-format.rst: the magic, 13 fields of 8 hex digits, the name with its NUL, the data;
# name and data each padded to 4 bytes.
def _cpio(name: str, mode: int, data: bytes) -> bytes:
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + "".join(f"{field:08x}" for field in fields).encode() + name.encode() + b"\0"
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


def _cli(arguments: Sequence[str]) -> int:
    layout, dashes, *command = arguments if len(arguments) > 2 else ("", "")
    layouts = [*LAYOUTS, SYSTEMD]
    if layout not in layouts or dashes != "--":
        sys.exit(f"usage: python -m tests.vm.guest {'|'.join(layouts)} -- COMMAND...")
    with tempfile.TemporaryDirectory(prefix="acctd-vm-") as results:
        status = run(layout, command, Path(results))
        sys.stdout.write(Path(results, "output").read_text(errors="replace"))
    return status


if __name__ == "__main__":
    sys.exit(_cli(sys.argv[1:]))
