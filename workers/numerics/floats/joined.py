"""Scales that linears share because a runtime joins them: queries, keys and values; gate and up of an MLP or an expert.

A runtime makes one matrix of them, which has one global scale (NVFP4) or one scale (FP8 per tensor). vLLM 0.33 takes
the largest of unequal global scales for all of them without rescaling anything, and rounds FP8 a second time. So the
largest magnitude that such scales come from is that of all linears of the set.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from app.domain.methods import Scheme
from app.domain.methods.named_schemes import WHOLE, ScaleType


def shares_scale(scheme: Scheme) -> bool:
    """True if weights of the scheme have a scale of the whole tensor."""
    return scheme.row is not None and (scheme.row.scale is ScaleType.E4M3 or scheme.row.rows == WHOLE)


def sets_of(
    joined: Iterable[Sequence[str]], schemes: Mapping[str, Scheme], wanted: Iterable[str]
) -> dict[str, tuple[str, ...]]:
    """For every wanted linear all that it is joined with and that have its scheme, itself among them."""
    sets: dict[str, tuple[str, ...]] = {name: (name,) for name in wanted}
    for names in joined:
        for name in names:
            if name in sets:
                sets[name] = tuple(other for other in names if schemes.get(other) == schemes[name])
    return sets


def joined_amax(
    joined: Iterable[Sequence[str]], schemes: Mapping[str, Scheme], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Largest magnitude of each linear's set, fp32 (), for those whose scheme has a scale of the whole tensor."""
    amax = {name: weight.abs().max().float() for name, weight in weights.items() if shares_scale(schemes[name])}
    sets = sets_of(joined, schemes, amax)
    return {name: torch.stack([amax[other] for other in names if other in amax]).max() for name, names in sets.items()}
