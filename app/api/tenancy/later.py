"""Writes that come a little later, so that reading costs none: keys' last uses and bytes that were downloaded.

Kept in memory and written at most once in `WRITE_SECONDS`; what a process that is killed has not written is lost.
"""

import asyncio
import threading
from collections import Counter
from time import monotonic

import structlog
from starlette.concurrency import run_in_threadpool

from app.store.session import Database
from app.store.tenancy.keys import note_uses
from app.store.tenancy.usage import add_usage
from bitwright.errors import Unavailable

WRITE_SECONDS = 60.0
AGAIN_SECONDS = 600.0
"""A file that a key downloads again within this time, in ranges say, is one download in the audit log."""
MOST_REMEMBERED = 50_000

log = structlog.get_logger(__name__)


class WrittenLater:
    """One per process, for any thread."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._uses: dict[str, float] = {}
        self._downloaded: Counter[str] = Counter()
        self._seen: dict[tuple[str, str], float] = {}

    def note_use(self, key_id: str) -> None:
        """A key was used now."""
        with self._lock:
            self._uses[key_id] = monotonic()

    def note_download(self, tenant_id: str, size: int) -> None:
        """So many bytes were sent to a tenant."""
        with self._lock:
            self._downloaded[tenant_id] += size

    def is_news(self, key_id: str, subject: str) -> bool:
        """True if this process has not seen the key download the subject within `AGAIN_SECONDS`."""
        at = monotonic()
        with self._lock:
            seen = self._seen.get((key_id, subject))
            if seen is not None and at - seen < AGAIN_SECONDS:
                return False
            if len(self._seen) >= MOST_REMEMBERED:
                self._seen = {one: then for one, then in self._seen.items() if at - then < AGAIN_SECONDS}
            if len(self._seen) < MOST_REMEMBERED:
                self._seen[key_id, subject] = at
        return True

    def write(self) -> None:
        """Write what was noted since the last time; while the database is away it stays noted.

        Raises:
            Unavailable: the database is away.
        """
        with self._lock:
            uses, self._uses = self._uses, {}
            downloaded, self._downloaded = self._downloaded, Counter()
        if not uses and not downloaded:
            return
        at = monotonic()
        try:
            with self._database.transaction() as session:
                note_uses(session, {key_id: at - then for key_id, then in uses.items()})
                for tenant_id, size in sorted(downloaded.items()):
                    add_usage(session, tenant_id, downloaded_bytes=size)
        except BaseException:
            with self._lock:
                self._uses = uses | self._uses
                self._downloaded += downloaded
            raise

    async def run(self) -> None:
        """Write every `WRITE_SECONDS` until cancelled."""
        while True:
            await asyncio.sleep(WRITE_SECONDS)
            try:
                await run_in_threadpool(self.write)
            except Exception as error:
                log.warning("later_writes_failed", error=type(error).__name__)

    def close(self) -> None:
        """Write what is left, if the database is there."""
        try:
            self.write()
        except Unavailable as error:
            log.warning("later_writes_lost", error=type(error).__name__)
