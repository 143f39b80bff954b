"""Tenants, their keys, quotas, use and audit trail, as types that the API and the client share."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, SecretStr

from bitwright.money import Money
from bitwright.views import View
from bitwright.whole_numbers import with_whole_numbers

MAX_OVERLAP_SECONDS = 30 * 86_400
Whole = Annotated[int, BeforeValidator(with_whole_numbers)]
"""An integer, also one that JSON writes with a point."""
Count = Annotated[Whole, Field(strict=True, ge=0, le=10**9)]
Bytes = Annotated[Whole, Field(strict=True, ge=0, le=1 << 60)]
ScopeName = Literal["read", "submit", "admin"]
TOKEN_PATTERN = "^[!-~]{1,500}$"  # noqa: S105 (of any token)
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.@-]{0,99}$"


class Quotas(View):
    """Limits of a tenant. null: as the service's `BITWRIGHT_TENANT_QUOTAS` says, else none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    queued_jobs: Count | None = Field(default=None, description="Jobs that wait; one more is refused.")
    running_jobs: Count | None = Field(default=None, description="Jobs that run; more of them wait.")
    storage_bytes: Bytes | None = Field(
        default=None, description="Bytes of artifacts and uploads together, announced ones included."
    )
    upload_bytes: Bytes | None = Field(default=None, description="Bytes of one upload.")
    uploads: Count | None = Field(default=None, description="Uploads, open or complete.")
    streams: Count | None = Field(default=None, description="Event streams that one process serves it.")
    posts_per_minute: Count | None = Field(default=None, description="POST requests within a minute.")
    max_priority: Annotated[Whole, Field(strict=True, ge=-100, le=100)] | None = Field(
        default=None, description="Highest priority of a job."
    )

    def over(self, defaults: "Quotas") -> "Quotas":
        """These, and where one is null the default."""
        own = self.model_dump(exclude_none=True)
        return defaults.model_copy(update=own)


class TenantRequest(View):
    """Body of POST /v1/admin/tenants."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=NAME, description="Unique: letters, digits, dots, dashes, underscores and @.")
    quotas: Quotas = Quotas()
    model_roots: list[str] | None = Field(
        default=None,
        max_length=64,
        description="Folders below `BITWRIGHT_MODEL_ROOTS` that this tenant may read; null: all of them, []: none.",
    )
    allowed_models: list[Annotated[str, Field(min_length=1, max_length=300)]] | None = Field(
        default=None,
        max_length=1000,
        description="Patterns of the models that it may use, as lists show them: `org/*`, `org/model@REVISION`, "
        "`/models/*`, `upl_*` for uploads; null: all.",
    )


class TenantChange(View):
    """Body of PATCH /v1/admin/tenants/{tenant_id}: what is left out stays."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quotas: Quotas | None = Field(default=None, description="Those given are set, null ones to the service's default.")
    model_roots: list[str] | None = Field(default=None, max_length=64)
    allowed_models: list[Annotated[str, Field(min_length=1, max_length=300)]] | None = Field(
        default=None, max_length=1000
    )
    suspended: bool | None = Field(
        default=None, description="true: its keys are refused and its queued jobs wait; false: as before."
    )


class TenantView(View):
    """A tenant as an operator sees it."""

    id: str
    name: str
    created_at: datetime
    suspended_at: datetime | None = None
    quotas: Quotas = Field(description="Its own; those that are null are the service's.")
    model_roots: list[str] | None = None
    allowed_models: list[str] | None = None
    has_hub_token: bool = Field(description="Whether a Hub token of its own is kept; it is never shown.")


class HubTokenRequest(View):
    """Body of PUT /v1/admin/tenants/{tenant_id}/hub-token."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    token: SecretStr = Field(
        description="One word of up to 500 printable ASCII characters.", json_schema_extra={"pattern": TOKEN_PATTERN}
    )


class KeyRequest(View):
    """Body of POST /v1/admin/tenants/{tenant_id}/keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$", description="What the key is for.")
    scopes: list[ScopeName] = Field(default=["submit"], min_length=1, max_length=3)
    expires_in_days: Annotated[float, Field(gt=0, le=3650, allow_inf_nan=False)] | None = Field(
        default=None, description="null: it never expires."
    )


class RotationRequest(View):
    """Body of POST /v1/admin/tenants/{tenant_id}/keys/{key_id}/rotate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    overlap_seconds: Whole = Field(
        default=86_400, strict=True, ge=0, le=MAX_OVERLAP_SECONDS, description="So long the old key is still valid."
    )


class KeyView(View):
    """An API key without its text."""

    id: str
    name: str
    start: str = Field(description="Its first characters.")
    scopes: list[str]
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = Field(default=None, description="To within about a minute.")
    replaces: str | None = Field(default=None, description="Id of the key that it was rotated from.")


class NewKeyView(KeyView):
    """A key that was just made."""

    key: str = Field(description="Its text, which cannot be had again.")


class AuditView(View):
    """Something that somebody did."""

    id: str
    at: datetime
    tenant_id: str
    key_id: str | None = Field(default=None, description="The key that asked; null: the operator's command line.")
    action: str = Field(examples=["job.submitted", "artifact.downloaded", "key.rotated"])
    subject: str = Field(description="Id of what it was done to.")
    request_id: str | None = None
    details: dict[str, str | int | float | bool | None] = Field(default_factory=dict)


class MonthView(View):
    """A tenant's use within a month (UTC)."""

    month: str = Field(examples=["2026-11"])
    jobs: int = Field(description="Jobs that ended; one that was retried ends again.")
    gpu_seconds: float = Field(
        description="Time of attempts times their GPUs; attempts that ended by a fault of the service are not counted."
    )
    cpu_seconds: float = Field(description="The same of attempts on workers without a GPU.")
    uploaded_bytes: int
    stored_bytes: int = Field(description="Bytes of artifacts that were made.")
    downloaded_bytes: int = Field(description="Bytes of artifacts that were sent, to within a minute.")
    cost: Money | None = Field(default=None, description="By the price when each attempt began; null: there is none.")


class UsedView(View):
    """Use of the quotas now."""

    queued_jobs: int
    running_jobs: int
    storage_bytes: int
    uploads: int


class UsageView(View):
    """Quotas of a tenant, what is used of them, and its months, newest first."""

    tenant_id: str
    tenant: str
    quotas: Quotas = Field(description="In force: its own over the service's; null: no limit.")
    used: UsedView
    months: list[MonthView]
