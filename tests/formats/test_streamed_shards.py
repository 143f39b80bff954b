"""Shards that are written while they grow: what loads is what was stored, memory stays small, and others go on."""

import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from app.domain.inputs.safetensors_header import LENGTH_BYTES, header_length, parse_header
from workers.formats.shards import HELD_BYTES, ShardWriter
from workers.formats.streamed_shard import DTYPES, StreamedShard

SEEDED = torch.Generator().manual_seed(0)


def loaded(files: list[Path]) -> dict[str, Tensor]:
    """All tensors, by safetensors; every header is sound by our own judgement too."""
    found: dict[str, Tensor] = {}
    for file in files:
        data = file.read_bytes()
        length = header_length(data[:LENGTH_BYTES], len(data), file.name)
        entries = parse_header(data[LENGTH_BYTES : LENGTH_BYTES + length], len(data), file.name)
        for entry in entries.values():
            assert entry.begin % max(1, {"I64": 8, "F32": 4, "I32": 4, "BF16": 2, "U8": 1}[entry.dtype]) == 0
        found |= load_file(file)
    return found


DRAWN = st.lists(
    st.tuples(
        st.sampled_from([torch.int64, torch.float32, torch.int32, torch.bfloat16, torch.uint8]),
        st.lists(st.integers(0, 9), min_size=0, max_size=3),
    ),
    max_size=20,
)


@settings(max_examples=60, deadline=None)
@given(drawn=DRAWN, held=st.integers(0, 200), full=st.integers(1, 600))
def test_what_was_stored_is_what_loads(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[torch.dtype, list[int]]], held: int, full: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tensors = {
        f"t{n}": torch.randint(0, 99, shape, generator=SEEDED).to(dtype) for n, (dtype, shape) in enumerate(drawn)
    }
    writer = ShardWriter(folder, "model", shard_bytes=full, held_bytes=held)
    for name, tensor in tensors.items():
        if int(name[1:]) % 3:
            writer.add({name: tensor})
        else:
            with writer.growing(name, tensor.dtype, tuple(tensor.shape)) as pieces:
                for piece in tensor.split(2) if tensor.dim() else [tensor]:
                    pieces.append(piece)
    found = loaded(writer.finish())
    assert found.keys() == tensors.keys()
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in tensors.items())


def test_what_is_small_is_stored_as_ever(tmp_path: Path) -> None:
    assert HELD_BYTES == 268_435_456
    written = []
    for held in (HELD_BYTES, 100):
        folder = tmp_path / str(held)
        folder.mkdir()
        writer = ShardWriter(folder, "model", held_bytes=held)
        writer.add({"a": torch.arange(8), "b": torch.arange(100, dtype=torch.uint8)})
        written.append(writer.finish()[0].read_bytes())
    assert len(written[0]) < 500
    assert len(written[1]) > 4096
    with safe_open(tmp_path / "100" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}, "transformers refuses a file without it"


def test_a_header_without_room_ends_its_shard(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "model", held_bytes=8)
    tensors = {f"a.name.of.some.length.{n}": torch.full((8,), n) for n in range(100)}
    for name, tensor in tensors.items():
        writer.add({name: tensor})
    files = writer.finish()
    assert len(files) > 1
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for file in files:
        assert {name for name, place in index.items() if place == file.name} == load_file(file).keys()
    found = loaded(files)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_pieces_that_are_no_whole_tensor_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "model", held_bytes=8)
    with writer.growing("a", torch.int64, (4, 2)) as pieces:
        pieces.append(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="48 bytes for 64"):
        writer.finish()
    writer.abandon()


def test_python_holds_no_more_than_it_was_told(tmp_path: Path) -> None:
    """Bytes go to the file as they are; torch's own memory is watched where a whole checkpoint is written."""
    writer = ShardWriter(tmp_path, "model", held_bytes=1 << 16)
    tensor = torch.zeros(1 << 20)
    tracemalloc.start()
    for n in range(8):
        writer.add({f"t{n}": tensor})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    writer.finish()
    assert peak < 1 << 20


def test_a_writer_goes_on_where_another_ended(tmp_path: Path) -> None:
    parts, folders = tmp_path / "parts", [tmp_path / "first", tmp_path / "second", tmp_path / "whole"]
    for folder in (parts, *folders):
        folder.mkdir()
    first = ShardWriter(folders[0], "model", held_bytes=32, parts=parts)
    first.add({"a": torch.arange(8), "b": torch.arange(3)})
    sealed = first.seal()
    assert [shard.names for shard in sealed] == [("a", "b")]
    first.add({"lost": torch.arange(40)})
    first.abandon()
    second = ShardWriter(folders[1], "model", held_bytes=32, parts=parts)
    assert all(second.holds(shard) for shard in sealed)
    second.adopt(sealed)
    with pytest.raises(ValueError, match="a is stored twice"):
        second.add({"a": torch.arange(8)})
    second.add({"c": torch.arange(5)})
    files = second.finish()
    assert [file.name for file in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert loaded(files).keys() == {"a", "b", "c"}
    third = ShardWriter(folders[2], "model", parts=parts)
    assert third.holds(sealed[0]), "it stays for whoever comes next"
    (parts / sealed[0].file).write_bytes(b"torn")
    assert not third.holds(sealed[0])
    (parts / sealed[0].file).unlink()
    assert not third.holds(sealed[0])


def test_every_dtype_of_torch_has_the_files_name(tmp_path: Path) -> None:
    for number, (dtype, name) in enumerate(DTYPES.items()):
        tensor = torch.zeros(8, dtype=torch.uint8).view(dtype)
        shard = StreamedShard(tmp_path / str(number), 4096)
        shard.write("t", tensor)
        shard.close()
        with safe_open(tmp_path / str(number), framework="pt") as file:
            assert file.get_slice("t").get_dtype() == name
            assert file.get_tensor("t").dtype == dtype
