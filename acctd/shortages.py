"""Jobs whose memory runs out: heard of as soon as the kernel says so, and dealt with as their policy asks.

For one keeper of jobs, the living agent or `acctd run`: both give its one descriptor to what they wait with, and call
hear(). What is put on record is inquest.py's; how a job is ended for good is its keeper's. A guardian beside it
(guard.py) sees that no job waits for ever for a keeper that is dead. Knows no socket and no event loop.
"""

import select
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Self

from acctd import inquest, oomprogram
from acctd.agent import Agent
from acctd.cgroup.memory import JobMemory
from acctd.ears import Ears
from acctd.errors import AcctdError
from acctd.guard import Guard, released
from acctd.job import Job
from acctd.kernel import memevents, procs
from acctd.kernel.memevents import Ear
from acctd.metrics import (
    MEMORY_FAILCNT,
    MEMORY_KERNEL,
    MEMORY_OOM_KILLS,
    MEMORY_PEAK,
    MEMORY_RESIDENT,
    MEMORY_SWAP_FAILCNT,
)
from acctd.policies import Shortage
from acctd.watched import Watched
from collectors.memory import MemoryReader

_MUTE = 0.1  # s for which a job is not listened to that is just ending, or at its limit with page cache alone
_TOGETHER = 1.0  # s; a killer that strikes again within is the same shortage
_FRESH = 60.0  # s; what the kernel killed since is put down to the last shortage, unless readings are rarer
_REARMED_BELOW = 5  # percent below a threshold at which it may be told again
_BUDGET = 0.004  # s to look at processes while the job stands still
_LONG = 0.05  # s, where it stands still anyway until somebody has decided
_REASON = 500  # characters of what the site's program says to the owner
_LIMIT_HITS = (MEMORY_FAILCNT, MEMORY_SWAP_FAILCNT)
_NEAR = 1 << 18  # bytes; what the kernel charges ahead
_KILLED_BY_KERNEL = "killed by the kernel"

Tell = Callable[[Job, str, str], None]
Trouble = Callable[[Job | None, BaseException | str], None]


