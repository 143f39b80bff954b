"""Scales in another dtype than they were fitted in, and how far that moves them."""

from dataclasses import replace

import torch
from torch import Tensor

from workers.numerics.quantized import AffineWeight


def rescaled(weight: AffineWeight, dtype: torch.dtype) -> tuple[AffineWeight, float]:
    """The weight with its scales rounded to `dtype`, and the largest relative error of one.

    The error of a scale below the smallest normal number of `dtype` is relative to that number. bf16's eight
    significant bits are exact in fp16 from 2^-17 to its largest number. The error is infinite where a scale is beyond
    `dtype`.
    """
    if weight.scale.dtype == dtype:
        return weight, 0.0
    rounded = weight.scale.to(dtype)
    return replace(weight, scale=rounded), largest_error(weight.scale, rounded)


def largest_error(exact: Tensor, rounded: Tensor) -> float:
    """max |rounded - exact| / max(|exact|, smallest normal number of the rounded ones' dtype), computed in fp64."""
    wide = exact.double()
    floor = torch.finfo(rounded.dtype).smallest_normal
    if not wide.numel():
        return 0.0
    return float(((rounded.double() - wide).abs() / wide.abs().clamp_min(floor)).max())
