"""The fake quantizer of SignRound on floating-point grids, in torch's operators, for any device and dtype.

With L_k the values of the element, u the map that counts them (`workers.numerics.floats.elements.to_index`) and s the
factor of a group:

    q = clamp(round(u(w / s) + V)),    w_hat = s * L_q,    m = [q was not clamped],    D = dL/dw_hat
    dL/dV = s * (L_{q+1} - L_q) * D * m          of which only the sign is used: s and the step are positive

so that V in [-1/2, 1/2] reaches the next value everywhere, where a shift of w / s would move a weight between 4 and 6
by a quarter of a step. Weights are processed in chunks that stay in a CPU's cache.
`workers.numerics.backends.rounding.float_rounding_kernels` has the same in Triton.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from app.domain.methods.named_schemes import Element
from workers.numerics.backends.rounding.rounding_operators import CACHED_ELEMENTS, CHUNK_ELEMENTS
from workers.numerics.floats.elements import LAST_INDEX, code_of_index, from_index, to_index

LIMIT = 0.5
"""Of V."""


@dataclass(frozen=True)
class FloatGroups:
    """The tensors of the quantizer, all contiguous: (groups, G) or (groups,).

    weight   the model's dtype      offset, factor   V and s, fp32, or fp64 for fp64 weights      codes   uint8, kept
    """

    weight: Tensor
    offset: Tensor
    factor: Tensor
    codes: Tensor

    def tensors(self) -> dict[str, Any]:
        """All tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def restart(self) -> None:
        """Sets what steps move to its start."""
        self.offset.zero_()


def write(groups: FloatGroups, element: Element, w_hat: Tensor) -> None:
    """Writes w_hat of the present V."""
    w_hat = w_hat.view(groups.weight.shape)
    for rows in _chunks(groups.weight):
        index, _ = _index(groups, element, rows)
        w_hat[rows] = from_index(index, element).mul_(groups.factor[rows].unsqueeze(-1))


def step(
    groups: FloatGroups, element: Element, *, gradient: Tensor, rate: Tensor, faults: Tensor, w_hat: Tensor
) -> None:
    """Updates V and writes w_hat of the new one. Adds the number of NaN gradients to `faults`; they move nothing."""
    gradient = gradient.view(groups.weight.shape)
    for rows in _chunks(groups.weight):
        index, unclamped = _index(groups, element, rows)
        inside = gradient[rows].to(index.dtype) * (index == unclamped)
        faults += inside.isnan().sum(dtype=faults.dtype)
        groups.offset[rows].sub_(inside.nan_to_num_().sign_().mul_(rate)).clamp_(-LIMIT, LIMIT)
    write(groups, element, w_hat)


def keep(groups: FloatGroups, element: Element, better: Tensor) -> None:
    """Stores the present codes, if `better`."""
    if not better.is_cuda and not better:
        return
    for rows in _chunks(groups.weight):
        kept, codes = groups.codes[rows], code_of_index(_index(groups, element, rows)[0], element)
        kept.copy_(torch.where(better, codes, kept) if better.is_cuda else codes)


def warm_ups(*_: object, **__: object) -> list[Callable[[], object]]:
    """An empty list: nothing is compiled."""
    return []


def _index(groups: FloatGroups, element: Element, rows: slice) -> tuple[Tensor, Tensor]:
    """q of a chunk, and the same before clamping."""
    last, working = LAST_INDEX[element], groups.offset.dtype
    in_steps = groups.weight[rows].to(working) / groups.factor[rows].unsqueeze(-1)
    unclamped = to_index(in_steps, element).add_(groups.offset[rows]).round_()
    return unclamped.clamp(-last, last), unclamped


def _chunks(weight: Tensor) -> Iterator[slice]:
    count, width = weight.shape
    size = max(1, (CHUNK_ELEMENTS if weight.is_cuda else CACHED_ELEMENTS) // width)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
