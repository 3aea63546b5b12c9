"""A process that takes memory when it is told to, and no more: what the tests of out-of-memory put into jobs.

Reads lines and answers each with one, once it is done; ends with its input:

    take N          hold N MiB of anonymous memory, from now on: it takes what is missing, or gives back what is above
    cache N PATH    read so much of a file, which stays in the page cache
    many K N        K children take N MiB each, stay until each of them has it or is dead, and end

The pages are touched by itself and not by a system call: on cgroup v1 a call that would have to wait for memory fails
with EFAULT instead. Standard library only, and little of it: `python -I -S` starts it within half a second in a guest.
"""

import os
import signal
import sys

MIB = 1 << 20


def main() -> None:
    held: list[bytes] = []
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "take":
            take(held, int(rest[0]))
            say("has", len(held))
        elif word == "cache":
            read(rest[1], int(rest[0]))
            say("read", rest[0])
        else:
            say("killed", many(int(rest[0]), int(rest[1])))


def take(held: list[bytes], wanted: int) -> None:
    while len(held) < wanted:
        held.append(b"x" * MIB)
    del held[wanted:]


def read(path: str, size: int) -> None:
    fd = os.open(path, os.O_RDONLY)
    for offset in range(0, size * MIB, 1 << 16):
        os.pread(fd, 1 << 16, offset)
    os.close(fd)


def many(count: int, size: int) -> int:
    """How many of the children were ended by SIGKILL."""
    (gate, opener), (wait, release) = os.pipe(), os.pipe()
    pids, full = [], []
    for _ in range(count):
        ear, mouth = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(release)
            os.close(opener)
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write("500")  # the kernel is to choose one of these, not their parent
            os.read(gate, 1)
            take(kept := [], size)
            os.write(mouth, b"x")
            os.read(wait, 1)
            os._exit(len(kept) != size)
        os.close(mouth)
        pids.append(pid)
        full.append(ear)
    os.close(opener)  # all are there: to fork fails where memory is short
    for ear in full:
        os.read(ear, 1)  # nothing, where it is dead
        os.close(ear)
    os.close(release)
    os.close(wait)
    os.close(gate)
    return sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL for pid in pids)


def say(*words: object) -> None:
    print(*words, flush=True)


if __name__ == "__main__":
    main()
