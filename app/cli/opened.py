"""The database for operators' commands: opened with the settings of the data folder, closed at the end."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from app.cli.environment import use_data_dir

if TYPE_CHECKING:
    from app.store.session import Database


@contextmanager
def opened_database(data_dir: Path | None) -> Iterator["Database"]:
    """The database that the settings name."""
    from app.store.session import Database  # noqa: PLC0415 (needs the `api` extra)

    database = Database(use_data_dir(data_dir).database_url)
    try:
        yield database
    finally:
        database.close()
