"""`acctd run [options] -- COMMAND...`: like /usr/bin/time, for a whole job. Makes, watches and finishes one job.

Turns options into a JobSpec, hands the terminal to the command, and says at the end what the job used. Exits as the
command did: its status, or 128+n after signal n.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import click
import msgspec

from acctd import accounts, enclosure, launch, wishes
from acctd import config as configuration
from acctd.agent import Agent
from acctd.cli.options import limit_options, limits_given
from acctd.cli.output import Output, say
from acctd.cli.summary import summary
from acctd.cli.supervise import Course, LiveLine, Signals, supervise
from acctd.config import with_default_classes
from acctd.errors import UsageError
from acctd.job import Ending, Job
from acctd.model import DestinationClass, JobSpec, NetworkMode, Owner, Record, parse_class, parse_size
from acctd.network import resolver
from acctd.policies import OOM_ACTIONS, OomAction
from acctd.recovery import recover
from acctd.rows import Terms
from acctd.shortages import Shortages
from exporters.classad import format_ad, record_ad

if TYPE_CHECKING:
    from acctd.cli.influx import Series


@click.command("run", context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False})
@click.option("--id", "job_id", metavar="ID", help="The job's id; a new one if not given.")
@click.option("--user", metavar="USER", help="Run as this user (name or number); as the caller if not given.")
@limit_options
@click.option("--oom", type=click.Choice(OOM_ACTIONS), help="What to do when the memory runs out.")
@click.option("--oom-ceiling", metavar="SIZE", help="How far --oom grow may raise the limit.")
@click.option("--oom-deadline", metavar="S", type=float, help="How long processes wait at most for a decision.")
@click.option("--pid-namespace", is_flag=True, help="The job's processes see each other and no others.")
@click.option("--scratch", metavar="DIR", multiple=True, help="Make DIR the job's own, gone with it; may be repeated.")
@click.option("--chroot", metavar="NAME", help="A root directory of the configuration.")
@click.option("--no-new-privs", is_flag=True, help="No set-user-id program gives the job rights.")
@click.option("--network", type=click.Choice(["nat", "host", "none"]), help="A pipe of its own, the host's, or none.")
@click.option("--internal", metavar="CIDR,...", multiple=True, help="Networks billed as Internal; may be repeated.")
@click.option(
    "--class", "classes", metavar="NAME=CIDR,...", multiple=True, help="One more destination class; may be repeated."
)
@click.option("--tag", "tags", metavar="KEY=VALUE", multiple=True, help="Kept in the record; may be repeated.")
@click.option("--classad", metavar="FILE", help="Write the record as a ClassAd; - is standard output.")
@click.option("--json", "json_path", metavar="FILE", help="Write the record as JSON; - is standard output.")
@click.option("--influx", metavar="URL", help="Send the job's series there: http://HOST:8086?db=NAME.")
@click.option("--config", "config_path", metavar="FILE", help="Configuration file.")
@click.option("-q", "--quiet", is_flag=True, help="No live line and no summary.")
@click.argument("arguments", metavar="COMMAND...", nargs=-1, required=True, type=click.UNPROCESSED)
def command(
    job_id: str | None,
    user: str | None,
    network: NetworkMode | None,
    internal: tuple[str, ...],
    classes: tuple[str, ...],
    tags: tuple[str, ...],
    classad: str | None,
    json_path: str | None,
    influx: str | None,
    config_path: str | None,
    quiet: bool,
    arguments: tuple[str, ...],
    oom: OomAction | None,
    oom_ceiling: str | None,
    oom_deadline: float | None,
    pid_namespace: bool,
    scratch: tuple[str, ...],
    chroot: str | None,
    no_new_privs: bool,
    **limits: str | None,
) -> int:
    """Run COMMAND as a job and account for all it does."""
    config = configuration.load(config_path, os.environ)
    owner, groups, environ = _owner(user)
    spec = JobSpec(
        # Checked in full here; without --id the ledger gives one, once everything else is known to be in order.
        id=job_id if job_id is not None else "r0",
        owner=owner,
        limits=wishes.limits(config.limits, limits_given(limits)),
        network=network or config.network.mode,
        classes=_classes(internal, classes),
        tags=_tags(tags),
        oom=wishes.oom(config, _oom(oom, oom_ceiling, oom_deadline), root=True),
        isolation=wishes.isolation(
            config,
            {
                "pid_namespace": pid_namespace,
                "scratch": list(scratch),
                "chroot": chroot,
                "no_new_privs": no_new_privs,
            },
        ),
    )
    spec = with_default_classes(spec, config)
    sent = _series(influx)
    outputs = {form: Output(option, path) for option, form, path in _files(classad, json_path)}
    # From here on signals are taken in order, one by one: none is lost, and none interrupts a half-made job.
    with (
        Signals() as signals,
        Agent(config) as agent,
        Shortages(agent, tell=_untold, trouble=_noted, end=_see_end) as shortages,
    ):
        recovery = recover(agent)
        if job_id is None:
            spec = replace(spec, id=agent.ledger.next_id())
        with sent(agent, spec.id) as series:
            record = _account(agent, spec, arguments, groups, environ, signals, shortages, recovery, quiet=quiet)
            if series is not None:
                series.finish(record.id)
        for form, output in outputs.items():
            output.write(_formatted(form, record))
    if not quiet:
        for old in recovery:
            say(f"acctd: finished job {old.id}, whose acctd had died")
        say(f"acctd: {summary(record)}")
    for sentence in agent.trouble:
        say(f"acctd: {sentence}; the next acctd run tries again")
    return 128 + record.exit_signal if record.exit_signal is not None else record.exit_code or 0


def _series(url: str | None) -> "Callable[[Agent, str], AbstractContextManager[Series | None]]":
    """What sends the job's series there. Imported when it is asked for: it takes as long as the rest of acctd run."""
    if url is None:
        return lambda _agent, _name: nullcontext()
    from acctd.cli import influx

    sink = influx.parse_sink(url)
    return lambda agent, name: influx.series(agent, sink, name, os.environ)


