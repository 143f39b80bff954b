"""Checkpoint folders made by hand, sound ones and damaged ones. No torch: the API has none either."""

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "tie_word_embeddings": True,
}
SHAPES = {"model.embed_tokens.weight": (128, 64), "model.norm.weight": (64,)}


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any] | None = None,
    *,
    shards: bool = False,
    shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> Path:
    """A small checkpoint; in two files with an index if `shards`; with tensors of these shapes besides."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    (folder / "tokenizer.json").write_text("{}")
    if not shards:
        (folder / "model.safetensors").write_bytes(safetensors({**SHAPES, **shapes}))
        return folder
    weight_map = {}
    for number, (name, shape) in enumerate(SHAPES.items(), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        (folder / file).write_bytes(safetensors({name: shape}))
        weight_map[name] = file
    write_index(folder, weight_map)
    return folder


def as_hub_cache(checkpoint: Path, cache: Path) -> Path:
    """The same checkpoint as huggingface_hub keeps it: a snapshot of links to blobs that lie beside all snapshots."""
    repository = cache / "models--org--model"
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for number, file in enumerate(sorted(checkpoint.iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    return snapshot


def write_index(folder: Path, weight_map: Mapping[str, object]) -> None:
    """An index that says so."""
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def safetensors(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """A bf16 file of zeros."""
    header, position = {}, 0
    for name, shape in shapes.items():
        size = 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    return with_header(header, position)


def with_header(header: object, data_bytes: int, claimed: int | None = None) -> bytes:
    """A file with any header, true or not; `claimed` is the length that it claims to have."""
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if claimed is None else claimed) + encoded + bytes(data_bytes)
