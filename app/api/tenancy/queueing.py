"""A job queued for a tenant: within its quotas, in the audit log, with its Hub token sealed, all in one transaction."""

from fastapi import Request
from sqlalchemy.orm import Session

from app.api.tenancy.admission import actor, require_job_room
from app.api.tenancy.known_keys import KnownKeys
from app.api.tenancy.limit_headers import Limit, tell_limit
from app.domain.access import Principal
from app.domain.inputs.roots import roots_of
from app.domain.request.job_request import JobRequest
from app.domain.request.publishing import Publish
from app.settings import Settings
from app.store.idempotency import Idempotency
from app.store.jobs import JobRepository, model_label
from app.store.models import Job
from app.store.tenancy.audit import entry_of
from app.store.tenancy.hub_tokens import TOKEN_FIELD, Vault, keep_token
from app.store.tenancy.tenants import Policy
from app.store.tenancy.usage import cost_micros, money
from app.tracing import job_traceparent
from bitwright.errors import Conflict, InvalidRequest, QueuedJobsExceeded
from bitwright.money import Money


def policy_and_settings(known: KnownKeys, principal: Principal, settings: Settings) -> tuple[Policy, Settings]:
    """The tenant's policy, and the settings as they are for it: with the folders that it may read."""
    policy = known.policy(principal.tenant_id)
    if policy.model_roots is None:
        return policy, settings
    roots = roots_of(settings.model_roots, policy.model_roots)
    return policy, settings.model_copy(update={"model_roots": roots})


def queue_job(
    session: Session,
    http: Request,
    principal: Principal,
    policy: Policy,
    request: JobRequest,
    *,
    recipe: str | None = None,
    idempotency: Idempotency | None = None,
    vault: Vault | None = None,
    token: str | None = None,
) -> Job:
    """Queue a job; for a repeated key, the earlier one with `replayed` set.

    Raises:
        QueuedJobsExceeded, StorageExceeded: there is no room for it.
        InvalidRequest: see `JobRepository.add`; or there is a token, and the service cannot keep one.
        KeyReused: the key was used for another request.
    """
    require_token(policy, request.publish, token, field="publish")
    room = require_job_room(session, principal.tenant_id, policy)
    details = {
        "method": request.quantization.method,
        "model": model_label(request.model)[:200],
        "own_hub_token": token is not None,
    }
    job = JobRepository(session, principal.tenant_id).add(
        request,
        recipe=recipe,
        idempotency=idempotency,
        noted=lambda job_id: entry_of(actor(principal), "job.submitted", job_id, details),
        traced=job_traceparent,
    )
    if job.replayed:
        return job
    if room is not None and policy.quotas.queued_jobs is not None:
        tell_limit(http.scope, Limit(QueuedJobsExceeded.policy, policy.quotas.queued_jobs, room))
    if token is not None and vault is not None:
        keep_token(session, vault, token, tenant_id=principal.tenant_id, job_id=job.id, field=TOKEN_FIELD)
    return job


def require_hub(settings: Settings, publish: Publish | None) -> None:
    """Check that workers may reach the Hub, if something is to be published.

    Raises:
        Conflict: the operator does not let them.
    """
    if publish is not None and not settings.hub_enabled:
        hint = "ask the operator to set BITWRIGHT_HUB_ENABLED"
        raise Conflict("this service may not reach the Hub", field="publish", value=publish.hub, hint=hint)


def require_token(policy: Policy, publish: Publish | None, token: str | None, *, field: str) -> None:
    """Check that there is a token to publish with: one that came along, or the tenant's.

    Raises:
        InvalidRequest: there is none. The service's own, which fetches for all, writes for nobody.
    """
    if publish is None or token is not None or policy.own_token:
        return
    hint = "send one in the header X-Hub-Token, or have the operator keep one for your tenant"
    raise InvalidRequest("there is no Hub token to publish with", field=field, value=publish.hub, hint=hint)


def estimated_cost(estimates: dict[str, object], settings: Settings) -> dict[str, Money]:
    """Money for the estimated seconds on one device, by its class, where that has a price."""
    seconds = estimates.get("seconds")
    prices = {device: settings.price_micros(device) for device in ("cpu", "cuda")}
    return {
        device: money(cost_micros(float(seconds[device]), price), settings.price_currency)
        for device, price in prices.items()
        if price is not None and isinstance(seconds, dict) and device in seconds
    }
