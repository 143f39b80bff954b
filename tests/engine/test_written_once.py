"""Files of a result that are opened for writing: each once, the report with them."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.engine.conftest import finish

WRITING = os.O_WRONLY | os.O_RDWR
_listeners: list[Callable[[str], None]] = []


def _hear(event: str, arguments: tuple[object, ...]) -> None:
    """A hook of the interpreter, which cannot be taken back."""
    if event == "open" and _listeners and isinstance(arguments[0], str) and int(str(arguments[2])) & WRITING:
        for listener in _listeners:
            listener(arguments[0])


@pytest.fixture(scope="session")
def hook() -> None:
    sys.addaudithook(_hear)


@contextmanager
def written(below: Path) -> Iterator[Counter[str]]:
    """How often each file below a folder is opened for writing."""
    found = Counter[str]()

    def listener(path: str) -> None:
        if Path(path).is_relative_to(below):
            found[str(Path(path).relative_to(below))] += 1

    _listeners.append(listener)
    try:
        yield found
    finally:
        _listeners.remove(listener)


@pytest.mark.usefixtures("hook")
def test_each_file_of_a_result_is_written_once(small_model: Path, tmp_path: Path) -> None:
    with written(tmp_path) as opened:
        finished = finish(small_model, tmp_path, bits=4, formats=["native", "compressed-tensors"])
    output = {name: count for name, count in opened.items() if "output/" in name}
    reports = [name for name in output if "report" in Path(name).name]
    assert len(reports) == 2 * len(finished.result.checkpoints), "as JSON and as a page"
    assert set(output.values()) == {1}, output
