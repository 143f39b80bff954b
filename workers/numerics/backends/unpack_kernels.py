"""The Triton kernel that computes W_hat from packed codes; formulas in `workers.numerics.packed_weight`.

It reads 2, 4 or 8 bits per code and writes w_hat. With offsets the compiler may round the product and the sum at once;
everything else is the reference's, bit for bit. The interpreter runs the same code on a CPU (TRITON_INTERPRET=1).
"""

import triton
import triton.language as tl
from torch import Tensor

PROGRAM_ELEMENTS = 2048
"""Weights that a program computes."""
KINDS = ("middle", "zero", "offset", "codebook")


def unpack(
    packed: Tensor,
    scale: Tensor,
    other: Tensor | None,
    out: Tensor,
    *,
    kind: str,
    width: int,
    group_size: int,
    middle: float,
) -> None:
    """Writes W_hat to `out` (out, in); scale (out, groups), the rest as in `PackedWeight`."""
    count = out.numel()
    _unpack[(triton.cdiv(count, PROGRAM_ELEMENTS),)](
        packed,
        scale.contiguous(),
        packed if other is None else other,
        out,
        count,
        group_size,
        middle,
        WIDTH=width,
        KIND=KINDS.index(kind),
        BLOCK=PROGRAM_ELEMENTS,
    )


@triton.jit
def _unpack(  # type: ignore[no-untyped-def]
    PACKED, SCALE, OTHER, OUT, count, group_size, middle, WIDTH: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < count
    each: tl.constexpr = 8 // WIDTH
    byte = tl.load(PACKED + at // each, mask=real, other=0).to(tl.int32)
    code = (byte >> ((at % each) * WIDTH).to(tl.int32)) & (2**WIDTH - 1)
    group = at // group_size
    scale = tl.load(SCALE + group, mask=real, other=0.0).to(tl.float32)
    if KIND == 3:
        value = tl.load(OTHER + code, mask=real, other=0.0) * scale
    elif KIND == 2:
        value = code.to(tl.float32) * scale + tl.load(OTHER + group, mask=real, other=0.0).to(tl.float32)
    elif KIND == 1:
        value = (code.to(tl.float32) - tl.load(OTHER + group, mask=real, other=0).to(tl.float32)) * scale
    else:
        value = (code.to(tl.float32) - middle) * scale
    tl.store(OUT + at, value.to(OUT.dtype.element_ty), mask=real)
