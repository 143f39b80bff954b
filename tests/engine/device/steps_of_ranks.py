"""The minibatches of two ranks as one process would read them, so that it takes the steps that they take together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from tests.engine.device.rank_pair import SIZE
from workers.contracts.tuning import TuningSettings
from workers.engine.tune import sample_order
from workers.engine.tune import tuner as tuning
from workers.engine.tune.sample_order import minibatches, split


def union(local: Callable[[int], Tensor]) -> Tensor:
    """Indices among all samples of what each rank has picked among its own; along the last dimension."""
    return torch.cat([local(rank) * SIZE + rank for rank in range(SIZE)], dim=-1)


def splits_of(samples: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Each rank's training and held-out samples, among its own."""
    shares = [len(range(rank, samples, SIZE)) for rank in range(SIZE)]
    return [split(share, seed, sample_order.MOST_HELD_OUT // SIZE) for share in shares]


def batches_of(samples: int, settings: TuningSettings, seed: int) -> Tensor:
    """Every step's minibatch of all ranks together, as indices among all samples."""
    own = replace(settings, batch_size=settings.batch_size // SIZE)
    return union(lambda rank: minibatches(splits_of(samples, seed)[rank][0], own, seed))


@contextmanager
def steps_of_ranks(samples: int) -> Iterator[None]:
    """While it lasts, tuning of so many samples splits and reads them as two ranks do."""

    def split_as_ranks(samples: int, seed: int, most: int = 0) -> tuple[Tensor, Tensor]:
        splits = splits_of(samples, seed)
        return union(lambda rank: splits[rank][0]), union(lambda rank: splits[rank][1])

    def batches_as_ranks(_: Tensor, settings: TuningSettings, seed: int) -> Tensor:
        return batches_of(samples, settings, seed)

    with patch.object(tuning, "split", split_as_ranks), patch.object(tuning, "minibatches", batches_as_ranks):
        yield
