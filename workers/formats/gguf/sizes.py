"""Bytes of a GGUF file beside its quantized blocks, before anything is quantized: header, and tensors as they are.

Metadata is written for it, tokenizer included, and measured; tensors go through the file's own names and layouts
without their numbers. What is not known before is bounded: `GENERAL_BYTES` for the keys that name the result, and the
room up to the next multiple of 32 after each tensor.
"""

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGML_QUANT_VERSION, GGUFWriter
from torch import Tensor

from workers.formats.gguf.metadata import Architecture
from workers.formats.gguf.placed import PlacedTensors
from workers.formats.gguf.tokenizer import add_tokenizer
from workers.formats.source_files import BlockSource, SourceCheckpoint

GENERAL_BYTES = 6 << 10
"""Of the keys under `general.` and `bitwright.`, at the most: names, licence, tags, hashes."""
ALIGNMENT = 32
ENTRY_BYTES, DIMENSION_BYTES = 24, 8
"""Of a tensor in the header, its name aside: lengths, type and offset; and of each of its dimensions."""
DTYPES: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class PackedLinear:
    """A linear that will be quantized: its name, the source's tensors that hold it, and its shape (out, in)."""

    name: str
    tensors: tuple[str, ...]
    shape: tuple[int, int]


class _Sizes:
    """Names and sizes of a file's tensors, for `PlacedTensors`."""

    def __init__(self) -> None:
        self.header = 0
        self.data = 0
        self._names: set[str] = set()

    def add(self, name: str, data: Tensor, kind: int, *, slot: int | None = None, of: int = 1) -> None:  # noqa: ARG002
        """Count a tensor, or one of a stack of `of`; uint8 (..., bytes per row)."""
        self.data += data.numel()
        if name in self._names:
            return
        self._names.add(name)
        dimensions = data.ndim + (slot is not None)
        self.header += len(name.encode()) + ENTRY_BYTES + DIMENSION_BYTES * dimensions + ALIGNMENT - 1


def bytes_beside(
    source: SourceCheckpoint, linears: Iterable[PackedLinear], beside: Mapping[str, tuple[int, ...]]
) -> int:
    """Bytes of the file without the linears' own, at the most.

    beside   names and shapes of linears that stay as they are, and lie in a tensor with some that do not
    """
    architecture, sizes = Architecture.of(source), _Sizes()
    placed, taken = PlacedTensors(architecture, sizes), set[str]()
    for linear in linears:
        taken.update(linear.tensors)
        name = f"{linear.name}.weight"
        if placed.is_remade(name):
            placed.add_dequantized(name, torch.empty(linear.shape, dtype=torch.bfloat16, device="meta"))
        else:
            placed.add_rows(name, torch.empty((linear.shape[0], 0), dtype=torch.uint8, device="meta"), 0)
    for name, shape in beside.items():
        placed.add_plain(f"{name}.weight", torch.empty(shape, dtype=torch.bfloat16, device="meta"))
    for name, tensor in source.tensors.items():
        if name in taken or placed.is_left_out(name) or (isinstance(source, BlockSource) and placed.copy(name, source)):
            continue
        placed.add_plain(name, torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta"))
    placed.add_made(source)
    return sizes.data + sizes.header + _metadata_bytes(architecture, source) + GENERAL_BYTES


def _metadata_bytes(architecture: Architecture, source: SourceCheckpoint) -> int:
    """Bytes of the architecture's numbers and of the tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "metadata.gguf"
        writer = GGUFWriter(file, architecture.name)
        architecture.add_to(writer, source)
        add_tokenizer(writer, source.folder, architecture.vocabulary)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return file.stat().st_size
