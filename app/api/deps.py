"""State of an API process, and the aliases by which endpoints ask for it.

Coroutines, because a plain function would take a thread for each of them, of which there are few.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Header, Request
from pydantic import SecretStr

from app.api.event_feed import EventFeed
from app.api.lists.written_jobs import WrittenJobs
from app.api.metrics import Metrics
from app.api.pages.log_ins import LogIns
from app.api.submission.hub_child import HubChild, Looks
from app.api.submission.kept import Kept
from app.api.tenancy.known_keys import KnownKeys
from app.api.tenancy.later import WrittenLater
from app.inspection.inspector import Inspector
from app.settings import Settings
from app.store.blobs import BlobStore
from app.store.idempotency import KEY_SHAPE
from app.store.models import Worker
from app.store.session import Database
from app.store.tenancy.hub_tokens import Vault
from app.store.waiting import Place
from app.tracing import Tracing
from bitwright.tenancy import TOKEN_PATTERN


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


async def _inspector(state: Annotated["State", Depends(get_state)]) -> Inspector:
    return state.inspector


async def _metrics(state: Annotated["State", Depends(get_state)]) -> Metrics:
    return state.metrics


async def _later(state: Annotated["State", Depends(get_state)]) -> WrittenLater:
    return state.later


async def _keys(state: Annotated["State", Depends(get_state)]) -> KnownKeys:
    return state.keys


async def _vault(state: Annotated["State", Depends(get_state)]) -> Vault:
    return state.vault


async def _queue(state: Annotated["State", Depends(get_state)]) -> Kept[Mapping[str, Place]]:
    return state.queue


async def _written_jobs(state: Annotated["State", Depends(get_state)]) -> WrittenJobs:
    return state.written_jobs


async def _log_ins(state: Annotated["State", Depends(get_state)]) -> LogIns:
    return state.log_ins


@dataclass(frozen=True)
class State:
    """Everything that requests share."""

    settings: Settings
    database: Database
    blobs: BlobStore
    feed: EventFeed
    metrics: Metrics
    keys: KnownKeys
    later: WrittenLater
    vault: Vault
    inspector: Inspector
    queue: Kept[Mapping[str, Place]]
    """Places of the queued jobs, by their ids."""
    workers: Kept[Sequence[Worker]]
    """The live workers."""
    hub: HubChild | None = None
    """None where models on the Hub are the workers' business alone."""
    tracing: Tracing | None = None
    """None where no collector of traces is set."""
    log_ins: LogIns = field(default_factory=LogIns)
    written_jobs: WrittenJobs = field(default_factory=WrittenJobs)


StateOf = Annotated[State, Depends(get_state)]
SettingsOf = Annotated[Settings, Depends(_settings)]
DatabaseOf = Annotated[Database, Depends(_database)]
BlobsOf = Annotated[BlobStore, Depends(_blobs)]
FeedOf = Annotated[EventFeed, Depends(_feed)]
LooksOf = Annotated[Looks | None, Depends(_hub)]
HubOf = Annotated[HubChild | None, Depends(_hub)]
InspectorOf = Annotated[Inspector, Depends(_inspector)]
QueueOf = Annotated[Kept[Mapping[str, Place]], Depends(_queue)]
WrittenJobsOf = Annotated[WrittenJobs, Depends(_written_jobs)]
LogInsOf = Annotated[LogIns, Depends(_log_ins)]
MetricsOf = Annotated[Metrics, Depends(_metrics)]
LaterOf = Annotated[WrittenLater, Depends(_later)]
KeysOf = Annotated[KnownKeys, Depends(_keys)]
VaultOf = Annotated[Vault, Depends(_vault)]
HubTokenHeader = Annotated[
    SecretStr | None,
    Header(
        alias="X-Hub-Token",
        json_schema_extra={"pattern": TOKEN_PATTERN},
        description="A Hub token for this job alone: kept encrypted, used to fetch the model and texts, erased at the "
        "job's end. It is no part of the request that an Idempotency-Key stands for.",
    ),
]
IdempotencyHeader = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="1 to 255 visible characters. Within a day, the same key gives what the first request made.",
        json_schema_extra={"pattern": f"^{KEY_SHAPE.pattern}$"},
    ),
]
