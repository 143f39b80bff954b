"""The fake quantizer's formulas written plainly, whole tensors at a time: what its fast forms are compared with."""

import torch
from torch import Tensor

from app.domain.methods import Scheme
from workers.numerics.affine import (
    ASYMMETRIC_FACTORS,
    SYMMETRIC_FACTORS,
    Grid,
    GroupRange,
    grid,
    range_factors,
    round_to_grid,
)
from workers.numerics.backends.rounding_operators import Groups


def present_grid(groups: Groups, scheme: Scheme) -> Grid:
    return grid(GroupRange(groups.low, groups.high), scheme, groups.scale.dtype, groups.alpha, groups.beta)


def fake_quantized(groups: Groups, scheme: Scheme) -> Tensor:
    """w_hat in the weight's dtype."""
    to = present_grid(groups, scheme)
    codes, _ = round_to_grid(groups.weight.to(groups.offset.dtype), to, groups.offset)
    return (less_zero(codes, to) * to.scale.unsqueeze(-1)).to(groups.weight.dtype)


def gradients(groups: Groups, d: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dV, dL/dalpha and dL/dbeta."""
    to = present_grid(groups, scheme)
    weight, d = groups.weight.to(groups.offset.dtype), d.to(groups.offset.dtype)
    codes, free = round_to_grid(weight, to, groups.offset)
    d_inside = d * (codes == free)
    d_scale = (d * less_zero(codes, to)).sum(-1) - (d_inside * weight).sum(-1) / to.scale
    d_offset = d_inside * to.scale.unsqueeze(-1)
    if to.zero is None:
        low_wins = -groups.alpha * groups.low > groups.beta * groups.high
        by_low, by_high = groups.low / to.lowest, groups.high / to.lowest
        return d_offset, d_scale * torch.where(low_wins, by_low, 0), d_scale * torch.where(low_wins, 0, by_high)
    d_zero = -to.scale * (d.sum(-1) - d_inside.sum(-1))
    d_scale = d_scale + d_zero * groups.alpha * groups.low / to.scale.square()
    d_alpha = -d_zero * groups.low / to.scale - d_scale * groups.low / to.highest
    return d_offset, d_alpha, d_scale * groups.high / to.highest


def search_range(weight: Tensor, moments: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> GroupRange:
    """Every candidate tried on its own; weight and moments (groups, G), fp32 or wider."""
    best, least = GroupRange.of(weight), torch.full((len(weight),), torch.inf, device=weight.device)
    for candidate in range_candidates(best, scheme):
        error = rounding_error(weight, moments, candidate, scheme, scale_dtype)
        better = error < least
        least = torch.where(better, error, least)
        best = GroupRange(torch.where(better, candidate.low, best.low), torch.where(better, candidate.high, best.high))
    return best


def range_candidates(full: GroupRange, scheme: Scheme) -> list[GroupRange]:
    if not scheme.symmetric:
        factors = range_factors(ASYMMETRIC_FACTORS)
        return [GroupRange(full.low * a, full.high * b) for a in factors for b in factors]
    low_wins, widest = -full.low > full.high, torch.maximum(-full.low, full.high)
    found = []
    for factor in range_factors(SYMMETRIC_FACTORS):
        for by_low in (low_wins, ~low_wins):
            reach = widest * factor
            found.append(GroupRange(torch.where(by_low, -reach, 0), torch.where(by_low, 0, reach)))
    return found


def rounding_error(
    weight: Tensor, moments: Tensor, ranges: GroupRange, scheme: Scheme, scale_dtype: torch.dtype
) -> Tensor:
    """sum_j moments_j * (w_hat_j - w_j)^2 of each group."""
    to = grid(ranges, scheme, scale_dtype)
    codes, _ = round_to_grid(weight, to)
    return ((less_zero(codes, to) * to.scale.unsqueeze(-1) - weight).square() * moments).sum(-1)


def less_zero(codes: Tensor, to: Grid) -> Tensor:
    """q - z"""
    return codes if to.zero is None else codes - to.zero.unsqueeze(-1)
