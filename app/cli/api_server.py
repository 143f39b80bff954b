"""The API's server: it ends within seconds of a signal, whatever is open.

Event streams end at once and say when to come back; requests and downloads get `ENDING_SECONDS`, and what hangs in a
thread after `LAST_SECONDS` ends with the process.
"""

import os
import socket
import threading

import structlog
import uvicorn

from app.api.deps import State
from app.api.main import create_app
from app.settings import Settings

ENDING_SECONDS = 3
LAST_SECONDS = 8.0
EXIT_HANGING = 70
"""Exit code (EX_SOFTWARE) of a process whose threads did not end."""

log = structlog.get_logger(__name__)


class Server(uvicorn.Server):
    """uvicorn's server for this application; `run` blocks until a signal."""

    def __init__(self, settings: Settings | None = None) -> None:
        app = create_app(settings)
        super().__init__(
            uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=ENDING_SECONDS, server_header=False)
        )
        self._state: State = app.state.bitwright
        self._last = threading.Timer(LAST_SECONDS, _exit)
        self._last.daemon = True

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal."""
        try:
            super().run(sockets)
        finally:
            self._last.cancel()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End: streams first, then all else."""
        self._last.start()
        self._state.feed.close()
        await super().shutdown(sockets)


def _exit() -> None:
    log.error("threads_hang", after_seconds=LAST_SECONDS)
    os._exit(EXIT_HANGING)
