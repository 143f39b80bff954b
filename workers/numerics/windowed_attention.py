"""Causal attention within a window on a GPU: FlashAttention's kernels as torch has them, forward and backward.

`torch.nn.functional.scaled_dot_product_attention` takes a window as a mask of (length, length) truth values only, and
computes all of their scores then; the kernels below it skip tiles outside of the window. They serve fp16 and bf16 and
heads of up to 256; anything else takes the mask.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from workers.numerics.causal_attention import Band, scaled_dot_product_attention

WIDEST_HEAD = 256
"""Of the kernels."""


def attend_within(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | Band | None, scaling: float) -> Tensor:
    """`causal_attention.attend` for a GPU; `mask` may be a `Band`."""
    if not isinstance(mask, Band):
        return scaled_dot_product_attention(query, key, value, mask, scaling)
    length = query.shape[1]
    if mask.window >= length:
        return scaled_dot_product_attention(query, key, value, None, scaling)
    if query.dtype not in (torch.float16, torch.bfloat16) or query.shape[-1] > WIDEST_HEAD:
        whole = mask.mask(length, query.device)[None, None]
        return scaled_dot_product_attention(query, key, value, whole, scaling)
    output: Tensor = _Windowed.apply(query, key, value, scaling, mask.window)  # type: ignore[no-untyped-call]
    return output.flatten(2)


class _Windowed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int) -> Tensor:
        length = query.shape[1]
        ctx.settings = {"scale": scaling, "window_size_left": window - 1, "window_size_right": 0}
        output: Tensor
        output, log_sum, state, unused, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, None, None, length, length, 0.0, True, False, **ctx.settings
        )
        ctx.save_for_backward(query, key, value, output, log_sum, state, unused)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum, state, unused = ctx.saved_tensors
        sizes = (None, None, query.shape[1], key.shape[1], 0.0, True, state, unused)
        given = (gradients[0].contiguous(), query, key, value, output, log_sum)
        with _the_deterministic_kernel():
            by_input = torch.ops.aten._flash_attention_backward(*given, *sizes, **ctx.settings)
        return *by_input, None, None


@contextmanager
def _the_deterministic_kernel() -> Iterator[None]:
    """The choice of torch, which takes the deterministic kernel only where anything else would be an error."""
    enabled = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=only_warns)
