"""The list of jobs, which is the first page, and what a visitor does with several of them."""

from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request
from starlette.responses import RedirectResponse, Response

from app.api.deps import DatabaseOf, SettingsOf, StateOf
from app.api.pages.documentation import begin
from app.api.pages.rendering import page, root_of
from app.api.pages.session import FORM, SEE_OTHER, OwnForm, PageRoute, VisitorOf, check_host, page_router, visitor
from app.api.representations import job_view
from app.domain.methods import METHODS, RECIPES
from app.domain.request.adapter_recipes import ADAPTER_RECIPES
from app.store.job_pages import JobFilters
from app.store.jobs import JobRepository
from app.store.waiting import places
from bitwright.errors import InvalidRequest
from bitwright.job_states import FINAL_STATUSES, JobStatus

front = APIRouter(route_class=PageRoute, include_in_schema=False)
"""Its one page is a document for programs, too, which may come under any name."""
router = page_router()

JOBS_A_PAGE = 30
MOST_COMPARED = 8


@front.get("/")
def list_jobs(
    request: Request,
    state: StateOf,
    database: DatabaseOf,
    settings: SettingsOf,
    status: Annotated[str, Query(max_length=16)] = "",
    method: Annotated[str, Query(max_length=64)] = "",
    model: Annotated[str, Query(max_length=4096)] = "",
    label: Annotated[str, Query(max_length=600)] = "",
    after: Annotated[str, Query(max_length=64)] = "",
) -> Response:
    """Jobs, newest first, with filters; for programs, links to what there is."""
    if "text/html" not in request.headers.get("accept", ""):
        return begin(request)
    check_host(request, settings)
    found = visitor(request, state, database)
    filters = {"status": status, "method": method, "model": model.strip(), "label": label.strip()}
    with database.reading() as session:
        listed = JobRepository(session, found.principal.tenant_id).page(
            after=after or None,
            limit=JOBS_A_PAGE,
            filters=JobFilters(
                status=_status(status),
                method=method or None,
                model=filters["model"] or None,
                labels=_label(filters["label"]) or {},
            ),
        )
        queue = places(session) if any(job.status is JobStatus.QUEUED for job in listed.items) else {}
        jobs = [job_view(job, place=queue.get(job.id)) for job in listed.items]
    used = {name: value for name, value in filters.items() if value}
    following = None if listed.next_cursor is None else urlencode({**used, "after": listed.next_cursor})
    return page(
        request,
        "jobs",
        visitor=found,
        jobs=jobs,
        filters=filters,
        filtered=bool(used),
        statuses=[one.value for one in JobStatus],
        methods=[*METHODS, *RECIPES, *ADAPTER_RECIPES],
        following=following,
        first="" if after == "" else f"?{urlencode(used)}" if used else "/",
        live=any(job.status not in FINAL_STATUSES for job in jobs) or after == "",
        most=MOST_COMPARED,
    )


@router.post("/compare", openapi_extra=FORM)
def choose_compared(request: Request, form: OwnForm, _visitor: VisitorOf) -> Response:
    """The way to a comparison of the jobs that were ticked."""
    return RedirectResponse(
        f"{root_of(request)}/compare?{urlencode({'jobs': ' '.join(form.get('job', ()))})}", SEE_OTHER
    )


def _status(text: str) -> JobStatus | None:
    if not text:
        return None
    try:
        return JobStatus(text)
    except ValueError as error:
        known = ", ".join(status.value for status in JobStatus)
        raise InvalidRequest(
            "there is no such status", field="status", value=text, hint=f"there are: {known}"
        ) from error


def _label(text: str) -> dict[str, str] | None:
    if not text:
        return None
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InvalidRequest("a label is name=value", field="label", value=text, hint="e.g. commit=abc123")
    return {name.strip(): value.strip()}
