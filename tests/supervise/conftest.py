"""Supervision is tested with real processes, on SQLite and on a real PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.store.session import Database
from tests.supervise.bench import Bench
from workers.disk.workspace import Workspace


@pytest.fixture
def bench(tmp_path: Path, database_url: str) -> Iterator[Bench]:
    """A worker over a fresh database of each kind in turn."""
    database = Database(database_url)
    yield Bench.make(tmp_path / "bench", database)
    database.close()


@pytest.fixture
def sqlite_bench(tmp_path: Path, sqlite_url: str) -> Iterator[Bench]:
    """The same on SQLite alone, where the database makes no difference."""
    database = Database(sqlite_url)
    yield Bench.make(tmp_path / "bench", database)
    database.close()


@pytest.fixture
def workspace(sqlite_bench: Bench) -> Workspace:
    workspace = Workspace.of(sqlite_bench.context.settings.workspace_dir, "job_x")
    workspace.open()
    return workspace
