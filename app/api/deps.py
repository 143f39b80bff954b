"""State of an API process, and the aliases by which endpoints ask for it."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Request

from app.api.event_feed import EventFeed
from app.api.metrics import Metrics
from app.api.submission.hub_child import HubChild
from app.inspection.inspector import Inspector
from app.settings import Settings
from app.store.blobs import BlobStore
from app.store.session import Database


def get_state(request: Request) -> "State":
    """The state that `create_app` made."""
    state: State = request.app.state.bitwright
    return state


def _settings(state: Annotated["State", Depends(get_state)]) -> Settings:
    return state.settings


def _database(state: Annotated["State", Depends(get_state)]) -> Database:
    return state.database


def _blobs(state: Annotated["State", Depends(get_state)]) -> BlobStore:
    return state.blobs


def _feed(state: Annotated["State", Depends(get_state)]) -> EventFeed:
    return state.feed


def _hub(state: Annotated["State", Depends(get_state)]) -> HubChild | None:
    return state.hub


def _inspector(state: Annotated["State", Depends(get_state)]) -> Inspector:
    return state.inspector


def _metrics(state: Annotated["State", Depends(get_state)]) -> Metrics:
    return state.metrics


@dataclass(frozen=True)
class State:
    """Everything that requests share."""

    settings: Settings
    database: Database
    blobs: BlobStore
    feed: EventFeed
    metrics: Metrics
    inspector: Inspector
    hub: HubChild | None = None
    """None where models on the Hub are the workers' business alone."""


SettingsOf = Annotated[Settings, Depends(_settings)]
DatabaseOf = Annotated[Database, Depends(_database)]
BlobsOf = Annotated[BlobStore, Depends(_blobs)]
FeedOf = Annotated[EventFeed, Depends(_feed)]
HubOf = Annotated[HubChild | None, Depends(_hub)]
InspectorOf = Annotated[Inspector, Depends(_inspector)]
MetricsOf = Annotated[Metrics, Depends(_metrics)]
IdempotencyHeader = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="1 to 255 visible characters. Within a day, the same key gives what the first request made.",
    ),
]
