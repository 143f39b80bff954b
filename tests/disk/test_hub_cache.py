"""Models fetched from the Hub: kept while a job holds them, gone when nobody has used them for long."""

import os
import threading
import time
from pathlib import Path

from tests.supervise.bench import wait_for
from workers.disk.hub_cache import holding, prune_models

LONG_AGO = 1000.0


def make(root: Path, name: str, *, seconds_ago: float = LONG_AGO) -> Path:
    """A model's folder that was last used so long ago."""
    folder = root / name
    with holding(folder):
        (folder / "model.safetensors").write_bytes(b"weights")
    grow_old(folder, seconds_ago)
    return folder


def grow_old(folder: Path, seconds: float = LONG_AGO) -> None:
    then = time.time() - seconds
    os.utime(folder / ".used", (then, then))


def test_only_what_was_not_used_for_long_goes(tmp_path: Path) -> None:
    old, young = make(tmp_path, "org--old@1"), make(tmp_path, "org--young@1", seconds_ago=10)
    (tmp_path / "notes.txt").write_text("not a model")
    assert prune_models(tmp_path, unused_seconds=100) == [old.name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", young.name]
    assert prune_models(tmp_path / "nothing", unused_seconds=0) == []


def test_what_a_job_holds_stays_however_long_it_takes(tmp_path: Path) -> None:
    folder = make(tmp_path, "org--model@1")
    with holding(folder), holding(folder):
        grow_old(folder)
        assert prune_models(tmp_path, unused_seconds=100) == []
    assert prune_models(tmp_path, unused_seconds=100) == [], "its time counts from the end of its use"
    grow_old(folder)
    assert prune_models(tmp_path, unused_seconds=100) == [folder.name]
    assert not folder.exists()


def test_a_folder_of_an_older_version_has_the_age_of_its_last_change(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("org--old@1", "org--young@1")]
    for folder in folders:
        folder.mkdir()
    then = time.time() - LONG_AGO
    os.utime(folders[0], (then, then))
    assert prune_models(tmp_path, unused_seconds=100) == ["org--old@1"]


def test_what_a_killed_worker_had_begun_to_remove_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".removed-x").mkdir(parents=True)
    (tmp_path / ".removed-x" / "model.safetensors").write_bytes(b"weights")
    prune_models(tmp_path, unused_seconds=100)
    assert list(tmp_path.iterdir()) == []


def test_who_holds_and_who_prunes_never_share_a_folder(tmp_path: Path) -> None:
    """Whoever holds a folder has it whole until the end, while another prunes all the time."""
    folder, done, pruned = tmp_path / "org--model@1", threading.Event(), []

    def prune() -> None:
        while not done.is_set():
            pruned.extend(prune_models(tmp_path, unused_seconds=-1))

    pruning = threading.Thread(target=prune)
    pruning.start()
    try:
        for turn in range(200):
            with holding(folder):
                (folder / "written").write_text(str(turn))
                assert (folder / "written").read_text() == str(turn)
        wait_for(lambda: pruned, what="a moment in which nobody holds it")
    finally:
        done.set()
        pruning.join()
