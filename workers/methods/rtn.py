"""Round to nearest (RTN): the baseline that every other method is measured against.

    s, z from the group's range (`workers.numerics.affine`, alpha = beta = 1)
    q = clamp(round(w/s) + z),  w_hat = s*(q - z)

Schemes of FP8 and FP4 have the scales of `floats.float_grids`. Of FP4 and MX, where few scales can be stored,
the one near the usual with the least squared error of its group is taken (`scale_search`).

Reads the weights alone, one linear at a time; cost O(out*in). Left out on purpose: a search of integers' ranges and any
use of activations, which would make it another method. llama.cpp's types are the exception: their scales are codes
themselves, so that any rounding to them is a search (`workers.numerics.blocks.search`), weighted by the inputs' second
moments.
"""

import torch
from torch import Tensor

from app.domain.methods import Form, RTNSpec, Scheme
from workers.contracts.blocks import BlockTask, Method
from workers.contracts.results import BlockResult
from workers.numerics.affine import GroupRange, affine_grid, affine_weight, grouped, round_to_grid
from workers.numerics.blocks.search import search_blocks
from workers.numerics.floats import float_grids
from workers.numerics.quantized import AffineWeight, LinearResult, QuantizedWeight
from workers.numerics.row_parts import row_parts


class RTN:
    def quantize_block(self, task: BlockTask, spec: RTNSpec) -> BlockResult:
        amax = task.joined_amax()
        # Without calibration, moments are those of the evaluation text, which must not decide anything.
        moments = task.second_moments if spec.observes_inputs() else {}
        results = {
            name: LinearResult(
                round_to_scheme(
                    task.linear(name).weight,
                    scheme,
                    task.scale_dtype,
                    amax.get(name),
                    search=spec.scale_search,
                    moments=moments.get(name),
                )
            )
            for name, scheme in task.schemes.items()
        }
        return BlockResult(results)

    def quantize_tensor(
        self,
        weight: Tensor,
        scheme: Scheme,
        scale_dtype: torch.dtype,
        spec: RTNSpec,
        joined_amax: Tensor | None = None,
    ) -> LinearResult:
        """One linear's weight (out, in) by itself; what a runtime joins with it only lends its largest magnitude."""
        search = spec.scale_search
        return LinearResult(round_to_scheme(weight, scheme, scale_dtype, joined_amax, search=search))


def round_to_scheme(
    weight: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    joined_amax: Tensor | None = None,
    *,
    search: bool = True,
    moments: Tensor | None = None,
) -> QuantizedWeight:
    """Round a weight (out, in) of any float dtype to nearest, whatever the scheme's element.

    search    whether FP4 and MX take the best of the scales near the usual one
    moments   second moments of the inputs, (in,), that weigh the search of llama.cpp's types
    """
    if scheme.form is Form.BLOCKS:
        return search_blocks(weight, scheme, moments)
    if scheme.form is Form.FLOAT:
        quantize = float_grids.searched if search else float_grids.quantize
        return quantize(weight, scheme, scale_dtype, joined_amax)
    return quantize_weight(weight, scheme, scale_dtype)


@torch.no_grad()
def quantize_weight(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> AffineWeight:
    """Round a weight (out, in) of any float dtype to `scheme`; in_features must divide into groups."""
    parts = [
        _rounded(weight[rows], scheme, scale_dtype)
        for rows in row_parts(weight.shape[0], weight.shape[1], weight.device)
    ]
    if len(parts) == 1:
        return parts[0]
    codes, scale = torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts])
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return AffineWeight(codes, scale, torch.cat(zeros) if zeros else None, scheme, weight.dtype)


def _rounded(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> AffineWeight:
    w = grouped(weight.float(), scheme.group_size)
    grid = affine_grid(GroupRange.of(w), scheme, scale_dtype)
    codes, _ = round_to_grid(w, grid)
    return affine_weight(codes, grid, scheme, scale_dtype, weight.dtype)


METHOD = Method(RTNSpec, RTN())
