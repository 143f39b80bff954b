"""The tensors that a block type stores of a weight, rows first: side by side, in parts, and row by row of two."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from workers.numerics.quantized import BlockWeight


def beside(weights: Sequence[BlockWeight]) -> BlockWeight:
    """Weights of the same rows, their columns one after another."""
    return _each(weights, lambda parts: torch.cat(list(parts), 1))


def split_rows(weight: BlockWeight, rows: Sequence[int]) -> list[BlockWeight]:
    """Weights with the given numbers of consecutive outputs."""
    ends = [sum(rows[: at + 1]) for at in range(len(rows))]
    return [_rows(weight, slice(end - count, end)) for end, count in zip(ends, rows, strict=True)]


def of_rows(first: Tensor, one: BlockWeight, other: BlockWeight) -> BlockWeight:
    """Rows of one weight where `first` (out, 1) says so, else those of another."""
    return _each((one, other), lambda parts: torch.where(first, parts[0], parts[1]))


def _rows(weight: BlockWeight, rows: slice) -> BlockWeight:
    return _each((weight,), lambda parts: parts[0][rows])


def _each(weights: Sequence[BlockWeight], joined: Callable[[Sequence[Tensor]], Tensor]) -> BlockWeight:
    def optional(*parts: Tensor | None) -> Tensor | None:
        given = [part for part in parts if part is not None]
        return joined(given) if given else None

    return replace(
        weights[0],
        codes=joined([weight.codes for weight in weights]),
        scale=joined([weight.scale for weight in weights]),
        scale_codes=optional(*(weight.scale_codes for weight in weights)),
        minimum=optional(*(weight.minimum for weight in weights)),
        minimum_codes=optional(*(weight.minimum_codes for weight in weights)),
    )
