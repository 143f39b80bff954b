"""A GGUF file as a checkpoint: names and order of rows of transformers, numbers by gguf-py.

Names are gguf-py's own (`TensorNameMap`), asked with the names of the parameters that transformers builds from the
file's configuration. What llama.cpp's converter changed besides names is undone: the order of rows of q and k in
llama, the one that is added to norms, experts stacked into one tensor. Read in transformers 5.23
(`modeling_gguf_pytorch_utils.py`) and llama.cpp (`convert_hf_to_gguf.py`).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, dequantize, get_tensor_name_map
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from app.domain.inputs.quantized.gguf_config import gguf_config, gguf_words
from app.domain.inputs.quantized.gguf_header import BLOCKS, GgufEntry, GgufHeader, parse_gguf
from app.domain.inputs.quantized.stored import MOST_SMALL_BYTES, corrupt
from bitwright.errors import CorruptCheckpoint, UnsupportedCheckpoint
from workers.engine.model.sources.recipe import ReadStored
from workers.formats.source_files import StoredBlocks

CHUNK_NUMBERS = 1 << 22
"""Numbers that are dequantized at once: what a tensor costs beside itself."""
COMPUTED = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight|blk\.\d+\.attn_rot_embd(\.weight)?")
"""Tensors of rotary frequencies, which the configuration says."""
EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")
NORMS_PLUS_ONE = frozenset({"gemma2", "gemma3", "nemotron"})

Undo = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file, or one expert's part of it.

    entry      its place
    shape      of the tensor that is made
    shift      what is added to every number
    reorder    what is done to the whole, whose numbers it leaves as they are
    """

    file: Path
    entry: GgufEntry
    shape: tuple[int, ...]
    dtype: torch.dtype
    shift: float = 0.0
    reorder: Undo | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that it reads."""
        return (self.file,)

    def stored(self) -> StoredBlocks:
        """Its bytes, in llama.cpp's own order of rows."""
        width = self.entry.shape[-1] // BLOCKS[self.entry.kind][1] * BLOCKS[self.entry.kind][2]
        octets = np.fromfile(self.file, np.uint8, self.entry.size, offset=self.entry.begin)
        if len(octets) != self.entry.size:
            raise corrupt(self.file.name, "is shorter than its header says")
        return StoredBlocks(self.entry.kind, torch.from_numpy(octets).view(*self.entry.shape[:-1], width))

    def make(self, read: ReadStored) -> Tensor:  # noqa: ARG002 - a GGUF file has no tensors of safetensors
        """The tensor on the host, dequantized some rows at a time."""
        kind = GGMLQuantizationType(self.entry.kind)
        width = self.entry.shape[-1]
        row_bytes = width // BLOCKS[self.entry.kind][1] * BLOCKS[self.entry.kind][2]
        rows, step = prod(self.entry.shape) // width, max(1, CHUNK_NUMBERS // width)
        made = torch.empty(rows, width, dtype=self.dtype)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            begin = self.entry.begin + first * row_bytes
            octets = np.fromfile(self.file, np.uint8, count * row_bytes, offset=begin)
            if len(octets) != count * row_bytes:
                raise corrupt(self.file.name, "is shorter than its header says")
            numbers = torch.from_numpy(np.array(dequantize(octets.reshape(count, row_bytes), kind), np.float32))
            made[first : first + count] = numbers + self.shift if self.shift else numbers
        made = made.view(self.entry.shape)
        return (made if self.reorder is None else self.reorder(made)).reshape(self.shape).contiguous()


@dataclass(frozen=True)
class GgufSource:
    """A file, understood.

    config    of the model, as config.json has it
    tensors   parameter's name -> how it is made
    what      the file in words
    tokens    whether it holds a tokenizer
    rules     what it says of its tokenizer's rules, by its own keys
    computed  tensors of rotary frequencies, by the file's names
    """

    config: dict[str, object]
    tensors: Mapping[str, GgufTensor]
    what: str
    tokens: bool
    rules: Mapping[str, object]
    computed: Mapping[str, GgufTensor]


def read_gguf(file: Path) -> GgufSource:
    """Reads a file's header.

    Raises:
        CorruptCheckpoint: counts, lengths, offsets or shapes cannot be true, or a parameter has no tensor.
        UnsupportedCheckpoint: an architecture, a type or a tensor that is not read.
    """
    header = gguf_header(file)
    config = gguf_config(header, partial(_content, file, header))
    dtype = getattr(torch, str(config["dtype"]))
    sources = dict(_sources(file, header, config, dtype))
    computed = {
        name: GgufTensor(file, entry, entry.shape, dtype)
        for name, entry in header.tensors.items()
        if COMPUTED.fullmatch(name)
    }
    rules = {key: value for key, value in header.metadata.items() if key.startswith("tokenizer.ggml.")}
    tokens = "tokenizer.ggml.tokens" in header.counts
    return GgufSource(config, sources, gguf_words(header), tokens, rules, computed)


