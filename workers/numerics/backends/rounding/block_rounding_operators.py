"""The fake quantizer of SignRound on llama.cpp's block types, in torch's operators, for any device and dtype.

With x the place of a weight on the type's axis (`workers.numerics.blocks.axis`), L_k its levels, f and o the factor
and offset of a sub-block, which stay:

    q = round(x),  w_hat = f * L_q + o,    m = [q was not clamped],    D = dL/dw_hat
    dL/dx = f * (L_{q+1} - L_q) * D * m                  of which only the sign is used: that of f may be negative

x is u((w - o) / f) + V of SignRound's formulas. Four levels of a lattice are rounded together, straight through. All of
it is exact in fp32 as llama.cpp decodes it, but for the last sum. Weights are processed in chunks that stay in a CPU's
cache.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from workers.numerics.backends.rounding.rounding_operators import CACHED_ELEMENTS, CHUNK_ELEMENTS
from workers.numerics.blocks.axis import BlockAxis


@dataclass(frozen=True)
class BlockGroups:
    """The tensors of the quantizer, all contiguous: (sub-blocks, columns) or (sub-blocks,).

    place, start     x, and where it began, fp32, or fp64 for fp64 weights
    factor, offset   f and o, the same dtype; o has no element where the type has no offset
    codes            uint8, kept
    """

    place: Tensor
    start: Tensor
    factor: Tensor
    offset: Tensor
    codes: Tensor

    def tensors(self) -> dict[str, Any]:
        """All tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def restart(self) -> None:
        """Sets what steps move to its start."""
        self.place.copy_(self.start)


def warm_ups(*_: object) -> list[Callable[[], object]]:
    """An empty list: nothing is compiled."""
    return []


def write(groups: BlockGroups, axis: BlockAxis, w_hat: Tensor) -> None:
    """Writes w_hat of the present places."""
    w_hat = w_hat.view(groups.place.shape)
    for rows in chunks(groups.place):
        weight = axis.value(axis.rounded(groups.place[rows])).mul_(groups.factor[rows].unsqueeze(1))
        w_hat[rows] = weight.add_(groups.offset[rows].unsqueeze(1)) if groups.offset.numel() else weight


def step(
    groups: BlockGroups, axis: BlockAxis, *, gradient: Tensor, rate: Tensor, faults: Tensor, w_hat: Tensor
) -> None:
    """Updates x and writes w_hat of the new one. Adds the number of NaN gradients to `faults`; they move nothing."""
    gradient, move = gradient.view(groups.place.shape), (groups.factor.sign() * rate).unsqueeze(1)
    for rows in chunks(groups.place):
        place = groups.place[rows]
        d = gradient[rows].to(place.dtype)
        faults += d.isnan().sum(dtype=faults.dtype)
        free = place.round()
        inside = (free >= axis.low) & (free <= axis.high)
        place.sub_(d.nan_to_num(0.0).sign_().mul_(inside).mul_(move[rows]))
    write(groups, axis, w_hat)


def keep(groups: BlockGroups, axis: BlockAxis, better: Tensor) -> None:
    """Stores the present codes, if `better`."""
    if not better.is_cuda and not better:
        return
    for rows in chunks(groups.place):
        kept, codes = groups.codes[rows], axis.code(axis.rounded(groups.place[rows]))
        kept.copy_(torch.where(better, codes, kept) if better.is_cuda else codes)


def chunks(weight: Tensor) -> Iterator[slice]:
    """Slices of (sub-blocks, columns)."""
    count, width = weight.shape
    size = max(1, (CHUNK_ELEMENTS if weight.is_cuda else CACHED_ELEMENTS) // width)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
