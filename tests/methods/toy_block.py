"""A block of two linears with outlier input channels, as a `BlockTask`: small, yet hard for round to nearest."""

import torch
from torch import Tensor, nn

from app.domain.methods import Scheme
from workers.contracts import BlockTask
from workers.engine.tuning import Tuner


class ToyBlock(nn.Module):
    def __init__(self, width: int = 32, inner: int = 48) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, hidden: Tensor) -> Tensor:
        up: Tensor = self.down(nn.functional.silu(self.up(hidden)))
        return hidden + up


def toy_task(schemes: dict[str, Scheme], samples: int = 32, length: int = 24, micro_batch: int = 8) -> BlockTask:
    torch.manual_seed(3)
    block = ToyBlock()
    hidden = torch.randn(samples, length, 32)
    hidden[..., :3] *= 12
    with torch.no_grad():
        targets = block(hidden)
    return BlockTask(
        index=0,
        block=block,
        forward=lambda module, x: module(x),
        inputs=hidden,
        inputs_fp=hidden,
        targets=targets,
        schemes=schemes,
        moments={},
        scale_dtype=torch.float32,
        device=torch.device("cpu"),
        seed=7,
        micro_batch=micro_batch,
        tick=lambda _: None,
        tune=Tuner().tune,
    )
