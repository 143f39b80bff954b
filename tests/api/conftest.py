"""An application on a real store: a tenant with keys, a stranger, and a hand that does a worker's writes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest
import structlog
from starlette.testclient import TestClient

from app.api.main import create_app
from app.api.submission.capacity import workers_now
from app.domain.access import Scope
from app.domain.attempt_lines import AttemptEvent
from app.settings import Settings
from app.store.attempts import AttemptWriter, Claim, NewArtifact, claim
from app.store.blobs import open_blobs
from app.store.session import Database
from app.store.tenancy.keys import ensure_tenant, issue_key
from bitwright.errors import BitwrightError, RequirementMissed
from bitwright.job_states import DeviceClass
from tests.reports import report

SHORTHAND = {"model": "org/model", "method": "rtn", "bits": 4}
BROWSER = {"Accept": "text/html", "Origin": "http://testserver"}


@dataclass(frozen=True)
class Api:
    """An application with its store, and clients of several callers."""

    settings: Settings
    database: Database
    folder: Path
    tenant_id: str
    client: TestClient
    """May submit."""
    reader: TestClient
    stranger: TestClient
    """May submit, as another tenant."""
    anonymous: TestClient
    key: str
    admin: TestClient
    """Looks after all tenants; its own is a third one."""
    admin_key: str
    stranger_id: str

    def visitor(self, key: str | None = None) -> TestClient:
        """A browser that has logged in, with the submitter's key unless another is given."""
        browser = TestClient(self.client.app, headers=BROWSER, raise_server_exceptions=False)
        answer = browser.post("/login", data={"key": key or self.key}, follow_redirects=False)
        assert answer.status_code == 303, answer.text
        return browser

    def submit(self, **fields: object) -> str:
        """Queue a job; its id."""
        response = self.client.post("/v1/jobs", json={**SHORTHAND, **fields})
        assert response.status_code == 202, response.text
        return str(response.json()["id"])

    def send_file(self) -> str:
        """Send a text through OpenAI's interface; its id."""
        row = b'{"messages": [{"role": "user", "content": "theirs"}, {"role": "assistant", "content": "theirs"}]}'
        form = {"files": {"file": ("theirs.jsonl", row)}, "data": {"purpose": "fine-tune"}}
        return str(self.client.post("/v1/files", **form).json()["id"])  # type: ignore[arg-type]

    def look_at_workers(self) -> None:
        """Have the API see the workers that are alive now, not those of a moment ago."""
        workers_now(self.client.app.state.bitwright.workers)  # type: ignore[attr-defined]

    def claim(self) -> Claim:
        """Take the next job, as a worker does."""
        with self.database.transaction() as session:
            held = claim(session, worker_id="worker-1", device_class=DeviceClass.CPU, lease_seconds=600)
        assert held is not None
        return held

    def tell(self, held: Claim, *events: AttemptEvent) -> None:
        """Store events of an attempt."""
        with self.database.transaction() as session:
            AttemptWriter(session, held.job_id, held.attempt).append(events)

    def succeed(self, held: Claim, checkpoints: Mapping[str, Mapping[str, bytes]] | None = None) -> None:
        """End a job with these files: format -> path -> content."""
        artifacts = self._store_all(checkpoints or {})
        with self.database.transaction() as session:
            AttemptWriter(session, held.job_id, held.attempt).succeed(report(), artifacts)

    def miss(self, held: Claim, checkpoints: Mapping[str, Mapping[str, bytes]]) -> None:
        """End a job with these files, and with a requirement that they miss."""
        artifacts, error = self._store_all(checkpoints), RequirementMissed("perplexity ratio 1.3 exceeds 1.1")
        with self.database.transaction() as session:
            AttemptWriter(session, held.job_id, held.attempt).fail(error, report=report(), artifacts=artifacts)

    def fail(self, held: Claim, error: BitwrightError) -> None:
        """End an attempt with an error."""
        with self.database.transaction() as session:
            AttemptWriter(session, held.job_id, held.attempt).fail(error)

    def _store_all(self, checkpoints: Mapping[str, Mapping[str, bytes]]) -> list[NewArtifact]:
        return [
            self._store(export_format, path, content)
            for export_format, files in checkpoints.items()
            for path, content in files.items()
        ]

    def _store(self, export_format: str, path: str, content: bytes) -> NewArtifact:
        source = self.folder / "made"
        source.write_bytes(content)
        blob = open_blobs(self.settings.blob_url).put(source)
        return NewArtifact(export_format, path, blob.sha256, blob.size, "application/octet-stream")


