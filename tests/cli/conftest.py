"""A service that commands in this process are run against."""

from collections.abc import Iterator

import pytest
import structlog

from tests.bitwright.service import Service, running_service


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The API runs in this process, as do most commands: it logs to a file, so that their output is their own."""
    folder, before = tmp_path_factory.mktemp("service"), structlog.get_config()
    with (folder / "api.log").open("w") as log, running_service(folder) as running:
        structlog.reset_defaults()
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(log))
        yield running
    structlog.configure(**before)
