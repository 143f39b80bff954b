"""The minibatches of two ranks as one process would read them, so that it takes the steps that they take together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

from tests.engine.device.rank_pair import SIZE
from workers.contracts.tuning import TuningSettings
from workers.engine.tune import sequence_order
from workers.engine.tune import tuner as tuner_module
from workers.engine.tune.sequence_order import minibatches, split


def union(local: Callable[[int], Tensor]) -> Tensor:
    """Indices among all sequences of what each rank has picked among its own; along the last dimension."""
    return torch.cat([local(rank) * SIZE + rank for rank in range(SIZE)], dim=-1)


def splits_of(sequences: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Each rank's training and held-out sequences, among its own."""
    shares = [len(range(rank, sequences, SIZE)) for rank in range(SIZE)]
    return [split(share, seed, sequence_order.MOST_HELD_OUT // SIZE) for share in shares]


def batches_of(sequences: int, settings: TuningSettings, seed: int) -> Tensor:
    """Every step's minibatch of all ranks together, as indices among all sequences."""
    own = replace(settings, batch_size=settings.batch_size // SIZE)
    return union(lambda rank: minibatches(splits_of(sequences, seed)[rank][0], own, seed))


@contextmanager
def steps_of_ranks(sequences: int) -> Iterator[None]:
    """While it lasts, tuning of so many sequences splits and reads them as two ranks do."""

    def split_as_ranks(sequences: int, seed: int, most: int = 0) -> tuple[Tensor, Tensor]:
        splits = splits_of(sequences, seed)
        return union(lambda rank: splits[rank][0]), union(lambda rank: splits[rank][1])

    def batches_as_ranks(_: Tensor, settings: TuningSettings, seed: int) -> Tensor:
        return batches_of(sequences, settings, seed)

    with (
        patch.object(tuner_module, "split", split_as_ranks),
        patch.object(tuner_module, "minibatches", batches_as_ranks),
    ):
        yield
