"""Parts of large matrices on the host: some rows at a time, so that intermediate tensors stay small.

Groups lie within rows, so whatever is computed of a quantized matrix is the same in parts as at once, bit for bit. On a
GPU everything is computed at once: there a large matrix is what the device is for.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

PART = 1 << 24
"""Elements of a part: 64 MB in fp32."""


CACHED = 1 << 19
"""Elements of a part that stays in a CPU's caches through a chain of operations."""


def row_parts(rows: int, columns: int, device: torch.device, elements: int | None = None) -> Iterator[slice]:
    """Slices of the rows of a matrix, all of them at once where it is small or not on the host."""
    step = rows if device.type != "cpu" else max(1, (elements or PART) // max(1, columns))
    yield from (slice(first, min(first + step, rows)) for first in range(0, rows, max(1, step)))


def in_row_parts(matrix: Tensor, make: Callable[[slice], Tensor]) -> Tensor:
    """Results of `make` for slices of a matrix's rows, one below the other."""
    parts = row_parts(matrix.shape[0], matrix.shape[1], matrix.device)
    first = next(parts, slice(0, 0))
    made = make(first)
    if first.stop >= matrix.shape[0]:
        return made
    whole = made.new_empty(matrix.shape[0], *made.shape[1:])
    whole[first] = made
    for rows in parts:
        whole[rows] = make(rows)
    return whole
