"""One worker's context over a real database, with scripted attempts instead of computed ones."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from app.domain.request.job_request import JobRequest
from app.settings import Settings
from app.store.artifacts import ArtifactRepository
from app.store.attempts import Claim, claim
from app.store.blobs import FolderBlobs
from app.store.events import EventRepository
from app.store.ids import new_id
from app.store.jobs import JobRepository
from app.store.models import Artifact, Attempt, Job
from app.store.session import Database
from app.store.tenancy.keys import ensure_tenant
from bitwright.events import Event
from bitwright.job_states import DeviceClass, JobStatus
from workers.supervise.attempt.attempt_runner import supervise
from workers.supervise.capacity import Capacity
from workers.supervise.context import WorkerContext

CPU = Capacity(
    device=DeviceClass.CPU,
    device_name=None,
    device_memory_bytes=None,
    host_memory_bytes=1 << 30,
    disk_bytes=1 << 30,
    disk_total_bytes=1 << 31,
)


def wait_for(condition: Callable[[], object], seconds: float = 60.0, what: str = "the condition") -> None:
    """Wait until `condition` is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come true within {seconds} s")
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """True if a process computes, i.e. exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def make_context(folder: Path, database: Database, **settings: object) -> WorkerContext:
    """A worker with its files under `folder`, whose attempts follow scripts."""
    values = {"data_dir": folder, "model_roots": (folder / "models",), "lease_seconds": 6, **settings}
    return WorkerContext(
        worker_id=f"test.{new_id('wrk')}",
        capacity=CPU,
        settings=Settings.model_validate(values),
        database=database,
        blobs=FolderBlobs(folder / "blobs"),
        attempt_module="tests.supervise.scripted_attempt",
    )


@dataclass
class Bench:
    """A database with one tenant, and a worker."""

    context: WorkerContext
    tenant_id: str
    model: Path

    @classmethod
    def make(cls, folder: Path, database: Database, **settings: object) -> "Bench":
        """A worker with its files under `folder`."""
        model = folder / "models" / "m"
        model.mkdir(parents=True)
        context = make_context(folder, database, **settings)
        with database.transaction() as session:
            tenant_id = ensure_tenant(session, new_id("tnt")).id
        return cls(context, tenant_id, model)

    def submit(self, script: str, **fields: object) -> str:
        """Queue a job whose attempts follow `script`; its id."""
        return self.submit_body(
            {
                **{
                    "model": str(self.model),
                    "method": "rtn",
                    "bits": 4,
                    "metadata": {"script": script},
                    "verify": "off",
                },
                **fields,
            }
        )

    def submit_body(self, body: Mapping[str, object]) -> str:
        """Queue a job; its id."""
        with self.context.database.transaction() as session:
            return JobRepository(session, self.tenant_id).add(JobRequest.parse(body)).id

    def claim(self) -> Claim:
        """Take the next job, waiting out a back-off."""
        found: list[Claim] = []

        def look() -> bool:
            found.extend(self._try_claim())
            return bool(found)

        wait_for(look, what="a claimable job")
        return found[0]

    def _try_claim(self) -> list[Claim]:
        with self.context.database.transaction() as session:
            claimed = claim(
                session,
                worker_id=self.context.worker_id,
                device_class=self.context.device,
                lease_seconds=self.context.settings.lease_seconds,
            )
        return [] if claimed is None else [claimed]

    def run(self) -> JobStatus | None:
        """Claim and supervise one attempt to its end."""
        return supervise(self.context, self.claim())

    def start(self) -> "Running":
        """Claim an attempt and supervise it in a thread."""
        return Running(self, self.claim())

    def job(self, job_id: str) -> Job:
        with self.context.database.reading() as session:
            return JobRepository(session, self.tenant_id).get(job_id)

    def attempts(self, job_id: str) -> list[Attempt]:
        with self.context.database.reading() as session:
            return list(JobRepository(session, self.tenant_id).attempts(job_id))

    def events(self, job_id: str) -> list[Event]:
        with self.context.database.reading() as session:
            return [stored.event for stored in EventRepository(session, self.tenant_id).page(job_id, 0, 1000)]

    def artifacts(self, job_id: str) -> list[Artifact]:
        with self.context.database.reading() as session:
            return list(ArtifactRepository(session, self.tenant_id).of_job(job_id))

    def cancel(self, job_id: str) -> None:
        with self.context.database.transaction() as session:
            JobRepository(session, self.tenant_id).cancel(job_id)

    def workspace(self, job_id: str) -> Path:
        return self.context.settings.workspace_dir / job_id

    def with_stopping(self, stopping: threading.Event) -> "Bench":
        return replace(self, context=replace(self.context, stopping=stopping))

    def log(self, job_id: str) -> list[dict[str, object]]:
        """The JSON lines of the job's attempt.log."""
        lines = (self.workspace(job_id) / "attempt.log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]


class Running:
    """A supervised attempt in a thread."""

    def __init__(self, bench: Bench, claimed: Claim) -> None:
        self.claim = claimed
        self._bench = bench
        self.status: JobStatus | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.status = supervise(self._bench.context, self.claim)

    def wait(self, seconds: float = 60.0) -> JobStatus | None:
        """The status after the attempt's end."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            raise TimeoutError("the supervisor did not end")
        return self.status

    def log_event(self, name: str) -> dict[str, object]:
        """The fields of the log event that the attempt wrote; waits for it."""
        found: list[dict[str, object]] = []

        def look() -> bool:
            events = self._bench.events(self.claim.job_id)
            found.extend(dict(event.fields) for event in events if event.type == "log" and event.event == name)
            return bool(found)

        wait_for(look, what=f"log event {name}")
        return found[0]
