"""Tensors of groups whose ranges are clipped by learned factors, as their kernels take them."""

from dataclasses import dataclass

from torch import Tensor

from workers.numerics.adamw import AdamW


@dataclass(frozen=True)
class ClippedState:
    """Groups (count, G) of one scheme; all tensors contiguous.

    weight            the model's dtype                           offset   V, fp32, or None for 0
    low, high         fp32 (count,), the ranges at the start      logits   fp32 (2, count): beta, then gamma
    optimizer         of the logits; its count is that of the steps done
    slope             fp32 (count,), room for dL/ds of a step
    codes, zero       uint8, of the kept result                   scale    the dtype that stores scales
    """

    weight: Tensor
    offset: Tensor | None
    low: Tensor
    high: Tensor
    logits: Tensor
    optimizer: AdamW
    slope: Tensor
    codes: Tensor
    scale: Tensor
    zero: Tensor
