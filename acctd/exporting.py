"""All sinks of one node at work: a thread for each, and what is served of the newest samples.

The composition root of `acctd export`: knows every target, and which configuration makes which. A sink that fails, for
want of a token or by a defect of ours, is tried again and keeps no other from its turn.
"""

import logging
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from acctd.errors import AcctdError
from acctd.frames import STREAMS
from acctd.sinks import ExportConfig, InfluxSink, JsonSink, PrometheusSink
from acctd.spool import size
from exporters import positions
from exporters.delivery import Delivery, Target, check_directory

if TYPE_CHECKING:
    from exporters.follow import Follower
    from exporters.scrape import Scrape

_PATIENCE = 2.0  # s for requests that are under way when all ends
_AGAIN = 10.0  # s until a sink that could not be begun is begun again

log = logging.getLogger("acctd")


class Exporter:
    """Use as a context manager; leaving it ends all threads, but for those that are in a request, see stop()."""

    def __init__(self, config: ExportConfig, host: str, environ: Mapping[str, str]) -> None:
        """Raises AcctdError where positions cannot be kept."""
        self._config, self._host, self._environ = config, host, environ
        self._stopping = threading.Event()
        self._finite = threading.Event()  # each sink ends once it has delivered what there is
        self._threads: list[threading.Thread] = []
        self.deliveries: dict[str, Delivery] = {}
        """The sinks that are at work, by name."""
        self._told: dict[str, str] = {}  # why a sink could not be begun
        self._scraped: tuple[Follower, Scrape] | None = None
        check_directory(config.positions_dir)
        for old, new in positions.adopt(config.positions_dir, {s.name: s.identity for s in self._sinks()}):
            log.info("sink %s goes on where it was as %s", new, old)

    def __enter__(self) -> "Exporter":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, *, until_empty: bool = False) -> None:
        """Begin all sinks; with `until_empty` each ends once it has delivered what there is, and nothing is served."""
        if until_empty:
            self.end_when_empty()
        for sink in self._sinks():
            # None holds up the end of the process: who is cut off in a request makes it again.
            thread = threading.Thread(target=self._run, args=(sink,), name=f"sink {sink.name}", daemon=True)
            self._threads.append(thread)
            thread.start()
        if self._config.prometheus is not None and not until_empty:
            self._serve(self._config.prometheus)

    def end_when_empty(self) -> None:
        """Nothing more will be written: let each sink end once it has delivered what there is."""
        self._finite.set()
        for delivery in list(self.deliveries.values()):
            delivery.end_when_empty()

    def sent(self) -> int:
        """Points that were accepted, of all sinks together."""
        return sum(delivery.numbers().counts.sent for delivery in list(self.deliveries.values()))

    def join(self, timeout: float | None = None) -> bool:
        """Wait until all sinks have ended, or for some seconds; whether they have."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def backlog(self) -> int:
        """Bytes that a sink has not read; a sink that could not be begun has read nothing."""
        waiting = [delivery.backlog() for delivery in list(self.deliveries.values())]
        begun = len(waiting) == len(self._sinks())
        return max(waiting, default=0) if begun else 1 + sum(size(self._config.spool_dir / s) for s in STREAMS)

    def trouble(self, name: str) -> str | None:
        """Why a sink does not get on."""
        if name in self.deliveries:
            return self.deliveries[name].numbers().trouble
        return self._told.get(name)

    def stop(self, patience: float = _PATIENCE) -> None:
        """End all. What is still in a request after `patience` s is left to end with the process; it must end then."""
        self._stopping.set()
        for delivery in list(self.deliveries.values()):
            delivery.stop()
        self.join(patience)
        if self._scraped is not None:
            for each in self._scraped:
                each.close()

    def _serve(self, sink: PrometheusSink) -> None:
        from exporters.board import Board
        from exporters.follow import Follower
        from exporters.prometheus import Exposition
        from exporters.scrape import Scrape

        board = Board(grace=sink.grace, scheduler=self._config.scheduler)
        follower = Follower(board, self._config.spool_dir)
        scrape = Scrape(sink, Exposition(board, self._config.cluster, self._config.names, self.deliveries).render)
        follower.start()
        self._scraped = follower, scrape
        thread = threading.Thread(target=self._listen, args=(scrape,), name="listen", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _listen(self, scrape: "Scrape") -> None:
        """An address may come up after us, or be another's for a while; the sinks go on meanwhile."""
        told = ""
        while not self._stopping.is_set():
            try:
                log.info("serving %s", scrape.start())
                return
            except AcctdError as e:
                if str(e) != told:
                    log.error("[prometheus]: %s; trying again", e)
                    told = str(e)
            self._stopping.wait(_AGAIN)

    def _sinks(self) -> tuple[InfluxSink | JsonSink, ...]:
        return (*self._config.influxdb, *self._config.json)

    def _run(self, sink: InfluxSink | JsonSink) -> None:
        while not self._stopping.is_set():
            try:
                delivery = Delivery(sink.name, self._target(sink), self._config.spool_dir, self._config.positions_dir)
                self.deliveries[sink.name] = delivery
                if self._stopping.is_set():
                    return
                delivery.run(until_empty=self._finite.is_set())
                return
            except AcctdError as e:
                if self._told.get(sink.name) != str(e):
                    log.error("sink %s: %s", sink.name, e)
                    self._told[sink.name] = str(e)
            except Exception as e:  # a defect of ours
                log.exception("sink %s failed; it is begun again", sink.name)
                self._told[sink.name] = repr(e)
            self.deliveries.pop(sink.name, None)
            if self._finite.is_set():
                return
            self._stopping.wait(_AGAIN)

    def _target(self, sink: InfluxSink | JsonSink) -> Target:
        """Imported when there is one: the InfluxDB client is half of this process's memory."""
        if isinstance(sink, InfluxSink):
            from exporters.influxdb import InfluxTarget

            return InfluxTarget(sink, self._config, self._host, self._environ)
        from exporters.jsonlines import JsonTarget

        return JsonTarget(sink)