def gguf_header(file: Path) -> GgufHeader:
    """The checked header of a file."""
    with file.open("rb") as stream:

        def read(start: int, length: int) -> bytes:
            stream.seek(start)
            return stream.read(length)

        return parse_gguf(read, file.stat().st_size, file.name)


def _content(file: Path, header: GgufHeader, name: str) -> bytes:
    entry = header.tensors[name]
    if entry.size > MOST_SMALL_BYTES:
        raise corrupt(name, f"has {entry.size} bytes, where a few describe the model")
    with file.open("rb") as stream:
        stream.seek(entry.begin)
        return stream.read(entry.size)


def _sources(
    file: Path, header: GgufHeader, config: Mapping[str, object], dtype: torch.dtype
) -> Iterator[tuple[str, GgufTensor]]:
    architecture = str(header.metadata["general.architecture"])
    names = _names(architecture, config)
    for name, entry in header.tensors.items():
        if COMPUTED.fullmatch(name):
            continue
        tensor = GgufTensor(file, entry, entry.shape, dtype)
        experts = EXPERTS.fullmatch(name)
        if experts is not None:
            yield from _each_expert(experts, tensor)
        elif name in names:
            parameter, shape = names[name]
            yield parameter, _undone(architecture, config, name, replace(tensor, shape=_fitted(name, entry, shape)))
        else:
            detail = f"the GGUF file holds {name}, and the {config['model_type']} of transformers has no such parameter"
            hint = "give the model that it was made from, as safetensors (the repository without -GGUF)"
            raise UnsupportedCheckpoint(detail, field="model", value=name, hint=hint)


def _names(architecture: str, config: Mapping[str, object]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor's name in the file -> parameter's name and shape."""
    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its validators raise
        words = " ".join(str(error).split())[:300]
        detail = f"the GGUF file's metadata is no valid {config['model_type']} configuration: {words}"
        raise CorruptCheckpoint(detail, field="model", hint="convert the model again") from error
    kind = next(kind for kind, name in MODEL_ARCH_NAMES.items() if name == architecture)
    known = get_tensor_name_map(kind, built.config.num_hidden_layers)
    names: dict[str, tuple[str, tuple[int, ...]]] = {}
    for parameter, tensor in built.state_dict().items():
        module, dot, leaf = parameter.rpartition(".")
        name = known.get_name(module if leaf in ("weight", "bias") else parameter)
        if name is not None:
            names[f"{name}{dot}{leaf}" if leaf in ("weight", "bias") else name] = parameter, tuple(tensor.shape)
    return names


def _fitted(name: str, entry: GgufEntry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The parameter's shape, if the stored one differs from it by sides of 1 alone."""
    if [side for side in entry.shape if side != 1] != [side for side in shape if side != 1]:
        raise corrupt(name, f"has the shape {entry.shape}; the file's metadata promises {shape}")
    return shape


def _each_expert(match: re.Match[str], tensor: GgufTensor) -> Iterator[tuple[str, GgufTensor]]:
    """Experts one by one, under the names that the model's own files have: each is a run of whole rows."""
    if len(tensor.entry.shape) != 3:
        raise corrupt(match.string, f"has the shape {tensor.entry.shape}; experts have three dimensions")
    count, *shape = tensor.entry.shape
    size = tensor.entry.size // count
    for expert in range(count):
        entry = replace(tensor.entry, shape=tuple(shape), begin=tensor.entry.begin + expert * size, size=size)
        parameter = f"model.layers.{match[1]}.mlp.experts.{expert}.{match[2]}_proj.weight"
        yield parameter, replace(tensor, entry=entry, shape=tuple(shape))


def _undone(architecture: str, config: Mapping[str, object], name: str, tensor: GgufTensor) -> GgufTensor:
    """The tensor with what llama.cpp's converter did to it taken back."""
    if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]
        if not isinstance(heads, int) or tensor.shape[0] % (2 * heads):
            raise corrupt(name, f"has {tensor.shape[0]} rows, which {heads} heads do not share in pairs")
        return replace(tensor, reorder=partial(_in_halves, heads=heads))
    if architecture in NORMS_PLUS_ONE and name.endswith("norm.weight"):
        return replace(tensor, shift=-1.0)
    return tensor


def _in_halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of heads from pairs of neighbours, as GGML turns them, to two halves, as transformers does."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
