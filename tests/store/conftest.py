"""Every test of the store runs on SQLite and on a real PostgreSQL."""

from collections.abc import Iterator

import pytest

from app.store.keys import ensure_tenant
from app.store.session import Database


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """An open, empty database."""
    opened = Database(database_url)
    yield opened
    opened.close()


@pytest.fixture
def tenant(database: Database) -> str:
    """Id of a tenant."""
    with database.transaction() as session:
        return ensure_tenant(session, "first").id


@pytest.fixture
def stranger(database: Database) -> str:
    """Id of another tenant."""
    with database.transaction() as session:
        return ensure_tenant(session, "second").id
