"""Blocks of a few linears with outlier input channels, as a `BlockTask`: small, yet hard for round to nearest."""

from typing import Any

import torch
from torch import Tensor, nn

from app.domain.methods import Scheme
from workers.contracts.blocks import BlockTask, Fold
from workers.engine.quantize.registry import METHODS
from workers.engine.tune.tuner import Tuner


class ToyBlock(nn.Module):
    def __init__(self, width: int = 32, inner: int = 48) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, hidden: Tensor) -> Tensor:
        up: Tensor = self.down(nn.functional.silu(self.up(hidden)))
        return hidden + up


class GatedBlock(nn.Module):
    """A norm, then a gated MLP whose `gate` and `up` share their inputs."""

    def __init__(self, width: int = 32, inner: int = 48) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.gate, self.up = nn.Linear(width, inner), nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, hidden: Tensor) -> Tensor:
        x = self.norm(hidden)
        mixed: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return hidden + mixed


GATED_FOLDS = (Fold("norm", ("gate", "up"), ""), Fold("up", ("down",), "down"))
"""Of a `GatedBlock`; the empty name is the block itself."""


def toy_task(
    schemes: dict[str, Scheme], samples: int = 32, length: int = 24, micro_batch: int = 8, **changed: Any
) -> BlockTask:
    """The task of a `ToyBlock`."""
    torch.manual_seed(3)
    block = ToyBlock()
    hidden = torch.randn(samples, length, 32)
    hidden[..., :3] *= 12
    return _task(block, hidden, schemes=schemes, micro_batch=micro_batch, **changed)


def gated_task(schemes: dict[str, Scheme], samples: int = 32, length: int = 24, **changed: Any) -> BlockTask:
    """The task of a `GatedBlock`: channels of few common causes, three of them amplified, one that is never lit."""
    torch.manual_seed(4)
    block = GatedBlock()
    hidden = torch.randn(samples, length, 12) @ torch.randn(12, 32) + torch.randn(samples, length, 32)
    hidden[..., 9] = 0
    block.norm.weight.data = 1 + 0.2 * torch.randn(32)
    block.norm.weight.data[:3] *= 12
    return _task(block, hidden, **({"schemes": schemes, "folds": GATED_FOLDS} | changed))


def _task(block: nn.Module, hidden: Tensor, **given: Any) -> BlockTask:
    with torch.no_grad():
        targets = block(hidden)
    fields: dict[str, Any] = {
        "index": 0,
        "block": block,
        "forward": lambda module, x: module(x),
        "inputs": hidden,
        "inputs_fp": hidden,
        "targets": targets,
        "second_moments": {},
        "scale_dtype": torch.float32,
        "device": torch.device("cpu"),
        "seed": 7,
        "micro_batch": 8,
        "tick": lambda _: None,
        "tune": Tuner().tune,
        "quantize": lambda task, spec: METHODS[spec.method].quantize_block(task, spec),
    }
    return BlockTask(**(fields | given))
