"""A look at a checkpoint before a job is queued: configuration, shapes and safetensors headers, no torch, no weights.

It reads names, sizes and headers through `CheckpointFiles`, so a local folder, an upload and a repository on the Hub
are judged alike.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path, PurePosixPath
from typing import Protocol

from app.domain.inputs.architectures import Dimensions, is_accepted, read_dimensions
from app.domain.inputs.checkpoint_choice import check_choice
from app.domain.inputs.config_numbers import check_numbers, header_bytes, names_of
from app.domain.inputs.foreign_files import INDEX, SINGLE, foreign_files, gguf_file
from app.domain.inputs.quantized.gguf_config import gguf_config, gguf_words
from app.domain.inputs.quantized.gguf_header import GgufHeader, parse_gguf
from app.domain.inputs.quantized.registry import read_method, read_quantized
from app.domain.inputs.quantized.stored import MOST_SMALL_BYTES, corrupt
from app.domain.inputs.safetensors_header import (
    DTYPE_BITS,
    LENGTH_BYTES,
    NAMED,
    TensorEntry,
    header_length,
    parse_header,
)
from app.domain.inputs.side_files import check_side_files, read_object
from bitwright.errors import CorruptCheckpoint, UnsupportedCheckpoint

CONFIG = "config.json"
MADE_BYTES = 2
"""Bytes of a number that a quantized weight is read as: bf16."""
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

    tensor_bytes   in memory, with quantized weights as the numbers that they mean
    dimensions     None for a type that is not accepted, of which tensors are all that is known
    tensors        by name, quantized ones as those numbers; empty where headers were not read: then `weights` is what
                   the files' sizes say
    quantized      what the checkpoint is, in words, where its weights are quantized
    """

    config: Mapping[str, object]
    dimensions: Dimensions | None
    tensor_bytes: int
    weights: int
    tokenizer: bool
    tensors: Mapping[str, TensorEntry] = field(default_factory=dict)
    quantized: str | None = None


