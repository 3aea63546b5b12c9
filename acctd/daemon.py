"""The living agent: holds every job of the node, reads all of them each interval, and acts on one when asked.

One event loop and no thread but the kernel's own waits: a step of work is some milliseconds, a tick is cut into slices,
and whoever asks in between is answered in between. Knows nothing of sockets and frames; server.py does. Who may do what
is decided in methods.py.
"""

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from acctd import family, tracking
from acctd.agent import Agent
from acctd.alarms import Alarms
from acctd.books import Books
from acctd.cgroup.change import change
from acctd.chirps import Chirps
from acctd.config import Config
from acctd.cost import Cost
from acctd.errands import Errands
from acctd.errors import AcctdError, InUseError, NotFoundError, UsageError
from acctd.guard import released
from acctd.job import Ending, Job, boottime, lingering
from acctd.kernel import procs
from acctd.model import JobSpec, Limits, Record
from acctd.news import News
from acctd.outlet import Outlet
from acctd.recovery import recover, unaccounted
from acctd.relays import Relays
from acctd.rows import Rule, Terms
from acctd.vigil import Vigil
from acctd.warden import Warden
from acctd.whereabouts import Whereabouts
from collectors.nfs import NfsReader

_ROUNDS = 50  # of following processes that fork while they are registered
_SLICE = 20
"""Jobs read before the loop may do something else: about 2 ms of work."""


