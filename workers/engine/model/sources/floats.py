"""Weights whose codes are small floating-point numbers: FP8, MXFP4 and NVFP4 to fp32.

    FP8      W = code * scale
    MXFP4    W = number of the code * 2^(scale - 127), 32 of them to a scale
    NVFP4    W = number of the code * (scale / global_scale), 16 of them to a scale

Codes of four bits are E2M1 (OCP Microscaling Formats 1.0): a sign and one of 0, 0.5, 1, 1.5, 2, 3, 4, 6.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from app.domain.inputs.quantized.stored import QuantizedTensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def scaled(parts: Mapping[str, Tensor], weight: QuantizedTensor) -> Tensor:
    """Codes times the scale of their block, of `rows` by `columns`, of which the last may be partial."""
    codes, scale = parts["codes"].float(), parts["scale"]
    scale = exponents(scale) if weight.number("exponents") else scale.float()
    if scale.numel() == 1:
        return codes * scale.reshape(())
    *experts, rows, columns = weight.shape
    block_rows, block_columns = weight.number("rows"), weight.number("columns")
    grid = scale.reshape(*experts, -(-rows // block_rows), -(-columns // block_columns))
    for _ in range(2):  # rows, then columns
        codes, grid = codes.transpose(-1, -2), grid.transpose(-1, -2)
        block_rows, block_columns = block_columns, block_rows
        grid = grid.repeat_interleave(block_columns, dim=-1)[..., : codes.shape[-1]] if block_columns > 1 else grid
    return codes * grid


def mxfp4(parts: Mapping[str, Tensor], weight: QuantizedTensor) -> Tensor:
    """Experts of gpt-oss: codes (experts, rows, groups, 16) -> (experts, groups * 32, rows)."""
    scale = exponents(parts["scale"]).unsqueeze(-1)
    experts, columns, rows = weight.shape
    return (e2m1(parts["codes"]) * scale).view(experts, rows, columns).transpose(1, 2)


def mxfp4_rows(parts: Mapping[str, Tensor], weight: QuantizedTensor) -> Tensor:
    """Rows of codes with exponents, (out, in / 2) and (out, groups)."""
    return _in_groups(e2m1(parts["codes"]), exponents(parts["scale"]), weight.number("group"))


def nvfp4(parts: Mapping[str, Tensor], weight: QuantizedTensor) -> Tensor:
    """Rows of codes with FP8 scales that a number of the whole weight divides."""
    scale = parts["scale"].float() / parts["global_scale"].float().reshape(())
    return _in_groups(e2m1(parts["codes"]), scale, weight.number("group"))


def exponents(scale: Tensor) -> Tensor:
    """2^(scale - 127), fp32, of exponents as bytes or as E8M0; 255 is no number."""
    stored = scale.view(torch.uint8).int()
    # The exponent of an fp32 number has the same bias; its least, 2^-127, is a number without one.
    bits = torch.where(stored == 0, 1 << 22, stored << 23)
    return torch.where(stored == 255, torch.nan, bits.view(torch.float32))


def e2m1(packed: Tensor) -> Tensor:
    """The numbers of packed codes, fp32: uint8 (..., n) -> (..., 2 n), of a byte the low half first."""
    numbers = torch.tensor(E2M1)
    halves = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return numbers[halves.int()]


def _in_groups(numbers: Tensor, scale: Tensor, group: int) -> Tensor:
    return numbers * scale.repeat_interleave(group, dim=-1)[..., : numbers.shape[-1]]
