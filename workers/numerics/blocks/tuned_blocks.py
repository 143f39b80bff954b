"""Linears in a block type of llama.cpp's whose rounding is learned by the signs of gradients.

The formulas are in `workers.numerics.backends.rounding.block_rounding_operators`.

The start is a quantized weight: its grid and its codes. Factors, offsets and their codes stay, so that what is tuned is
what a file stores, to the bit.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from workers.numerics.backend import block_rounding_kernels
from workers.numerics.backends.rounding.block_rounding_operators import BlockGroups
from workers.numerics.blocks.axis import BlockAxis, start_of
from workers.numerics.learned_ranges import working_dtype
from workers.numerics.quantized import BlockWeight
from workers.numerics.tuned_codes import TunedCodes


def tuned_blocks(weights: Mapping[str, Tensor], starts: Mapping[str, BlockWeight]) -> TunedCodes[BlockGroups]:
    """Linears of one block type with the places of their weights (out, in), and what they begin as."""
    axis = BlockAxis(next(iter(starts.values())).kind)
    own = {name: starts[name] for name in weights}
    state, weight = _start(axis, weights, own), next(iter(weights.values()))
    return TunedCodes(own, state, axis, block_rounding_kernels(weight.device, weight.dtype))


def _start(axis: BlockAxis, weights: Mapping[str, Tensor], starts: Mapping[str, BlockWeight]) -> BlockGroups:
    """Every place in its code's interval, and no result kept yet."""
    width, grids = axis.kind.columns, [starts[name] for name in weights]
    weight = torch.cat([each.reshape(-1, width) for each in weights.values()])
    working = working_dtype(weight)
    factor = torch.cat([grid.factor().flatten() for grid in grids]).to(working)
    offsets = [offset.flatten() for grid in grids if (offset := grid.offset()) is not None]
    offset = torch.cat(offsets).to(working) if offsets else factor.new_empty(0)
    codes = torch.cat([grid.codes.view(-1, width) for grid in grids])
    place = start_of(axis, weight, codes, factor, offset if offsets else None)
    return BlockGroups(place, place.clone(), factor, offset, torch.zeros_like(codes))
