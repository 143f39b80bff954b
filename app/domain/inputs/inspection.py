"""A look at a checkpoint before a job is queued: configuration, shapes and safetensors headers, no torch, no weights.

It reads names, sizes and headers through `CheckpointFiles`, so a local folder, an upload and a repository on the Hub
are judged alike.
"""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Protocol

from app.domain.inputs.architectures import Dimensions, check_not_quantized, is_accepted, read_dimensions
from app.domain.inputs.checkpoint_choice import check_choice
from app.domain.inputs.foreign_files import INDEX, SINGLE, foreign_files
from app.domain.inputs.quantized_tensors import HINT, quantized_tensor
from app.domain.inputs.safetensors_header import DTYPE_BITS, LENGTH_BYTES, TensorEntry, header_length, parse_header
from bitwright.errors import CorruptCheckpoint, UnsupportedArchitecture, UnsupportedCheckpoint

CONFIG = "config.json"
MAX_CONFIG_BYTES, MAX_INDEX_BYTES = 4 << 20, 64 << 20
HEADERS_AT_ONCE = 8
"""A header is two reads of a few kilobytes, which over a network are all waiting."""
WEIGHT_BYTES = {"float32": 4, "float64": 8}
"""Of a weight, by config.json's dtype, where no header was read; else 2."""


class CheckpointFiles(Protocol):
    """A checkpoint's files by name."""

    def names(self) -> Sequence[str]: ...

    def size(self, name: str) -> int: ...

    def read(self, name: str, start: int, length: int) -> bytes: ...


@dataclass(frozen=True)
class FolderFiles:
    """The files of a local folder whose links were checked."""

    folder: Path

    def names(self) -> Sequence[str]:
        """Plain files directly in the folder."""
        return sorted(entry.name for entry in os.scandir(self.folder) if entry.is_file())

    def size(self, name: str) -> int:
        """Bytes of the file."""
        return (self.folder / name).stat().st_size

    def read(self, name: str, start: int, length: int) -> bytes:
        """Up to `length` bytes from `start`."""
        with (self.folder / name).open("rb") as file:
            file.seek(start)
            return file.read(length)


@dataclass(frozen=True)
class Inspection:
    """Contents of a checkpoint: its configuration and shapes, and its tensors' bytes and number of weights.

    dimensions   None for a type that is not accepted, of which tensors are all that is known
    tensors      by name; empty where headers were not read: then `weights` is what the files' sizes say
    """

    config: Mapping[str, object]
    dimensions: Dimensions | None
    tensor_bytes: int
    weights: int
    tokenizer: bool
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)


