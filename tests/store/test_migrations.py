import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from alembic.config import main as command_line
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, select, text
from sqlalchemy.exc import IntegrityError

from app.store.idempotency import Idempotency
from app.store.jobs import JobRepository
from app.store.models import Base, IdempotencyKey
from app.store.session import Database, migrate, schema_serves
from app.store.uploads import NewUploadFile, UploadRepository
from tests.store.samples import add, request

ROOT = Path(__file__).parents[2]
TEXT = NewUploadFile("text.jsonl", 3, "0" * 64)


def alembic(database: Database, step: str) -> None:
    """Run `alembic check` or `alembic downgrade base` on this database, as a person would."""
    config = Config(str(ROOT / "alembic.ini"))
    with database.engine.begin() as connection:
        config.attributes["connection"] = connection
        if step == "check":
            command.check(config)
        else:
            command.downgrade(config, step)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A database of its own, since these tests change its tables."""
    opened = Database(database_url)
    yield opened
    opened.close()


def test_models_and_migrations_agree(database: Database) -> None:
    alembic(database, "check")
    assert schema_serves(database)


def test_a_schema_of_the_next_release_serves_and_one_of_an_earlier_does_not(
    database: Database, database_url: str
) -> None:
    """As one replaces processes in turn, the old ones go on and are sent requests, and may be started again."""
    (newest,) = ScriptDirectory(str(ROOT / "migrations")).get_heads()
    for revision, serves in ((f"{int(newest) + 1:04d}", True), ("0001", False)):
        with database.engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = :to"), {"to": revision})
        assert schema_serves(database) is serves
        if serves:
            migrate(database_url)
            with database.engine.connect() as connection:
                assert connection.scalar(text("SELECT version_num FROM alembic_version")) == revision


def test_a_table_that_no_migration_makes_is_noticed(database: Database) -> None:
    with database.engine.begin() as connection:
        connection.execute(text("DROP TABLE sweep_lease"))
    with pytest.raises(Exception, match="sweep_lease"):
        alembic(database, "check")


def test_down_and_up_again(database: Database, database_url: str) -> None:
    alembic(database, "base")
    assert not schema_serves(database)
    assert inspect(database.engine).get_table_names() == ["alembic_version"]
    migrate(database_url)
    assert schema_serves(database)
    assert set(inspect(database.engine).get_table_names()) == {*Base.metadata.tables, "alembic_version"}


def test_keys_of_the_release_before_are_kept(database: Database, database_url: str, tenant: str) -> None:
    """0002 makes room for uploads in the table of keys: SQLite builds that table anew."""
    key = Idempotency.of("k", request())
    with database.transaction() as session:
        job_id = JobRepository(session, tenant).add(request(), idempotency=key).id
    alembic(database, "0001")
    migrate(database_url)
    with database.transaction() as session:
        found = JobRepository(session, tenant).find_replayed(key)
        assert found is not None
        assert found.id == job_id
        upload = UploadRepository(session, tenant).create([TEXT], idempotency=Idempotency("u", "0" * 64))
        upload_id = upload.id
    with database.transaction() as session:
        JobRepository(session, tenant).cancel(job_id)
        JobRepository(session, tenant).delete(job_id)
        UploadRepository(session, tenant).delete(upload_id)
        assert session.scalars(select(IdempotencyKey)).all() == []


def test_an_empty_database_is_not_current(empty_url: str) -> None:
    database = Database(empty_url)
    assert not schema_serves(database)
    database.close()


def test_a_migration_that_fails_leaves_nothing(empty_url: str) -> None:
    database = Database(empty_url)
    with database.engine.begin() as connection:
        connection.execute(text("CREATE TABLE upload_file (x INTEGER)"))  # in the way of the last table
    with pytest.raises(Exception, match=r"upload_file|not available"):
        migrate(empty_url)
    assert inspect(database.engine).get_table_names() == ["upload_file"]
    database.close()


def test_there_is_one_line_of_versions() -> None:
    config = Config()
    config.set_main_option("script_location", str(ROOT / "migrations"))
    assert len(ScriptDirectory.from_config(config).get_heads()) == 1


def test_the_command_line_reads_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("BITWRIGHT_DATABASE_URL", f"sqlite:///{tmp_path / 'x.db'}")
    command_line(["upgrade", "head"])
    command_line(["check"])
    monkeypatch.delenv("BITWRIGHT_DATABASE_URL")
    with pytest.raises(SystemExit, match="BITWRIGHT_DATABASE_URL"):
        command_line(["check"])


def test_migrate_needs_no_folder(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a%20b.db'}"
    code = f"from app.store.session import migrate; migrate({url!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    database = Database(url)
    assert schema_serves(database)
    database.close()


@pytest.mark.parametrize(
    "change", ["status = 'running'", "status = 'done'", "lease_expires_at = created_at", "tenant_id = 'tnt_none'"]
)
def test_the_database_itself_refuses_what_cannot_be(database: Database, tenant: str, change: str) -> None:
    add(database, tenant)
    with pytest.raises(IntegrityError), database.transaction() as session:
        session.execute(text(f"UPDATE job SET {change}"))
