"""A job's scratch folder: what is in it, how long it stays, and what of it is output."""

import os
import time
from pathlib import Path

import pytest

from workers.disk.hub_cache import holding, prune_models
from workers.disk.orders import AttemptOrder, FetchOrder, TextOrder
from workers.disk.workspace import Workspace, output_files, prune


@pytest.fixture
def job(tmp_path: Path) -> Workspace:
    workspace = Workspace.of(tmp_path, "job_1")
    workspace.open()
    return workspace


def test_the_places_in_the_folder(job: Workspace, tmp_path: Path) -> None:
    assert job.folder == tmp_path / "job_1"
    places = [job.order, job.fetch_order, job.fetched, job.sources, job.output, job.log, job.lock]
    assert [place.relative_to(job.folder).as_posix() for place in places] == [
        *("order.json", "fetch.json", "fetched.json", "sources", "output", "attempt.log", "lock"),
    ]
    assert job.sources.is_dir()


def test_opening_a_folder_again_notes_that_it_is_used(job: Workspace, tmp_path: Path) -> None:
    os.utime(job.folder / "used", (0, 0))
    job.open()
    assert prune(tmp_path, unused_seconds=3600, in_use=lambda _: False) == []
    os.utime(job.folder / "used", (0, 0))
    assert prune(tmp_path, unused_seconds=3600, in_use=lambda _: True) == []
    assert prune(tmp_path, unused_seconds=3600, in_use=lambda _: False) == ["job_1"]
    job.remove()  # once more does no harm


def test_a_folder_without_a_stamp_has_its_own_age(tmp_path: Path) -> None:
    for name, age in (("job_old", 7200), ("job_young", 0)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert prune(tmp_path, unused_seconds=3600, in_use=lambda _: False) == ["job_old"]


def test_ranks_meet_where_no_earlier_attempt_met(job: Workspace) -> None:
    """The file of an attempt that was killed would be taken for that of peers that are there."""
    first = job.rendezvous(1)
    first.touch()
    second = job.rendezvous(2)
    assert (first.name, second.name) == ("rendezvous-1", "rendezvous-2")
    assert not first.exists()
    second.touch()
    assert not job.rendezvous(2).exists()


def test_output_is_every_real_file_in_order(tmp_path: Path) -> None:
    for name in ("b.json", "a/z.json", "a/b/c.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to(tmp_path / "b.json")
    found = [(name, path.read_text()) for path, name in output_files(tmp_path)]
    assert found == [(name, name) for name in ("a/b/c.json", "a/z.json", "b.json")]


def test_a_fetch_is_empty_where_nothing_comes_from_the_hub() -> None:
    text = TextOrder.model_validate({"dataset": {"source": "hub", "id": "org/text"}, "path": "/x", "characters": 1})
    assert FetchOrder(model=None, models_folder="/m").empty
    for role in ("calibration", "evaluation", "finetuning"):
        assert not FetchOrder.model_validate({"model": None, "models_folder": "/m", role: text}).empty
    with pytest.raises(ValueError, match="greater than 0"):
        TextOrder.model_validate({**text.model_dump(), "characters": 0})


def test_an_order_is_for_one_process_and_whole_batches_where_it_says_nothing() -> None:
    fields = AttemptOrder.model_fields
    assert {
        name: fields[name].default for name in ("device_index", "world_size", "micro_batch_divisor", "rendezvous")
    } == {**{"device_index": 0, "world_size": 1, "micro_batch_divisor": 1, "rendezvous": ""}}


def test_a_models_time_counts_from_the_end_of_its_use(tmp_path: Path) -> None:
    folder = tmp_path / "org--model@1"
    with holding(folder):
        os.utime(folder / ".used", (0, 0))
    assert time.time() - (folder / ".used").stat().st_mtime < 60
    os.utime(folder / ".used", (0, 0))
    holding_it = holding(folder)
    holding_it.__enter__()
    assert time.time() - (folder / ".used").stat().st_mtime < 60, "and from its beginning"
    failed = RuntimeError()
    assert not holding_it.__exit__(RuntimeError, failed, None)
    assert prune_models(tmp_path, unused_seconds=-1) == ["org--model@1"], "who failed holds it no more"
    assert list(tmp_path.iterdir()) == []
