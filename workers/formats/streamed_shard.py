"""A safetensors file that is written while its tensors come: bytes at once, the header into room that was left for it.

The format has its header first, with the places of all tensors; spaces after its JSON are part of it. Tensors of other
lengths than multiples of eight bytes are written last, so that each begins where its dtype may begin.
"""

import json
import os
from pathlib import Path

import torch
from torch import Tensor

from app.domain.inputs.safetensors_header import LENGTH_BYTES

ALIGNMENT = 8
DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8"},
    **{torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.bool: "BOOL"},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0"},
}
METADATA = '"__metadata__":{"format":"pt"}'
OF_ENTRY, OF_DIMENSION = 96, 22
"""Characters of a tensor's entry in a header at the most, beside its name, and of each of its dimensions."""


def bytes_of(tensor: Tensor) -> int:
    """Bytes that a tensor's elements take."""
    return tensor.numel() * tensor.element_size()


def room_of(name: str, dimensions: int) -> int:
    """Characters that a tensor takes in a header at the most."""
    return len(json.dumps(name)) + OF_ENTRY + OF_DIMENSION * dimensions


class StreamedShard:
    """One file that is being written.

    room   bytes of its header
    """

    def __init__(self, file: Path, room: int) -> None:
        self.file = file
        self._room = room
        self._entries: list[str] = [METADATA]
        self._used = len(METADATA) + 2
        self._position = 0
        self._stream = file.open("wb")
        self._stream.seek(LENGTH_BYTES + room)

    def takes(self, more: int) -> bool:
        """True if the header has room for entries of so many characters."""
        return self._used + more <= self._room

    def write(self, name: str, tensor: Tensor) -> None:
        """A whole tensor on the host."""
        self.begin(name, tensor.dtype, tuple(tensor.shape))
        self.append(tensor)

    def begin(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """A tensor whose elements follow in pieces, in their order."""
        end = self._position + torch.Size(shape).numel() * dtype.itemsize
        about = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [self._position, end]}
        entry = f"{json.dumps(name)}:{json.dumps(about, separators=(',', ':'))}"
        self._entries.append(entry)
        self._used += len(entry) + 1
        self._position = end

    def append(self, piece: Tensor) -> None:
        """The next elements of the tensor that was begun last; what is mapped from a file is not copied on the way."""
        self._stream.write(piece.contiguous().flatten().view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Write the header; the file is durable then.

        Raises:
            ValueError: the bytes are not those of the tensors that were begun.
        """
        written = self._stream.tell() - LENGTH_BYTES - self._room
        header = ("{" + ",".join(self._entries) + "}").encode()
        if written != self._position or len(header) > self._room:
            self._stream.close()
            raise ValueError(f"{self.file.name}: {written} bytes for {self._position}, a header of {len(header)}")
        self._stream.seek(0)
        self._stream.write(self._room.to_bytes(LENGTH_BYTES, "little") + header.ljust(self._room))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def abandon(self) -> None:
        """Close the file as it is; it is no checkpoint's."""
        self._stream.close()
