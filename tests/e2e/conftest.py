"""Whole installations of real processes. One serves all tests of a module: starting five processes takes a while."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from app.store.session import migrate
from tests import servers
from tests.api.checkpoints import write_checkpoint
from tests.e2e.installation import Installation


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder under which an installation may read models."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def model(models: Path) -> Path:
    """A checkpoint that passes the API's inspection and holds nothing: scripted attempts read none."""
    return write_checkpoint(models / "hollow")


@pytest.fixture(scope="session")
def short_model(models: Path) -> Path:
    """A real Llama of two blocks."""
    return train(models, blocks=2)


@pytest.fixture(scope="session")
def long_model(models: Path) -> Path:
    """The same with ten blocks: time for many kills."""
    return train(models, blocks=10)


def train(folder: Path, blocks: int) -> Path:
    """A few seconds of training: faults care for files and processes, not for quality."""
    from workers.tiny_model import Recipe, make_tiny_model

    recipe = Recipe(
        vocabulary=512, width=64, intermediate=192, blocks=blocks, positions=512, steps=30, batch=2, length=64
    )
    return make_tiny_model(folder / f"blocks{blocks}", recipe)


@pytest.fixture(scope="module")
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path
) -> Iterator[Installation]:
    """An installation over an empty database; the module's DATABASE, WORKER_MODULE and SETTINGS say of what kind."""
    folder = tmp_path_factory.mktemp("installation")
    with ExitStack() as stack:
        url = f"sqlite:///{folder}/data/bitwright.db"
        if request.module.DATABASE == "postgresql":
            server = request.getfixturevalue("postgres")
            url = servers.text(stack.enter_context(servers.postgres_database(server)))
        settings = getattr(request.module, "SETTINGS", {})
        made = stack.enter_context(
            Installation(folder, model, url, worker_module=request.module.WORKER_MODULE, settings=settings)
        )
        migrate(url)
        yield made


@pytest.fixture
def installed(shared: Installation) -> Iterator[Installation]:
    """The module's installation with everything but the second worker running."""
    shared.ensure("valkey", "sweep", "api", "worker0")
    yield shared
    shared.tell()
    if shared["worker1"].running():
        shared["worker1"].stop()
