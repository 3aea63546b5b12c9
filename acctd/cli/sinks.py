"""`acctd sinks`: how far each sink is, and what is the matter with it. Reads positions and spool; asks nobody."""

import os
import time

import click
import msgspec

from acctd import config as configuration
from acctd.cli.output import emit
from acctd.cli.table import Column, clean, plain, short
from acctd.errors import NotPermittedError, UsageError
from acctd.frames import STREAMS
from acctd.sinks import ExportConfig
from acctd.spool import Position, backlog, size
from exporters import positions
from exporters.positions import State

_COLUMNS = [
    Column("SINK", right=False),
    *(Column(title) for title in ("SENT", "WAITING", "FAILED", "DROPPED", "REFUSED", "ACCEPTED")),
    Column("TROUBLE", right=False),
]


@click.command("sinks")
@click.option("--config", "config_path", metavar="FILE", help="Configuration file.")
@click.option("--json", "as_json", is_flag=True, help="All that is known, as JSON.")
def command(config_path: str | None, as_json: bool) -> None:
    """Show how far the sinks of `acctd export` are.

    SENT and REFUSED count points, FAILED requests that had to be made again, DROPPED lines of the spool that had to go
    before they were read; WAITING is bytes of the spool.
    """
    config = configuration.load(config_path, os.environ).export
    if not config.active:
        raise UsageError("the configuration has no sink; add [influxdb.NAME], [json.NAME] or [prometheus]")
    try:
        _show(config, as_json=as_json)
    except PermissionError as e:
        raise NotPermittedError(
            f"{e.filename} may not be read by this user; run as root, or as one of export.group"
        ) from e


def _show(config: ExportConfig, *, as_json: bool) -> None:
    found = {name: positions.load(config.positions_dir, name) for name in config.names}
    waiting = {
        name: sum(backlog(config.spool_dir / stream, at) for stream, at in _positions(state).items())
        for name, state in found.items()
    }
    if as_json:
        shown = {name: {"state": state, "waiting_bytes": waiting[name]} for name, state in found.items()}
        spool = {stream: size(config.spool_dir / stream) for stream in STREAMS}
        emit(msgspec.json.format(msgspec.json.encode({"sinks": shown, "spool_bytes": spool}), indent=2).decode())
        return
    for line in plain(_COLUMNS, [_row(name, state, waiting[name]) for name, state in found.items()]):
        emit(line)


def _positions(state: State | None) -> dict[str, Position]:
    return dict.fromkeys(STREAMS, Position()) if state is None else state.positions


def _row(name: str, state: State | None, waiting: int) -> tuple[str, ...]:
    if state is None:
        return name, "0", short(waiting), "0", "0", "0", "never", "acctd export has not begun it"
    counts = state.counts
    accepted = f"{max(0, time.time() - state.accepted):.0f} s ago" if state.accepted else "never"
    numbers = (counts.sent, short(waiting), counts.failures, sum(counts.dropped.values()), counts.quarantined)
    return name, *(str(number) for number in numbers), accepted, clean(state.trouble or "-")
