"""The guardian: a small process beside a keeper of jobs (the agent, or `acctd run`) that lets go what nobody acts on.

A job that waits in OOM on cgroup v1 (oom_kill_disable), and a frozen job, waits until somebody acts; its keeper may
hang, be stopped, or be dead. So at a deadline this process writes 0 to memory.oom_control, which lets the kernel's own
killer loose, or thaws. It decides nothing else. Kernel doc: admin-guide/cgroup-v1/memory.rst, "OOM Control".

Standard library only and little of it; imports nothing of acctd. `python -I -S guardian.py DIRECTORY` runs it; guard.py
does, in a session of its own. Lines come on descriptor 0, fields divided by NUL, seconds as text:

    watch NAME SECONDS FILE           memory.oom_control of a job's cgroup, v1; once more renews it
    forget NAME
    freeze NAME SECONDS FILE VALUE    write VALUE to FILE then, unless `thawed` comes before
    thawed NAME

and go to descriptor 1: `released`, `thawed` or `unguarded`, then NAME TIME TEXT TRACE. TIME is in seconds since the
epoch, TEXT says why. TRACE is a file in DIRECTORY that says the same as JSON, for whoever keeps the job by then; empty
where there is none.

The timer of a job in OOM starts anew with each event (its limit was raised, and reached again), but not for ever. It
rests while the cgroup above is in OOM too: the shortage is that one's then, and shows in all below.

A cgroup that a job makes inside its own inherits that tasks wait there, and has limits that nobody hears of: a living
keeper lets it go at its readings, this process once its keeper is gone.

When its keeper is gone (descriptor 0 ends) it goes on until nothing is left to watch. The next keeper's guardian marks
the files of each job it is given as its own, and this one then lets the job be: what the new keeper deals with has its
whole deadline from then on. SIGTERM ends it; if it has no keeper, who would start another, it first lets all jobs go.
"""

import os
import select
import sys
import time
from _signal import (  # type: ignore[import-not-found]  # signal itself loads enum and re, 0.8 MB
    SIG_IGN,
    SIG_SETMASK,
    SIGHUP,
    SIGINT,
    SIGTERM,
    pthread_sigmask,
    set_wakeup_fd,
    signal,
)

IN, OUT = 0, 1
MARK = "trusted.acctd.guardian"
"""Extended attribute on a watched file: which guardian acts on it. A kernel without them has them all act."""

MADE = "trusted.acctd"
"""Extended attribute on the cgroups that acctd made: a family inside a job has a policy of its own."""

LOOKS = 10  # at a waiting job in each deadline
ENDLESS = 10  # deadlines in OOM are too many, whatever events came between
CLAIMS_EVERY = 10.0  # s between looks for marks of other guardians, once the keeper is gone


