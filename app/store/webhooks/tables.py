"""Tables of webhooks."""

from datetime import datetime

from sqlalchemy import ForeignKey, Index, String, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from app.store.clock import now
from app.store.models import Base, Id


class WebhookEndpoint(Base):
    """An address that a tenant's messages go to. Its secret is only ever stored encrypted."""

    __tablename__ = "webhook_endpoint"

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenant.id", ondelete="CASCADE"), index=True)
    url: Mapped[str] = mapped_column(Text)
    events: Mapped[list[str]]
    description: Mapped[str] = mapped_column(String(200), default="")
    sealed: Mapped[str] = mapped_column(Text)
    sealed_before: Mapped[str | None] = mapped_column(Text)
    """The secret before the last rotation, which signs as well until `before_until`."""
    before_until: Mapped[datetime | None]
    disabled_at: Mapped[datetime | None]
    disabled_why: Mapped[str | None] = mapped_column(String(16))
    """`gone`: it answered 410; `owner`: its owner switched it off."""
    created_at: Mapped[datetime] = mapped_column(default=now())


class WebhookDelivery(Base):
    """A message on its way to one endpoint."""

    __tablename__ = "webhook_delivery"
    __table_args__ = (
        Index("ix_webhook_delivery_endpoint_id_id", "endpoint_id", "id"),
        Index(
            "ix_webhook_delivery_due",
            "due_at",
            postgresql_where=text("due_at IS NOT NULL"),
            sqlite_where=text("due_at IS NOT NULL"),
        ),
    )

    id: Mapped[str] = mapped_column(Id, primary_key=True)
    endpoint_id: Mapped[str] = mapped_column(Id, ForeignKey("webhook_endpoint.id", ondelete="CASCADE"))
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenant.id", ondelete="CASCADE"), index=True)
    message_id: Mapped[str] = mapped_column(Id)
    """The same for every endpoint, every try and every replay: by it a receiver knows what it has had."""
    type: Mapped[str] = mapped_column(String(64))
    body: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(String(16), default="pending")
    """`pending`, `delivered` or `failed`."""
    attempts: Mapped[int] = mapped_column(default=0)
    """Number of tries so far; the fence of what is written of one."""
    tries: Mapped[int] = mapped_column(default=0)
    """Of them, those since the last replay."""
    due_at: Mapped[datetime | None]
    """Time of the next try; while one runs, the time from which it counts as lost."""
    created_at: Mapped[datetime] = mapped_column(default=now(), index=True)
    ended_at: Mapped[datetime | None]


class WebhookAttempt(Base):
    """One try to deliver a message."""

    __tablename__ = "webhook_attempt"

    delivery_id: Mapped[str] = mapped_column(
        Id, ForeignKey("webhook_delivery.id", ondelete="CASCADE"), primary_key=True
    )
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    tenant_id: Mapped[str] = mapped_column(Id, ForeignKey("tenant.id", ondelete="CASCADE"), index=True)
    at: Mapped[datetime] = mapped_column(default=now())
    seconds: Mapped[float]
    status_code: Mapped[int | None]
    error: Mapped[str | None] = mapped_column(String(200))
    answer: Mapped[str | None] = mapped_column(Text)
    """The first 4 kB of what the receiver said."""
