"""`make demo`: one job that uses memory, CPU, disk and network, in a network of its own making, and its account.

    campus (198.51.100.0/24) --- node --- wide area (203.0.113.0/24)

acctd runs on the node, as an admin would start it. All of it is namespaces and temporary files, gone at the end.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lab.topology import Topology
from lab.traffic import PORT, Server

_JOB = f"""
set -e
echo "job: 40 MiB of memory, half a second of CPU"
{sys.executable} - <<'PY'
import time
held = bytearray(40 << 20)
while time.process_time() < 0.5:
    sum(range(10000))
PY
echo "job: 20 MiB to disk"
dd if=/dev/zero of="$DEMO_FILE" bs=1M count=20 oflag=direct status=none
echo "job: 10,000,000 bytes from the campus, 3,000,000 bytes to the wide area"
{sys.executable} "$DEMO_TRAFFIC" take 198.51.100.2 {PORT} 10000000 --tcp
{sys.executable} "$DEMO_TRAFFIC" give 203.0.113.2 {PORT} 3000000 --tcp
"""


def main() -> int:
    """Run the demo; the exit status is the job's."""
    repo = Path(__file__).parents[1]
    with Topology() as lab, tempfile.TemporaryDirectory(prefix="acctd-demo-", dir="/var/tmp") as scratch:
        servers = []
        try:
            for site in (lab.campus, lab.wan):
                with lab.enter(site):
                    servers.append(Server())
            config = Path(scratch, "acctd.toml")
            config.write_text(
                f'state_dir = "{scratch}/state"\nruntime_dir = "{scratch}/run"\n'
                f'[cgroup]\nbase = "acctd-demo-{os.getpid()}"\n'
            )
            environ = {
                **os.environ,
                "ACCTD_CONFIG": str(config),
                "PYTHONPATH": str(repo),
                "DEMO_FILE": f"{scratch}/data",
                "DEMO_TRAFFIC": str(repo / "lab" / "traffic.py"),
            }
            acctd = [sys.executable, "-m", "acctd"]
            options = ["--id", "demo", "--memory", "512M", "--internal", "198.51.100.0/24,2001:db8:1::/64"]
            print(f"$ acctd run {' '.join(options)} -- sh -c '...'", flush=True)
            done = lab.run(lab.node, [*acctd, "run", *options, "--", "sh", "-c", _JOB], env=environ, check=False)
            print("\n$ acctd show demo --classad", flush=True)
            subprocess.run([*acctd, "show", "demo", "--classad"], env=environ, check=True)
            return done.returncode
        finally:
            for server in servers:
                server.close()


if __name__ == "__main__":
    sys.exit(main())
