"""Events of a job: a page of JSON, or a live stream for clients that accept `text/event-stream`."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, StreamingResponse

from app.api.auth import Reader
from app.api.deps import DatabaseOf, FeedOf, SettingsOf
from app.api.event_stream import HEADERS, MEDIA_TYPE, JobEvents, stream_events
from app.api.http.documentation import problems
from app.api.representations import event_view
from bitwright.errors import InvalidRequest
from bitwright.job_states import FINAL_STATUSES
from bitwright.views import EventPage

router = APIRouter(tags=["events"])

VARY = {"Vary": "Accept"}
EXAMPLE = (
    'id: 3\nevent: progress\ndata: {"sequence": 3, "created_at": "2026-01-05T10:00:00Z", "attempt": 1, "event": …}\n\n'
)
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A page, or a stream that ends after the job's last event.",
        "model": EventPage,
        "content": {MEDIA_TYPE: {"schema": {"type": "string"}, "example": EXAMPLE}},
    },
    204: {"description": "Stream only: the job is final and every event was seen. Do not reconnect."},
    **problems("not_found", "too_many_requests", "streams_exceeded"),
}


@router.get(
    "/v1/jobs/{job_id}/events",
    summary="Read or follow a job's events",
    operation_id="list_events",
    responses=RESPONSES,
    response_model=None,
)
async def get_events(
    *,
    job_id: str,
    request: Request,
    principal: Reader,
    settings: SettingsOf,
    database: DatabaseOf,
    feed: FeedOf,
    after: Annotated[int, Query(ge=0, description="Only events with a greater sequence.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="Events a page.")] = 100,
    last_event_id: Annotated[
        str | None, Header(max_length=20, description="Stream only: continue after this event.")
    ] = None,
) -> Response:
    """Events in order. With `Accept: text/event-stream` they come live, those after Last-Event-ID first."""
    source = JobEvents(database, principal.tenant_id, job_id)
    if not accepts_stream(request.headers.get("accept", "")):
        page = await run_in_threadpool(_page, source, after, limit)
        return JSONResponse(page.model_dump(mode="json"), headers=VARY)
    start = after if last_event_id is None else parse_last_event_id(last_event_id)
    job = await run_in_threadpool(source.job)
    if job.status in FINAL_STATUSES and start >= job.last_event:
        return Response(status_code=204, headers=VARY)
    most = principal.quotas.over(settings.tenant_quotas).streams
    feed.require_room(principal.key_id, principal.tenant_id, most)
    body = stream_events(feed, source, job.last_event, start, principal.key_id)
    return StreamingResponse(body, media_type=MEDIA_TYPE, headers=HEADERS | VARY)


def _page(source: JobEvents, after: int, limit: int) -> EventPage:
    events = source.page(after, limit)
    return EventPage(
        items=[event_view(event) for event in events],
        next_after=events[-1].sequence if len(events) == limit else None,
    )


def accepts_stream(accept: str) -> bool:
    """True if `text/event-stream` is named, and not refused with q=0."""
    for entry in accept.split(","):
        kind, *parameters = (piece.strip().lower() for piece in entry.split(";"))
        if kind == MEDIA_TYPE:
            return not any(parameter.replace(" ", "") in {"q=0", "q=0.0", "q=0.00"} for parameter in parameters)
    return False


def parse_last_event_id(value: str) -> int:
    """The sequence number that a client resumes after; empty means from the start.

    Raises:
        InvalidRequest: it is not one that a stream gave.
    """
    if value and not (value.isascii() and value.isdecimal()):
        detail = "Last-Event-ID is the number of an event of this job"
        hint = "send the id of the last event that arrived, or leave the header out to start from the first"
        raise InvalidRequest(detail, field="Last-Event-ID", value=value, hint=hint)
    return int(value or 0)
