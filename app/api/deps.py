"""State of an API process, and the aliases by which endpoints ask for it.

Coroutines, because a plain function would take a thread for each of them, of which there are few.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Request

from app.api.event_feed import EventFeed
from app.api.metrics import Metrics
from app.api.submission.hub_child import HubChild
from app.api.submission.kept import Kept
from app.settings import Settings
from app.store.blobs import BlobStore
from app.store.idempotency import KEY_SHAPE
from app.store.session import Database
from app.store.waiting import Place


async def get_state(request: Request) -> "State":
    """The state that `create_app` made."""
    state: State = request.app.state.bitwright
    return state


async def _settings(state: Annotated["State", Depends(get_state)]) -> Settings:
    return state.settings


async def _database(state: Annotated["State", Depends(get_state)]) -> Database:
    return state.database


async def _blobs(state: Annotated["State", Depends(get_state)]) -> BlobStore:
    return state.blobs


async def _feed(state: Annotated["State", Depends(get_state)]) -> EventFeed:
    return state.feed


async def _hub(state: Annotated["State", Depends(get_state)]) -> HubChild | None:
    return state.hub


async def _metrics(state: Annotated["State", Depends(get_state)]) -> Metrics:
    return state.metrics


async def _queue(state: Annotated["State", Depends(get_state)]) -> Kept[Mapping[str, Place]]:
    return state.queue


@dataclass(frozen=True)
class State:
    """Everything that requests share."""

    settings: Settings
    database: Database
    blobs: BlobStore
    feed: EventFeed
    metrics: Metrics
    queue: Kept[Mapping[str, Place]]
    """Places of the queued jobs, by their ids."""
    hub: HubChild | None = None
    """None where models on the Hub are the workers' business alone."""


SettingsOf = Annotated[Settings, Depends(_settings)]
DatabaseOf = Annotated[Database, Depends(_database)]
BlobsOf = Annotated[BlobStore, Depends(_blobs)]
FeedOf = Annotated[EventFeed, Depends(_feed)]
HubOf = Annotated[HubChild | None, Depends(_hub)]
QueueOf = Annotated[Kept[Mapping[str, Place]], Depends(_queue)]
MetricsOf = Annotated[Metrics, Depends(_metrics)]
IdempotencyHeader = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="1 to 255 visible characters. Within a day, the same key gives what the first request made.",
        json_schema_extra={"pattern": f"^{KEY_SHAPE.pattern}$"},
    ),
]