class Shortages:
    """The jobs of one keeper. Close it when the keeper goes: the jobs and their policies stay."""

    def __init__(self, agent: Agent, *, tell: Tell, trouble: Trouble, end: Callable[[Job], None]) -> None:
        """`tell` and `trouble` as in news.py. `end` sees to it that all of a job goes which has had SIGKILL."""
        self._agent, self._tell, self._trouble, self._see_end = agent, tell, trouble, end
        self._ears = Ears()
        self._watched: dict[int, Watched] = {}  # by the job's seq
        self.pushed: set[int] = set()
        """Jobs whose limit is a low one for a moment, by seq: see alarms.py."""
        self._examined: set[int] = set()  # jobs that are being read for evidence, by seq
        self.guard = Guard(agent.config.runtime_dir, lambda e: trouble(None, e))
        self._ears.add(self.guard.fileno(), select.EPOLLIN, self._guardian_speaks)
        agent.after_reading = self.check

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Readable when hear() has something to do."""
        return self._ears.fileno()

    def due(self) -> float | None:
        """When hear() is to be called though nothing was heard: time.monotonic(), or None."""
        return self._ears.due()

    def listen(self, job: Job) -> None:
        """From now on, also after its limits have changed, or once it was taken over. Raises AcctdError.

        What befell it before that is found out by the next reading.
        """
        known = job.row.seq in self._watched
        self._let_be(job)
        directory, inside = job.cgroups.directory("memory"), job.cgroups.inside("memory")
        if directory is None or inside is None:
            return
        memory = JobMemory(directory, inside)
        watched = Watched(job, memory, memory.troubles())
        if known:
            watched.changed = time.monotonic()
        self._watched[job.row.seq] = watched
        if self._was_released(job) or (job.shortages and time.time() - job.shortages[-1].time < _FRESH):
            watched.last = time.monotonic()  # what the kernel kills now, it may kill for that
        watched.take_over()
        self._arm(watched)
        if watched.limit is None:
            return
        watched.out = memevents.out_of_memory(directory)
        if watched.out is not None:
            self._ears.add(watched.out.fileno(), watched.out.events, lambda: self._ran_out(watched))
        self._hear_thresholds(watched)
        if memory.troubles().waiting:
            self._act(watched)

    def forget(self, job: Job) -> None:
        """It is being finished. What can still be heard of it was heard by its last reading."""
        watched = self._watched.get(job.row.seq)
        self._let_be(job)
        if watched is not None and job.spec.oom.action != "kernel":
            self.guard.forget(job.spec.id)
            self.guard.thawed(job.spec.id)

    def leave_frozen(self, job: Job) -> None:
        """Somebody suspends it: what we have stopped stays so, whatever comes of that."""
        watched = self._watched.get(job.row.seq)
        if watched is not None and watched.frozen:
            watched.leave(self.guard)

    def hear(self) -> None:
        """Deal with what the kernel, the guardian and programs have said. Never waits and never raises for one job."""
        self._ears.hear()

    def check(self, job: Job) -> None:
        """After each reading of a job: what no ear tells, and thresholds where the kernel has none."""
        if job.row.seq in self._examined:
            return
        try:
            if (watched := self._watched.get(job.row.seq)) is not None:
                self._look(watched)
            else:
                self._look_back(job)
        except (AcctdError, OSError) as e:
            self._trouble(job, e)

    def close(self) -> None:
        """Hear no more. Jobs that wait are the guardian's from now on, until somebody listens again."""
        for watched in list(self._watched.values()):
            self._answered(watched)  # the next keeper finds it at its limit, and asks anew
            self._let_be(watched.job)
        self.guard.close()
        self._ears.close()

    # Hearing

    def _hear_thresholds(self, watched: Watched) -> None:
        """Be told when the usage crosses one, of the limit as it is now: for a keeper that has somebody to tell.

        Readings find it out, too.
        """

    def _let_be(self, job: Job) -> None:
        watched = self._watched.pop(job.row.seq, None)
        if watched is None:
            return
        for ear in watched.ears():
            self._ears.drop(ear.fileno())
            ear.close()
        self._drop_question(watched)
        watched.thaw(self.guard)

    def _hear_its_end(self, watched: Watched) -> None:
        """Look now and then whether it has gone that was ended, and hear nothing of it meanwhile."""
        if watched.out is not None:
            self._ears.mute(watched.out.fileno(), _MUTE, lambda: self._see_whether_over(watched))

    def _ran_out(self, watched: Watched) -> None:
        try:
            if watched.out is not None and watched.out.clear() and watched.memory.directory.exists():
                self._hear_v1(watched) if watched.memory.v1 else self._hear_v2(watched)
        except (AcctdError, OSError) as e:
            self._trouble(watched.job, e)

    def _hear_v1(self, watched: Watched) -> None:
        # All jobs below the limit that was reached hear of it; that of the highest is the one.
        waiting = watched.memory.troubles().waiting
        for place in inquest.above(self._agent.held, watched.job):
            above = self._watched.get(place.row.seq)
            if above is not None and above.out is not None:
                self._ran_out(above)
                if not waiting and time.monotonic() - above.last < _TOGETHER:
                    return
        self._act(watched)

    def _hear_v2(self, watched: Watched) -> None:
        before, watched.seen = watched.seen, (now := watched.memory.troubles())
        armed = watched.limit if watched.job.spec.oom.action != "kernel" else None
        if now.ooms > before.ooms:
            self._killed_by_kernel(watched)
        elif armed is not None and now.high > before.high and watched.memory.is_exhausted(armed):
            self._act(watched)
        else:
            self._said_too_much(watched, watched.out)

    def _said_too_much(self, watched: Watched, ear: Ear | None) -> None:
        """There was nothing to do. A job that lives at its limit with page cache says this without end."""
        now = time.monotonic()
        if ear is not None and now - watched.idle < _MUTE:
            self._ears.mute(ear.fileno(), _MUTE)
        watched.idle = now

    def _warn(self, watched: Watched, held: int) -> None:
        """Tell of the highest threshold that is crossed, once, until the job is well below it again."""
        if watched.limit is None:
            return
        percent = 100 * held // watched.limit
        crossed = max((each for each in watched.job.spec.oom.thresholds if each <= percent), default=0)
        if crossed > watched.warned:
            watched.warned = crossed
            self._tell(
                watched.job, "memory", f"{percent} % of its {watched.limit} bytes in use, page cache not counted"
            )
        elif watched.warned and percent < watched.warned - _REARMED_BELOW:
            watched.warned = crossed

    def _look(self, watched: Watched) -> None:
        job = watched.job
        last = job.meter.last((MEMORY_RESIDENT, MEMORY_KERNEL, MEMORY_OOM_KILLS))
        kills = last.pop((MEMORY_OOM_KILLS, ""), 0)
        if not watched.ending:  # memory.stat lags behind, and would tell of what is gone
            self._warn(watched, sum(last.values()))
        if watched.asking is not None and not job.cgroups.living():
            self._drop_question(watched)
        if kills > job.kills_told:
            if watched.out is not None:
                # The starter may be quicker than we are: what was said is heard before the account is closed.
                self._ran_out(watched)
            self._count_kills(watched)
        if watched.memory.v1 and job.spec.oom.action != "kernel":
            watched.memory.let_inner_go()
            if watched.memory.troubles().waiting:
                self._act(watched)  # an event that was heard while another shortage was dealt with
        self._see_whether_over(watched)

    def _see_whether_over(self, watched: Watched) -> None:
        """Whether what was done about a shortage has had its effect: then the next one is another one."""
        if watched.limit is None or not (watched.ending or watched.loose):
            return
        over = watched.memory.is_well_below(watched.limit)
        if watched.ending:
            # What lies in a tmpfs stays when nobody is left.
            watched.ending = not over and bool(watched.job.cgroups.members())
            if watched.ending:
                self._hear_its_end(watched)
        if watched.loose and over:
            self._arm(watched)
            watched.loose = False

    def _look_back(self, job: Job) -> None:
        """What befell a job while no agent lived, as far as its counters tell: whether it ever was at its own limit."""
        was_released = self._was_released(job)
        directory, inside = job.cgroups.directory("memory"), job.cgroups.inside("memory")
        if directory is None or inside is None:
            return
        # Not what was metered: that has the victims of families in it on v2.
        new = JobMemory(directory, inside).troubles().kills - job.kills_told
        if new > 0:
            job.kills_told += new
            if was_released:
                job.shortages[-1] = inquest.with_kills(job, job.shortages[-1], new)
                return
            limit, peak = job.spec.limits.hard, job.meter.last((MEMORY_PEAK,)).get((MEMORY_PEAK, ""), 0)
            # v1 counts no hit of a limit of memory and swap together where the kernel kills at once (seen on 6.18).
            own = limit is not None and (any(job.meter.last(_LIMIT_HITS).values()) or peak >= limit - _NEAR)
            self._keep(job, self._examine(job, _KILLED_BY_KERNEL, host=not own, kills=new))

    def _count_kills(self, watched: Watched) -> None:
        """Put new victims of the kernel down to the limit they fell to: the job's, that of one above, or the node's."""
        job = watched.job
        new = watched.memory.troubles().kills - job.kills_told
        if new <= 0:
            return
        job.kills_told += new
        if (index := watched.recent(self._fresh)) is not None:
            last = job.shortages[index]
            job.shortages[index] = inquest.with_kills(job, last, last.kills + new)
            job.unstored = True
            return
        for place in inquest.above(self._agent.held, job):
            above = self._watched.get(place.row.seq)
            if above is not None and (index := above.recent(self._fresh)) is not None:
                self._keep(job, inquest.told_to(job, place.shortages[index], "parent", new))
                return
        self._keep(job, self._examine(job, _KILLED_BY_KERNEL, host=True, kills=new))

    @property
    def _fresh(self) -> float:
        return max(_FRESH, 2 * self._agent.config.poll_interval)

    # Acting

    def _act(self, watched: Watched) -> None:
        """The limit of this very job was reached, and nothing can be reclaimed."""
        action = watched.job.spec.oom.action
        if watched.job.row.seq in self.pushed:
            return  # that limit is not its own, and nobody is killed for it
        if action == "kernel" or watched.loose:
            self._killed_by_kernel(watched)
        elif watched.memory.v1 and (not watched.memory.troubles().waiting or watched.is_waking()):
            return  # the limit was raised, or somebody ended meanwhile
        elif watched.ending or watched.asking is not None:
            return
        elif action == "exec":
            self._ask(watched)
        elif action != "grow" or not self._grow(watched, None):
            self._end(watched, "killed" if action == "kill" else "held")

    def _killed_by_kernel(self, watched: Watched) -> None:
        job, now = watched.job, time.monotonic()
        again = now - watched.last < _TOGETHER and watched.recent(self._fresh) is not None
        watched.last = now
        if not again:
            self._keep(job, self._examine(job, _KILLED_BY_KERNEL))
        self._count_kills(watched)

    def _end(self, watched: Watched, action: str) -> None:
        """Stop the job, look at it, end it."""
        job = watched.job
        watched.ending, watched.last = True, time.monotonic()
        self._freeze(watched)
        shortage = self._examine(job, action)
        job.cgroups.kill(timeout=0.0)
        watched.thaw(self.guard)  # on v2 what enters it later would be frozen, too
        self._hear_its_end(watched)
        self._keep(job, shortage)
        self._see_end(job)

    def _grow(self, watched: Watched, wanted: int | None) -> bool:
        """Raise the limit a step, or to what is wanted; False where that would go too far."""
        job, limit, policy = watched.job, watched.limit, watched.job.spec.oom
        if limit is None:
            return False
        new = wanted if wanted is not None else limit + limit * policy.step // 100
        # v2: it may be over its limit by more than a step.
        used = watched.memory.usage()
        while wanted is None and new < used + limit // 64 and (policy.ceiling is None or new < policy.ceiling):
            new += limit * policy.step // 100
        new = min(new, policy.ceiling) if policy.ceiling is not None else new
        room = procs.meminfo().get("MemAvailable", 0) - self._agent.config.oom.reserve
        if new <= limit or new < used or new - limit > room:
            return False
        shortage = self._examine(job, "grown", said={"raised_to": new})
        try:
            self._agent.set_limits(job, replace(job.spec.limits, memory=new), reclaim=False)
            self._arm(watched)
            self._hear_thresholds(watched)
        except AcctdError as e:
            self._trouble(job, e)
            return False
        watched.last = watched.changed = time.monotonic()
        self._keep(job, shortage)
        return True

    def _freeze(self, watched: Watched) -> None:
        try:
            watched.freeze(self.guard)
        except (AcctdError, OSError) as e:
            self._trouble(watched.job, e)  # what is to be done about the shortage is done all the same

    def _arm(self, watched: Watched) -> None:
        """Make the kernel wait for us, if the policy needs that; never without a guardian."""
        job, limit = watched.job, watched.limit
        if limit is None or job.spec.oom.action == "kernel":
            # v1: a family inherits from its parent that tasks wait. v2: there may have been a limit before.
            if watched.memory.v1 or job.spec.oom.action != "kernel":
                watched.memory.disarm()
            return
        if watched.memory.v1:
            self.guard.watch(job.spec.id, watched.memory.directory.path, job.spec.oom.deadline)
        watched.memory.arm(limit)

    def _let_loose(self, watched: Watched) -> None:
        """Let the kernel's killer decide, until the job is well below its limit again."""
        watched.memory.disarm()
        watched.loose, watched.last = True, time.monotonic()

    # The site's program

    def _ask(self, watched: Watched) -> None:
        job, program = watched.job, self._agent.config.oom.program
        watched.last = time.monotonic()
        self._freeze(watched)
        shortage = self._examine(job, "held", budget=_LONG)
        try:
            if program is None:
                raise AcctdError("oom.program is not in the configuration any more")
            asking = oomprogram.ask(program, inquest.facts(job, shortage), watched.patience)
        except AcctdError as e:
            self._trouble(job, e)
            self._end(watched, "held")
            return
        watched.asking, watched.asked = asking, shortage
        self._ears.add(asking.fileno(), select.EPOLLIN, lambda: self._follow(watched, shortage))
        self._tell(job, "memory", f"nothing is left below its limit, and {program} is asked what to do")

    def _answered(self, watched: Watched) -> None:
        if watched.asking is not None:
            self._ears.drop(watched.asking.fileno())
            watched.asking.close()
            watched.asking = None

    def _drop_question(self, watched: Watched) -> None:
        """Nobody has to decide any more: the job has ended, or has another limit. What was seen of it stays."""
        if watched.asking is not None and watched.asked is not None:
            self._answered(watched)
            self._keep(watched.job, inquest.with_kills(watched.job, replace(watched.asked, action="undecided"), 0))

    def _follow(self, watched: Watched, shortage: Shortage) -> None:
        """Do as the program says; where it says nothing in time the kernel decides, where it makes no sense hold."""
        job, asking = watched.job, watched.asking
        if asking is None or not asking.has_ended():
            return
        if not job.cgroups.living():
            self._drop_question(watched)
            return
        try:
            try:
                answer = asking.answer()
            except AcctdError as e:
                self._trouble(job, e)
                answer = oomprogram.Answer("hold")
            finally:
                self._answered(watched)
            if answer is None:
                self._release(watched)
                return
            if reason := " ".join(answer.reason.split())[:_REASON]:
                job.note(f"the site says: {reason}")
                self._tell(job, "memory", f"the site says: {reason}")
            if answer.action == "kernel":
                self._keep(job, inquest.with_kills(job, replace(shortage, action=_KILLED_BY_KERNEL), 0))
                self._let_loose(watched)
                watched.thaw(self.guard)
            elif answer.action == "grow" and self._grow(watched, answer.memory):
                watched.thaw(self.guard)
            else:
                self._end(watched, "killed" if answer.action == "kill" else "held")
        except (AcctdError, OSError) as e:
            self._trouble(job, e)

    def _release(self, watched: Watched) -> None:
        """Nobody has decided in time."""
        job = watched.job
        self._keep(job, self._examine(job, "released", said={"waited": job.spec.oom.deadline}))
        self._let_loose(watched)
        watched.thaw(self.guard)

    def _guardian_speaks(self) -> None:
        """The guardian has let a job go that waited for us for too long, or could not watch one."""
        try:
            self._hear_guardian()
        except (AcctdError, OSError) as e:
            self._trouble(None, e)

    def _hear_guardian(self) -> None:
        for deed in self.guard.news():
            watched = next((w for w in self._watched.values() if w.job.spec.id == deed.name), None)
            if watched is not None:
                watched.last = time.monotonic()
                if deed.what == "released" and not watched.ending:
                    self._keep(watched.job, inquest.released(watched.job, deed))
                    self._answered(watched)  # too late
                    watched.thaw(self.guard)
                    watched.loose = True
                elif deed.what == "unguarded":
                    watched.memory.disarm()
                    self._trouble(watched.job, f"no guardian can watch it ({deed.text}); the kernel decides")
            deed.remove()

    def _was_released(self, job: Job) -> bool:
        """Whether a guardian let this job go after its keeper had died; that is put on record."""
        found = False
        for deed in released(self._agent.config.runtime_dir):
            if deed.name == job.spec.id and deed.time >= job.row.created:
                if deed.what == "released":
                    self._keep(job, inquest.released(job, deed))
                    found = True
                deed.remove()
        return found

    def _examine(
        self,
        job: Job,
        action: str,
        *,
        host: bool = False,
        kills: int = 0,
        budget: float = _BUDGET,
        said: Mapping[str, float] | None = None,
    ) -> Shortage:
        """Evidence as in inquest.py; and the account as of this moment, whose peaks a later reading would not show."""
        self._examined.add(job.row.seq)
        try:
            self._agent.take(job, MemoryReader)
        finally:
            self._examined.discard(job.row.seq)
        return inquest.examine(job, action=action, host=host, kills=kills, budget=budget, said=said)

    # Telling

    def _keep(self, job: Job, shortage: Shortage) -> None:
        """Put it into the record of the job, and of those that it is part of or that were part of it, and tell."""
        job.ran_out(shortage)
        told = [job]
        if shortage.level == "job":
            told += inquest.tell_around(self._agent.held, job, shortage)
        try:
            self._agent.store(told)  # whoever dies now has it on record
        except AcctdError as e:
            self._trouble(job, e)  # kept in memory, and stored with the next reading
        self._tell(job, "out-of-memory", shortage.text)