def inspect_checkpoint(files: CheckpointFiles, *, any_type: bool = False, headers: bool = True) -> Inspection:
    """Judge a checkpoint: its configuration first, its weights' headers last.

    any_type   whether a type that is not accepted will do, for a job without a model
    headers    whether the headers of its weights are read; else names and sizes are all that is judged of them

    Raises:
        UnsupportedArchitecture: not a `model_type` that can be quantized, or quantized in a way that is not read.
        UnsafeCheckpoint, UnsupportedCheckpoint: its weights are pickled, or are none that this service reads.
        CorruptCheckpoint: a file is missing, truncated, or says what cannot be true.
    """
    names = frozenset(files.names())
    foreign = foreign_files(names)
    if foreign is not None:
        raise foreign.refusal("model")
    check_side_files(names, files.size)
    gguf = gguf_file(names)
    if gguf is not None:
        return _inspect_gguf(files, gguf)
    config = _read_json(files, CONFIG, MAX_CONFIG_BYTES, names)
    check_numbers(config)
    accepted = is_accepted(config) or not any_type
    method = read_method(config)
    if accepted:
        read_dimensions(config)  # before anything larger is read
    shards = _shards(files, names, header_bytes(config))
    check_choice(names, SINGLE if SINGLE in names else INDEX, config)
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    tokenizer = bool(names & {"tokenizer.json", "tokenizer.model", "vocab.json"})
    if not headers:
        size = sum(files.size(shard) for shard in shards)
        weights = size // WEIGHT_BYTES.get(str(config.get("dtype") or config.get("torch_dtype")), 2)
        dimensions = read_dimensions(config) if accepted else None
        return Inspection(plain, dimensions, size, weights, tokenizer, quantized=method)
    tensors, quantized = _logical(files, config, _headers(files, shards, config))
    return Inspection(
        config=plain,
        dimensions=read_dimensions(config, {n: entry.shape for n, entry in tensors.items()}) if accepted else None,
        tensor_bytes=sum(entry.end - entry.begin for entry in tensors.values()),
        weights=sum((entry.end - entry.begin) * 8 // DTYPE_BITS[entry.dtype] for entry in tensors.values()),
        tokenizer=tokenizer,
        tensors=tensors,
        quantized=quantized,
    )


Headers = dict[str, dict[str, TensorEntry]]
"""Weight files by name -> their tensors."""


def _headers(files: CheckpointFiles, shards: Mapping[str, set[str]], config: Mapping[str, object]) -> Headers:
    """Headers of all weight files in the order of names, which hold what the index promises and no more names than the
    configuration has.
    """
    most, room = names_of(config), header_bytes(config)
    read = partial(_read_header, files, most=most, room=room)
    with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
        headers = dict(zip(sorted(shards), pool.map(read, sorted(shards)), strict=True))
    tensors = {name for header in headers.values() for name in header}
    if len(tensors) > most:
        detail = f"the weights' headers have {len(tensors)} tensors; config.json can name {most}"
        raise CorruptCheckpoint(detail, field="model", value=len(tensors), hint=NAMED)
    for shard, promised in shards.items():
        missing = sorted(promised - tensors)
        if missing:
            detail = f"{INDEX} says that {shard} holds {missing[0]}, but it does not, nor does another shard"
            raise CorruptCheckpoint(detail, field=INDEX)
    return headers


def _logical(
    files: CheckpointFiles, config: Mapping[str, object], headers: Headers
) -> tuple[dict[str, TensorEntry], str | None]:
    """Tensors by name, those of the last file winning and quantized weights as bf16; and what the checkpoint is."""
    tensors = {name: entry for header in headers.values() for name, entry in header.items()}
    quantized = read_quantized(config, tensors, partial(_content, files, headers))
    if quantized is None:
        return tensors, None
    made = {name: (weight.shape, prod(weight.shape) * MADE_BYTES) for name, weight in quantized.weights.items()}
    entries = {name: TensorEntry("BF16", shape, 0, size) for name, (shape, size) in made.items()}
    return {name: tensors[name] for name in quantized.kept} | entries, quantized.what


def weight_files(files: CheckpointFiles) -> list[str]:
    """Names of the files that hold a checkpoint's weights, and of their index; raises as `inspect_checkpoint`."""
    names = frozenset(files.names())
    gguf = gguf_file(names)
    if gguf is not None:
        return [gguf]
    return [*sorted(_shards(files, names, MAX_INDEX_BYTES)), *([] if SINGLE in names else [INDEX])]


def _inspect_gguf(files: CheckpointFiles, name: str) -> Inspection:
    header = parse_gguf(partial(files.read, name), files.size(name), name)
    config = gguf_config(header, partial(_gguf_content, files, name, header))
    weights = sum(prod(entry.shape) for entry in header.tensors.values())
    return Inspection(
        config=config,
        dimensions=read_dimensions(config),
        tensor_bytes=weights * MADE_BYTES,
        weights=weights,
        tokenizer="tokenizer.ggml.tokens" in header.counts,
        quantized=gguf_words(header),
    )


def _content(files: CheckpointFiles, headers: Headers, tensor: str) -> bytes:
    """The bytes of a small tensor of a shard."""
    shard = next(shard for shard in reversed(headers) if tensor in headers[shard])
    entry = headers[shard][tensor]
    start = LENGTH_BYTES + header_length(files.read(shard, 0, LENGTH_BYTES), files.size(shard), shard) + entry.begin
    return files.read(shard, start, min(entry.end - entry.begin, MOST_SMALL_BYTES))


def _gguf_content(files: CheckpointFiles, name: str, header: GgufHeader, tensor: str) -> bytes:
    entry = header.tensors[tensor]
    if entry.size > MOST_SMALL_BYTES:
        raise corrupt(tensor, f"has {entry.size} bytes, where a few describe the model")
    return files.read(name, entry.begin, entry.size)


def _shards(files: CheckpointFiles, names: frozenset[str], room: int) -> dict[str, set[str]]:
    """Weight files to the tensors that the index promises in each; a single file promises nothing.

    room   bytes that the index may have
    """
    if SINGLE in names:
        return {SINGLE: set()}
    if INDEX not in names:
        hint = f"add the weights as {SINGLE}, or as shards with {INDEX}"
        raise UnsupportedCheckpoint("the checkpoint holds no weights", field="model", hint=hint)
    weight_map = _read_json(files, INDEX, min(room, MAX_INDEX_BYTES), names).get("weight_map")
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
    return read_object(files.read(name, 0, size), name, name)


def _read_header(files: CheckpointFiles, name: str, *, most: int, room: int) -> dict[str, TensorEntry]:
    size = files.size(name)
    length = header_length(files.read(name, 0, LENGTH_BYTES), size, name, room)
    return parse_header(files.read(name, LENGTH_BYTES, length), size, name, most)