class Daemon:
    """The jobs of this node, from the agent's start to its end."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.books = Books(agent)
        self.cost = Cost()
        self.news = News(self.books, self.cost)
        self.jobs: dict[str, Job] = {}
        self._busy: set[str] = set()  # being finished
        self._vigil = Vigil()
        self.where = Whereabouts(self.jobs)
        self._warden = Warden(agent, self.books, self.news, self.jobs)
        self._errands = Errands(self.news.trouble)
        self._relays = Relays(agent)
        self.chirps = Chirps(agent, self.jobs, self.news, self._errands, self._set_terms)
        self._ticking = False
        self._outlet = Outlet(agent, self.news, self._errands)
        self.shortages = Alarms(
            agent,
            tell=self.news.tell,
            trouble=self.news.trouble,
            end=lambda job: self._errands.begin(self._see_end(job)),
        )

    # Beginning and end

    def start(self) -> None:
        """Take over what an earlier agent left: living jobs are held again, ended ones get their records.

        Call it inside the running event loop.
        """
        for path, said in unaccounted(self.agent):
            self.news.tell(None, "unaccounted", f"started without an agent: {said}")
            path.unlink()
        self.shortages.start()
        self._take_over()
        for deed in released(self.agent.config.runtime_dir):
            self.news.tell(None, "released", f"job {deed.name}, which has ended, had waited for an agent")
            deed.remove()
        self._warden.guard(self.jobs.values())
        self._warden.mend(self.jobs.values())
        self.books.store(self.jobs.values())

    def _take_over(self) -> None:
        """Hold the living jobs that nobody holds, and finish the ended ones."""
        before = set(self.jobs)
        for record in recover(self.agent, adopt=self._adopt):
            self.news.tell(record, "finished", "; ".join(("recovered", record.state, *record.notes)))
            self._outlet.finished(record)
        self._report()
        for job in [job for name, job in self.jobs.items() if name not in before]:
            self._keep_watch(job)
            self._relays.open(job)
            with self._telling(job):
                self.shortages.take_over(job)
            # Before anything is mended: the kernel went on counting.
            with self._telling(job):
                self.agent.read_one(job)

    def stop(self) -> None:
        """Store all totals and let go; the jobs go on without us."""
        self._vigil.close()
        self._warden.close()
        self._errands.close()
        self._relays.close_all()
        for job in self.jobs.values():
            with self._telling(job):
                self.agent.read_one(job)
        self.shortages.close()
        self.books.store(self.jobs.values())
        while self.jobs:
            self.jobs.popitem()[1].close()
        self._outlet.close()

    def reconfigure(self, config: Config) -> None:
        """Another configuration for the jobs to come; those there are keep what they were made with."""
        self.agent.reconfigure(config)
        self._outlet.reconfigure()
        self._warden.close()
        self._warden.guard(self.jobs.values())
        self._warden.mend(self.jobs.values())

    def _report(self) -> None:
        for sentence in self.agent.trouble:
            self.news.trouble(None, sentence)
        self.agent.trouble.clear()
        for job in self.agent.cleared:
            self.news.tell(job, "removed", "what could not be removed when it was finished has gone at last")
        self.agent.cleared.clear()

    def _adopt(self, job: Job) -> None:
        self.jobs[job.spec.id] = job
        self.news.tell(job, "adopted", "held again after a restart; the kernel went on counting")

    # Jobs

    def create(self, spec: JobSpec, terms: Terms | None = None) -> Job:
        """Make a job; with spec.parent, a family inside that job. Raises as Agent.create does, and NotFoundError."""
        parent = self.find(spec.parent) if spec.parent is not None else None
        if spec.id in self.jobs or spec.id in self.books.unsigned:
            raise InUseError(f"job id {spec.id!r} is in use by a living job; choose another")
        if parent is not None and parent.spec.id in self._busy:
            raise UsageError(f"parent {parent.spec.id!r} is being finished; it takes no family any more")
        job = self.agent.create(spec, parent, terms)
        try:
            self.shortages.listen(job)
            self.agent.ledger.made(job.row.seq)
        except BaseException:
            self.shortages.forget(job)
            self.agent.abandon(job)
            raise
        job.row = replace(job.row, phase="made")
        job.leave_namespace()
        self.jobs[spec.id] = job
        self._keep_watch(job)
        self._warden.guard([job])
        self._relays.open(job)
        inside = f" inside {spec.parent}" if spec.parent is not None else ""
        self.news.tell(job, "created", f"for {spec.owner.name}{inside}, network {spec.network}")
        return job

    def register(self, spec: JobSpec, pid: int, terms: Terms, uid: int | None) -> Job:
        """Take a running process and its descendants as a new family: both made and entered, or neither.

        Of the descendants only those that are in the same job as the process itself, and a user's if one is named.
        """
        place = self.where.job_of(pid)
        job = self.create(spec, terms)
        try:
            self.attach(job, pid)
            # Whoever is forked meanwhile by one that is not yet inside is found in the next round.
            inside = job.cgroups.living()
            for _ in range(_ROUNDS):
                new = {other for other in procs.descendants(pid) if other not in inside}
                if not new:
                    break
                theirs = {other for other in new if uid is None or procs.owner(other) == uid}
                self._take_in(job, {other for other in theirs if self.where.job_of(other) is place})
                inside |= new
        except BaseException:
            self._let_out(job)
            raise
        return job

    def _let_out(self, job: Job) -> None:
        """Undo a registration: its processes go where they may, and nothing of the family is left."""
        parent = self.agent.held.get(job.row.parent) if job.row.parent is not None else None
        if parent is not None:
            self.agent.fold(job, parent)
        if not job.cgroups.living():
            self._forget(job)
            self.agent.abandon(job)

    def find(self, name: str) -> Job:
        """A job that is open. Raises NotFoundError."""
        job = self.jobs.get(name)
        if job is None:
            raise NotFoundError(f"no open job {name!r}; acctd-hook list names those there are")
        return job

    def attach(self, job: Job, pid: int) -> None:
        """Put a process into the job; the job runs from the first one on. Raises NotFoundError, KernelRefusedError."""
        if job.spec.id in self._busy:
            raise UsageError(f"job {job.spec.id!r} is being finished; it takes no process any more")
        first = job.row.phase == "made"
        member = procs.identity(pid)
        if not procs.is_alive(member):
            raise NotFoundError(f"pid {pid} does not exist any more; attach a living process")
        terms = job.row.terms
        if first or terms.ended_ns is not None:
            job.row = replace(job.row, terms=replace(terms, member=member, ended_ns=None))
        if first:
            # Written before: whoever dies after it leaves a job that may have run, and is billed.
            self.books.write(lambda: self.agent.begin(job))
        elif job.row.terms is not terms:
            self._set_terms(job, job.row.terms)
        try:
            job.cgroups.attach(pid)
        except AcctdError:
            if first and not job.cgroups.living():
                # Nobody is in it after all.
                job.row = replace(job.row, phase="made", terms=terms)
                self.books.write(lambda: self.agent.ledger.made(job.row.seq))
            raise
        self._watch_member(job)
        for outer in (each for each in family.above(self.agent.held, job) if each.row.terms.ended_ns is not None):
            self._set_terms(outer, replace(outer.row.terms, member=member, ended_ns=None))  # it goes on with this one
            self._watch_member(outer)
        if first:
            self.agent.take(job, NfsReader)
            self.news.tell(job, "began", f"pid {pid}")

    async def set_limits(self, job: Job, limits: Limits, *, reclaim: bool) -> None:
        """Change what a job may use. Raises as Agent.set_limits does; nothing has changed then."""
        try:
            while job.row.seq in self.shortages.pushed:
                await asyncio.sleep(0.005)  # its limit is another one for a moment
            if reclaim:
                # Beside the loop: swapping takes its time.
                await asyncio.to_thread(change, job.cgroups, job.spec.limits, limits, reclaim=True)
            if not self._is_idle(job):
                raise UsageError(f"job {job.spec.id!r} is being finished; its limits are not changed any more")
            self.agent.set_limits(job, limits, reclaim=False)
        finally:
            if self.jobs.get(job.spec.id) is job:
                self.shortages.listen(job)  # its policy has files of its own beside the limit's
        self.news.tell(job, "limits", f"changed: {limits.told()}")

    def track(self, job: Job, rule: Rule) -> set[int]:
        """Take the processes that a rule names, now and at every tick; those found now."""
        tracking.check(rule)
        terms = replace(job.row.terms, rules=(*(r for r in job.row.terms.rules if r != rule), rule))
        self.agent.ledger.set_terms(job.row.seq, terms)
        job.row = replace(job.row, terms=terms)
        return self._take_tracked(job, tracking.Survey())

    def _take_tracked(self, job: Job, survey: tracking.Survey) -> set[int]:
        new = self.where.to_take(job, survey)
        self._take_in(job, new)
        return new

    def _take_in(self, job: Job, pids: Iterable[int]) -> None:
        for pid in pids:
            try:
                self.attach(job, pid)
            except NotFoundError:
                continue  # it ended by itself

    def network_of(self, job: Job) -> Job | None:
        """The job whose network a job's processes are in: itself, or the nearest above that has one of its own."""
        around = (job, *family.above(self.agent.held, job))
        return next((place for place in around if place.spec.network != "parent"), None)

    def move_pipe(self, job: Job, pid: int, uid: int) -> None:
        """Lead the job's pipe into a process's network namespace. Raises UsageError where it is too late for that."""
        if job.spec.network not in ("nat", "none"):
            raise UsageError(f"job {job.spec.id!r} has no network of its own ({job.spec.network}) that could be moved")
        if job.row.phase != "made" or job.row.terms.moved:
            raise UsageError(f"job {job.spec.id!r} runs already; its pipe can be moved once, before that")
        self.agent.move_pipe(job, pid, uid)
        self._relays.open(job)
        self._set_terms(job, replace(job.row.terms, moved=True))

    def read(self, job: Job) -> None:
        """Read a job now, with the families inside it, whose networks are part of its account."""
        for each in (*family.below(self.jobs, job), job):
            self.agent.read_one(each)

    async def kill(self, job: Job, timeout: float = 10.0) -> set[int]:
        """End every process of a job without holding up another; the pids that would not die within `timeout` s."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        for left, pause in job.cgroups.killing():
            if loop.time() > deadline:
                return left
            await asyncio.sleep(pause)
        return set()

    async def finish(self, job: Job, ending: Ending) -> Record:
        """End, read for the last time, sign off, dismantle; families inside it first.

        Asked twice at a time, the second waits for the first.
        """
        name = job.spec.id
        while name in self._busy:
            await asyncio.sleep(0.01)
        if self.jobs.get(name) is not job:
            return self._record_of(job)
        self._busy.add(name)
        try:
            self.agent.take(job, NfsReader)
            await self.kill(job)
            for inner in family.below(self.jobs, job):
                await self.finish(inner, Ending(at=inner.row.terms.ended_ns))
            record = self._close(job, ending)
            self.chirps.finish(job, record)
        finally:
            self._busy.discard(name)
        return record

    async def unregister(self, job: Job) -> Record:
        """End a family and not its processes, which go on in its parent. UsageError where nothing could take them."""
        parent = self.agent.held.get(job.row.parent) if job.row.parent is not None else None
        if parent is None and (living := job.cgroups.living()):
            raise UsageError(
                f"job {job.spec.id!r} is in no other job that could take its {len(living)} processes; use finish"
            )
        for inner in family.below(self.jobs, job):
            await self.unregister(inner)
        if parent is not None:
            self.shortages.forget(job)
            self.agent.fold(job, parent)
        return await self.finish(job, Ending(at=boottime()))

    def _close(self, job: Job, ending: Ending) -> Record:
        ending = replace(ending, at=job.row.terms.ended_ns or ending.at)
        record = self.agent.last_reading(job, ending, patience=0.0)  # kill() has had it, without blocking others
        self.books.unsigned[job.spec.id] = job, record
        self._forget(job)
        self._outlet.finished(record)
        if self.books.sign_off(job, record):
            self.news.tell(record, "finished", f"{record.state}, wall {record.wall_ns / 1e9:.3f} s")
        else:
            self.news.tell(record, "waiting", "finished, but its record cannot be written yet")
        self._report()
        return record

    def _forget(self, job: Job) -> None:
        self.jobs.pop(job.spec.id, None)
        self._vigil.forget(job.spec.id)
        self._relays.close(job.spec.id)
        self.shortages.forget(job)
        self._errands.drop(job)

    def _record_of(self, job: Job) -> Record:
        """What somebody else has finished meanwhile; its id may have been given again, or it was undone."""
        record = self.record(job.spec.id)
        if record.started != job.row.created:
            raise NotFoundError(f"job {job.spec.id!r} was given up meanwhile, and has no record")
        return record

    def record(self, name: str) -> Record:
        """The newest record of an id, also one that waits to be written. Raises NotFoundError."""
        if name in self.books.unsigned:
            return self.books.unsigned[name][1]
        return self.books.read(lambda: self.agent.ledger.record(name))

    # Who is watched

    def _keep_watch(self, job: Job) -> None:
        """Hear of the end of its processes and of its watcher, and read it as often as its starter asked for."""
        terms = job.row.terms
        self._watch_member(job)
        self.chirps.open(job)
        if terms.watcher is not None:
            self._vigil.watch(job.spec.id, terms.watcher, lambda: self._errands.begin(self._watcher_ended(job)))
        if terms.interval is not None:
            self._errands.begin(self._read_often(job, terms.interval), job)

    def _watch_member(self, job: Job) -> None:
        """Wait for one of its processes; when that ends, for another one, until there is none."""
        terms = job.row.terms
        if terms.member is None or terms.ended_ns is not None:
            return
        with self._telling(job):  # descriptors may be short: then it is not known when it ends, until somebody says so
            self._vigil.watch(job.spec.id, terms.member, lambda: self._member_ended(job))

    def _member_ended(self, job: Job) -> None:
        if self.jobs.get(job.spec.id) is not job:
            return
        if living := family.living(self.jobs, job):
            job.row = replace(job.row, terms=replace(job.row.terms, member=procs.identity(min(living))))
            self._watch_member(job)
        else:
            self._set_terms(job, replace(job.row.terms, ended_ns=boottime()))
            self.news.tell(job, "ended", "its last process has ended")

    def _set_terms(self, job: Job, terms: Terms) -> None:
        job.row = replace(job.row, terms=terms)
        self.books.write(lambda: self.agent.ledger.set_terms(job.row.seq, terms))

    async def _watcher_ended(self, job: Job) -> None:
        """Nobody will finish it: its processes go to its parent, or it is finished once it has none, see each tick."""
        if self.jobs.get(job.spec.id) is job:
            self.news.tell(job, "abandoned", "its watcher has ended")
            await self._give_up(job)

    async def _give_up(self, job: Job) -> None:
        if job.row.phase == "made" and not job.cgroups.living():
            self._forget(job)
            self.agent.abandon(job)
        elif job.row.parent is not None:
            await self.unregister(job)
        elif not job.cgroups.living():
            await self.finish(job, Ending(at=job.row.terms.ended_ns))

    async def _read_often(self, job: Job, interval: float) -> None:
        while self.jobs.get(job.spec.id) is job:
            await asyncio.sleep(interval)
            if self.jobs.get(job.spec.id) is job and job.spec.id not in self._busy:
                with self._telling(job):
                    self.agent.read_one(job)

    async def _see_end(self, job: Job) -> None:
        """A job was ended for want of memory: all of it, whatever it takes."""
        if survivors := await self.kill(job):
            self.news.trouble(job, f"SIGKILL does not end all of it: {lingering(survivors)}")

    # Ticks

    async def tick(self) -> float:
        """Read all jobs once; the s it took. A second one meanwhile is counted as missed and does nothing."""
        if self._ticking:
            self.cost.missed_ticks += 1
            return 0.0
        self._ticking = True
        try:
            with self.cost.measured():
                await self._read_all()
                await self._housekeeping()
                await self._outlet.end_tick(self.jobs, self.cost)
        finally:
            self._ticking = False
        return self.cost.last_tick

    async def snapshot(self) -> float:
        """A tick now, once the one under way has ended; the s it took."""
        while self._ticking:
            await asyncio.sleep(0.005)
        return await self.tick()

    async def _read_all(self) -> None:
        jobs = self._idle()
        await self._warden.read(jobs)
        self._outlet.begin_tick(self.jobs)
        for start in range(0, len(jobs), _SLICE):
            part = [job for job in jobs[start : start + _SLICE] if self._is_idle(job)]
            for job in part:
                with self._telling(job):
                    self.agent.take(job)
            self.books.store(part)
            self._outlet.sample(self.jobs, part)
            await asyncio.sleep(0)
        self.books.seen()

    async def _housekeeping(self) -> None:
        """What a tick does beside reading: mend chains, take tracked processes, catch up, clear up."""
        self._warden.mend(self._idle())
        self._warden.keep_forwarding(self._idle())
        survey = tracking.Survey()
        for job in self._idle():
            if job.row.terms.rules and self._is_idle(job):
                with self._telling(job):
                    self._take_tracked(job, survey)
                await asyncio.sleep(0)
            watcher = job.row.terms.watcher
            if watcher is not None and self._is_idle(job) and not procs.is_alive(watcher):
                with self._telling(job):
                    await self._give_up(job)
        for record in self.books.catch_up():
            self.news.tell(record, "finished", f"{record.state}; its record could be written now")
        self.agent.clear_up()
        self._report()
        if self.agent.unrecovered:
            self._take_over()
        await asyncio.sleep(0)

    def _idle(self) -> list[Job]:
        return [job for job in self.jobs.values() if self._is_idle(job)]

    def _is_idle(self, job: Job) -> bool:
        return self.jobs.get(job.spec.id) is job and job.spec.id not in self._busy

    @contextmanager
    def _telling(self, job: Job) -> Iterator[None]:
        """Trouble with one job is told, and keeps no other from its turn."""
        try:
            yield
        except (AcctdError, OSError) as e:
            self.news.trouble(job, e)
