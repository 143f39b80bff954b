"""Whole installations of real processes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from app.store.session import migrate
from tests.e2e.installation import Installation

Install = Callable[..., Installation]


@pytest.fixture
def install(tmp_path: Path, model: Path) -> Iterator[Install]:
    """Makes installations with an empty database; nothing of them is left at the end."""
    with ExitStack() as stack:

        def make(**options: object) -> Installation:
            folder = tmp_path / f"installation{len(list(tmp_path.iterdir()))}"
            made = Installation(folder, model, **options)  # type: ignore[arg-type]
            migrate(made.database_url)
            return stack.enter_context(made)

        yield make


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real Llama of six blocks, trained for a few seconds: faults care for files and processes, not for quality."""
    from workers.engine.tiny_model import Recipe, make_tiny_model

    recipe = Recipe(vocabulary=512, width=64, intermediate=192, blocks=6, positions=512, steps=40, batch=4)
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", recipe)
