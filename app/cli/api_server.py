"""The API's server: it ends within seconds of a signal, whatever is open.

Event streams end at once and say when to come back; requests and downloads get `ENDING_SECONDS`, and what hangs in a
thread after `LAST_SECONDS` ends with the process.
"""

import gc
import os
import socket
import threading
from importlib import import_module

import structlog
import uvicorn

from app.many_imports import many_imports

APPLICATION = "app.api.main:create_app"
END_STREAMS = "end_streams"
"""Name in the application's lifespan state of the function that ends all event streams."""
ENDING_SECONDS = 3
LAST_SECONDS = 8.0
COLLECTED_AFTER = (20_000, 20, 50)
"""Thresholds of the garbage collector: a page of a list alone makes some thousand objects, none of them in cycles."""
EXIT_HANGING = 70
"""Exit code (EX_SOFTWARE) of a process whose threads did not end."""

log = structlog.get_logger(__name__)


class Server(uvicorn.Server):
    """uvicorn's server for the application, with settings from the environment; `run` blocks until a signal."""

    def __init__(self) -> None:
        with many_imports():
            import_module(APPLICATION.partition(":")[0])
        super().__init__(
            uvicorn.Config(
                APPLICATION,
                factory=True,
                log_config=None,
                timeout_graceful_shutdown=ENDING_SECONDS,
                server_header=False,
            )
        )
        self._last = threading.Timer(LAST_SECONDS, _exit)
        self._last.daemon = True

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal."""
        try:
            super().run(sockets)
        finally:
            self._last.cancel()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to serve; what is loaded by now stays, and is looked through by the collector no more."""
        await super().startup(sockets)
        gc.collect()
        gc.freeze()
        gc.set_threshold(*COLLECTED_AFTER)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End: streams first, then all else."""
        self._last.start()
        self.lifespan.state[END_STREAMS]()
        await super().shutdown(sockets)


def _exit() -> None:
    log.error("threads_hang", after_seconds=LAST_SECONDS)
    os._exit(EXIT_HANGING)
