"""Compilation of all loops ahead of their first use, by calls on a few numbers."""

from itertools import product

import torch
from torch import Tensor

from app.domain.methods import Scheme, SchemeName
from workers.numerics.backends import block_loops
from workers.numerics.backends.rounding import rounding_loops
from workers.numerics.backends.rounding.rounding_operators import GridSettings, Groups
from workers.numerics.blocks.descent import descend
from workers.numerics.blocks.search import search_blocks
from workers.numerics.blocks.tuned_blocks import tuned_blocks
from workers.numerics.product_dtype import product_dtype

DTYPES = (torch.bfloat16,)
"""Of models; others compile when they come."""
GROUPS, WIDTH = 4, 32
BLOCK_TYPES = (SchemeName.Q4_0, SchemeName.Q4_1, SchemeName.IQ4_NL)
"""One whose levels are whole numbers, one with offsets, and one whose levels are neither."""


def compile_all() -> None:
    """Compile, or read from the cache, what weights and hidden states of each dtype need on this machine."""
    for dtype in DTYPES:
        multiplied = product_dtype(torch.device("cpu"), dtype)
        for gradient, symmetric in product({dtype, multiplied}, (True, False)):
            _round(dtype, gradient, symmetric=symmetric)
    for dtype in DTYPES:
        _pass_both_ways(dtype)
        for gradient, name in product({dtype, product_dtype(torch.device("cpu"), dtype)}, BLOCK_TYPES):
            _learn_blocks(dtype, gradient, Scheme.named(name))


def _round(dtype: torch.dtype, gradient: torch.dtype, *, symmetric: bool) -> None:
    weight = torch.ones(GROUPS, WIDTH, dtype=dtype)
    ones, settings = torch.ones(GROUPS), GridSettings(4, symmetric, 1e-10)
    low, high = rounding_loops.search_range(weight, torch.ones(1, WIDTH), settings, dtype)
    codes, zero = torch.zeros(GROUPS, WIDTH, dtype=torch.uint8), torch.zeros(GROUPS, dtype=torch.uint8)
    offset, scale = torch.zeros(GROUPS, WIDTH), ones.to(dtype)
    groups = Groups(weight, offset, low, high, ones, ones.clone(), codes, scale, zero)
    faults = torch.zeros(1, dtype=torch.int32)
    rounding_loops.step(
        groups,
        settings,
        gradient=torch.ones(GROUPS, WIDTH, dtype=gradient),
        rate=torch.tensor(0.1),
        faults=faults,
        limits=(0.5, 1.5),
        w_hat=torch.empty_like(weight),
    )
    rounding_loops.keep(groups, settings, torch.tensor(True))


def _learn_blocks(dtype: torch.dtype, gradient: torch.dtype, scheme: Scheme) -> None:
    """From the search by way of a sweep to a step and what is kept."""
    weight = torch.ones(GROUPS, 5 * WIDTH, dtype=dtype)
    made = descend(weight, search_blocks(weight, scheme), torch.eye(weight.shape[1]), 1)
    tuned, w_hat = tuned_blocks({"": weight}, {"": made}), torch.empty_like(weight)
    tuned.write(w_hat)
    tuned.step(torch.ones_like(weight, dtype=gradient), torch.tensor(0.1), w_hat)
    tuned.keep(torch.tensor(True))


def _pass_both_ways(dtype: torch.dtype) -> None:
    def ones(*shape: int) -> Tensor:
        return torch.ones(*shape, dtype=dtype, requires_grad=True)

    hidden, weight, angles = ones(1, 2, WIDTH), ones(WIDTH).detach(), ones(1, 2, WIDTH // 4).detach()
    residual, normal = block_loops.add_rms_norm(hidden, block_loops.rms_norm(hidden, weight, 1e-5), weight, 1e-5)
    shifted = block_loops.rms_norm(hidden, weight, 1e-5, offset=1.0, rounds_twice=False)
    heads = block_loops.silu_mul(normal, shifted).view(1, 2, 4, WIDTH // 4)
    turned = block_loops.apply_rope(heads, counts=(2, 1, 1), cos=angles, sin=angles)
    for parts in ([residual.detach()], [residual.detach(), residual.detach()]):
        block_loops.square_error(parts, torch.zeros(1, 2, WIDTH, dtype=dtype), torch.zeros(1, dtype=torch.int64), 1, 1)
    torch.autograd.backward([residual, *turned], [torch.ones_like(each) for each in (residual, *turned)])
