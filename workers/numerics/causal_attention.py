"""Causal attention on a CPU as batched matrix products over tiles of queries, forward and backward.

For each tile of consecutive positions, with P = softmax(c q k^T) over the keys up to the tile's last position,

    o = P v        dv = P^T do        dS = P * (do v^T - rowsum(P * do v^T))        dq = c dS k        dk = c dS^T q

Keys beyond a tile are never multiplied. Query heads that share a key head lie one after another as rows of one product,
so that keys and values are not repeated. P and dS have the dtype of products (`workers.numerics.product_dtype`);
products, maxima and sums are accumulated in fp32 if that dtype has 16 bits. P is kept from the forward pass for the
backward.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from workers.numerics.product_dtype import product_dtype

SHORT, SHORT_TILE, LONG_TILE = 512, 64, 128
"""Positions of a tile: measured for sequences up to `SHORT`, and for longer ones."""
MOST_KEPT = 1 << 26
"""Most probabilities that are kept for the backward pass; attention over more is left to torch."""


@dataclass(frozen=True)
class Band:
    """A mask by which each position sees itself and the window - 1 positions before it."""

    window: int

    @classmethod
    def of(cls, mask: Tensor) -> "Band | None":
        """The band that a mask (1, 1, length, length) of truth values is; None if it is something else."""
        if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[:2] != (1, 1) or mask.shape[2] != mask.shape[3]:
            return None
        band = cls(int(mask[0, 0, -1].sum()))
        return band if band.window > 0 and torch.equal(mask[0, 0], band.mask(mask.shape[2], mask.device)) else None

    def mask(self, length: int, device: torch.device) -> Tensor:
        """The same as truth values, (length, length)."""
        full = torch.ones(length, length, dtype=torch.bool, device=device)
        return full.tril().triu(1 - self.window)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """softmax(scaling * q k^T) v, (batch, length, query heads * width); causal if there is no mask.

    query (batch, length, heads, width); key and value the same with fewer heads, each for as many query heads; mask as
    `torch.nn.functional.scaled_dot_product_attention` takes it.
    """
    batch, length, heads, _ = query.shape
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    kept = batch * heads * length * (length + _tile(length)) // 2 if trains else 0
    if mask is None and heads % key.shape[2] == 0 and kept <= MOST_KEPT:
        output: Tensor = _TiledAttention.apply(query, key, value, scaling)  # type: ignore[no-untyped-call]
        return output
    return scaled_dot_product_attention(query, key, value, mask, scaling)


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """torch's own attention, with the arguments and the result of `attend`."""
    if mask is not None and query.is_cuda and key.shape[2] < query.shape[2]:
        # With a mask only the slow kernel shares keys between heads.
        key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], dim=2) for x in (key, value))
    output = nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=True,
    )
    return output.transpose(1, 2).flatten(2)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        groups, dtype = key.shape[2], product_dtype(query.device, query.dtype)
        keys, values = (_by_group(x, slice(None), groups).to(dtype) for x in (key, value))
        output, kept = torch.empty(query.shape, dtype=query.dtype), []
        for rows in _tiles(query.shape[1]):
            queries = _by_group(query, rows, groups).to(dtype)
            scores = _scaled_product(queries, keys[:, : rows.stop].mT, scaling)
            count = rows.stop - rows.start
            scores.view(len(scores), -1, count, scores.shape[-1])[..., rows].add_(_later(count, scores.dtype))
            probabilities = scores.softmax(-1)
            _put_by_group(output, rows, groups, torch.bmm(probabilities, values[:, : rows.stop]))
            if any(ctx.needs_input_grad):
                kept += [queries, probabilities]
        ctx.scaling, ctx.shapes = scaling, (query.shape, key.shape)
        ctx.save_for_backward(keys, values, *kept)
        return output.flatten(2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        keys, values, *kept = ctx.saved_tensors
        query_shape, (batch, length, groups, width) = ctx.shapes
        d_output = gradients[0].reshape(query_shape)
        d_query = torch.empty(query_shape, dtype=d_output.dtype)
        d_keys, d_values = (torch.empty(x.shape, dtype=x.dtype) for x in (keys, values))
        tiles = list(zip(_tiles(length), kept[::2], kept[1::2], strict=True))
        for rows, queries, probabilities in reversed(tiles):
            d_tile = _by_group(d_output, rows, groups).to(keys.dtype)
            d_probabilities = torch.bmm(d_tile, values[:, : rows.stop].mT)
            d_scores = torch.ops.aten._softmax_backward_data(d_probabilities, probabilities, -1, probabilities.dtype)
            _put_by_group(d_query, rows, groups, _scaled_product(d_scores, keys[:, : rows.stop], ctx.scaling))
            # The last tile, which comes first, has all keys: it overwrites the sums that the others add to.
            adds = float(rows.stop < length)
            d_values[:, : rows.stop].baddbmm_(probabilities.mT, d_tile, beta=adds)
            d_keys[:, : rows.stop].baddbmm_(d_scores.mT, queries, beta=adds, alpha=ctx.scaling)
        back = (x.view(batch, groups, length, width).transpose(1, 2).to(d_output.dtype) for x in (d_keys, d_values))
        return d_query, *back, None


def _tile(length: int) -> int:
    return SHORT_TILE if length <= SHORT else LONG_TILE


def _tiles(length: int) -> Iterator[slice]:
    step = _tile(length)
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(batch, length, heads, width) as (batch, groups, heads / groups, length, width), a view."""
    batch, length, heads, width = x.shape
    return x.view(batch, length, groups, heads // groups, width).permute(0, 2, 3, 1, 4)


def _by_group(x: Tensor, rows: slice, groups: int) -> Tensor:
    """Positions `rows` of x (batch, length, heads, width) as (batch * groups, heads / groups * rows, width)."""
    tile = _grouped(x[:, rows], groups)
    return tile.reshape(len(x) * groups, -1, x.shape[-1])


def _put_by_group(x: Tensor, rows: slice, groups: int, value: Tensor) -> None:
    """The inverse of `_by_group`: writes `value` to positions `rows` of x."""
    tile = _grouped(x[:, rows], groups)
    tile.copy_(value.view(tile.shape))


def _scaled_product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """factor * a b, scaled before it is rounded; batches of matrices."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=factor)


@lru_cache
def _later(count: int, dtype: torch.dtype) -> Tensor:
    """-inf where the column is a later position than the row, else 0; (count, count)."""
    return torch.full((count, count), -math.inf, dtype=dtype).triu(1)
