"""One service for all tests of the client; each test has jobs of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bitwright.service import Service, running_service


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder: Path = tmp_path_factory.mktemp("service")
    with running_service(folder) as running:
        yield running
