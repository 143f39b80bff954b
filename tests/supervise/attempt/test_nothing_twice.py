"""Work of a supervisor that is done once or not at all: processes, readings of files, copies."""

from pathlib import Path
from typing import Any, BinaryIO

import pytest

from app.store import blobs
from bitwright.job_states import JobStatus
from tests.supervise.bench import Bench
from workers.supervise import child_process
from workers.supervise.child_process import ChildProcess

FILES = {"model.safetensors": b"w" * 100, "deep/config.json": b"{}", "README.md": b"card"}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Modules of the processes that are started."""
    started: list[str] = []
    start = child_process._Process

    class Counted(start):  # type: ignore[misc, valid-type]
        def __init__(self, arguments: list[str], **given: Any) -> None:
            started.append(arguments[0])
            super().__init__(arguments, **given)

    monkeypatch.setattr(child_process, "_Process", Counted)
    assert ChildProcess.__module__ == child_process.__name__
    return started


def test_a_job_of_local_sources_is_one_process_whose_files_are_moved_and_read_once(
    sqlite_bench: Bench, modules: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed, moved, copied = list[int](), list[str](), list[str]()
    hash_, move, copy = blobs._hash, blobs._moved, blobs._copy

    def counted_hash(source: BinaryIO) -> blobs.Blob:
        blob = hash_(source)
        hashed.append(blob.size)
        return blob

    def counted_move(source: BinaryIO, path: Path, target: Path) -> bool:
        moved.append(path.name)
        return move(source, path, target)

    def counted_copy(source: BinaryIO, target: Any) -> blobs.Blob:
        copied.append(str(target))
        return copy(source, target)

    for name, function in {"_hash": counted_hash, "_moved": counted_move, "_copy": counted_copy}.items():
        monkeypatch.setattr(blobs, name, function)
    job_id = sqlite_bench.submit(",".join(f"file:{name}:{text.decode()}" for name, text in FILES.items()))
    assert sqlite_bench.run() is JobStatus.SUCCEEDED
    assert modules == [sqlite_bench.context.attempt_module], "no fetch where nothing is fetched"
    assert sorted(hashed) == sorted(map(len, FILES.values())), "each byte once"
    assert sorted(moved) == sorted(Path(name).name for name in FILES)
    assert copied == []
    stored = {artifact.path: artifact.sha256 for artifact in sqlite_bench.artifacts(job_id)}
    for name, text in FILES.items():
        with sqlite_bench.context.blobs.open(stored[name]) as file:
            assert file.read() == text
