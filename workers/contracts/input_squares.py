"""Sums of a linear's squared inputs over calibration text: what llama.cpp's importance matrix holds of it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SUMS, COUNTS = "in_sum2", "counts"
"""Last names of the two tensors, as in llama.cpp's file."""


@dataclass(frozen=True)
class InputSquares:
    """Of one linear, in the original model.

    sums    sum over tokens of x_j^2, fp32 (in,), on the host
    count   number of tokens
    """

    sums: Tensor
    count: int

    def tensors(self, name: str) -> dict[str, Tensor]:
        """As they are stored for the linear of that name."""
        return {f"{name}.{SUMS}": self.sums, f"{name}.{COUNTS}": torch.tensor([self.count], dtype=torch.int64)}

    @classmethod
    def read(cls, name: str, tensors: Mapping[str, Tensor]) -> "InputSquares":
        """The inverse of `tensors`."""
        return cls(tensors[f"{name}.{SUMS}"], int(tensors[f"{name}.{COUNTS}"]))
