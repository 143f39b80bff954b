"""The application. `uvicorn --factory app.api.main:create_app` serves it with settings from the environment."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI

from app.api import architectures, artifacts, events, formats, health, jobs, methods, uploads, workers
from app.api.deps import State
from app.api.event_feed import POLL_LIMIT, EventFeed
from app.api.http import archive
from app.api.http.documentation import DESCRIPTION, TAGS, complete_document
from app.api.http.errors import install_error_handlers
from app.api.http.middleware import BodyLimit, RequestContext
from app.api.http.strictness import refuse_unread
from app.api.metrics import Metrics
from app.api.pages import catalogue, compare, documentation, entrance, job, submit
from app.api.pages import jobs as job_list
from app.api.submission import exports
from app.api.submission.hub_child import HubChild
from app.logs import configure_logging
from app.settings import Settings, settings_or_exit, warn_of_unknown_variables
from app.store.blobs import open_blobs
from app.store.events import StoredEvent, events_after
from app.store.jobs import count_by_status
from app.store.session import Database

MODULES = (jobs, exports, events, artifacts, archive, uploads, methods, formats, architectures, workers, health)
ROUTERS = tuple(module.router for module in MODULES)
PAGES = tuple(module.router for module in (entrance, job_list, job, submit, compare, catalogue))
"""Routers of the dashboard."""


def create_app(settings: Settings | None = None) -> FastAPI:
    """An application on the store that the settings name; the schema must be there (`migrate`)."""
    if settings is None:
        settings = settings_or_exit()
        configure_logging(settings)
        warn_of_unknown_variables()
    state = build_state(settings)
    app = Application(
        title="Bitwright",
        summary="Quantization as a service.",
        description=DESCRIPTION,
        version=version("bitwright"),
        openapi_tags=TAGS,
        dependencies=[Depends(refuse_unread)],
        docs_url=None,  # `app.api.pages.documentation` has both, without scripts from elsewhere
        redoc_url=None,
        lifespan=_lifespan,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    app.state.bitwright = state
    pages = (job_list.front, entrance.assets, *PAGES) if settings.dashboard else ()
    for router in (*ROUTERS, *pages, documentation.router):
        app.include_router(router)
    install_error_handlers(app)
    # The one added last is outermost.
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    app.add_middleware(RequestContext, observe=state.metrics.observe)
    return app


def build_state(settings: Settings) -> State:
    """State that the application's requests share."""
    database = Database(settings.database_url)

    def read_events(cursors: Mapping[str, int]) -> Sequence[StoredEvent]:
        with database.reading() as session:
            return events_after(session, cursors, POLL_LIMIT)

    def count_jobs() -> Mapping[str, int]:
        with database.reading() as session:
            return {status.value: count for status, count in count_by_status(session).items()}

    feed = EventFeed(read_events, poll_seconds=settings.event_poll_seconds, max_streams=settings.max_streams)
    return State(
        settings=settings,
        database=database,
        blobs=open_blobs(settings.blob_url),
        feed=feed,
        metrics=Metrics(count_jobs, lambda: feed.streams),
        hub=HubChild(settings) if settings.looks_at_hub else None,
    )


class Application(FastAPI):
    """FastAPI with an OpenAPI document that holds the schemas of problems, too."""

    def openapi(self) -> dict[str, Any]:
        """The document; made once."""
        if self.openapi_schema is None:
            complete_document(super().openapi())
        return super().openapi()


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state: State = app.state.bitwright
    poller = asyncio.create_task(state.feed.run(), name="event-feed")
    try:
        yield
    finally:
        poller.cancel()
        with suppress(asyncio.CancelledError):
            await poller
        if state.hub is not None:
            state.hub.close()
        state.database.close()
