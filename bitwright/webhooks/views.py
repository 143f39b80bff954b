"""Webhook endpoints, the kinds of messages that they get, and the log of deliveries."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from bitwright.views import View
from bitwright.whole_numbers import with_whole_numbers

MessageType = Literal[
    "job.queued",
    "job.running",
    "job.paused",
    "job.resumed",
    "job.succeeded",
    "job.failed",
    "job.cancelled",
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
]
BY_DEFAULT: tuple[MessageType, ...] = ("job.succeeded", "job.failed", "job.cancelled")
RETRY_SECONDS: tuple[float, ...] = (0, 5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""Waits before each try of a message, each after the end of the one before."""
MAX_URL = 2048

Url = Annotated[
    str,
    Field(
        min_length=8,
        max_length=MAX_URL,
        pattern=r"^https?://",
        description="Where messages are sent by POST: https, on the public internet, unless the operator allows it.",
        examples=["https://example.org/hooks"],
    ),
]
Events = Annotated[tuple[MessageType, ...], Field(min_length=1, max_length=16, description="Messages that it gets.")]
Description = Annotated[str, Field(max_length=200, description="A note of your own.")]


class _Asked(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _take_whole_numbers(cls, body: Any) -> Any:
        return with_whole_numbers(body)


class WebhookRequest(_Asked):
    """Body of POST /v1/webhooks."""

    url: Url
    events: Events = BY_DEFAULT
    description: Description = ""


class WebhookChange(_Asked):
    """Body of PATCH /v1/webhooks/{id}; what is left out stays."""

    url: Url | None = None
    events: Events | None = None
    description: Description | None = None
    enabled: bool | None = Field(default=None, strict=True, description="Whether it gets messages.")


class SecretRotation(_Asked):
    """Body of POST /v1/webhooks/{id}/rotate."""

    overlap_seconds: int = Field(
        default=86_400, strict=True, ge=0, le=7 * 86_400, description="So long the old secret signs as well."
    )


class WebhookView(View):
    """A webhook endpoint."""

    id: str = Field(examples=["whe_01k6z3f8c2v9q4w7x5y1t0r8ab"])
    url: str
    events: list[str]
    description: str = ""
    enabled: bool
    disabled_at: datetime | None = None
    disabled_why: str | None = Field(default=None, description="`gone`: it answered 410. `owner`: it was switched off.")
    created_at: datetime


class NewWebhookView(WebhookView):
    """A webhook endpoint with its secret, which no other answer has."""

    secret: str = Field(description="`whsec_` and 32 bytes in base 64: what receivers check signatures with.")


class DeliveryAttemptView(View):
    """One try to deliver a message."""

    number: int
    at: datetime
    seconds: float
    status_code: int | None = None
    error: str | None = Field(default=None, description="Where there was no answer: why.")
    answer: str | None = Field(default=None, description="The first 4 kB of the receiver's answer.")


class DeliveryView(View):
    """A message on its way to an endpoint, or at its end."""

    id: str = Field(examples=["whd_01k6z3f8c2v9q4w7x5y1t0r8ab"])
    message_id: str = Field(description="`webhook-id` of every try and replay: by it a receiver knows what it has had.")
    type: str
    status: Literal["pending", "delivered", "failed"]
    attempts: int
    next_attempt_at: datetime | None = None
    created_at: datetime
    ended_at: datetime | None = None
    body: str = Field(description="As it is sent and signed.")
    log: list[DeliveryAttemptView] = Field(
        default_factory=list, description="Tries, first to last; of a single delivery only."
    )
