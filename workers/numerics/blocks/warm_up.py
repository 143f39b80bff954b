"""Calls that compile what makes a weight of a block type: its search, GPTQ's columns in turn and coordinate descent."""

from collections.abc import Callable

import torch

from app.domain.methods import Scheme
from workers.numerics.backend import column_kernels, descent_kernels, search_kernels
from workers.numerics.learned_ranges import working_dtype


def block_warm_ups(
    columns: int,
    scheme: Scheme,
    dtypes: tuple[torch.dtype, torch.dtype],
    device: torch.device,
    *,
    eliminates: bool,
    sweeps: int,
) -> list[Callable[[], object]]:
    """For linears of so many columns in a block type; none where nothing is compiled.

    dtypes       of weights and of stored scales
    eliminates   whether columns are rounded in turn      sweeps   of descent that follow
    """
    kind, (dtype, scale_dtype) = scheme.blocks, dtypes
    assert kind is not None  # noqa: S101 - for the type checker
    working = working_dtype(torch.empty(0, dtype=dtype))
    search, descent = search_kernels(device, dtype), descent_kernels(device, working)
    calls = [] if search is None else search.warm_ups(columns, scheme, dtype, device)
    if eliminates:
        calls += column_kernels(device, working).warm_ups(columns, scheme, scale_dtype, device)
    return calls + (descent.warm_ups(columns, kind, device) if descent is not None and sweeps else [])
