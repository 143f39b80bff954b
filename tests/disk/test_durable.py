"""Files after a power cut: every rename of the sources leaves all of a file or none, as promised."""

import ast
import asyncio
import hashlib
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import MagicMock, patch

import pytest
import torch

from app.store.blobs import FolderBlobs, materialise
from app.store.upkeep import backup
from bitwright.asynchronous import downloads as asynchronous
from bitwright.blocking import downloads as blocking
from bitwright.endpoint import Endpoint, save_endpoint
from bitwright.files.downloads import PartialFile, ignore_bytes
from bitwright.views import ArtifactView
from tests.documentation import ROOT
from tests.power_cut import PowerCut
from tests.supervise.attempt.test_sources import Bucket
from workers.disk.durable import replace_file, sync_tree
from workers.formats.shards import ShardWriter

DATA = b"bytes"
"""Few enough to stay in a buffer that nobody flushes."""


def replacing(folder: Path) -> None:
    replace_file(folder / "state.json", DATA)


def storing(folder: Path) -> None:
    (folder / "made").write_bytes(DATA)
    FolderBlobs(folder / "blobs").put(folder / "made")


def materialising(folder: Path) -> None:
    (folder / "made").write_bytes(DATA)
    blobs = FolderBlobs(folder / "blobs")
    blob = blobs.put(folder / "made")
    assert materialise(Bucket(blobs), blob.sha256, folder / "copy")  # type: ignore[arg-type]


def writing_shards(folder: Path) -> None:
    writer = ShardWriter(folder, "model", shard_bytes=16)
    writer.add({"a": torch.zeros(4), "b": torch.ones(4)})
    assert len(writer.finish()) == 2


def view() -> ArtifactView:
    return ArtifactView(
        id="a", job_id="j", format="native", path="w", sha256=hashlib.sha256(DATA).hexdigest(), size=len(DATA),
        media_type="x", created_at=datetime.now(UTC),
    )  # fmt: skip


def downloading(folder: Path) -> None:
    def receive(_transport: object, _artifact: object, file: PartialFile, _on_bytes: object) -> None:
        file.write(DATA)

    with patch.object(blocking, "_receive", receive):
        blocking.download_artifact(MagicMock(), view(), folder, ignore_bytes)


def downloading_in_a_loop(folder: Path) -> None:
    async def receive(_transport: object, _artifact: object, file: PartialFile, _on_bytes: object) -> None:
        file.write(DATA)

    with patch.object(asynchronous, "_receive", receive):
        asyncio.run(asynchronous.download_artifact(MagicMock(), view(), folder, ignore_bytes))


def saving(folder: Path) -> None:
    save_endpoint(folder, Endpoint("http://127.0.0.1:1", "key"))


DURABLE: dict[str, Callable[[Path], None]] = {
    "workers/disk/durable.py::replace_file": replacing,
    "app/store/blobs.py::_put": storing,
}
"""Name and bytes are there after a power cut."""
WHOLE: dict[str, Callable[[Path], None]] = {
    "app/store/blobs.py::materialise": materialising,
    "workers/formats/shards.py::_named": writing_shards,
    "bitwright/blocking/downloads.py::download_artifact": downloading,
    "bitwright/asynchronous/downloads.py::download_artifact": downloading_in_a_loop,
    "bitwright/endpoint.py::save_endpoint": saving,
    "app/store/upkeep/backup.py::_write_durably": lambda folder: backup._write_durably(folder / "manifest.json", DATA),
}
"""If the name is there, so are the bytes; without the name it is made again."""
ELSEWHERE = {"workers/supervise/attempt/base_job.py::base_job_folder"}
"""Tested beside its other promises, in `tests/supervise/attempt/test_base_job.py`."""
UNPROMISED = {
    "app/store/blobs.py::_moved",  # to a name that nobody looks for, under which it is hashed and synced
    "workers/disk/hub_cache.py::_take_away",  # the folder is about to be deleted
    "workers/tiny_model.py::make_tiny_model",  # of a demonstration
    "workers/disk/handover.py::hand_over",  # of files that the next attempt is given anew
    "workers/child/confinement.py::_write",  # for a process of the same attempt
    "workers/supervise/kernels.py::_take_over",  # made again where it is missing
    "bitwright/cli/reports.py::save_page",  # downloaded again
}


@pytest.mark.parametrize("place", DURABLE)
def test_what_got_its_name_survives_a_power_cut(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = PowerCut(monkeypatch)
    DURABLE[place](tmp_path)
    assert cut.renamed
    assert (cut.torn, cut.lost()) == ([], [])


@pytest.mark.parametrize("place", WHOLE)
def test_what_has_a_name_after_a_power_cut_is_whole(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = PowerCut(monkeypatch)
    WHOLE[place](tmp_path)
    assert cut.renamed
    assert cut.torn == []


def test_what_a_power_cut_takes_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = PowerCut(monkeypatch)
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "a").rename(tmp_path / "b")
    assert (cut.torn, cut.lost()) == (["a"], [str(tmp_path)])
    with (tmp_path / "c").open("wb") as file:
        file.write(b"1")
        os.fsync(file.fileno())  # still in Python's buffer
    (tmp_path / "c").replace(tmp_path / "d")
    assert cut.torn == ["a", "c"]


def test_a_tree_is_synced_to_its_last_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "tree" / "a" / "b"
    deep.mkdir(parents=True)
    for file in (deep / "file", tmp_path / "tree" / "file", deep.parent / ".hidden"):
        file.write_bytes(DATA)
    (deep / "link").symlink_to(tmp_path / "nowhere")
    cut = PowerCut(monkeypatch)
    sync_tree(tmp_path / "tree")
    (deep / "link").unlink()
    assert cut.unsynced(tmp_path / "tree") == set()


def renames() -> Iterator[str]:
    """`file::function` of every rename in the sources."""
    for folder in ("app", "bitwright", "workers"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for function in ast.walk(tree):
                if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and any(
                    map(_renames, ast.walk(function))
                ):
                    yield f"{path.relative_to(ROOT).as_posix()}::{function.name}"


def _renames(call: ast.AST) -> bool:
    """`os.replace(a, b)`, `shutil.move(a, b)`, `path.replace(b)`; a text's has two arguments, a date's has names."""
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute) or call.keywords:
        return False
    name, owner = call.func.attr, call.func.value
    if isinstance(owner, ast.Name) and owner.id in {"os", "shutil"}:
        return name in {"replace", "rename", "renames", "move"}
    return name in {"replace", "rename"} and len(call.args) == 1


def test_every_rename_of_the_sources_has_its_promise_tried() -> None:
    assert set(renames()) == {*DURABLE, *WHOLE, *ELSEWHERE, *UNPROMISED}
