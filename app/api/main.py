"""The application. `bitwright api` serves it with settings from the environment (`app.cli.api_server`)."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence, Set
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI

from app.api import architectures, artifacts, events, formats, health, jobs, methods, uploads, workers
from app.api.admin import audit, keys, tenants, usage
from app.api.deps import State
from app.api.event_feed import POLL_LIMIT, EventFeed
from app.api.http import archive
from app.api.http.documentation import DESCRIPTION, TAGS, complete_document
from app.api.http.errors import install_error_handlers
from app.api.http.middleware import BodyLimit, RequestContext
from app.api.http.strictness import refuse_unread
from app.api.hub import files as hub_files
from app.api.hub import models as hub_models
from app.api.hub import publishing
from app.api.metrics import Metrics
from app.api.openai import files as openai_files
from app.api.openai import fine_tuning
from app.api.pages import catalogue, compare, documentation, entrance, job, submit
from app.api.pages import jobs as job_list
from app.api.pages import keys as key_page
from app.api.submission import exports
from app.api.submission.hub_child import HubChild
from app.api.submission.kept import Kept
from app.api.tenancy.known_keys import KnownKeys
from app.api.tenancy.later import WrittenLater
from app.api.tenancy.store_gauges import StoreGauges
from app.api.webhooks import endpoints
from app.domain.access import Principal
from app.inspection.inspector import inspector_of_process
from app.logs import configure_logging
from app.settings import Settings, settings_or_exit, warn_of_unknown_variables
from app.store.blobs import open_blobs
from app.store.events import StoredEvent, events_after
from app.store.jobs import count_by_status
from app.store.models import Worker
from app.store.session import REQUESTS, Database
from app.store.tenancy.hub_tokens import Vault
from app.store.tenancy.keys import authenticate, good_keys
from app.store.tenancy.tenants import Policy, policy_of
from app.store.waiting import Place, places
from app.store.workers import list_workers
from app.tracing import open_tracing

OPENAI_MODULES = (openai_files, fine_tuning)
MODULES = (
    *(jobs, exports, events, artifacts, archive, uploads, methods, formats, architectures, workers, health),
    *OPENAI_MODULES,
    endpoints,
)
QUEUE_SECONDS = 1.0
"""Places of queued jobs are so old at the most; of what this process itself has queued or cancelled, new."""
WORKERS_SECONDS = 1.0
"""A job is held against workers that were alive so long ago at the most; one that is refused, against those of now."""
HUB_MODULES = (hub_models, hub_files, publishing)
ADMIN_MODULES = (tenants, keys, usage, audit)
ROUTERS = tuple(module.router for module in (*MODULES, *HUB_MODULES, *ADMIN_MODULES))
PAGES = tuple(module.router for module in (entrance, job_list, job, submit, compare, catalogue, key_page))
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
    app.add_middleware(RequestContext, observe=state.metrics.observe, tracing=state.tracing)
    return app


def build_state(settings: Settings) -> State:
    """State that the application's requests share."""
    database = Database(settings.database_url, REQUESTS)

    def read_events(cursors: Mapping[str, int]) -> Sequence[StoredEvent]:
        with database.reading() as session:
            return events_after(session, cursors, POLL_LIMIT)

    def count_jobs() -> Mapping[str, int]:
        with database.reading() as session:
            return {status.value: count for status, count in count_by_status(session).items()}

    def read_queue() -> Mapping[str, Place]:
        with database.reading() as session:
            return places(session)

    def read_workers() -> Sequence[Worker]:
        with database.reading() as session:
            return [state.worker for state in list_workers(session)]

    def find_policy(tenant_id: str) -> Policy:
        with database.reading() as session:
            return policy_of(session, tenant_id, settings.tenant_quotas)

    def keys_that_are_good(key_ids: Set[str]) -> Set[str]:
        with database.reading() as session:
            return good_keys(session, key_ids)

    def find_key(plaintext: str) -> Principal:
        with database.reading() as session:
            return authenticate(session, plaintext)

    metrics = Metrics(count_jobs, lambda: feed.streams)
    metrics.registry.register(StoreGauges(database, by_tenant=settings.metrics_by_tenant))
    feed = EventFeed(
        read_events,
        poll_seconds=settings.event_poll_seconds,
        max_streams=settings.max_streams,
        max_streams_of_key=settings.max_streams_of_key or max(settings.max_streams // 4, 1),
        good_keys=keys_that_are_good,
    )
    return State(
        settings=settings,
        database=database,
        blobs=open_blobs(settings.blob_url),
        feed=feed,
        metrics=metrics,
        keys=KnownKeys(find_key, find_policy),
        later=WrittenLater(database),
        vault=Vault(settings.token_keys),
        inspector=inspector_of_process(),
        queue=Kept(read_queue, QUEUE_SECONDS),
        workers=Kept(read_workers, WORKERS_SECONDS),
        hub=HubChild(settings) if settings.looks_at_hub else None,
        tracing=open_tracing(settings, "bitwright-api"),
    )


class Application(FastAPI):
    """FastAPI with an OpenAPI document that holds the schemas of problems, too."""

    def openapi(self) -> dict[str, Any]:
        """The document; made once."""
        if self.openapi_schema is None:
            complete_document(super().openapi())
        return super().openapi()


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[dict[str, Callable[[], None]]]:
    state: State = app.state.bitwright
    poller = asyncio.create_task(state.feed.run(), name="event-feed")
    writer = asyncio.create_task(state.later.run(), name="later-writes")
    try:
        yield {"end_streams": state.feed.close}  # for the server, when it is told to end (`app.cli.api_server`)
    finally:
        for task in (poller, writer):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        await asyncio.to_thread(state.later.close)
        if state.hub is not None:
            state.hub.close()
        state.database.close()
        if state.tracing is not None:
            await asyncio.to_thread(state.tracing.close)
