"""State of an API process, and the aliases by which endpoints ask for it."""

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Header, Request

from app.api.event_feed import EventFeed
from app.api.metrics import Metrics
from app.api.pages.log_ins import LogIns
from app.api.submission.hub_child import HubChild, Looks
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


def _metrics(state: Annotated["State", Depends(get_state)]) -> Metrics:
    return state.metrics


def _log_ins(state: Annotated["State", Depends(get_state)]) -> LogIns:
    return state.log_ins


@dataclass(frozen=True)
class State:
    """Everything that requests share."""

    settings: Settings
    database: Database
    blobs: BlobStore
    feed: EventFeed
    metrics: Metrics
    hub: HubChild | None = None
    """None where models on the Hub are the workers' business alone."""
    log_ins: LogIns = field(default_factory=LogIns)


SettingsOf = Annotated[Settings, Depends(_settings)]
DatabaseOf = Annotated[Database, Depends(_database)]
BlobsOf = Annotated[BlobStore, Depends(_blobs)]
FeedOf = Annotated[EventFeed, Depends(_feed)]
LooksOf = Annotated[Looks | None, Depends(_hub)]
HubOf = Annotated[HubChild | None, Depends(_hub)]
LogInsOf = Annotated[LogIns, Depends(_log_ins)]
MetricsOf = Annotated[Metrics, Depends(_metrics)]
IdempotencyHeader = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="1 to 255 visible characters. Within a day, the same key gives what the first request made.",
    ),
]