class Watched:
    """One file that a job may hang by: what is written to it lets the job go."""

    def __init__(self, name: bytes, seconds: bytes, file: bytes, value: bytes) -> None:
        self.name, self.file, self.value = name, file, value
        self.deadline = float(seconds)
        # Kept open: should the job go and another come under its name, that one is not touched.
        self.fd = os.open(file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        self.began: float | None = None  # monotonic s; the time runs from then
        self.look = 0.0  # monotonic s; when to look again

    def due(self, now: float) -> bool:
        """Whether the job is to be let go now."""
        return self.began is not None and now >= self.began + self.deadline

    def why(self, now: float) -> bytes:
        """Why it is let go."""
        return b"it had been frozen for %.1f s and nobody acted" % (now - (self.began or now))

    def close(self) -> None:
        os.close(self.fd)


class Memory(Watched):
    """A memory cgroup of v1. Its time runs while it waits in OOM."""

    def __init__(self, name: bytes, seconds: bytes, file: bytes) -> None:
        super().__init__(name, seconds, file, b"0")
        self.first: float | None = None  # since then every look saw it wait
        self.outer = os.path.join(os.path.dirname(os.path.dirname(file)), b"memory.oom_control")
        self.event = -1
        try:
            self.event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            door = os.open(os.path.join(os.path.dirname(file), b"cgroup.event_control"), os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(door, b"%d %d" % (self.event, self.fd))
            finally:
                os.close(door)
        except OSError:
            self.close()
            raise

    def heard(self, now: float) -> None:
        """The kernel told of something. It may be old, or the cgroup's end: what counts is how things are now."""
        try:
            os.read(self.event, 8)
        except BlockingIOError:
            pass  # the first look of all: nothing told of it yet
        self.began = None
        self.wait(now)

    def wait(self, now: float) -> bool:
        """Whether its tasks wait now. Raises OSError once the cgroup is gone."""
        text = os.pread(self.fd, 256, 0)
        if b"oom_kill_disable 1" not in text or b"under_oom 1" not in text:
            self.began = self.first = None
            return False
        self.began = self.began or now
        self.first = self.first or now
        self.look = min(now + self.deadline / LOOKS, self.began + self.deadline)
        return True

    def due(self, now: float) -> bool:
        if not self.wait(now) or self.began is None or self.first is None:
            return False
        if now < self.began + self.deadline and now < self.first + self.deadline * ENDLESS:
            return False
        if self._outer_waits():
            self.began = self.first = now
            self.look = now + self.deadline / LOOKS
            return False
        return True

    def why(self, now: float) -> bytes:
        return b"it had waited in OOM for %.1f s and nobody acted" % (now - (self.first or now))

    def close(self) -> None:
        super().close()
        if self.event >= 0:
            os.close(self.event)

    def let_inner_go(self) -> None:
        """Let the kernel act in the cgroups that the job made by itself. What acctd made inside has a mark."""
        with os.scandir(os.path.dirname(self.file)) as entries:
            inner = [
                entry.path for entry in entries if entry.is_dir(follow_symlinks=False) and not _is_acctds(entry.path)
            ]
        for top in inner:
            for place, _, _ in os.walk(top):
                try:
                    fd = os.open(os.path.join(place, b"memory.oom_control"), os.O_WRONLY | os.O_CLOEXEC)
                    try:
                        os.write(fd, b"0")
                    finally:
                        os.close(fd)
                except OSError:
                    continue  # it has gone

    def _outer_waits(self) -> bool:
        try:
            fd = os.open(self.outer, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False  # the hierarchy ends there
        try:
            return b"under_oom 1" in os.read(fd, 256)
        finally:
            os.close(fd)


def _is_acctds(path: bytes) -> bool:
    try:
        return bool(os.getxattr(path, MADE))
    except OSError:
        return False


class Guardian:
    """All that one keeper has it watch."""

    def __init__(self, directory: bytes) -> None:
        self.directory = directory
        self.me = b"%d.%d" % (os.getpid(), time.monotonic_ns())
        self.keeper = True
        self.claimed = 0.0  # monotonic s; when we last looked for marks of others
        self.watched: dict[tuple[bytes, bytes], Watched] = {}  # by kind and name
        self.events: dict[int, Memory] = {}
        self.text = b""
        self.poll = select.epoll()
        self.poll.register(IN, select.EPOLLIN)
        self.ended, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.poll.register(self.ended, select.EPOLLIN)
        set_wakeup_fd(write)
        signal(SIGTERM, lambda *_: None)
        for number in (SIGHUP, SIGINT):
            signal(number, SIG_IGN)
        pthread_sigmask(SIG_SETMASK, ())  # acctd run blocks what it waits for, and that comes through exec

    def run(self) -> None:
        """Until nothing is left to do."""
        while self.keeper or self.watched:
            ready = [fd for fd, _ in self.poll.poll(self.timeout())]
            if IN in ready:
                self.listen()
            if self.ended in ready:
                self.end()
                return
            for fd in ready:
                if (memory := self.events.get(fd)) is not None:
                    self.guarded((b"watch", memory.name), memory.heard, time.monotonic())
            self.act()

    def timeout(self) -> float | None:
        """Seconds until there is something to look at; None for never."""
        now = time.monotonic()
        times = [each.look - now for each in self.watched.values() if each.began is not None]
        if not self.keeper:
            times.append(self.claimed + self.rounds() - now)
        return max(0.0, min(times)) if times else None

    def rounds(self) -> float:
        """Seconds between two rounds, once the keeper is gone."""
        return min([CLAIMS_EVERY, *(each.deadline for each in self.events.values())])

    # What the keeper says

    def listen(self) -> None:
        received = os.read(IN, 1 << 16)
        if not received:
            self.keeper = False
            self.poll.unregister(IN)
            return
        *lines, self.text = (self.text + received).split(b"\n")
        for line in lines:
            verb, name, *fields = line.split(b"\0")
            if verb in (b"forget", b"thawed"):
                self.drop((b"watch" if verb == b"forget" else b"freeze", name))
            else:
                self.take((verb, name), fields)

    def take(self, key: tuple[bytes, bytes], fields: list[bytes]) -> None:
        """Watch something, or watch it anew."""
        self.drop(key)
        now = time.monotonic()
        try:
            watched: Watched
            if key[0] == b"watch":
                watched = memory = Memory(key[1], *fields)
                self.events[memory.event] = memory
                self.poll.register(memory.event, select.EPOLLIN)
            else:
                watched = Watched(key[1], *fields)
                watched.began, watched.look = now, now + watched.deadline
        except OSError as e:
            self.tell(b"unguarded", key[1], time.time_ns(), os.fsencode(str(e)), b"")
            return
        self.watched[key] = watched
        try:
            os.setxattr(watched.fd, MARK, self.me)
        except OSError:
            pass  # no such attributes here
        if isinstance(watched, Memory):
            self.guarded(key, watched.heard, now)

    def drop(self, key: tuple[bytes, bytes]) -> None:
        """Watch it no more. Closing the event's descriptor is what takes it back from the kernel."""
        watched = self.watched.pop(key, None)
        if watched is None:
            return
        if isinstance(watched, Memory):
            del self.events[watched.event]
        watched.close()

    # What it does

    def act(self) -> None:
        """Let go what is due, and drop what is gone or another guardian's."""
        now = time.monotonic()
        if not self.keeper and now >= self.claimed + self.rounds():
            self.claimed = now
            for key, watched in list(self.watched.items()):
                self.guarded(key, self.go_round, key, watched)
        for key, watched in list(self.watched.items()):
            if watched.began is not None and now >= watched.look:
                self.guarded(key, self.look_at, key, watched, now)

    def look_at(self, key: tuple[bytes, bytes], watched: Watched, now: float) -> None:
        if watched.due(now) and self.claims(key, watched):
            self.let_go(key, watched, b"released" if key[0] == b"watch" else b"thawed", watched.why(now))

    def go_round(self, key: tuple[bytes, bytes], watched: Watched) -> None:
        if self.claims(key, watched) and isinstance(watched, Memory):
            watched.let_inner_go()

    def claims(self, key: tuple[bytes, bytes], watched: Watched) -> bool:
        """Whether it is still ours to act on; another guardian's is dropped. Raises OSError once it is gone."""
        os.pread(watched.fd, 1, 0)
        try:
            if os.getxattr(watched.fd, MARK) != self.me:
                self.drop(key)
                return False
        except OSError:
            pass  # no such attributes here
        return True

    def let_go(self, key: tuple[bytes, bytes], watched: Watched, what: bytes, why: bytes) -> None:
        os.write(watched.fd, watched.value)
        if isinstance(watched, Memory):
            watched.began = watched.first = None  # it is watched on: its keeper may have it wait again
        else:
            self.drop(key)
        now = time.time_ns()
        self.tell(what, watched.name, now, why, self.trace(what, why, watched, now))

    def end(self) -> None:
        """SIGTERM. A keeper starts another guardian; without one nobody would be left to let these go."""
        if self.keeper:
            return
        for key, watched in list(self.watched.items()):
            self.guarded(key, self.leave, key, watched)

    def leave(self, key: tuple[bytes, bytes], watched: Watched) -> None:
        if self.claims(key, watched):
            waits = watched.began is not None
            what = b"thawed" if key[0] == b"freeze" else b"released" if waits else b"unguarded"
            self.let_go(key, watched, what, b"its guardian was ended")

    def guarded(self, key, what, *arguments) -> None:  # type: ignore[no-untyped-def]  # anything that reads or writes
        """Do it; a file that is gone is watched no more."""
        try:
            what(*arguments)
        except OSError as e:
            self.drop(key)
            if e.errno not in (2, 19):  # ENOENT, ENODEV: its cgroup was removed
                self.tell(b"unguarded", key[1], time.time_ns(), os.fsencode(str(e)), b"")

    # What it says

    def trace(self, what: bytes, why: bytes, watched: Watched, now: int) -> bytes:
        """Leave a file that tells of it; its path, or nothing where that cannot be."""
        values = quoted(watched.name), quoted(what), now / 1e9, quoted(why), quoted(watched.file)
        text = b'{"name": %b, "what": %b, "time": %.3f, "text": %b, "file": %b}\n' % values
        path = os.path.join(self.directory, b"%b.%d" % (watched.name, now))
        # Named only once it is whole; a job's name begins with no dot.
        part = os.path.join(self.directory, b"." + self.me)
        try:
            fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, text)
            finally:
                os.close(fd)
            os.rename(part, path)
        except OSError:
            return b""  # the line to the keeper is all that tells of it
        return path

    def tell(self, what: bytes, name: bytes, now: int, text: bytes, trace: bytes) -> None:
        """Tell the keeper, if it lives and reads. What was done has its trace, told or not."""
        try:
            os.write(OUT, b"\0".join((what, name, b"%.3f" % (now / 1e9), text.replace(b"\n", b" "), trace)) + b"\n")
        except OSError:
            return  # nobody is there, or listens: whoever comes next reads the trace


def quoted(text: bytes) -> bytes:
    """As a JSON string. The module json would take 1.1 MB."""
    return b'"%b"' % b"".join(
        b"\\u%04x" % ord(char) if char in '"\\' or ord(char) < 32 or "\ud800" <= char <= "\udfff" else char.encode()
        for char in os.fsdecode(text)
    )


def main() -> None:
    """Entry point."""
    os.set_blocking(OUT, False)
    try:
        with open("/proc/self/oom_score_adj", "wb", buffering=0) as file:
            file.write(b"-900")
    except OSError:
        pass  # not permitted: then it is the keeper's own
    Guardian(os.fsencode(sys.argv[1])).run()


if __name__ == "__main__":
    main()
