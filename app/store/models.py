"""The tables. Every row of a tenant carries `tenant_id`; workers and the sweep's lease belong to the service."""

from datetime import datetime
from typing import Any, cast

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Enum,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from app.store.clock import Instant, now
from bitwright.job_states import JobStatus

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

JsonObject = dict[str, Any]
"""Stored as text, never as PostgreSQL's jsonb: the order of `modules.overrides` has a meaning, and jsonb loses it."""

Status = Enum(
    JobStatus,
    native_enum=False,
    length=16,
    values_callable=lambda statuses: [status.value for status in statuses],
    create_constraint=True,
    name="status",
)
START_LENGTH = 256
MODEL_START = f"substr(model, 1, {START_LENGTH})"
"""Part of a model that its index holds: a path may be longer than an entry of a B-tree of PostgreSQL."""
Id = String(30)
Sha256 = String(64)


def _where(condition: str) -> dict[str, Any]:
    """Options of an index that holds only the rows of this condition."""
    return {"postgresql_where": text(condition), "sqlite_where": text(condition)}


class Base(DeclarativeBase):
    """Registry of the tables, with names for every constraint so that migrations can address them."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {  # noqa: RUF012
        datetime: Instant(),
        JsonObject: JSON(none_as_null=True),
        list[str]: JSON(none_as_null=True),
    }


def table_of(kind: type[Base]) -> Table:
    """The table of a kind of row, for statements that make rows and no objects of them."""
    return cast(Table, kind.__table__)


class Tenant(Base):
    """Owner of jobs, keys, artifacts and uploads."""

    __tablename__ = "tenant"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    name: Mapped[str] = mapped_column(String(200), unique=True)
    created_at: Mapped[datetime] = mapped_column(default=now())
    suspended_at: Mapped[datetime | None]
    """From then on its keys are refused and no job of it begins."""
    quotas: Mapped[JsonObject | None]
    """Its own, by the names of `bitwright.tenancy.Quotas`; what is not there is the service's."""
    model_roots: Mapped[list[str] | None]
    allowed_models: Mapped[list[str] | None]
    served_at: Mapped[datetime | None]
    """Time at which a worker last took one of its jobs: of two with equally many running, the other goes first."""


class ApiKey(Base):
    """A key, known only by the sha256 of its text: 190 random bits need no slow hash."""

    __tablename__ = "api_key"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenant.id", ondelete="CASCADE"), index=True)
    name: Mapped[str] = mapped_column(String(200))
    digest: Mapped[str] = mapped_column(Sha256, unique=True)
    start: Mapped[str] = mapped_column(String(8))
    """The first characters, by which people distinguish keys."""
    scopes: Mapped[list[str]]
    created_at: Mapped[datetime] = mapped_column(default=now())
    revoked_at: Mapped[datetime | None]
    expires_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    """Written at most once a minute."""
    replaces: Mapped[str | None] = mapped_column(Id)
    """The key that it was rotated from."""


class PageSession(Base):
    """A browser that has shown a key: it may open pages as that key's owner until a time, or the key's end.

    The cookie's text is known only by its sha256.
    """

    __tablename__ = "page_session"

    digest: Mapped[str] = mapped_column(Sha256, primary_key=True)
    key_id: Mapped[str] = mapped_column(Id, ForeignKey("api_key.id", ondelete="CASCADE"), index=True)
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenant.id", ondelete="CASCADE"), index=True)
    expires_at: Mapped[datetime] = mapped_column(index=True)
    created_at: Mapped[datetime] = mapped_column(default=now())


