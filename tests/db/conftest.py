"""Real databases on free loopback ports, in directories of the test's own. One that does not start is a failure.

Debian's influxd 1.6 answers for InfluxDB 1, VictoriaMetrics for the write path of InfluxDB 2; they are installed by
`tools/system-packages db`. Each class can be used without pytest, too: by fault tests and benchmarks.
"""

import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

import pytest
import urllib3

START_SECONDS = 60.0


class Server:
    """A process that answers HTTP on a port of its own; `stop()` and `start()` as often as wanted, on the same port.

    It ends with the thread that started it: start it from one that lives for as long as it is wanted.
    """

    binary = ""
    ready = "/"  # answers below 400 once it takes requests

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self._http = urllib3.PoolManager(retries=False, timeout=30.0)

    def argv(self) -> Sequence[str]:
        raise NotImplementedError

    def start(self) -> None:
        """Returns once it answers."""
        binary = shutil.which(self.binary)
        if binary is None:
            raise RuntimeError(f"{self.binary} is not installed; run tools/system-packages db")
        with open(self.directory / "log", "ab") as log:
            # Ended with this thread, whatever becomes of it: nothing here is worth keeping. prctl(2), PR_SET_PDEATHSIG
            argv = ["setpriv", "--pdeathsig", "KILL", binary, *self.argv()]
            self.process = subprocess.Popen(argv, stdout=log, stderr=log, cwd=self.directory)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                words = (self.directory / "log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{self.binary} does not answer on {self.url}:\n{words}")
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            return self.get(self.ready).status < 400
        except (urllib3.exceptions.HTTPError, OSError):
            return False

    def stop(self) -> None:
        """In peace."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """At once, in the middle of whatever it does."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self.process is None:
            return
        self.process.send_signal(how)
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None
        self._http.clear()

    def get(self, path: str, /, **parameters: str) -> urllib3.BaseHTTPResponse:
        return self._http.request("GET", f"{self.url}{path}", fields=parameters)

    def post(self, path: str, body: bytes = b"", /, **parameters: str) -> urllib3.BaseHTTPResponse:
        """As it stands: answers are the caller's to judge."""
        query = f"?{urlencode(parameters)}" if parameters else ""
        return self._http.request("POST", f"{self.url}{path}{query}", body=body)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Influx1(Server):
    """influxd 1.6. Has the database `acctd` with the retention policies `weeks` (the default) and `years`.

    `data` and `http` are lines for these sections of its configuration; `user` is whom its own queries are made by.
    """

    binary = "influxd"
    ready = "/ping"
    database = "acctd"

    def __init__(self, directory: Path, data: str = "", http: str = "", user: tuple[str, str] | None = None) -> None:
        super().__init__(directory)
        self.data, self.http, self.user = data, http, user

    def argv(self) -> Sequence[str]:
        path = self.directory / "influxdb.conf"
        path.write_text(
            f"""
            reporting-disabled = true
            bind-address = "127.0.0.1:{free_port()}"
            [meta]
            dir = "{self.directory}/meta"
            [data]
            dir = "{self.directory}/data"
            wal-dir = "{self.directory}/wal"
            query-log-enabled = false
            {self.data}
            [monitor]
            store-enabled = false
            [http]
            bind-address = "127.0.0.1:{self.port}"
            log-enabled = false
            {self.http}
            """
        )
        return ["-config", str(path)]

    def start(self) -> None:
        super().start()
        if self.user is not None:
            name, word = self.user
            self.query(f"CREATE USER {name} WITH PASSWORD '{word}' WITH ALL PRIVILEGES", post=True)
        self.query(f'CREATE DATABASE "{self.database}" WITH NAME "weeks"', post=True)
        self.query(f'CREATE RETENTION POLICY "years" ON "{self.database}" DURATION INF REPLICATION 1', post=True)

    def write(self, lines: bytes, policy: str = "weeks") -> urllib3.BaseHTTPResponse:
        return self.post("/write", lines, db=self.database, rp=policy, precision="ns")

    def query(self, text: str, *, post: bool = False) -> list[dict[str, Any]]:
        """InfluxQL: the rows as dictionaries, times in ns, tags of GROUP BY and `name` among the columns."""
        ask = self.post if post else self.get
        by = dict(zip(("u", "p"), self.user, strict=True)) if self.user is not None else {}
        answer = ask("/query", q=text, db=self.database, epoch="ns", **by)
        document = json.loads(answer.data)
        found: list[dict[str, Any]] = []
        for result in document.get("results", [document]):
            if "error" in result:
                raise RuntimeError(f"{text}: {result['error']}")
            for series in result.get("series", ()):
                for values in series.get("values", ()):
                    row = dict(zip(series["columns"], values, strict=True))
                    found.append({"name": series.get("name"), **series.get("tags", {}), **row})
        return found


