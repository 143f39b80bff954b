"""The tensors that a block type stores of a weight, rows first: empty ones, views of parts, and row by row of two."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from app.domain.methods import Scheme
from workers.numerics.quantized import BlockWeight


def empty_weight(weight: Tensor, scheme: Scheme) -> BlockWeight:
    """A weight (out, in) in a type whose blocks divide its rows, before anything is known of it."""
    kind = scheme.blocks
    assert kind is not None  # noqa: S101 - for the type checker
    rows, columns = weight.shape

    def empty(size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, columns // size, dtype=dtype, device=weight.device)

    return BlockWeight(
        empty(1, torch.uint8),
        empty(kind.weights, torch.float16),
        scheme,
        weight.dtype,
        None if kind.scales is None else empty(kind.columns, torch.uint8),
        empty(kind.weights, torch.float16) if kind.offset else None,
        None if kind.minimums is None else empty(kind.columns, torch.uint8),
    )


def columns_of(weight: BlockWeight, columns: slice) -> BlockWeight:
    """Views of some columns, whole blocks."""

    def part(tensors: Sequence[Tensor]) -> Tensor:
        width = weight.codes.shape[1] // tensors[0].shape[1]
        return tensors[0][:, columns.start // width : columns.stop // width]

    return _each((weight,), part)


def split_rows(weight: BlockWeight, rows: Sequence[int]) -> list[BlockWeight]:
    """Weights with the given numbers of consecutive outputs."""
    ends = [sum(rows[: at + 1]) for at in range(len(rows))]
    return [rows_of(weight, slice(end - count, end)) for end, count in zip(ends, rows, strict=True)]


def of_rows(first: Tensor, one: BlockWeight, other: BlockWeight) -> BlockWeight:
    """Rows of one weight where `first` (out, 1) says so, else those of another."""
    return _each((one, other), lambda parts: torch.where(first, parts[0], parts[1]))


def rows_of(weight: BlockWeight, rows: slice) -> BlockWeight:
    """Views of some rows."""
    return _each((weight,), lambda parts: parts[0][rows])


def copy_of(weight: BlockWeight) -> BlockWeight:
    """The same in tensors of its own."""
    return _each((weight,), lambda parts: parts[0].clone())


def same_bytes(one: BlockWeight, other: BlockWeight) -> bool:
    """True if both are stored as the same bytes."""

    def equal(parts: Sequence[Tensor]) -> Tensor:
        mine, theirs = (part.contiguous().view(torch.uint8) for part in parts)
        return torch.tensor(torch.equal(mine, theirs))

    found = _each((one, other), equal)
    tensors = (found.codes, found.scale, found.scale_codes, found.minimum, found.minimum_codes)
    return all(bool(tensor) for tensor in tensors if tensor is not None)


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