class Job(Base):
    """A job's present state. Its history is in `Event`, its runs are in `Attempt`."""

    __tablename__ = "job"
    __table_args__ = (
        CheckConstraint("(status = 'running') = (lease_expires_at IS NOT NULL)", name="lease_while_running"),
        Index("ix_job_tenant_id_id", "tenant_id", "id"),
        Index("ix_job_claim", "status", "device", "priority", "id"),
        Index("ix_job_lease", "lease_expires_at", postgresql_where=text("lease_expires_at IS NOT NULL")),
        # For lists: each ends with what they are ordered by, and a status is one of five.
        Index("ix_job_status", "tenant_id", "status", "id"),
        Index("ix_job_method", "tenant_id", "method", "status", "id"),
        Index("ix_job_recipe", "tenant_id", "recipe", "status", "id", **_where("recipe IS NOT NULL")),
        Index("ix_job_model", "tenant_id", text(MODEL_START), "status", "id"),
        Index("ix_job_finished", "finished_at", **_where("finished_at IS NOT NULL")),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenant.id", ondelete="CASCADE"))
    status: Mapped[JobStatus] = mapped_column(Status)
    request: Mapped[JsonObject]
    """The full form of the request."""
    method: Mapped[str] = mapped_column(String(64))
    recipe: Mapped[str | None] = mapped_column(String(64))
    """The request's `method`, where that is short for more."""
    model: Mapped[str] = mapped_column(Text)
    """Shorthand of the model's source."""
    device: Mapped[str] = mapped_column(String(8))
    """`any`, `cpu` or `cuda`."""
    priority: Mapped[int]
    attempt: Mapped[int] = mapped_column(default=0)
    """Number of the latest attempt; the fence of every write for it."""
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    held: Mapped[bool] = mapped_column(default=False, server_default=false())
    """Its owner paused it: no claim while it is queued, and the worker that runs it is to give it back."""
    progress: Mapped[JsonObject | None]
    """The latest `ProgressEvent`."""
    error: Mapped[JsonObject | None]
    """`ErrorData` of the attempt that ended last, while the job is not running or succeeded."""
    report: Mapped[JsonObject | None]
    created_at: Mapped[datetime] = mapped_column(default=now())
    available_at: Mapped[datetime] = mapped_column(default=now())
    """No claim before this time: the back-off after a fault."""
    started_at: Mapped[datetime | None]
    """Start of the first attempt."""
    finished_at: Mapped[datetime | None]
    updated_at: Mapped[datetime] = mapped_column(default=now())
    last_event: Mapped[int] = mapped_column(default=0)
    """Sequence number of the latest event."""
    worker_id: Mapped[str | None] = mapped_column(String(200))
    """The worker that holds the lease; None while no attempt runs."""
    lease_expires_at: Mapped[datetime | None]
    micro_batch_divisor: Mapped[int] = mapped_column(default=1)
    blocks_done: Mapped[int] = mapped_column(default=0)
    """Blocks that any attempt has made durable."""
    fruitless_attempts: Mapped[int] = mapped_column(default=0)
    """Consecutive attempts, the running one included, that made no new block durable."""
    traceparent: Mapped[str | None] = mapped_column(String(55))
    """Place of the request that made the job in its trace, where one is kept."""

    replayed = False
    """True on the object that `JobRepository.add` returns for a repeated Idempotency-Key. Not a column."""

    @property
    def metadata_(self) -> dict[str, str]:
        """The caller's own labels."""
        return dict(self.request.get("metadata", {}))


class JobLabel(Base):
    """One entry of a request's metadata, for lists to filter by with one index on every database."""

    __tablename__ = "job_label"
    __table_args__ = (Index("ix_job_label_value", "tenant_id", "name", "value", "job_id"),)

    job_id: Mapped[str] = mapped_column(Id, ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(String(512))
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenant.id", ondelete="CASCADE"))


class JobName(Base):
    """The name that a tenant gave to a job: that of a repository, for clients of a Hub."""

    __tablename__ = "job_name"

    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenant.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(96), primary_key=True)
    job_id: Mapped[str] = mapped_column(Id, ForeignKey("job.id", ondelete="CASCADE"), index=True, unique=True)


class Publication(Base):
    """The result of a job on its way to the Hub."""

    __tablename__ = "publication"
    __table_args__ = (Index("ix_publication_open", "status", "available_at", **_where("finished_at IS NULL")),)

    job_id: Mapped[str] = mapped_column(Id, ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenant.id", ondelete="CASCADE"), index=True)
    status: Mapped[str] = mapped_column(String(16))
    """A `PublicationStatus`."""
    request: Mapped[JsonObject]
    """`Publish`."""
    attempt: Mapped[int] = mapped_column(default=0)
    """Number of the latest attempt; the fence of every write for it."""
    answer: Mapped[JsonObject | None]
    """The Hub's: `url` and `commit`."""
    error: Mapped[JsonObject | None]
    """`ErrorData` of the attempt that ended last."""
    created_at: Mapped[datetime] = mapped_column(default=now())
    updated_at: Mapped[datetime] = mapped_column(default=now())
    available_at: Mapped[datetime] = mapped_column(default=now())
    """No attempt before this time."""
    finished_at: Mapped[datetime | None]
    worker_id: Mapped[str | None] = mapped_column(String(200))
    lease_expires_at: Mapped[datetime | None]


class FineTuningJob(Base):
    """A job that came through OpenAI's interface, with what was asked there."""

    __tablename__ = "fine_tuning_job"
    __table_args__ = (Index("ix_fine_tuning_job_tenant_id_job_id", "tenant_id", "job_id"),)

    job_id: Mapped[str] = mapped_column(Id, ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenant.id", ondelete="CASCADE"))
    asked: Mapped[JsonObject]


class JobUpload(Base):
    """An upload that a job reads; it cannot be deleted while the job may still run."""

    __tablename__ = "job_upload"

    job_id: Mapped[str] = mapped_column(Id, ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    upload_id: Mapped[str] = mapped_column(
        Id, ForeignKey("upload.id", ondelete="CASCADE"), primary_key=True, index=True
    )
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenant.id", ondelete="CASCADE"))


class Attempt(Base):
    """One run of a job by one worker."""

    __tablename__ = "attempt"

    job_id: Mapped[str] = mapped_column(Id, ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenant.id", ondelete="CASCADE"))
    worker_id: Mapped[str] = mapped_column(String(200))
    status: Mapped[JobStatus] = mapped_column(Status)
    """running, or how it ended; queued if it was given back unfinished."""
    started_at: Mapped[datetime] = mapped_column(default=now())
    finished_at: Mapped[datetime | None]
    error: Mapped[JsonObject | None]
    blocks_done: Mapped[int] = mapped_column(default=0)
    device_class: Mapped[str | None] = mapped_column(String(8))
    """`cpu` or `cuda`, of its worker."""
    devices: Mapped[int | None]
    """GPUs, or processes on a CPU, that the worker gives to it."""
    price_micros: Mapped[int | None] = mapped_column(BigInteger)
    """Millionths of the currency for an hour of one device, when it began."""


class Event(Base):
    """An event of a job, numbered from 1 without gaps."""

    __tablename__ = "event"

    job_id: Mapped[str] = mapped_column(Id, ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenant.id", ondelete="CASCADE"))
    attempt: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(default=now())
    data: Mapped[JsonObject]


class Artifact(Base):
    """One file of a checkpoint that a job made; its bytes are the blob of that hash."""

    __tablename__ = "artifact"
    __table_args__ = (
        UniqueConstraint("job_id", "format", "path"),
        Index("ix_artifact_tenant_id_size", "tenant_id", "size"),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenant.id", ondelete="CASCADE"))
    job_id: Mapped[str] = mapped_column(Id, ForeignKey("job.id", ondelete="CASCADE"))
    format: Mapped[str] = mapped_column(String(64))
    path: Mapped[str] = mapped_column(String(1024))
    sha256: Mapped[str] = mapped_column(Sha256, index=True)
    size: Mapped[int] = mapped_column(BigInteger)
    media_type: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default=now())


class KeptFile(Base):
    """One file of what an unfinished job has finished so far, for another machine; its bytes are the blob of that hash.

    `path` lies in the workspace's `state`. All rows of a job are of one moment of one attempt.
    """

    __tablename__ = "kept_file"

    job_id: Mapped[str] = mapped_column(Id, ForeignKey("job.id", ondelete="CASCADE"), primary_key=True)
    path: Mapped[str] = mapped_column(String(512), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenant.id", ondelete="CASCADE"), index=True)
    attempt: Mapped[int]
    sha256: Mapped[str] = mapped_column(Sha256, index=True)
    size: Mapped[int] = mapped_column(BigInteger)
    kept_at: Mapped[datetime] = mapped_column(default=now())


class Upload(Base):
    """Files that a caller sends: a checkpoint, or one JSONL text."""

    __tablename__ = "upload"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenant.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[datetime] = mapped_column(default=now())
    expires_at: Mapped[datetime]
    """An upload that is not complete by then is removed."""
    completed_at: Mapped[datetime | None]
    files: Mapped[list["UploadFile"]] = relationship(order_by="UploadFile.position", lazy="selectin", viewonly=True)

    replayed = False
    """True on the object that `UploadRepository.create` returns for a repeated Idempotency-Key. Not a column."""

    @property
    def complete(self) -> bool:
        """True if every file has arrived and was checked."""
        return self.completed_at is not None

    @property
    def status(self) -> str:
        """`open` or `complete`."""
        return "complete" if self.complete else "open"


class UploadFile(Base):
    """One file of an upload and how many of its bytes have arrived."""

    __tablename__ = "upload_file"
    __table_args__ = (Index("ix_upload_file_tenant_id_size", "tenant_id", "size"),)

    upload_id: Mapped[str] = mapped_column(Id, ForeignKey("upload.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(1024), primary_key=True)
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenant.id", ondelete="CASCADE"))
    position: Mapped[int]
    size: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(Sha256, index=True)
    offset: Mapped[int] = mapped_column("received", BigInteger, default=0)
    """Bytes received so far; the next part starts here."""


class Worker(Base):
    """A process that runs jobs, and what it can hold."""

    __tablename__ = "worker"

    id: Mapped[str] = mapped_column(String(200), primary_key=True)
    device_class: Mapped[str] = mapped_column(String(8))
    capacity: Mapped[JsonObject]
    """Its capacity: device name, memory and disk in bytes, versions."""
    started_at: Mapped[datetime] = mapped_column(default=now())
    last_seen_at: Mapped[datetime] = mapped_column(default=now())


class SweepLease(Base):
    """The lease of the one sweep that is at work."""

    __tablename__ = "sweep_lease"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    holder: Mapped[str] = mapped_column(String(200))
    expires_at: Mapped[datetime]


class IdempotencyKey(Base):
    """A caller's Idempotency-Key and what it made: a job or an upload."""

    __tablename__ = "idempotency_key"
    __table_args__ = (
        # The key is taken before what it stands for is written, so the references are checked at commit.
        ForeignKeyConstraint(["job_id"], ["job.id"], ondelete="CASCADE", deferrable=True, initially="DEFERRED"),
        ForeignKeyConstraint(["upload_id"], ["upload.id"], ondelete="CASCADE", deferrable=True, initially="DEFERRED"),
        CheckConstraint("(job_id IS NULL) != (upload_id IS NULL)", name="stands_for_one"),
    )

    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenant.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(Sha256)
    job_id: Mapped[str | None] = mapped_column(Id, index=True)
    upload_id: Mapped[str | None] = mapped_column(Id, index=True)
    created_at: Mapped[datetime] = mapped_column(default=now())
    expires_at: Mapped[datetime] = mapped_column(index=True)


class HubToken(Base):
    """A Hub token of a tenant, or of one job until its end; only ever stored encrypted."""

    __tablename__ = "hub_token"

    owner: Mapped[str] = mapped_column(Id, primary_key=True)
    """Id of the tenant or of the job."""
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenant.id", ondelete="CASCADE"), index=True)
    job_id: Mapped[str | None] = mapped_column(Id, ForeignKey("job.id", ondelete="CASCADE"), index=True)
    sealed: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(default=now())


class RateWindow(Base):
    """A tenant's use of a rate in the window that runs."""

    __tablename__ = "rate_window"

    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenant.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    used: Mapped[int]
    ends_at: Mapped[datetime]


class UsageMonth(Base):
    """A tenant's use within a month; it outlives the jobs that it was used for."""

    __tablename__ = "usage_month"

    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenant.id", ondelete="CASCADE"), primary_key=True)
    month: Mapped[str] = mapped_column(String(7), primary_key=True)
    """Year and month in UTC, `2026-11`."""
    jobs: Mapped[int] = mapped_column(default=0)
    gpu_seconds: Mapped[float] = mapped_column(default=0.0)
    cpu_seconds: Mapped[float] = mapped_column(default=0.0)
    uploaded_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    stored_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    downloaded_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    cost_micros: Mapped[int | None] = mapped_column(BigInteger)
    """Millionths of the currency; None if no attempt had a price."""


class AuditEntry(Base):
    """Something that somebody did. A trigger refuses any change of a row; it outlives whatever it names."""

    __tablename__ = "audit"
    __table_args__ = (Index("ix_audit_tenant_id_id", "tenant_id", "id"),)

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    at: Mapped[datetime] = mapped_column(default=now(), index=True)
    tenant_id: Mapped[str] = mapped_column(Id)
    key_id: Mapped[str | None] = mapped_column(Id)
    action: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(64))
    request_id: Mapped[str | None] = mapped_column(String(64))
    details: Mapped[JsonObject | None]
