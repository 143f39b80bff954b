"""Split of calibration sequences into training and validation, and the order in which a run's steps read the first."""

import math

import torch
from torch import Tensor

from workers.contracts.tuning import TuningSettings

MOST_HELD_OUT = 16
HELD_OUT_SHARE = 8
"""One sequence in eight is held out, at most sixteen."""


def split(sequences: int, seed: int, most: int = MOST_HELD_OUT) -> tuple[Tensor, Tensor]:
    """Indices, int64, of the training and of the held-out sequences, at most `most`; a single one serves as both."""
    order = torch.randperm(sequences, generator=torch.Generator().manual_seed(seed))
    count = max(1, min(most, sequences // HELD_OUT_SHARE))
    return (order, order) if sequences == 1 else (order[count:], order[:count])


def minibatches(sequences: Tensor, settings: TuningSettings, seed: int) -> Tensor:
    """Indices of all minibatches, int64 (steps, batch); each pass is shuffled anew and its ragged tail dropped."""
    generator = torch.Generator().manual_seed(seed + 1)
    size = min(settings.batch_size, len(sequences))
    a_pass = len(sequences) // size
    passes = [
        sequences[torch.randperm(len(sequences), generator=generator)][: a_pass * size].view(a_pass, size)
        for _ in range(math.ceil(settings.steps / a_pass))
    ]
    return torch.cat([torch.empty(0, size, dtype=torch.int64), *passes])[: settings.steps]
