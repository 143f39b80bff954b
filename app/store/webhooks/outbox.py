"""Messages put down for a tenant's endpoints in the transaction of what they tell: both are there, or neither is."""

import json
from collections.abc import Mapping, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.store.clock import now
from app.store.ids import new_id
from app.store.models import FineTuningJob
from app.store.webhooks.tables import WebhookDelivery, WebhookEndpoint
from bitwright.job_states import JobStatus

MAX_BODY_BYTES = 20_000
OPENAIS = {status: f"fine_tuning.job.{status.value}" for status in (JobStatus.SUCCEEDED, JobStatus.FAILED)}
OPENAIS[JobStatus.CANCELLED] = "fine_tuning.job.cancelled"
"""Messages that OpenAI's service sends of its jobs, sent here of those that came through its interface."""


def tell_of_job(
    session: Session, tenant_id: str, job_id: str, state: str, *, attempt: int, error: str | None = None
) -> None:
    """Put down that a job came into a state, for each endpoint that wants to know: ids and states, nothing else.

    state   a status, `paused` or `resumed`
    error   code of the error that it failed with
    """
    endpoints = _endpoints(session, tenant_id)
    if not endpoints:
        return
    status = JobStatus.QUEUED if state in ("paused", "resumed") else JobStatus(state)
    data = {"id": job_id, "status": status.value, "attempt": attempt, "error": error}
    _tell(session, endpoints, f"job.{state}", data)
    openais = OPENAIS.get(status)
    if openais is not None and any(openais in endpoint.events for endpoint in endpoints):
        query = select(FineTuningJob.job_id).where(FineTuningJob.job_id == job_id)
        if session.scalars(query).one_or_none() is not None:
            _tell(session, endpoints, openais, data)


def tell_test(session: Session, endpoint: WebhookEndpoint) -> WebhookDelivery:
    """Put down a message that tells nothing, for one endpoint."""
    (delivery,) = _put(session, [endpoint], "webhook.test", {"id": endpoint.id})
    return delivery


def _endpoints(session: Session, tenant_id: str) -> Sequence[WebhookEndpoint]:
    """The tenant's endpoints that are on, which nobody removes before this transaction ends."""
    ours = (WebhookEndpoint.tenant_id == tenant_id, WebhookEndpoint.disabled_at.is_(None))
    query = select(WebhookEndpoint).where(*ours).order_by(WebhookEndpoint.id)
    return session.scalars(query.with_for_update(read=True, key_share=True)).all()


def _tell(session: Session, endpoints: Sequence[WebhookEndpoint], kind: str, data: Mapping[str, object]) -> None:
    _put(session, [endpoint for endpoint in endpoints if kind in endpoint.events], kind, data)


def _put(
    session: Session, endpoints: Sequence[WebhookEndpoint], kind: str, data: Mapping[str, object]
) -> list[WebhookDelivery]:
    if not endpoints:
        return []
    message_id, at = new_id("msg"), session.scalars(select(now())).one()
    told = {name: value for name, value in data.items() if value is not None}
    body = {
        "id": message_id,
        "object": "event",
        "type": kind,
        "timestamp": at.isoformat(),
        "created_at": int(at.timestamp()),
        "data": told,
    }
    text = json.dumps(body)
    if len(text) > MAX_BODY_BYTES:
        raise ValueError(f"a message of {len(text)} bytes is longer than receivers take")
    deliveries = [
        WebhookDelivery(
            id=new_id("whd"),
            endpoint_id=endpoint.id,
            tenant_id=endpoint.tenant_id,
            message_id=message_id,
            type=kind,
            body=text,
            due_at=at,
        )
        for endpoint in endpoints
    ]
    session.add_all(deliveries)
    session.flush()
    return deliveries
