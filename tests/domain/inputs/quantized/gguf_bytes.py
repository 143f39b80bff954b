"""GGUF files byte by byte, so that each number of a header can be a lie."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

LITTLE = {4: "I", 6: "f", 7: "?", 10: "Q"}


def text(value: bytes, length: int | None = None) -> bytes:
    """A string, which may claim another length."""
    return struct.pack("<Q", len(value) if length is None else length) + value


@dataclass(frozen=True)
class Tensor:
    """An entry of the list of tensors."""

    name: bytes
    sides: tuple[int, ...] = (64, 2)
    kind: int = 0
    offset: int = 0
    dimensions: int | None = None

    def described(self) -> bytes:
        """Its bytes in the header."""
        count = len(self.sides) if self.dimensions is None else self.dimensions
        sides = struct.pack(f"<{len(self.sides)}Q", *self.sides)
        return text(self.name) + struct.pack("<I", count) + sides + struct.pack("<IQ", self.kind, self.offset)


ARCHITECTURE = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")


@dataclass(frozen=True)
class File:
    """A file; `tensor_count` and `pair_count` may lie."""

    magic: bytes = b"GGUF"
    version: int = 3
    pairs: Sequence[bytes] = field(default_factory=lambda: (ARCHITECTURE,))
    tensors: Sequence[Tensor] = field(default_factory=lambda: (Tensor(b"a"), Tensor(b"b", offset=512)))
    tensor_count: int | None = None
    pair_count: int | None = None
    alignment: int = 32
    data: int = 1024

    def bytes(self) -> bytes:
        """Header, padding and zeros."""
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        pairs = len(self.pairs) if self.pair_count is None else self.pair_count
        head = self.magic + struct.pack("<IQQ", self.version, tensors, pairs)
        head += b"".join(self.pairs) + b"".join(tensor.described() for tensor in self.tensors)
        return head + bytes(-len(head) % self.alignment) + bytes(self.data)

    def but(self, **changes: Any) -> "File":
        """The same with other fields."""
        return replace(self, **changes)


def number(key: bytes, kind: int, value: object) -> bytes:
    """A pair of metadata."""
    return text(key) + struct.pack("<I", kind) + struct.pack("<" + LITTLE[kind], value)


def array(key: bytes, kind: int, count: int, content: bytes) -> bytes:
    """A pair of metadata whose value is an array, which may claim any length."""
    return text(key) + struct.pack("<IIQ", 9, kind, count) + content
