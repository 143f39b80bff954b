"""Results on their way to the Hub: begun, and looked at. A worker sends them."""

from typing import Annotated

import structlog
from fastapi import APIRouter, Body, Response

from app.api.auth import Reader, Submitter
from app.api.deps import DatabaseOf, HubTokenHeader, SettingsOf, VaultOf
from app.api.http.documentation import problems, text_header
from app.api.tenancy.admission import actor
from app.api.tenancy.queueing import require_hub, require_token
from app.domain.request.publishing import Publish
from app.store.artifacts import ArtifactRepository
from app.store.hub.branches import MAIN, branches
from app.store.hub.publications import begin_publication, publication_of
from app.store.jobs import JobRepository
from app.store.models import Publication
from app.store.tenancy.audit import record
from app.store.tenancy.hub_tokens import TOKEN_FIELD, checked_token, keep_token
from app.store.tenancy.tenants import policy_of
from bitwright.errors import Conflict, InvalidRequest
from bitwright.events import ErrorData
from bitwright.job_states import JobStatus, PublicationStatus
from bitwright.views import PublicationView

router = APIRouter(tags=["hub"])
log = structlog.get_logger(__name__)
POLL_AFTER_SECONDS = 5
ACCEPTED = {
    "description": "It is queued for a worker.",
    "headers": {"Retry-After": text_header("Seconds to wait before asking for it.", "integer")},
}


@router.post(
    "/v1/jobs/{job_id}/publish",
    summary="Publish a job's result on the Hub",
    operation_id="publish_job",
    status_code=202,
    responses={202: ACCEPTED, **problems("not_found", "conflict")},
)
def publish_job(
    *,
    job_id: str,
    body: Annotated[Publish, Body()],
    response: Response,
    principal: Submitter,
    settings: SettingsOf,
    database: DatabaseOf,
    vault: VaultOf,
    hub_token: HubTokenHeader = None,
) -> PublicationView:
    """Send the files of a succeeded job to a repository of the Hub that the operator's settings name.

    The token is the header's, which is kept encrypted until the publication has ended, or the tenant's. A repository
    whose last commit is not of Bitwright is refused, unless `force` says otherwise.
    """
    token = None if hub_token is None else checked_token(hub_token)
    require_hub(settings, body)
    with database.transaction() as session:
        job = JobRepository(session, principal.tenant_id).get(job_id)
        if job.status is not JobStatus.SUCCEEDED:
            hint = "wait for the status succeeded"
            raise Conflict(f"job {job_id} is {job.status.value} and has no result", value=job.status.value, hint=hint)
        kept = branches(job, ArtifactRepository(session, principal.tenant_id).of_job(job_id))
        if (body.format or MAIN) not in kept:
            hint = f"it has: {', '.join(kept)}"
            raise InvalidRequest(f"job {job_id} keeps no {body.format}", field="format", value=body.format, hint=hint)
        policy = policy_of(session, principal.tenant_id, settings.tenant_quotas)
        require_token(policy, body, token, field=TOKEN_FIELD)
        begin_publication(session, principal.tenant_id, job_id, body)
        if token is not None:
            keep_token(session, vault, token, tenant_id=principal.tenant_id, job_id=job_id, field=TOKEN_FIELD)
        details = {"repository": body.hub, "own_hub_token": token is not None}
        record(session, actor(principal), "job.published", job_id, details)
        view = publication_view(publication_of(session, principal.tenant_id, job_id))
    log.info("publication_queued", job_id=job_id, repository=body.hub)
    response.headers["Retry-After"] = str(POLL_AFTER_SECONDS)
    return view


@router.get(
    "/v1/jobs/{job_id}/publish",
    summary="Get a publication",
    operation_id="get_publication",
    responses=problems("not_found"),
)
def get_publication(job_id: str, principal: Reader, database: DatabaseOf) -> PublicationView:
    """The latest publication of a job: its status, and the Hub's answer or the error."""
    with database.reading() as session:
        JobRepository(session, principal.tenant_id).get(job_id)
        return publication_view(publication_of(session, principal.tenant_id, job_id))


def publication_view(row: Publication) -> PublicationView:
    """A publication as its tenant sees it."""
    answer = row.answer or {}
    return PublicationView(
        job_id=row.job_id,
        status=PublicationStatus(row.status),
        hub=row.request["hub"],
        private=row.request["private"],
        force=row.request["force"],
        format=row.request["format"],
        attempts=row.attempt,
        url=answer.get("url"),
        commit=answer.get("commit"),
        error=None if row.error is None else ErrorData.model_validate(row.error),
        created_at=row.created_at,
        updated_at=row.updated_at,
        finished_at=row.finished_at,
    )
