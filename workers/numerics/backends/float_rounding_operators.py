"""The fake quantizer of SignRound on floating-point grids, in torch's operators, for any device and dtype.

With L_k the values of the element and u the map that counts them (`workers.numerics.float_elements.to_index`):

    s = e4m3(G * s_0 * alpha) / G,  or s_0 * alpha as it is stored,  or s_0 (powers of two)
    q = clamp(round(u(w / s) + V)),    w_hat = s * L_q,    m = [q was not clamped]
    dL/dV = s * (L_{q+1} - L_q) * D * m          of which only the sign is used: s and the step are positive
    dL/dalpha = s_0 * sum_group D * (L_q - m * w / s)        the rounding of s passes gradients straight through

so that V in [-1/2, 1/2] reaches the next value everywhere, where a shift of w / s would move a weight between 4 and 6
by a quarter of a step. Weights are processed in chunks that stay in a CPU's cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from app.domain.methods import Scheme
from app.domain.methods.named_schemes import Element, ScaleType
from workers.numerics.affine import SMALLEST_SCALE
from workers.numerics.backends.rounding_operators import CACHED_ELEMENTS, CHUNK_ELEMENTS
from workers.numerics.float_elements import LAST_INDEX, code_of_index, from_index, to_index

SMALLEST_E4M3, LARGEST_E4M3 = 2.0**-9, 448.0


@dataclass(frozen=True)
class FloatSettings:
    """Facts that fix the grid of every group: the element, the type of its scale, and the least scale."""

    element: Element
    scale: ScaleType
    scale_dtype: torch.dtype

    @classmethod
    def of(cls, scheme: Scheme, scale_dtype: torch.dtype) -> "FloatSettings":
        """Settings of a scheme by name whose scales, if they are no bytes, are stored in `scale_dtype`."""
        if scheme.row is None:
            raise ValueError(f"{scheme} goes by no name")
        return cls(scheme.row.element, scheme.row.scale, scale_dtype)


@dataclass(frozen=True)
class FloatGroups:
    """The tensors of the quantizer, all contiguous: (groups, G) or (groups,).

    weight     the model's dtype      offset, start, divisor, alpha   fp32, or fp64 for fp64 weights
    start      s_0                    divisor   G of the group's linear, or 1
    codes      uint8, kept            factor    s of the kept result, times G: a number that can be stored
    """

    weight: Tensor
    offset: Tensor
    start: Tensor
    divisor: Tensor
    alpha: Tensor
    codes: Tensor
    factor: Tensor

    def tensors(self) -> dict[str, Any]:
        """All tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def stored_scale(groups: FloatGroups, settings: FloatSettings) -> Tensor:
    """s * G of the present alpha as it is stored, in the working dtype, (groups,)."""
    if settings.scale is ScaleType.E8M0:
        return groups.start
    scale = groups.start * groups.alpha
    if settings.scale is ScaleType.E4M3:
        scaled = (scale * groups.divisor).clamp(SMALLEST_E4M3, LARGEST_E4M3)
        return scaled.to(torch.float8_e4m3fn).to(scale.dtype)
    return scale.clamp(min=SMALLEST_SCALE[settings.scale_dtype]).to(settings.scale_dtype).to(scale.dtype)


def write(groups: FloatGroups, settings: FloatSettings, w_hat: Tensor) -> None:
    """Writes w_hat of the present parameters."""
    factor, w_hat = _factor(groups, settings), w_hat.view(groups.weight.shape)
    for rows in _chunks(groups.weight):
        index = _index(groups, settings, factor, rows)[0]
        w_hat[rows] = from_index(index, settings.element).mul_(factor[rows])


def step(
    groups: FloatGroups,
    settings: FloatSettings,
    *,
    gradient: Tensor,
    rate: Tensor,
    faults: Tensor,
    limits: tuple[float, float],
    w_hat: Tensor,
) -> None:
    """Updates V and, but for powers of two, alpha within `limits`; writes w_hat of the new parameters.

    Adds the number of groups with NaN gradients to `faults`; NaN moves nothing.
    """
    factor, by_alpha = _factor(groups, settings), torch.empty_like(groups.alpha)
    gradient = gradient.view(groups.weight.shape)
    for rows in _chunks(groups.weight):
        index, unclamped, in_steps = _index(groups, settings, factor, rows)
        d = gradient[rows].to(index.dtype)
        inside = d * (index == unclamped)
        by_alpha[rows] = (d * from_index(index, settings.element)).sum(-1) - (inside * in_steps).sum(-1)
        groups.offset[rows].sub_(inside.nan_to_num_().sign_().mul_(rate)).clamp_(-0.5, 0.5)
    faults += by_alpha.isnan().sum(dtype=faults.dtype)
    if settings.scale is not ScaleType.E8M0:
        groups.alpha.sub_(by_alpha.nan_to_num_().sign_().mul_(rate)).clamp_(*limits)
    write(groups, settings, w_hat)


def keep(groups: FloatGroups, settings: FloatSettings, better: Tensor) -> None:
    """Stores the present result in codes and factor, if `better`."""
    if not better.is_cuda and not better:
        return
    factor = _factor(groups, settings)
    _overwrite(groups.factor, stored_scale(groups, settings), better)
    for rows in _chunks(groups.weight):
        codes = code_of_index(_index(groups, settings, factor, rows)[0], settings.element)
        _overwrite(groups.codes[rows], codes, better)


def _factor(groups: FloatGroups, settings: FloatSettings) -> Tensor:
    """s, (groups, 1)."""
    return (stored_scale(groups, settings) / groups.divisor).unsqueeze(-1)


def _index(groups: FloatGroups, settings: FloatSettings, factor: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """q of a chunk, the same before clamping, and w/s."""
    last = LAST_INDEX[settings.element]
    in_steps = groups.weight[rows].to(groups.offset.dtype) / factor[rows]
    unclamped = to_index(in_steps, settings.element).add_(groups.offset[rows]).round_()
    return unclamped.clamp(-last, last), unclamped, in_steps


def _overwrite(kept: Tensor, value: Tensor, better: Tensor) -> None:
    kept.copy_(torch.where(better, value.to(kept.dtype), kept) if better.is_cuda else value)


def _chunks(weight: Tensor) -> Iterator[slice]:
    count, width = weight.shape
    size = max(1, (CHUNK_ELEMENTS if weight.is_cuda else CACHED_ELEMENTS) // width)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