class VictoriaMetrics(Server):
    """Takes what InfluxDB 2 takes, at /api/v2/write; every field is a series MEASUREMENT_FIELD."""

    binary = "victoria-metrics"
    ready = "/health"

    def argv(self) -> Sequence[str]:
        return [
            f"-httpListenAddr=127.0.0.1:{self.port}",
            f"-storageDataPath={self.directory}/data",
            # Of samples with the same ms one is kept, as InfluxDB does; without it, what is sent again is there twice.
            "-dedup.minScrapeInterval=1ms",
            "-retentionPeriod=100y",
            "-search.latencyOffset=0s",
            "-search.disableCache",
            "-memory.allowedBytes=268435456",
            "-loggerLevel=WARN",
        ]

    def write(self, lines: bytes) -> urllib3.BaseHTTPResponse:
        return self.post("/api/v2/write", lines, precision="ns")

    def flush(self) -> None:
        """Have what was taken be found: it is held back for a second otherwise."""
        self.get("/internal/force_flush")

    def query(self, text: str, at: float | None = None) -> list[dict[str, Any]]:
        """PromQL at one time, in s: a list of {"metric": labels, "value": [time, text]}."""
        return _vector(self, "/api/v1/query", text, at)

    def export(self, match: str) -> list[dict[str, Any]]:
        """All samples as stored: a list of {"metric": labels, "values": [...], "timestamps": [ms, ...]}."""
        self.flush()
        answer = self.get("/api/v1/export", **{"match[]": match, "start": "0", "end": "4102444800"})
        if answer.status != 200:
            raise RuntimeError(f"{match}: {answer.data.decode()}")
        return [json.loads(line) for line in answer.data.splitlines()]


class Prometheus(Server):
    """Scrapes `targets`, host:port each, every `interval` seconds; the scrape job is called acctd."""

    binary = "prometheus"
    ready = "/-/ready"

    def __init__(self, directory: Path, targets: Sequence[str] = (), interval: float = 1.0) -> None:
        super().__init__(directory)
        self.targets, self.interval = tuple(targets), interval

    def argv(self) -> Sequence[str]:
        path = self.directory / "prometheus.yml"
        # JSON is YAML.
        path.write_text(
            json.dumps(
                {
                    "global": {"scrape_interval": f"{round(self.interval * 1000)}ms"},
                    "scrape_configs": [
                        {"job_name": "acctd", "static_configs": [{"targets": list(self.targets)}]},
                    ],
                }
            )
        )
        return [
            f"--config.file={path}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            f"--storage.tsdb.path={self.directory}/data",
            "--web.enable-lifecycle",
            "--log.level=warn",
        ]

    def scrape(self, targets: Sequence[str]) -> None:
        """Other targets from now on."""
        self.targets = tuple(targets)
        self.argv()
        answer = self.post("/-/reload")
        if answer.status != 200:
            raise RuntimeError(answer.data.decode())

    def query(self, text: str, at: float | None = None) -> list[dict[str, Any]]:
        """PromQL at one time, in s: a list of {"metric": labels, "value": [time, text]}."""
        return _vector(self, "/api/v1/query", text, at)


def _vector(server: Server, path: str, text: str, at: float | None) -> list[dict[str, Any]]:
    parameters = {"query": text} if at is None else {"query": text, "time": repr(at)}
    answer = server.get(path, **parameters)
    document = json.loads(answer.data)
    if document["status"] != "success":
        raise RuntimeError(f"{text}: {document}")
    result: list[dict[str, Any]] = document["data"]["result"]
    return result


def free_port() -> int:
    """Of 127.0.0.1; somebody else may take it before it is used, which is seen then."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    """What the condition gives once it gives something."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s")
        time.sleep(0.05)
    return found


@pytest.fixture
def influx1(tmp_path: Path) -> Iterator[Influx1]:
    server = Influx1(tmp_path / "influx1")
    with server:
        yield server


@pytest.fixture
def victoria(tmp_path: Path) -> Iterator[VictoriaMetrics]:
    server = VictoriaMetrics(tmp_path / "victoria")
    with server:
        yield server


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    server = Prometheus(tmp_path / "prometheus")
    with server:
        yield server
