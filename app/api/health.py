"""Probes and metrics. They need no key and disclose nothing of any tenant."""

from functools import lru_cache
from typing import Literal

import structlog
from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field

from app.api.deps import DatabaseOf, MetricsOf, SettingsOf
from app.api.http.documentation import problems
from app.queue import BrokerState, broker_state
from app.settings import Settings
from app.store.session import Database, schema_serves
from bitwright.errors import Unavailable

router = APIRouter(tags=["health"])
log = structlog.get_logger(__name__)
PROBE_THREADS = 4


class Health(BaseModel):
    """Answer of a probe."""

    status: Literal["ok"] = Field(default="ok", description="Always `ok`; a failing probe answers with a problem.")


@router.get(
    "/livez", summary="Is the process alive?", operation_id="livez", responses=problems("invalid_request", public=True)
)
async def livez() -> Health:
    """Looks at nothing else: a database that is down is no reason to restart the API.

    Answered by the event loop itself, so that work in all threads keeps it from nobody.
    """
    return Health()


class Readiness(BaseModel):
    """Answer of `/readyz`. A service that cannot take requests answers with a problem."""

    status: Literal["ok", "degraded"] = Field(
        description="`degraded`: requests are taken and jobs run, but start some seconds later: no worker is notified."
    )
    broker: BrokerState | None = Field(
        default=None,
        description="Whether workers can be notified. `refuses`: it answers and takes no message, as one whose memory "
        "is full does. Left out where no broker is configured.",
    )


@router.get(
    "/readyz",
    summary="Can the service take requests?",
    operation_id="readyz",
    response_model_exclude_none=True,
    responses=problems("unavailable", "invalid_request", public=True),
)
async def readyz(database: DatabaseOf, settings: SettingsOf) -> Readiness:
    """Readiness: the database answers and has a schema that serves this version; the broker's state is said beside it.

    A broker that is down is no reason to take no requests: idle workers ask the database by themselves.
    """
    return await to_thread.run_sync(_readiness, database, settings, limiter=_probe_threads())


@lru_cache(maxsize=1)
def _probe_threads() -> CapacityLimiter:
    """Threads of probes alone: those of requests may all be at work, which is no reason to start this process anew."""
    return CapacityLimiter(PROBE_THREADS)


def _readiness(database: Database, settings: Settings) -> Readiness:
    if not schema_serves(database):
        raise Unavailable("the database has another schema", hint="run `bitwright migrate`")
    broker = broker_state(settings.broker_url) if settings.broker_url else None
    return Readiness(status="ok" if broker in ("ok", None) else "degraded", broker=broker)


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    operation_id="metrics",
    response_class=Response,
    responses={
        200: {"description": "Prometheus text format.", "content": {"text/plain": {"schema": {"type": "string"}}}},
        **problems("unavailable", "invalid_request", public=True),
    },
)
async def get_metrics(metrics: MetricsOf) -> Response:
    """Requests, event streams, and jobs by status."""
    text = await to_thread.run_sync(generate_latest, metrics.registry, limiter=_probe_threads())
    return Response(text, media_type=CONTENT_TYPE_LATEST)