def inspect_checkpoint(files: CheckpointFiles, *, any_type: bool = False, headers: bool = True) -> Inspection:
    """Judge a checkpoint: its configuration first, its weights' headers last.

    any_type   whether a type that is not accepted will do, for a job without a model
    headers    whether the headers of its weights are read; else names and sizes are all that is judged of them

    Raises:
        UnsupportedArchitecture: not a `model_type` that can be quantized, or quantized already.
        UnsafeCheckpoint, UnsupportedCheckpoint: its weights are pickled, or are none that this service reads.
        CorruptCheckpoint: a file is missing, truncated, or says what cannot be true.
    """
    names = frozenset(files.names())
    foreign = foreign_files(names)
    if foreign is not None:
        raise foreign.refusal("model")
    config = _read_json(files, CONFIG, MAX_CONFIG_BYTES, names)
    dimensions = None
    if any_type and not is_accepted(config):
        check_not_quantized(config)
    else:
        dimensions = read_dimensions(config)
    shards = _shards(files, names)
    check_choice(names, SINGLE if SINGLE in names else INDEX, config)
    tensors = _tensors(files, shards) if headers else {}
    promised = ((name, "") for tensors_of_shard in shards.values() for name in tensors_of_shard)
    quantized = quantized_tensor(((n, entry.dtype) for n, entry in tensors.items()) if headers else promised)
    if quantized is not None:
        detail = f"the checkpoint is quantized already: {quantized[0]} is {quantized[1]}"
        raise UnsupportedArchitecture(detail, field="model", value=quantized[0], hint=HINT)
    if headers:
        size = sum(entry.end - entry.begin for entry in tensors.values())
        weights = sum((entry.end - entry.begin) * 8 // DTYPE_BITS[entry.dtype] for entry in tensors.values())
    else:
        size = sum(files.size(shard) for shard in shards)
        weights = size // WEIGHT_BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 2)
    tokenizer = bool(names & {"tokenizer.json", "tokenizer.model", "vocab.json"})
    return Inspection(config, dimensions, size, weights, tokenizer, tensors)


def _tensors(files: CheckpointFiles, shards: Mapping[str, set[str]]) -> dict[str, TensorEntry]:
    """The tensors of all weight files, those of the last one in the order of names winning."""
    tensors: dict[str, TensorEntry] = {}
    with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
        for entries in pool.map(partial(_read_header, files), sorted(shards)):
            tensors |= entries
    for shard, promised in shards.items():
        missing = sorted(promised - tensors.keys())
        if missing:
            detail = f"{INDEX} says that {shard} holds {missing[0]}, but it does not, nor does another shard"
            raise CorruptCheckpoint(detail, field=INDEX)
    return tensors


def weight_files(files: CheckpointFiles) -> list[str]:
    """Names of the files that hold a checkpoint's weights, and of their index; raises as `inspect_checkpoint`."""
    names = frozenset(files.names())
    return [*sorted(_shards(files, names)), *([] if SINGLE in names else [INDEX])]


def _shards(files: CheckpointFiles, names: frozenset[str]) -> dict[str, set[str]]:
    """Weight files to the tensors that the index promises in each; a single file promises nothing."""
    if SINGLE in names:
        return {SINGLE: set()}
    if INDEX not in names:
        hint = f"add the weights as {SINGLE}, or as shards with {INDEX}"
        raise UnsupportedCheckpoint("the checkpoint holds no weights", field="model", hint=hint)
    weight_map = _read_json(files, INDEX, MAX_INDEX_BYTES, names).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CorruptCheckpoint(f"{INDEX} has no weight_map", field=INDEX)
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if not is_plain_name(shard) or not shard.endswith(".safetensors"):
            detail = f"{INDEX} puts {tensor!r} into {shard!r}; it may only name .safetensors files of its own folder"
            raise CorruptCheckpoint(detail, field=INDEX, value=shard)
        if shard not in names:
            raise CorruptCheckpoint(f"{INDEX} names {shard}, which is missing", field=INDEX, value=shard)
        shards.setdefault(shard, set()).add(tensor)
    return shards


def is_plain_name(name: object) -> bool:
    """True if this is the name of a file, with no folder in it, for POSIX and Windows alike."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= 255
        and name not in (".", "..")
        and name == PurePosixPath(name).name
        and not any(character in '\\/:*?"<>|' or ord(character) < 32 or ord(character) == 127 for character in name)
    )


def _read_json(files: CheckpointFiles, name: str, limit: int, names: frozenset[str]) -> Mapping[str, object]:
    if name not in names:
        raise CorruptCheckpoint(f"the checkpoint has no {name}", field="model", hint="name the folder that holds it")
    size = files.size(name)
    if size > limit:
        raise CorruptCheckpoint(f"{name} has {size} bytes; at most {limit} are read", field=name, value=size)
    try:
        decoded = json.loads(files.read(name, 0, size))
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpoint(f"{name} is not JSON: {error}", field=name) from error
    if not isinstance(decoded, Mapping):
        raise CorruptCheckpoint(f"{name} is no JSON object", field=name)
    return decoded


def _read_header(files: CheckpointFiles, name: str) -> dict[str, TensorEntry]:
    size = files.size(name)
    length = header_length(files.read(name, 0, LENGTH_BYTES), size, name)
    return parse_header(files.read(name, LENGTH_BYTES, length), size, name)
