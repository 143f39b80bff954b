"""A LoRA of a few lines, for tests of what trains any adapter."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from workers.contracts.adapters import TrainableAdapter
from workers.numerics.quantized import LinearResult


class SmallLoRA(TrainableAdapter):
    """y = b a x."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 2,
        *,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
        zero: bool = True,
    ) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, in_features, dtype=dtype, generator=generator) / in_features**0.5)
        start = torch.zeros if zero else torch.randn
        self.b = nn.Parameter(start(out_features, rank, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


def attach_small(
    linears: Mapping[str, LinearResult], dtype: torch.dtype = torch.float32
) -> dict[str, TrainableAdapter]:
    """One beside each linear, the same each time."""
    generator = torch.Generator().manual_seed(5)
    found: dict[str, TrainableAdapter] = {}
    for name, result in linears.items():
        out_features, in_features = result.weight.shape
        found[name] = SmallLoRA(in_features, out_features, dtype=dtype, generator=generator)
    return found
