"""One service for all tests of a module; each test has jobs of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bitwright.service import Service, running_service


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests of a module that says BOTH_CLIENTS over the blocking and over the asynchronous client."""
    if "service" in metafunc.fixturenames and getattr(metafunc.module, "BOTH_CLIENTS", False):
        metafunc.parametrize("service", [False, True], indirect=True, scope="module", ids=["blocking", "asynchronous"])


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Service]:
    folder: Path = tmp_path_factory.mktemp("service")
    with running_service(folder, asynchronous=getattr(request, "param", False)) as running:
        yield running
