"""Plain formulas of fake quantization and of the range search, which the backends are compared with.

SignRound's step stands in its own file, `workers.methods.sign_round.signed_step`.
"""

import torch
from torch import Tensor

from app.domain.methods import Scheme
from workers.numerics.affine import (
    ASYMMETRIC_FACTORS,
    SYMMETRIC_FACTORS,
    GroupRange,
    affine_grid,
    range_factors,
    round_to_grid,
)
from workers.numerics.backends.rounding.rounding_operators import Groups
from workers.numerics.learned_ranges import steps


def fake_quantized(groups: Groups, scheme: Scheme) -> Tensor:
    """w_hat in the weight's dtype."""
    present = affine_grid(GroupRange(groups.low, groups.high), scheme, groups.scale.dtype, groups.alpha, groups.beta)
    codes, _ = round_to_grid(groups.weight.to(groups.offset.dtype), present, groups.offset)
    return (steps(codes, present) * present.scale.unsqueeze(-1)).to(groups.weight.dtype)


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
    ranges = []
    for factor in range_factors(SYMMETRIC_FACTORS):
        for by_low in (low_wins, ~low_wins):
            reach = widest * factor
            ranges.append(GroupRange(torch.where(by_low, -reach, 0), torch.where(by_low, 0, reach)))
    return ranges


def rounding_error(
    weight: Tensor, moments: Tensor, ranges: GroupRange, scheme: Scheme, scale_dtype: torch.dtype
) -> Tensor:
    """sum_j moments_j * (w_hat_j - w_j)^2 of each group."""
    tried = affine_grid(ranges, scheme, scale_dtype)
    codes, _ = round_to_grid(weight, tried)
    return ((steps(codes, tried) * tried.scale.unsqueeze(-1) - weight).square() * moments).sum(-1)
