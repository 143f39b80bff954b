"""Damaged and hostile checkpoints are refused before anything is allocated; good ones are read as they are."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from app.domain.inputs.foreign_files import INDEX
from bitwright.errors import BitwrightError, CorruptCheckpoint, SourceNotFound, UnsafeCheckpoint
from tests.engine.model.random_models import save_random_model
from workers.engine.model.checkpoint import Checkpoint


def test_sharded_and_single_checkpoints_hold_the_same(tmp_path: Path) -> None:
    save_random_model(tmp_path / "single", "qwen2")
    save_random_model(tmp_path / "sharded", "qwen2", max_shard_size="20KB")
    single, sharded = Checkpoint.open(tmp_path / "single"), Checkpoint.open(tmp_path / "sharded")
    assert len(single.files) == 1
    assert len(sharded.files) > 2
    assert single.size == sharded.size
    assert single.tensors.keys() == sharded.tensors.keys()
    for name in single.tensors:
        assert torch.equal(single.read(name), sharded.read(name))


def test_the_digest_follows_the_weights_and_the_configuration(tmp_path: Path) -> None:
    save_random_model(tmp_path, "llama")
    first = Checkpoint.open(tmp_path).digest("abc")
    assert Checkpoint.open(tmp_path).digest("abc") == first
    assert Checkpoint.open(tmp_path).digest("def") != first
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert Checkpoint.open(tmp_path).digest("abc") != first


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def extend(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def empty(file: Path) -> None:
    file.write_bytes(b"")


def huge_header(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 2**63) + file.read_bytes()[8:])


def header_beyond_the_file(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", file.stat().st_size) + file.read_bytes()[8:])


def edit(change: Callable[[dict[str, dict[str, object]]], object]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        raw = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])

    return apply


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(truncate, id="truncated"),
        pytest.param(extend, id="longer than the header says"),
        pytest.param(empty, id="empty"),
        pytest.param(huge_header, id="header over the limit"),
        pytest.param(header_beyond_the_file, id="header longer than the file"),
        pytest.param(lambda f: f.write_bytes(struct.pack("<Q", 4) + b"nope"), id="header not JSON"),
        pytest.param(edit(lambda h: h[NORM].update(shape=[64])), id="shape and bytes differ"),
        pytest.param(edit(lambda h: h[NORM].update(data_offsets=[0, 2**40])), id="offset outside the file"),
        pytest.param(edit(lambda h: h[NORM].update(data_offsets=[-128, 0])), id="negative offset"),
        pytest.param(edit(lambda h: h[NORM].update(dtype="F128")), id="unknown dtype"),
        pytest.param(edit(lambda h: h.pop(NORM)), id="hole"),
        pytest.param(edit(lambda h: h.update(copy=dict(h[NORM]))), id="overlap"),
    ],
)
def test_a_damaged_file_is_refused_by_its_name(damage: Callable[[Path], None], tmp_path: Path) -> None:
    save_random_model(tmp_path, "llama")
    damage(tmp_path / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match=r"model\.safetensors"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x.bin", 7, "", None]
)
def test_an_index_names_only_files_beside_it(name: object, tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    save_random_model(folder, "llama", max_shard_size="20KB")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["w"] = name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CorruptCheckpoint, match=INDEX):
        Checkpoint.open(folder)


def lose_a_shard(folder: Path) -> None:
    next(folder.glob("model-00002-*.safetensors")).unlink()


def list_what_is_nowhere(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.layers.9.weight"] = next(iter(index["weight_map"].values()))
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("damage", [lose_a_shard, list_what_is_nowhere])
def test_an_index_that_does_not_fit_its_files_is_refused(damage: Callable[[Path], None], tmp_path: Path) -> None:
    save_random_model(tmp_path, "llama", max_shard_size="20KB")
    damage(tmp_path)
    with pytest.raises(CorruptCheckpoint, match="model"):
        Checkpoint.open(tmp_path)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (str(tmp_path / "exploded"),))

    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    torch.save(Bomb(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsafeCheckpoint, match=r"pytorch_model\.bin") as caught:
        Checkpoint.open(tmp_path)
    assert "safetensors" in str(caught.value.hint)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", ["[]", "{", '"x"', "[" * 200_000])
def test_a_configuration_that_is_no_object_is_refused(content: str, tmp_path: Path) -> None:
    save_random_model(tmp_path, "llama")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CorruptCheckpoint, match=r"config\.json"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_what_is_missing_is_named(missing: str, tmp_path: Path) -> None:
    save_random_model(tmp_path, "llama")
    (tmp_path / missing).unlink()
    with pytest.raises(SourceNotFound, match=missing) as caught:
        Checkpoint.open(tmp_path)
    assert isinstance(caught.value, BitwrightError)
    assert caught.value.hint
