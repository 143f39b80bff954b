"""Backward products of a linear in FP8, for methods that use the signs of a weight's gradient alone.

    D = dL/dW = (dL/dy)^T x  (out, in),    dL/dx = (dL/dy) W  (tokens, in)

Both factors are rounded to E4M3 with one scale each (`workers.numerics.eight_bits.casts`) and summed the quick way of
the GPU. The forward product stays as it is: rounded, its error would be a part of the loss, an eighth of that of 4-bit
weights, and weights would be tuned to it. An error of D does not move the loss; it can only turn signs. With g = dL/dy,

    |D_FP8 - D| <= (2u + u^2) |g|^T |x| + c,    u = 1/16,    c for numbers that are too small for the format

and for independent roundings it is about 4 % of the root of the sum over tokens of (g x)^2: by as much as D changes
with one token in seven hundred. So a sign turns only where tokens contradict each other nearly to zero, where the next
minibatch would turn it as well, and in sums weighted by |D| hardly any does.

GPUs multiply FP8 matrices that both lie along the dimension that is summed over, hence the transposed copies.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from workers.numerics import backend
from workers.numerics.eight_bits.casts import EightBits

MULTIPLE = 16
"""That every dimension of a product must be of."""
SMALLEST = 2048
"""Of both dimensions of a weight: below, rounding the factors takes as long as their products would save."""
CAPABILITY = (8, 9)
"""Of the first GPUs that multiply FP8."""


def serves(shape: tuple[int, int]) -> bool:
    """True if the products of a weight (out, in) can be computed in FP8."""
    return all(size % MULTIPLE == 0 for size in shape)


def pays(device: torch.device, dtype: torch.dtype, shape: tuple[int, int]) -> bool:
    """True if they are quicker in FP8 than in the weight's own dtype."""
    if not backend.triton_serves(device, dtype) or dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(device) >= CAPABILITY and serves(shape) and min(shape) >= SMALLEST


def warm_ups(device: torch.device, dtype: torch.dtype) -> list[Callable[[], object]]:
    """Casts of a small matrix, which compile them."""
    cast, x = backend.cast_to_eight_bits(device, dtype), torch.ones(MULTIPLE, MULTIPLE, dtype=dtype, device=device)
    return [partial(cast, x, lying=lying, turned=True) for lying in (False, True)]


def backward(
    by_output: Tensor, x: Tensor, weight: Tensor, gradient: Tensor | None, *, adds: bool, by_input: bool
) -> Tensor | None:
    """Puts dL/dW into `gradient` (out, in), or adds it there, and returns dL/dx if it is asked for.

    by_output (tokens, out) and x (tokens, in), tokens a multiple of 16
    """
    cast = backend.cast_to_eight_bits(x.device, x.dtype)
    g = cast(by_output.contiguous(), lying=by_input, turned=gradient is not None)
    if gradient is not None:
        inputs = cast(x.contiguous(), lying=False, turned=True)
        if adds:
            gradient += _product(g.turned, inputs.turned, g, inputs, gradient.dtype)
        else:
            _product(g.turned, inputs.turned, g, inputs, gradient.dtype, out=gradient)
    if not by_input:
        return None
    w = cast(weight, lying=False, turned=True)
    return _product(g.lying, w.turned, g, w, by_output.dtype)


def _product(
    a: Tensor | None, b: Tensor | None, of_a: EightBits, of_b: EightBits, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """a (m, k) b (n, k)^T of two rounded matrices in `dtype`, into `out` where that is given."""
    if a is None or b is None:
        raise ValueError("a factor of a product in FP8 lacks the side that is multiplied")
    # Quick sums are rounded to fewer bits than fp32's, which turns no more signs than exact ones do, and save a tenth.
    options = {"out_dtype": dtype, "use_fast_accum": True} | ({} if out is None else {"out": out})
    made: Tensor = torch._scaled_mm(a, b.T, of_a.scale, of_b.scale, **options)  # type: ignore[arg-type]
    return made
