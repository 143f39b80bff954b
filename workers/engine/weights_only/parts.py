"""Parts of a checkpoint: runs of its tensors, in an order that keeps layers together, each as large as a shard."""

import re
from collections.abc import Mapping
from math import prod

from app.domain.inputs.safetensors_header import DTYPE_BITS
from app.domain.weight_targets import TensorShape

DIGITS = re.compile(r"(\d+)")


def parts_of(tensors: Mapping[str, TensorShape], most: int) -> list[list[str]]:
    """Names of all tensors in parts of at most so many bytes; a tensor that is larger is a part of its own."""
    parts: list[list[str]] = []
    size = 0
    for name in sorted(tensors, key=natural):
        own = bytes_of(tensors[name])
        if not parts or size + own > most:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += own
    return parts


def bytes_of(tensor: TensorShape) -> int:
    """Bytes of a tensor by its shape and its dtype's name."""
    return prod(tensor.shape) * DTYPE_BITS[tensor.dtype] // 8


def natural(name: str) -> list[tuple[int, str]]:
    """A key by which layer 10 comes after layer 9."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in DIGITS.split(name)]
