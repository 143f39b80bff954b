"""Deliveries in the sender's hands: taken when they are due, and what came of each try."""

from collections.abc import Collection
from dataclasses import dataclass, field

import structlog
from sqlalchemy import ColumnElement, Select, delete, func, select, update
from sqlalchemy.orm import Session

from app.store.clock import now, seconds_from_now
from app.store.tenancy.hub_tokens import Vault
from app.store.webhooks.tables import WebhookAttempt, WebhookDelivery, WebhookEndpoint
from bitwright.errors import StorageError
from bitwright.webhooks.views import RETRY_SECONDS

LOST_SECONDS = 60.0
"""A try that has told nothing for so long was that of a sender that ended; the delivery is due again."""
AT_ONCE_OF_ENDPOINT = 2
LOOKED_AT = 200
GONE = 410
LONGEST_WAIT = 86_400.0
REMOVED_AT_ONCE = 5000

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Sending:
    """A message to send now. The body and the secrets stay out of any text made of this."""

    delivery_id: str
    endpoint_id: str
    tenant_id: str
    message_id: str
    attempt: int
    tries: int
    url: str
    body: str = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class Outcome:
    """End of a try: the receiver's answer, or the error that there was instead."""

    seconds: float
    status_code: int | None = None
    error: str | None = None
    answer: str | None = None
    retry_after: float | None = None

    @property
    def delivered(self) -> bool:
        """True for an answer of 200 to 299."""
        return self.status_code is not None and 200 <= self.status_code < 300


def anything_due(session: Session) -> bool:
    """True if a delivery is due. It writes and locks nothing."""
    return session.scalars(_due().limit(1)).first() is not None


def take_due(session: Session, vault: Vault, *, limit: int, busy: Collection[str] = ()) -> list[Sending]:
    """Up to `limit` messages to send now, oldest first, few of each endpoint; nobody else gets them meanwhile.

    busy   endpoints of messages that the sender is at, each as often
    """
    query = _due().order_by(WebhookDelivery.due_at, WebhookDelivery.id).limit(LOOKED_AT)
    query = query.with_for_update(of=WebhookDelivery, skip_locked=True)
    counts = {endpoint: list(busy).count(endpoint) for endpoint in busy}
    taken: list[Sending] = []
    for delivery, endpoint, before in session.execute(query):
        if len(taken) == limit:
            break
        if counts.get(endpoint.id, 0) >= AT_ONCE_OF_ENDPOINT:
            continue
        delivery.due_at = session.scalars(select(seconds_from_now(LOST_SECONDS))).one()
        sealed = [endpoint.sealed, *([endpoint.sealed_before] if before and endpoint.sealed_before else [])]
        try:
            secrets = tuple(vault.open(one) for one in sealed)
        except StorageError as error:
            log.error("webhook_secret_not_opened", webhook_id=endpoint.id, detail=error.detail)
            continue  # others need not wait for the operator to bring the key back
        counts[endpoint.id] = counts.get(endpoint.id, 0) + 1
        delivery.attempts, delivery.tries = delivery.attempts + 1, delivery.tries + 1
        taken.append(
            Sending(
                delivery_id=delivery.id,
                endpoint_id=endpoint.id,
                tenant_id=delivery.tenant_id,
                message_id=delivery.message_id,
                attempt=delivery.attempts,
                tries=delivery.tries,
                url=endpoint.url,
                body=delivery.body,
                secrets=secrets,
            )
        )
    session.flush()
    return taken


def note(session: Session, sent: Sending, outcome: Outcome) -> None:
    """Write what came of a try, unless another one has begun since: the next time, or the end."""
    if outcome.status_code == GONE:
        # Before any delivery: two tries that meet a 410 would wait for each other's.
        endpoint = select(WebhookEndpoint.id).where(WebhookEndpoint.id == sent.endpoint_id)
        session.execute(endpoint.with_for_update(key_share=True))
    this = (WebhookDelivery.id == sent.delivery_id, WebhookDelivery.attempts == sent.attempt)
    delivery = session.scalars(select(WebhookDelivery).where(*this).with_for_update()).one_or_none()
    if delivery is None or delivery.status != "pending":
        return
    session.add(
        WebhookAttempt(
            delivery_id=delivery.id,
            number=sent.attempt,
            tenant_id=sent.tenant_id,
            seconds=outcome.seconds,
            status_code=outcome.status_code,
            error=None if outcome.error is None else outcome.error[:200],
            answer=outcome.answer,
        )
    )
    wait = None if outcome.delivered or outcome.status_code == GONE else wait_after(sent.tries, outcome.retry_after)
    if wait is None:
        delivery.status = "delivered" if outcome.delivered else "failed"
        delivery.due_at, delivery.ended_at = None, session.scalars(select(now())).one()
    else:
        delivery.due_at = session.scalars(select(seconds_from_now(wait))).one()
    session.flush()
    if outcome.status_code == GONE:
        _switch_off(session, sent.endpoint_id)


def wait_after(tries: int, retry_after: float | None = None) -> float | None:
    """Seconds until the next try, after so many that failed; None after the last one."""
    if tries >= len(RETRY_SECONDS):
        return None
    return max(RETRY_SECONDS[tries], min(retry_after or 0.0, LONGEST_WAIT))


def remove_old_deliveries(session: Session, *, older_than_seconds: float) -> int:
    """Remove up to `REMOVED_AT_ONCE` ended deliveries of so long ago; how many there were."""
    old = (WebhookDelivery.created_at <= seconds_from_now(-older_than_seconds), WebhookDelivery.due_at.is_(None))
    some = select(WebhookDelivery.id).where(*old).limit(REMOVED_AT_ONCE)
    removed = delete(WebhookDelivery).where(WebhookDelivery.id.in_(some)).returning(WebhookDelivery.id)
    return len(session.scalars(removed).all())


def _switch_off(session: Session, endpoint_id: str) -> None:
    """End an endpoint that is gone, and all that waits for it."""
    off = {"disabled_at": func.coalesce(WebhookEndpoint.disabled_at, now()), "disabled_why": "gone"}
    session.execute(update(WebhookEndpoint).where(WebhookEndpoint.id == endpoint_id).values(off))
    waiting = (WebhookDelivery.endpoint_id == endpoint_id, WebhookDelivery.status == "pending")
    ended = {"status": "failed", "due_at": None, "ended_at": now()}
    session.execute(update(WebhookDelivery).where(*waiting).values(ended))


def _due() -> Select[WebhookDelivery, WebhookEndpoint, bool]:
    before: ColumnElement[bool] = func.coalesce(WebhookEndpoint.before_until > now(), False)
    return (
        select(WebhookDelivery, WebhookEndpoint, before)
        .join(WebhookEndpoint, WebhookEndpoint.id == WebhookDelivery.endpoint_id)
        .where(WebhookDelivery.due_at <= now(), WebhookEndpoint.disabled_at.is_(None))
    )
