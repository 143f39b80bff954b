"""Admission of a tenant's requests: its rate, its quotas, its models; and the caller as the audit log names it."""

from fnmatch import fnmatchcase

import structlog
from fastapi import Request
from sqlalchemy.orm import Session

from app.api.tenancy.limit_headers import Limit, tell_limit
from app.domain.access import Principal
from app.domain.request.job_request import JobRequest
from app.domain.request.sources import HubModel
from app.settings import Settings
from app.store.jobs import model_label
from app.store.session import Database
from app.store.tenancy.audit import Actor
from app.store.tenancy.quotas import POSTS, WINDOW_SECONDS, require_queue_room, require_storage, spend_post
from app.store.tenancy.tenants import Policy
from bitwright.errors import FieldProblem, InvalidRequest, SourceForbidden

NO_ROOM = ("rate_limit_exceeded", "queued_jobs_exceeded", "storage_exceeded")
"""Codes of a submission for which the tenant has no room."""


def actor(principal: Principal) -> Actor:
    """The caller with its request's id, which the log has bound."""
    bound = structlog.contextvars.get_contextvars().get("request_id")
    return Actor(principal.tenant_id, principal.key_id, None if bound is None else str(bound))


def posts_per_minute(request: Request, principal: Principal, settings: Settings) -> int | None:
    """The rate that a request counts for; None if it is no POST, or the tenant has no rate."""
    if request.method != "POST":
        return None
    own = principal.quotas.posts_per_minute
    return settings.tenant_quotas.posts_per_minute if own is None else own


def count_post(request: Request, principal: Principal, per_minute: int, database: Database) -> None:
    """Count a POST request of a tenant that has a rate; its answer tells what is left.

    Raises:
        RateLimitExceeded: nothing is left.
    """
    with database.transaction() as session:
        spent = spend_post(session, principal.tenant_id, per_minute)
    limit = Limit(POSTS, per_minute, spent.remaining, None, WINDOW_SECONDS, spent.seconds)
    tell_limit(request.scope, limit)


def require_allowed(policy: Policy, request: JobRequest) -> None:
    """Check what the tenant's policy says of a request by itself.

    Raises:
        SourceForbidden: the model is none that it may use.
        InvalidRequest: the priority is higher than it may be.
    """
    require_allowed_priority(policy, request)
    if policy.allowed_models is not None and not is_allowed(request, policy.allowed_models):
        hint = "ask the operator which models your tenant may use"
        label = model_label(request.model)
        raise SourceForbidden("the tenant may not use this model", field="model", value=label, hint=hint)


def require_allowed_priority(policy: Policy, request: JobRequest) -> None:
    """Check a job's priority.

    Raises:
        InvalidRequest: it is higher than the tenant's may be.
    """
    highest = policy.quotas.max_priority
    if highest is not None and request.priority > highest:
        detail = f"the tenant's jobs have a priority of {highest} at the most"
        problem = FieldProblem(field="priority", code="out_of_range", detail=detail, value=request.priority)
        raise InvalidRequest(f"priority: {detail}", field="priority", value=request.priority, errors=(problem,))


def is_allowed(request: JobRequest, patterns: tuple[str, ...]) -> bool:
    """True if a pattern matches the model as lists show it, or a Hub model's `id@revision`."""
    names = [model_label(request.model)]
    if isinstance(request.model, HubModel):
        names.append(f"{request.model.id}@{request.model.revision}")
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def require_job_room(session: Session, tenant_id: str, policy: Policy) -> int | None:
    """Check in the transaction that queues a job that there is room for it; the room that is left then, if it is known.

    Raises:
        QueuedJobsExceeded, StorageExceeded: there is none.
    """
    require_storage(session, tenant_id, policy.quotas)
    return require_queue_room(session, tenant_id, policy.quotas)