def _account(
    agent: Agent,
    spec: JobSpec,
    arguments: tuple[str, ...],
    groups: list[int],
    environ: Mapping[str, str],
    signals: Signals,
    shortages: Shortages,
    recovery: list[Record],
    *,
    quiet: bool,
) -> Record:
    job = agent.create(spec, terms=Terms(run=True))
    # A job with a namespace has a loopback of its own, where the host's resolver does not listen.
    servers = resolver.host_servers() if spec.network == "nat" else []
    course, started = Course(agent, job, recovery), False
    try:
        with resolver.Relay(job.namespace if job.namespace is not None else -1, servers) as relay:
            job.notes += [
                f"the resolver {server} does not answer inside the job: {why}" for server, why in relay.skipped
            ]
            shortages.listen(job)
            plan = enclosure.plan(spec.isolation, job.row.place.scratch, agent.config.isolation)
            agent.begin(job)
            process, at = launch.start(
                job, arguments, groups=groups, environ=environ, blocked=signals.before, isolation=plan
            )
            started = True
            agent.begin(job, at)
            live = LiveLine(job) if not quiet else None
            process.returncode = supervise(agent, job, process.pid, live, shortages, course)
            ending = Ending.now(process.returncode)
    except BaseException as e:
        if started:
            # What it has used is owed, whatever befell us.
            job.notes.append(f"acctd failed while it watched this job ({e}); its exit status is unknown")
            agent.finish(job, Ending())
        else:
            agent.abandon(job)
        shortages.forget(job)
        raise
    record = agent.finish(job, ending)
    shortages.forget(job)
    course.finish(record)
    for sentence in course.troubles if not quiet else ():
        say(f"acctd: {sentence}")
    return record


def _untold(_job: Job, _event: str, _text: str) -> None:
    """Nobody listens to a single job's events; what matters stands in its record, and in the summary."""


def _noted(job: Job | None, error: BaseException | str) -> None:
    if job is not None:
        job.note(str(error))
    else:
        say(f"acctd: {error}")


def _see_end(job: Job) -> None:
    job.cgroups.kill()


def _owner(user: str | None) -> tuple[Owner, list[int], dict[str, str]]:
    """Who runs the job, with which groups and which environment: the caller's own, and for --user HOME and the like."""
    if user is None:
        return accounts.of(os.getuid(), os.getgid()), os.getgroups(), dict(os.environ)
    account = accounts.named(user)
    return account.owner, account.groups, os.environ | account.environment


def _oom(action: OomAction | None, ceiling: str | None, deadline: float | None) -> dict[str, object]:
    bytes_ = parse_size("oom-ceiling", ceiling) if ceiling is not None else None
    given = {"action": action, "ceiling": bytes_, "deadline": deadline}
    return {name: value for name, value in given.items() if value is not None}


def _classes(internal: tuple[str, ...], classes: tuple[str, ...]) -> tuple[DestinationClass, ...]:
    given = [f"Internal={','.join(internal)}", *classes] if internal else list(classes)
    parsed = []
    for text in given:
        name, equals, cidrs = text.partition("=")
        if not equals:
            raise UsageError(f"class {text!r} is not NAME=CIDR,...; write it like Campus=198.51.100.0/24")
        parsed.append(parse_class(name, [cidr for cidr in cidrs.replace(",", " ").split() if cidr]))
    return tuple(parsed)


def _tags(tags: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in tags:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"tag {text!r} is not KEY=VALUE; write it like --tag Project=cms")
        if key in found:
            raise UsageError(f"tag {key} is given twice; keep one")
        found[key] = value
    return found


def _files(classad: str | None, json_path: str | None) -> list[tuple[str, str, str]]:
    wanted = (("--classad", "classad", classad), ("--json", "json", json_path))
    return [(option, form, path) for option, form, path in wanted if path is not None]


def _formatted(form: str, record: Record) -> str:
    if form == "classad":
        return format_ad(record_ad(record))
    return msgspec.json.format(msgspec.json.encode(record), indent=2).decode() + "\n"
