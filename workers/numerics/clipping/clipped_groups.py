"""Groups on affine grids whose ranges are clipped by a learned factor, from a start that may be another quantizer's.

    lo' = sigmoid(beta)*lo,  hi' = sigmoid(gamma)*hi      both start at 4: 0.982
    q = clamp(round(w/s + V) + z),  w_hat = s*(q - z)     s, z from lo' and hi' (`workers.numerics.affine`)

V is 0, or, from another quantizer's codes q_0 with s_0 and z_0, the offset with which the start gives its codes: 0
where rounding to nearest gives q_0, else q_0 - z_0 - w/s_0. V is not trained. Then lo and hi are the ends of that grid
over sigmoid(4), so that the start has its scales too.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.domain.methods import Scheme
from workers.numerics.adamw import AdamW
from workers.numerics.affine import Grid, GroupRange, affine_grid, round_to_grid
from workers.numerics.backend import clipping_kernels
from workers.numerics.backends.rounding.rounding_operators import GridSettings
from workers.numerics.clipping.state import ClippedState
from workers.numerics.learned_ranges import Kept, chunks, range_gradients, steps, working_dtype
from workers.numerics.quantized import AffineWeight

START = 4.0
"""Start value of both logits."""


@dataclass(frozen=True)
class GroupStart:
    """Start of some groups: lo and hi, fp32 (groups,), and V, fp32 (groups, G), or None for 0."""

    ranges: GroupRange
    offset: Tensor | None = None

    @classmethod
    def full(cls, weight: Tensor) -> "GroupStart":
        """The start at the full ranges of groups (count, G)."""
        return cls(GroupRange.of(weight.to(working_dtype(weight))))

    @classmethod
    def at(cls, quantized: AffineWeight, weight: Tensor) -> "GroupStart":
        """The start at the grid and the codes of a quantized weight; `weight` are its original groups (count, G)."""
        w = weight.to(working_dtype(weight))
        levels, top = 2 ** (quantized.scheme.bits - 1), 2**quantized.scheme.bits - 1
        scale = quantized.scale.flatten().to(w.dtype)
        if quantized.zero_point is None:
            zero = torch.full_like(scale, levels)
            reach = scale * levels
            ranges = GroupRange(-reach.clamp(min=0), -reach.clamp(max=0))
        else:
            zero = quantized.zero_point.flatten().to(w.dtype)
            ranges = GroupRange(-zero * scale, (top - zero) * scale)
        codes, unrounded = quantized.codes.view(w.shape).to(w.dtype), w / scale.unsqueeze(-1)
        nearest = (unrounded.round() + zero.unsqueeze(-1)).clamp(0, top)
        offset = torch.where(codes == nearest, 0, codes - zero.unsqueeze(-1) - unrounded)
        clipped = torch.sigmoid(torch.tensor(START, dtype=w.dtype, device=w.device))
        return cls(GroupRange(ranges.low / clipped, ranges.high / clipped), offset)

    @classmethod
    def joined(cls, starts: Sequence["GroupStart"]) -> "GroupStart":
        """Several starts of one kind, concatenated."""
        ranges = GroupRange(torch.cat([s.ranges.low for s in starts]), torch.cat([s.ranges.high for s in starts]))
        offsets = [s.offset for s in starts if s.offset is not None]
        return cls(ranges, torch.cat(offsets) if offsets else None)


class ClippedGroups:
    """Groups (count, G) of one scheme, in the model's dtype, with their logits (2, count): beta, then gamma."""

    def __init__(self, weight: Tensor, start: GroupStart, scheme: Scheme, scale_dtype: torch.dtype) -> None:
        self.weight, self.start = weight, start
        self.scheme, self._scale_dtype = scheme, scale_dtype
        self.logits = torch.full_like(torch.stack([start.ranges.low, start.ranges.high]), START)
        self.kept = Kept.empty(weight, scale_dtype)
        self.faults = torch.zeros((), dtype=torch.int64, device=self.logits.device)
        self._optimizer = AdamW.of(self.logits)
        self._kernels = clipping_kernels(weight.device, weight.dtype)
        self._slope = torch.empty_like(start.ranges.low)
        self._settings = GridSettings.of(scheme, scale_dtype)

    def write(self, out: Tensor) -> None:
        """Writes W_hat to `out` (count, G), in its dtype."""
        if self._kernels is not None:
            self._kernels.write(self._state, self._settings, out)
            return
        for groups in chunks(self.weight):
            grid, codes = self._rounded(groups)
            out[groups] = steps(codes, grid) * grid.scale.unsqueeze(-1)

    def gradients(self, gradient: Tensor) -> Tensor:
        """dL/dbeta and dL/dgamma, (2, count), for dL/dw_hat (count, G)."""
        d_logits = torch.empty_like(self.logits)
        for groups in chunks(self.weight):
            weight, (low, high) = self._chunk(groups), self.logits[:, groups].sigmoid()
            ranges, grid = self.start.ranges.rows(groups), self._grid(groups)
            d, offset = gradient[groups].to(weight.dtype), self._offset(groups)
            d_logits[:, groups] = torch.stack(range_gradients(d, weight, ranges, low, high, grid, offset))
        factor = self.logits.sigmoid()
        return d_logits.mul_(factor * (1 - factor))

    def step(self, gradient: Tensor, rate: Tensor, decay: float, out: Tensor) -> None:
        """One step of AdamW, given dL/dw_hat (count, G), and the new W_hat in `out`.

        `faults` counts groups with NaN in their gradients.
        """
        if self._kernels is not None:
            self._kernels.step(
                self._state,
                self._settings,
                gradient=gradient,
                rate=rate,
                decay=decay,
                faults=self.faults,
                w_hat=out,
            )
            return
        by_logits = self.gradients(gradient)
        self.faults += by_logits.isnan().any(0).sum()
        self._optimizer.step(self.logits, by_logits, rate, decay)
        self.write(out)

    def keep(self, better: Tensor) -> None:
        """Keeps codes and grids if `better`, a truth value on the device."""
        if self._kernels is not None:
            self._kernels.keep(self._state, self._settings, better)
            return
        for groups in chunks(self.weight):
            grid, codes = self._rounded(groups)
            self.kept.overwrite(groups, codes, grid, better)

    def restart(self) -> None:
        """Resets logits and optimizer to their start."""
        self.logits.fill_(START)
        self.faults.zero_()
        self._optimizer.reset()

    def adopt(self, other: "ClippedGroups") -> None:
        """Takes over the same number of another block's groups, at their start."""
        self.restart()
        self.weight.copy_(other.weight)
        start, adopted = self.start, other.start
        start.ranges.low.copy_(adopted.ranges.low)
        start.ranges.high.copy_(adopted.ranges.high)
        if start.offset is not None and adopted.offset is not None:
            start.offset.copy_(adopted.offset)

    @property
    def _state(self) -> ClippedState:
        start, kept = self.start, self.kept
        ranges = (start.offset, start.ranges.low, start.ranges.high)
        stored = (kept.codes, kept.scale, kept.zero_point)
        return ClippedState(self.weight, *ranges, self.logits, self._optimizer, self._slope, *stored)

    def _rounded(self, groups: slice) -> tuple[Grid, Tensor]:
        grid = self._grid(groups)
        return grid, round_to_grid(self._chunk(groups), grid, self._offset(groups))[0]

    def _grid(self, groups: slice) -> Grid:
        alpha, beta = self.logits[:, groups].sigmoid()
        return affine_grid(self.start.ranges.rows(groups), self.scheme, self._scale_dtype, alpha, beta)

    def _offset(self, groups: slice) -> Tensor | None:
        return None if self.start.offset is None else self.start.offset[groups]

    def _chunk(self, groups: slice) -> Tensor:
        return self.weight[groups].to(self.logits.dtype)


def clipping_warm_ups(
    linears: Iterable[tuple[int, Scheme]], dtype: torch.dtype, scale_dtype: torch.dtype, device: torch.device
) -> list[Callable[[], object]]:
    """Calls that compile the kernels of clipped groups for linears (in_features, scheme); none without kernels."""
    kernels = clipping_kernels(device, dtype)
    if kernels is None:
        return []
    kinds = {(scheme.width(columns), GridSettings.of(scheme, scale_dtype)) for columns, scheme in linears}
    return [call for kind in kinds for call in kernels.warm_ups(*kind, dtype, scale_dtype, device)]
