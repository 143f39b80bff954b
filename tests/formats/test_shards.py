"""Shards: on disk before they are listed, cut where they are full, the same whatever device or view they came from."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from workers.formats import shards
from workers.formats.shards import ShardWriter, write_json


def ones(count: int) -> torch.Tensor:
    return torch.ones(count, dtype=torch.float32)


def test_a_shard_is_of_two_gibibytes_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    assert shards.SHARD_BYTES == 2_147_483_648
    assert ShardWriter(tmp_path, "x")._shard_bytes == 2_147_483_648


def test_a_shard_that_is_exactly_full_is_one(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "model", shard_bytes=80)
    writer.add({"a": ones(10), "b": ones(10)})
    assert [file.name for file in writer.finish()] == ["model.safetensors"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors"]


def test_one_byte_more_is_another_shard_and_an_index_names_both(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "model", shard_bytes=79)
    writer.add({"b": ones(10), "a": ones(10)})
    writer.add({"c": ones(30)})  # larger than a shard, alone in one
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert [file.name for file in writer.finish()] == names
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 200},
        "weight_map": {"a": names[1], "b": names[0], "c": names[2]},
    }
    assert [load_file(tmp_path / name).keys() for name in names] == [{"b"}, {"a"}, {"c"}]
    with safe_open(tmp_path / names[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}, "transformers refuses a file without it"


def test_shards_are_on_disk_before_they_have_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor: int) -> None:
        steps.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def record_rename(place: Path, target: Path) -> Path:
        steps.append(("rename", Path(target).name))
        return rename(place, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    writer = ShardWriter(tmp_path, "w", shard_bytes=40)
    writer.add({"a": ones(10), "b": ones(10)})
    assert steps == [("fsync", "w-00001.safetensors.partial")]
    writer.finish()
    assert steps[1:] == [
        ("fsync", "w-00002.safetensors.partial"),
        ("rename", "w-00001-of-00002.safetensors"),
        ("rename", "w-00002-of-00002.safetensors"),
    ]


def test_a_view_is_stored_alone_and_a_name_once(tmp_path: Path) -> None:
    writer, base = ShardWriter(tmp_path, "w"), torch.arange(12.0).view(3, 4)
    writer.add({"column": base[:, 1], "all": base})
    base.zero_()
    with pytest.raises(ValueError, match="all is stored twice"):
        writer.add({"all": base})
    assert writer.total_bytes == 60
    writer.finish()
    found = load_file(tmp_path / "w.safetensors")
    assert found["column"].tolist() == [1, 5, 9]
    assert found["all"].flatten().tolist() == list(range(12))


def test_json_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    write_json(tmp_path / "x", {"b": "ü", "a": [1]})
    assert (tmp_path / "x").read_bytes() == '{\n  "b": "ü",\n  "a": [\n    1\n  ]\n}\n'.encode()
