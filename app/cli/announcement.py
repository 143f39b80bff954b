"""Messages of `serve`: its address as soon as the API answers, and readiness once its worker lives."""

import sys
import threading
import time
from dataclasses import dataclass

import structlog

from app.cli.installed import NAME, how_to_call
from app.settings import Settings
from bitwright.cli.render import out
from bitwright.endpoint import Endpoint, save_endpoint
from bitwright.errors import Unavailable

log = structlog.get_logger(__name__)

LOOK_SECONDS = 0.2
PATIENCE_SECONDS = 60.0
"""After so long without a worker it says that there is none yet."""


@dataclass(frozen=True)
class Announcement:
    """Address of the service, and the parts of it that run."""

    settings: Settings
    endpoint: Endpoint
    key_is_new: bool
    known: frozenset[str] | None
    """Workers that there were before this service started its own; None if it starts none."""

    def make(self, ended: threading.Event) -> None:
        """Leave address and key where the other commands find them, and tell what is up, until `ended`."""
        path = save_endpoint(self.settings.data_dir, self.endpoint)
        _say(f"The API answers at {self.endpoint.url}")
        _say(f"Data folder: {self.settings.data_dir}")
        if self.key_is_new:
            _say(f"API key, shown once and stored in {path}: {self.endpoint.key}")
        self._tell_roots()
        if self.known is not None:
            self._await_worker(self.known, ended)
        else:
            _say(f"Bitwright serves {self.endpoint.url} without a worker: jobs wait until one is started elsewhere")

    def _tell_roots(self) -> None:
        if self.settings.model_roots:
            _say(f"Local models may be read below: {', '.join(map(str, self.settings.model_roots))}")
        else:
            _say("Local models are not read: --model-root FOLDER allows a folder; the Hub and uploads need none")

    def _await_worker(self, known: frozenset[str], ended: threading.Event) -> None:
        deadline, warned = time.monotonic() + PATIENCE_SECONDS, False
        while not ended.wait(LOOK_SECONDS):
            fresh = own_workers(self.settings) - known
            if fresh:
                _say(f"Bitwright serves {self.endpoint.url} with worker {min(fresh)}")
                if call := how_to_call():
                    _say(f"In another terminal, the command {NAME} is {call}")
                return
            if not warned and time.monotonic() > deadline:
                warned = True
                _say("No worker is up yet: jobs are taken and wait; the log above says why")


def own_workers(settings: Settings) -> frozenset[str]:
    """Ids of the workers with this host's name that were alive a moment ago; a worker's id is never used again."""
    from app.store.session import Database  # noqa: PLC0415 (needs the `api` extra)
    from app.store.workers import list_workers  # noqa: PLC0415

    database = Database(settings.database_url)
    try:
        with database.reading() as session:
            ids = [state.worker.id for state in list_workers(session)]
    except Unavailable as error:
        log.warning("workers_not_listed", error=error.detail)
        return frozenset()
    finally:
        database.close()
    return frozenset(name for name in ids if name.startswith(f"{settings.worker_name}."))


def _say(line: str) -> None:
    out().print(line, soft_wrap=True, markup=False)
    sys.stdout.flush()
