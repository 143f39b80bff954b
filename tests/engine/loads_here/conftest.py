"""A child that reads checkpoints, started once for all tests: it forks for each order."""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest

from app.limited.process import LimitedProcess
from workers.runtimes.order import FILE_BYTES, HOST

RUNTIMES = {"transformers": {"version": version("transformers")}, "peft": {"version": version("peft")}}


@pytest.fixture(scope="session")
def warm_child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LimitedProcess]:
    with LimitedProcess.start(HOST, folder=tmp_path_factory.mktemp("reading"), file_bytes=FILE_BYTES) as child:
        yield child


@pytest.fixture
def reads(warm_child: LimitedProcess) -> dict[str, Any]:
    """Fields of an order whose worker reads in transformers and peft."""
    assert warm_child.usable
    handle = warm_child.handle
    return {
        "runtimes": RUNTIMES,
        "warm": {"orders": handle.orders, "answers": handle.answers, "pid": handle.pid},
    }
