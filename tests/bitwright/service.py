"""The real API on a loopback port with a real SQLite and blob folder, and a hand that does a worker's writes."""

import hashlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import uvicorn
from cryptography.fernet import Fernet
from pydantic import SecretStr

from app.api.main import create_app
from app.domain.access import Scope
from app.domain.attempt_lines import AttemptEvent
from app.settings import Settings
from app.store.attempts import AttemptWriter, Claim, NewArtifact, claim
from app.store.blobs import BlobStore, open_blobs
from app.store.session import Database, migrate
from app.store.tenancy.keys import ensure_tenant, issue_key
from bitwright import AsyncBitwright, AsyncClient, Bitwright, Client, RetryPolicy
from bitwright.errors import BitwrightError
from bitwright.job_states import DeviceClass
from bitwright.report import Report
from tests.bitwright.driven import Driven
from tests.reports import report

QUICK = RetryPolicy(attempts=4, first_seconds=0.01, longest_seconds=0.05)


@dataclass(frozen=True)
class Service:
    """A running service and the store behind it."""

    port: int
    key: str
    database: Database
    blobs: BlobStore
    folder: Path
    settings: Settings
    asynchronous: bool = False
    """Clients are asynchronous ones."""

    @property
    def address(self) -> tuple[str, int]:
        return ("127.0.0.1", self.port)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, url: str | None = None, retry: RetryPolicy = QUICK) -> Client:
        """A client of the kind that this service is asked with."""
        if self.asynchronous:
            return cast(Client, Driven(AsyncClient(url or self.url, self.key, retry=retry)))
        return Client(url or self.url, self.key, retry=retry)

    def resources(self) -> Bitwright:
        """The same with resources."""
        if self.asynchronous:
            return cast(Bitwright, Driven(AsyncBitwright(self.url, self.key, retry=QUICK)))
        return Bitwright(self.url, self.key, retry=QUICK)

    def claim(self) -> Claim:
        """Take the next job, as a worker does."""
        with self.database.transaction() as session:
            claimed = claim(session, worker_id="worker-1", device_class=DeviceClass.CPU, lease_seconds=600)
        assert claimed is not None
        return claimed

    def tell(self, claimed: Claim, events: Sequence[AttemptEvent]) -> None:
        """Store events of the attempt."""
        with self.database.transaction() as session:
            AttemptWriter(session, claimed.job_id, claimed.attempt).append(events)

    def succeed(self, claimed: Claim, files: Mapping[str, bytes] | None = None) -> None:
        """End the job with these files as its compressed-tensors checkpoint."""
        self.succeed_with(claimed, {"compressed-tensors": files or {}})

    def succeed_with(
        self, claimed: Claim, checkpoints: Mapping[str, Mapping[str, bytes]], told: Report | None = None
    ) -> None:
        """End the job with these files: format -> path -> content."""
        artifacts = [
            self._store(name, path, content) for name, files in checkpoints.items() for path, content in files.items()
        ]
        with self.database.transaction() as session:
            AttemptWriter(session, claimed.job_id, claimed.attempt).succeed(told or report(), artifacts)

    def fail(self, claimed: Claim, error: BitwrightError) -> None:
        """End the attempt with this error."""
        with self.database.transaction() as session:
            AttemptWriter(session, claimed.job_id, claimed.attempt).fail(error)

    def finished(
        self,
        body: Mapping[str, object],
        checkpoints: Mapping[str, Mapping[str, bytes]],
        told: Report | None = None,
    ) -> str:
        """The id of a job of this request that ended with these files."""
        with self.client() as client:
            job = client.submit(body)
        while (claimed := self.claim()).job_id != job.id:
            self.succeed(claimed)
        self.succeed_with(claimed, checkpoints, told)
        return job.id

    def _store(self, name: str, path: str, content: bytes) -> NewArtifact:
        source = self.folder / "source"
        source.write_bytes(content)
        blob = self.blobs.put(source)
        assert blob.sha256 == hashlib.sha256(content).hexdigest()
        return NewArtifact(name, path, blob.sha256, blob.size, "application/octet-stream")


@contextmanager
def running_service(folder: Path, *, asynchronous: bool = False) -> Iterator[Service]:
    """Start the API in a thread on a free port."""
    keys = (SecretStr(Fernet.generate_key().decode()),)
    settings = Settings(data_dir=folder, environment="test", event_poll_seconds=0.02, token_keys=keys)
    migrate(settings.database_url)
    database = Database(settings.database_url)
    with database.transaction() as session:
        tenant = ensure_tenant(session, "default")
        _, key = issue_key(session, tenant.id, name="test", scopes=frozenset(Scope))
    config = uvicorn.Config(create_app(settings), port=0, log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="api")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Service(port, key, database, open_blobs(settings.blob_url), folder, settings, asynchronous)
    finally:
        server.should_exit = True
        thread.join()
        database.close()
