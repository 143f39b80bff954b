"""Matrices rounded to FP8 (E4M3) with one scale each, in torch's operators: as they lie, and transposed.

    m = max|x|,    e = round_E4M3(448 x / m),    x ~ (m / 448) e

The largest magnitude becomes the format's largest, so that nothing is clamped, and what is not a number stays that. Of
numbers from m / 2^15 on the error is at most 1/16; those below m / 2^19 become 0.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LARGEST = 448.0
"""Of E4M3."""
SMALLEST_MAXIMUM = 1e-30
"""In place of the largest magnitude where that is smaller, so that a matrix of zeros has a scale."""


@dataclass(frozen=True)
class EightBits:
    """A matrix (rows, columns) in E4M3.

    lying    (rows, columns), contiguous; None if nobody asked for it
    turned   (columns, rows), contiguous; None if nobody asked for it
    scale    fp32 (): what its elements are multiplied by
    """

    lying: Tensor | None
    turned: Tensor | None
    scale: Tensor


class Cast(Protocol):
    """A matrix (rows, columns), contiguous, in FP8, as it lies, turned, or both."""

    def __call__(self, x: Tensor, *, lying: bool, turned: bool) -> EightBits: ...


def cast(x: Tensor, *, lying: bool, turned: bool) -> EightBits:
    """x (rows, columns), contiguous, of any floating dtype."""
    largest = x.abs().amax().float().clamp(min=SMALLEST_MAXIMUM)
    rounded = (x.float() * (LARGEST / largest)).to(torch.float8_e4m3fn)
    return EightBits(rounded if lying else None, rounded.T.contiguous() if turned else None, largest / LARGEST)
