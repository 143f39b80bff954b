"""The service under chaos: an installation of tests/e2e, its database a server that can be struck, too."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psycopg
from sqlalchemy import select

from app.domain.access import Scope
from app.store.models import Job
from app.store.session import migrate
from app.store.tenancy.keys import ensure_tenant, issue_key
from bitwright import Client
from bitwright.errors import Unavailable
from bitwright.job_states import JobStatus
from bitwright.retries import RetryPolicy
from tests import servers
from tests.chaos.link import Link
from tests.chaos.plan import LEASE_SECONDS, LINKED, TENANTS, WORKERS
from tests.e2e.installation import READERS, Installation, Process, children, command_line
from tests.hosts.namespaces import Host
from tests.supervise.bench import alive, wait_for

T = TypeVar("T")
PATIENCE = 120.0


class Story:
    """What happened, as lines of JSON with seconds since the beginning: each names the job or the part it is about."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def tell(self, what: str, **fields: object) -> None:
        """Add a line."""
        line = json.dumps({"seconds": round(self.seconds, 2), "what": what, **fields})
        with self._lock, self._file.open("a") as file:
            file.write(line + "\n")

    def lines(self) -> list[dict[str, object]]:
        """All lines so far."""
        with suppress(FileNotFoundError):
            return [json.loads(line) for line in self._file.read_text().splitlines()]
        return []


