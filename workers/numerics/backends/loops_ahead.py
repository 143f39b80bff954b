"""Compilation of all loops ahead of their first use, by calls on a few numbers."""

from itertools import product

import torch
from torch import Tensor

from workers.numerics.backends import block_loops
from workers.numerics.backends.rounding import rounding_loops
from workers.numerics.backends.rounding.rounding_operators import GridSettings, Groups
from workers.numerics.product_dtype import product_dtype

DTYPES = (torch.bfloat16,)
"""Of models; others compile when they come."""
GROUPS, WIDTH = 4, 32


def compile_all() -> None:
    """Compile, or read from the cache, what weights and hidden states of each dtype need on this machine."""
    for dtype in DTYPES:
        multiplied = product_dtype(torch.device("cpu"), dtype)
        for gradient, symmetric in product({dtype, multiplied}, (True, False)):
            _round(dtype, gradient, symmetric=symmetric)
    for dtype in DTYPES:
        _pass_both_ways(dtype)


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
