"""A worker with spares whose attempts follow scripts: real processes, without torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from app.store.session import Database
from tests.supervise.bench import CPU, Bench, wait_for
from workers.supervise.spares import pool
from workers.supervise.spares.pool import Spares
from workers.supervise.spares.spare import Spare

MODULE = "tests.supervise.scripted_attempt"


@dataclass
class Waiting:
    """A bench and its worker's spares."""

    bench: Bench
    spares: Spares

    def spare(self) -> Spare:
        """The one that waits; started if there is none, and ready."""
        self.spares.tend()
        (spare,) = self.spares.waiting
        wait_for(lambda: spare.ready, what="a spare that waits")
        return spare


@pytest.fixture
def waiting(tmp_path: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Waiting]:
    """One spare at a time; the next one starts as soon as one is taken, as where there are many processors."""
    monkeypatch.setattr(pool, "MANY_PROCESSORS", 1)
    database = Database(sqlite_url)
    bench = Bench.make(tmp_path / "bench", database, spares=1)
    context = bench.context
    spares = Spares(MODULE, context.worker_id, context.settings, replace(CPU, host_memory_bytes=64 << 30))
    yield Waiting(replace(bench, context=replace(context, spares=spares)), spares)
    spares.close()
    database.close()
