"""Seconds of each migration, down and up again, on a database with a million jobs, which must be as before.

    python -m benchmarks.service.migrations URL --jobs 1000000

Fills an empty database (`benchmarks.service.filling`), goes down to the first revision one step at a time and up again,
and compares jobs and labels with those of before. Prints a JSON line with the database's size.
"""

import argparse
import json
import time
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from app.store.session import Database, migrate
from benchmarks.service.filling import fill

ROOT = Path(__file__).parents[2]
FIRST = "0001"
JOBS = "SELECT count(*), min(id), max(id), sum(length(model)), sum(length(status)), sum(priority) FROM job"
LABELS = "SELECT count(*), min(value), max(value), sum(length(value)) FROM job_label"
"""What a step that keeps its rows leaves as it is."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--jobs", type=int, default=1_000_000)
    arguments = parser.parse_args()
    migrate(arguments.url)
    fill(arguments.url, arguments.jobs)
    database = Database(arguments.url)
    before = contents(database)
    revisions = [script.revision for script in ScriptDirectory(str(ROOT / "migrations")).walk_revisions()]
    down = {step: move(database, step, revisions[at + 1]) for at, step in enumerate(revisions[:-1])}
    up = {step: move(database, step, step) for step in reversed(revisions[:-1])}
    same = contents(database) == before
    size = database_bytes(database)
    database.close()
    print(json.dumps({"jobs": arguments.jobs, "bytes": size, "down": down, "up": up, "same": same}))
    if not same:
        raise SystemExit("jobs or labels are others than before")


def contents(database: Database) -> list[tuple[object, ...]]:
    """Figures that change when jobs or their labels do."""
    with database.engine.connect() as connection:
        return [tuple(connection.execute(text(query)).one()) for query in (JOBS, LABELS)]


def move(database: Database, step: str, target: str) -> float:
    """Seconds of bringing the schema to `target`: down past `step`, or up to it."""
    began = time.monotonic()
    with database.engine.begin() as connection:
        run = command.upgrade if step == target else command.downgrade
        run(config(connection), target)
    return round(time.monotonic() - began, 2)


def config(connection: Connection) -> Config:
    """Alembic's configuration for this connection."""
    made = Config()
    made.set_main_option("script_location", str(ROOT / "migrations"))
    made.attributes["connection"] = connection
    return made


def database_bytes(database: Database) -> int:
    """Size of the database on disk."""
    if database.engine.dialect.name == "sqlite":
        return Path(str(database.engine.url.database)).stat().st_size
    with database.engine.connect() as connection:
        return int(connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one())


if __name__ == "__main__":
    main()