class Answer(Protocol):
    """Attributes of an answer that tests look at, whichever HTTP client it came through."""

    @property
    def status_code(self) -> int: ...

    @property
    def text(self) -> str: ...

    @property
    def headers(self) -> Mapping[str, str]: ...

    def json(self) -> Any: ...


def problem(response: Answer, status: int, code: str) -> dict[str, object]:
    """The problem document of an answer that must be one."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, object] = response.json()
    assert (body["status"], body["code"]) == (status, code), body
    assert body["request_id"] == response.headers["x-request-id"]
    return body


def openai_error(response: Answer, status: int, code: str) -> dict[str, object]:
    """The error of an answer of OpenAI's interface that must be one."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error: dict[str, object] = response.json()["error"]
    assert error["code"] == code, error
    assert error["request_id"] == response.headers["x-request-id"]
    return error


def make_settings(folder: Path, database_url: str, **fields: object) -> Settings:
    """Settings on one folder, with `models` as the only root."""
    roots = (folder / "models",)
    roots[0].mkdir(exist_ok=True)
    values = {"data_dir": folder, "database_url": database_url, "model_roots": roots, "event_poll_seconds": 0.02}
    values |= {"page_hosts": ("testserver",)}
    return Settings.model_validate({**values, **fields})


@pytest.fixture(autouse=True)
def plain_logs() -> Iterator[None]:
    """Log lines as text on standard output. The default renders every traceback with all its variables: seconds."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["event"]),
        ]
    )
    yield
    structlog.reset_defaults()


@pytest.fixture
def settings(tmp_path: Path, sqlite_url: str) -> Settings:
    """Settings of an API on SQLite."""
    return make_settings(tmp_path, sqlite_url)


@pytest.fixture
def api(settings: Settings) -> Iterator[Api]:
    """An API on SQLite."""
    yield from run_api(settings)


@pytest.fixture
def any_api(tmp_path: Path, database_url: str) -> Iterator[Api]:
    """An API on each database in turn."""
    yield from run_api(make_settings(tmp_path, database_url))


def run_api(settings: Settings) -> Iterator[Api]:
    """The application of these settings, with tenants and keys."""
    application = create_app(settings)
    database = Database(settings.database_url)
    with database.transaction() as session:
        tenant, stranger = ensure_tenant(session, "first").id, ensure_tenant(session, "second").id
        _, submitter = issue_key(session, tenant, name="submitter", scopes=frozenset({Scope.SUBMIT}))
        _, reader = issue_key(session, tenant, name="reader", scopes=frozenset({Scope.READ}))
        _, other = issue_key(session, stranger, name="other", scopes=frozenset({Scope.SUBMIT}))
        operators = ensure_tenant(session, "operators").id
        _, administrator = issue_key(session, operators, name="admin", scopes=frozenset({Scope.ADMIN}))

    def client(key: str | None) -> TestClient:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return TestClient(application, headers=headers, raise_server_exceptions=False)

    with client(submitter) as main:
        yield Api(
            settings=settings,
            database=database,
            folder=settings.data_dir,
            tenant_id=tenant,
            client=main,
            reader=client(reader),
            stranger=client(other),
            anonymous=client(None),
            key=submitter,
            admin=client(administrator),
            admin_key=administrator,
            stranger_id=stranger,
        )
    database.close()