@dataclass
class Service:
    """Everything that a fault may strike.

    links        ways to the database, by part
    clocks       files that say by how many seconds a worker's clock is wrong
    jobs         recipe of each job, by id
    cancelled    jobs that a fault has cancelled and their tenant has not seen cancelled yet
    complaints   what went otherwise than it must
    hosts        the part's host, where each has one
    kept_every   seconds after which a worker keeps what a job has finished elsewhere, where it does
    api          the API's address
    models       the model as each tenant names it; its folder where a tenant is not there
    """

    installation: Installation
    postgres: Process
    cluster: servers.Cluster
    links: Mapping[str, Link]
    clocks: Mapping[str, Path]
    story: Story
    keys: dict[str, str] = field(default_factory=dict)
    clients: dict[str, Client] = field(default_factory=dict)
    jobs: dict[str, str] = field(default_factory=dict)
    tenants: dict[str, str] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)
    hosts: Mapping[str, Host] = field(default_factory=dict)
    kept_every: float | None = None
    api: str = ""
    models: dict[str, object] = field(default_factory=dict)

    def part(self, name: str) -> Process:
        """A part of the service by its name."""
        return self.postgres if name == "postgres" else self.installation[name]

    def complain(self, text: str) -> None:
        """Note what must not be."""
        self.complaints.append(text)
        self.story.tell("complaint", text=text)

    def submit(self, tenant: str, recipe: str, body: Mapping[str, object]) -> str:
        """Submit a job by HTTP; its id."""
        job = self.clients[tenant].submit({"model": self.models.get(tenant, str(self.installation.model)), **body})
        self.jobs[job.id], self.tenants[job.id] = recipe, tenant
        self.story.tell("submitted", job=job.id, tenant=tenant, recipe=recipe)
        return job.id

    def status(self, job_id: str) -> JobStatus:
        """Status of a job, from the database itself."""
        return self.job(job_id).status

    def job(self, job_id: str) -> Job:
        """A job of any tenant, from the database itself."""

        def look() -> Job:
            with self.installation.database.reading() as session:
                return session.get_one(Job, job_id)

        return patiently(look)

    def held_by(self, worker: str) -> str | None:
        """Id of the job that a worker holds, as far as the database says so now."""
        running = select(Job.id).where(Job.status == JobStatus.RUNNING, Job.worker_id.startswith(f"{worker}."))
        try:
            with self.installation.database.reading() as session:
                return session.scalar(running)
        except Unavailable:
            return None

    def computing(self, worker: str) -> list[int]:
        """Ids of a worker's processes that compute or are about to: no readers of input."""
        process = self.part(worker)
        if not process.running():
            return []
        found = [pid for pid in children(process.pid) if alive(pid)]
        return [pid for pid in found if not any(name in command_line(pid) for name in READERS)]

    def start_postgres(self) -> None:
        """Start the database's server, and wait until it has recovered."""
        deadline = time.monotonic() + PATIENCE
        self.postgres.start()
        while not self.answers():
            if not self.postgres.running():
                self.postgres.start()  # a process of the one before was not quite gone
            if time.monotonic() > deadline:
                raise TimeoutError(self.postgres.log.read_text()[-3000:])
            time.sleep(0.1)

    def answers(self) -> bool:
        """True if the database takes connections."""
        try:
            psycopg.connect(servers.libpq(self.cluster.url), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def ready(self) -> bool:
        """True if the API says so."""
        try:
            return next(iter(self.clients.values())).ready()
        except OSError:
            return False


def patiently(action: Callable[[], T]) -> T:
    """Do what a database that is away for a while refuses at first."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return action()
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.3)


@contextmanager
def serving(folder: Path, model: Path) -> Iterator[Service]:
    """A running service with its tenants; its files, logs and story are in `folder`."""
    with servers.postgres_cluster(synchronous_commit="on") as cluster:
        postgres = Process(
            "postgres", cluster.command, dict(os.environ), folder / "logs" / "postgres.log", user=cluster.user
        )
        here = "127.0.0.1"
        links = {name: link_of(cluster, here) for (name,) in LINKED}
        clocks = {name: folder / f"{name}.clock" for name in WORKERS}
        settings = {"LEASE_SECONDS": str(LEASE_SECONDS)}
        installation = Installation(folder, model, servers.text(cluster.url), settings=settings)
        service = Service(installation, postgres, cluster, links, clocks, Story(folder / "story.jsonl"))
        service.api = f"http://{here}:{installation.port}"
        try:
            begin(service, here)
            yield service
        finally:
            end_service(service)


def link_of(cluster: servers.Cluster, host: str) -> Link:
    """A way to the database from a port of `host`."""
    return Link(cluster.folder / ".s.PGSQL.5432", host)


def begin(service: Service, here: str, place: Callable[[], None] = lambda: None) -> None:
    """Start everything, the tenants and their clients included.

    here    address of this machine as the parts see it
    place   called before they start, and may give them places of their own
    """
    for link in service.links.values():
        link.__enter__()
    _rewire(service, here)
    place()
    service.start_postgres()
    migrate(service.installation.database_url)
    _tenants(service)
    service.installation.start("valkey", "sweep", "api", *WORKERS)
    wait_for(service.ready, PATIENCE, what="the API")


def _rewire(service: Service, here: str) -> None:
    """Lead the parts' connections through links, give workers clocks that can be wrong, and all of them a TMPDIR."""
    installation = service.installation
    for name, link in service.links.items():
        command = installation[name].command
        settings = {"DATABASE_URL": f"postgresql+psycopg://postgres@{here}:{link.port}/postgres"}
        if name in WORKERS:
            service.clocks[name].write_text("0")
            command = [sys.executable, "-m", "tests.chaos.moving_clock", str(service.clocks[name])]
            settings["SPARES"] = "1" if name == WORKERS[1] else "0"
        installation.add(name, command, **settings)
    temporary = installation.folder / "tmp"
    temporary.mkdir()
    for process in installation.processes.values():
        process.environment = {**process.environment, "TMPDIR": str(temporary)}


def _tenants(service: Service) -> None:
    """Make the tenants, a key for each, and clients that are patient: the API may be killed under them."""
    policy = RetryPolicy(attempts=90, longest_seconds=2.0)
    for name in TENANTS:
        with service.installation.database.transaction() as session:
            tenant = ensure_tenant(session, name)
            _, key = issue_key(session, tenant.id, name=name, scopes=frozenset(Scope))
        service.keys[name] = key
        service.clients[name] = Client(service.api, key, retry=policy)


def end_service(service: Service) -> None:
    """End everything that runs."""
    service.installation.close()
    service.installation.database.close()
    for client in service.clients.values():
        client.close()
    for link in service.links.values():
        link.__exit__()
    if service.postgres.running():
        for pid in [service.postgres.pid, *children(service.postgres.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        service.postgres.send(signal.SIGQUIT)
        assert service.postgres.process is not None
        service.postgres.process.wait(30)
