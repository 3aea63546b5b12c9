"""psutil_sum.py FILE SECONDS: what many a site's own script does: at each interval, sums over all processes of a job.

FILE lists the jobs' cgroup directories, one a line; a job's processes are those in its cgroup.procs. One JSON line an
interval: directory's name -> sums. It counts what lives at that moment: what a process used that has ended since is
not in the next sum.
"""

import json
import os
import sys
import time

import psutil


def sums(directory: str) -> dict[str, float]:
    """CPU s, resident bytes and I/O bytes of the processes in one cgroup now."""
    total = {"user": 0.0, "system": 0.0, "rss": 0, "read": 0, "write": 0, "processes": 0}
    with open(f"{directory}/cgroup.procs") as pids:
        listed = pids.read().split()
    for pid in listed:
        try:
            process = psutil.Process(int(pid))
            with process.oneshot():
                times, memory, io = process.cpu_times(), process.memory_info(), process.io_counters()
        except psutil.NoSuchProcess:
            continue
        total["user"] += times.user
        total["system"] += times.system
        total["rss"] += memory.rss
        total["read"] += io.read_bytes
        total["write"] += io.write_bytes
        total["processes"] += 1
    return total


def main() -> None:
    listed, interval = sys.argv[1], float(sys.argv[2])
    with open(listed) as lines:
        directories = [line.rstrip("\n") for line in lines]
    due = time.monotonic()
    while True:
        print(json.dumps({os.path.basename(path): sums(path) for path in directories}), flush=True)
        due += interval
        time.sleep(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    main()
