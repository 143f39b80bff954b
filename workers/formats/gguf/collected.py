"""Tensors on disk in the order in which they came, until the file's list of tensors can be written.

GGUF lists its tensors before their bytes. Experts come one by one and are one tensor there: the first of a stack makes
room for all.
"""

from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from torch import Tensor

from bitwright.errors import FormatCannotHold


@dataclass
class _Entry:
    """A tensor of the file: its rows of bytes, where they begin, and which of a stack have come."""

    kind: Kind
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

    def add(self, name: str, data: Tensor, kind: Kind, *, slot: int | None = None, of: int = 1) -> None:
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
            writer.add_tensor(name, data, raw_dtype=entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        self._file.unlink()
