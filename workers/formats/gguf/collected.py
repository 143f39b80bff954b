"""Tensors on disk in the order in which they came, until the file's list of tensors can be written.

GGUF lists its tensors before their bytes. Experts come one by one and are one tensor there: the first of a stack makes
room for all.
"""

from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFWriter
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from app.domain.methods import SCHEMES
from app.domain.methods.block_types import BlockType
from bitwright.errors import FormatCannotHold

TYPES: MappingProxyType[int, BlockType] = MappingProxyType(
    {row.blocks.number: row.blocks for row in SCHEMES.values() if row.blocks is not None}
)
"""The types of quantized tensors by their numbers."""


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: its rows of bytes, where they begin, and which of a stack have come."""

    kind: int
    shape: tuple[int, ...]
    begin: int
    stacked: int = 0
    there: set[int] = field(default_factory=set)

    @property
    def size(self) -> int:
        return prod(self.shape)


class Collected:
    """Bytes of tensors by llama.cpp's names."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._size = 0
        self._entries: dict[str, _Entry] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def add(self, name: str, data: Tensor, kind: int, *, slot: int | None = None, of: int = 1) -> None:
        """Take a tensor, or one of a stack of `of`; uint8 (..., bytes per row).

        Raises:
            FormatCannotHold: it is of another type or shape than the stack's others.
        """
        shape, entry = tuple(data.shape), self._entries.get(name)
        if entry is None:
            entry = self._entries[name] = _Entry(kind, shape, self._size, 0 if slot is None else of)
            self._size += entry.size * max(1, entry.stacked)
        elif entry.kind != kind or entry.shape != shape:
            raise FormatCannotHold(
                f"gguf stores all experts of a block in one tensor of one type, and those of {name} have several",
                field="formats",
                value=name,
                hint="give all experts of a block the same scheme, or ignore all of them",
            )
        with self._file.open("r+b" if self._file.exists() else "w+b") as stream:
            stream.seek(entry.begin + entry.size * (slot or 0))
            data.contiguous().numpy().tofile(stream)
        entry.there.add(slot or 0)

    def write(self, writer: GGUFWriter) -> None:
        """Write the complete GGUF file; removes the collected bytes.

        Raises:
            FormatCannotHold: an expert is missing.
        """
        for name, entry in self._entries.items():
            if len(entry.there) < max(1, entry.stacked):
                detail = f"gguf stores all experts of a block together, and {name} has {len(entry.there)} of them"
                raise FormatCannotHold(detail, field="formats", value=name, hint="leave gguf out of formats")
            shape = (entry.stacked, *entry.shape) if entry.stacked else entry.shape
            data = np.memmap(self._file, dtype=np.uint8, mode="r", offset=entry.begin, shape=shape)
            _add_tensor(writer, name, data, entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        self._file.unlink()


def _add_tensor(writer: GGUFWriter, name: str, data: "np.memmap[Any, Any]", kind: int) -> None:
    """Add rows of bytes; of a type that the package does not know yet, it is told their shape in weights."""
    if kind in GGML_QUANT_SIZES:
        writer.add_tensor(name, data, raw_dtype=Kind(kind))
        return
    shape = (*data.shape[:-1], data.shape[-1] // TYPES[kind].size * TYPES[kind].weights)
    writer.add_tensor(name, data.view(np.int8), raw_shape=shape, raw_dtype=kind)
