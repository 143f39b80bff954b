"""Fixtures that tests of several parts share. Servers start once a session, and only if a test asks for them."""

import gc
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL

from app.store.session import migrate
from tests import servers

# Nothing of what collecting imports and makes is ever garbage, and looking for it takes a third of that time.
gc.disable()

# The models of the tests are tiny: threads would wait for each other longer than they compute. Read when torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Processes of the service start without the caller's folder on their path; those of the tests lie in this one.
ROOT = str(Path(__file__).resolve().parent.parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))

# No worker keeps a spare attempt unless a test is about that: each one imports torch for seconds.
os.environ.setdefault("BITWRIGHT_SPARES", "0")

# Before anything imports torch: threads that wait sleep, so that tests in two processes do not starve each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Before anything imports Numba: what one process of the tests compiles, the others read. Of this version of the loops.
LOOPS = Path(__file__).resolve().parent.parent / "workers" / "numerics" / "loops"
_version = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(LOOPS.glob("*.py")))).hexdigest()[:16]
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"bitwright-test-loops-{_version}"))
# The same of what workers of the tests compile ahead, which is no matter of the user's own folder.
os.environ.setdefault("BITWRIGHT_KERNEL_DIR", str(Path(tempfile.gettempdir()) / f"bitwright-test-kernels-{_version}"))


LONGEST = ("documents", "e2e", "cli", "device", "ships", "supervise", "engine")
"""Folders whose files take longest. They begin first, so that none is left for the end, with the other process idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; within a folder, and of the rest, the order stays."""

    def turn(item: pytest.Item) -> int:
        folders = item.path.relative_to(ROOT).parts
        return next((number for number, name in enumerate(LONGEST) if name in folders), len(LONGEST))

    items.sort(key=turn)


def pytest_collection_finish() -> None:
    """Garbage is looked for again, in what tests make."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """At the end all is looked through: extension modules complain of what is left."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def postgres() -> Iterator[URL]:
    """A real PostgreSQL server, as its superuser."""
    given = servers.given_postgres()
    if given is not None:
        yield given
        return
    with servers.postgres_server() as url:
        yield url


@pytest.fixture(scope="session")
def migrated_template(postgres: URL) -> Iterator[str]:
    """Name of a PostgreSQL database with the newest schema, from which tests copy theirs."""
    with servers.postgres_database(postgres) as url:
        migrate(servers.text(url))
        assert url.database is not None
        yield url.database


@pytest.fixture
def postgres_url(postgres: URL, migrated_template: str) -> Iterator[str]:
    """URL of a fresh PostgreSQL database with the newest schema and no rows."""
    with servers.postgres_database(postgres, migrated_template) as url:
        yield servers.text(url)


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite database with the newest schema, from which tests copy theirs."""
    file = tmp_path_factory.mktemp("template") / "bitwright.db"
    migrate(f"sqlite:///{file}")
    return file


@pytest.fixture
def sqlite_url(tmp_path: Path, migrated_file: Path) -> str:
    """URL of a fresh SQLite database with the newest schema and no rows."""
    return f"sqlite:///{shutil.copy(migrated_file, tmp_path)}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """Each database in turn, fresh."""
    name = "sqlite_url" if request.param == "sqlite" else "postgres_url"
    return str(request.getfixturevalue(name))


@pytest.fixture(scope="session")
def broker_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real Valkey that the whole session shares."""
    given = servers.given_broker()
    if given is not None:
        yield given
        return
    with servers.valkey_server(tmp_path_factory.mktemp("valkey")) as running:
        yield running.url


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """Folder of a small trained checkpoint with a tokenizer: two Llama blocks, width 128, bf16, untied head."""
    from tests.tiny_model import tiny_model_folder

    return tiny_model_folder()
