"""NormalFloat: block-wise quantization to the quantiles of a normal distribution (Dettmers et al., arXiv:2305.14314).

A weight (out, in) is viewed in groups of B0 consecutive columns. With the codebook c of b0 bits and a = absmax of a
group,

    q = argmin_i |w/a - c_i|            w_hat = a*c_q
    c_i = Phi^-1(p_i) / Phi^-1(P),      P = 0.9677083
    p   = 2^(b0-1) points from 1 - P to 1/2 without the last, then 2^(b0-1) + 1 points from 1/2 to P, evenly spaced

so that c has 0, -1 and 1, and one value more on the positive side. This is the construction of bitsandbytes, which the
paper's formula only approximates. bitsandbytes ships the 16 values of NF4 as constants, rounded on the way; they stand
here too, so that codes and weights equal its own, bit for bit.

Double quantization in the form of LQ-LoRA (Guo et al., arXiv:2311.12023, and its code), whose configurations are
(b0, b1, b2, B0, B1), stores a in b1 bits, with one maximum of dtype b2 for B1 consecutive groups:

    off = min a over the whole linear       m = max of a - off over B1 groups, rounded to b2
    a_code = clamp(round((a - off)/m * (2^b1 - 1)), 0, 2^b1 - 1)
    a_hat  = off + m*a_code/(2^b1 - 1)      bits per weight: b0 + b1/B0 + b2/(B0*B1)

Codes are computed with the stored a_hat, not with a, so that they fit the shipped values. QLoRA's own second level
(8-bit floats around the mean) takes the same bits and is not built. Different from LQ-LoRA's code: groups lie within
rows, and the last of the B1 may be fewer, so that any number of groups is allowed. The formula leaves out `off`, one
number per linear.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

from app.domain.methods import AbsmaxScheme, Scheme
from workers.numerics.quantized import CodebookWeight, QuantizedAbsmax
from workers.numerics.row_parts import CACHED, in_row_parts

OUTERMOST = 0.9677083
"""P of the module docstring."""

STACKED = 1 << 26
"""Weights of all configurations together that a GPU rounds at once."""

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The values of bitsandbytes; those of `quantiles` to 1.1e-7."""


@dataclass(frozen=True)
class DoubleQuantization:
    """Storage of a group's absmax in codes: b1 = `bits`, b2 = `dtype`, B1 = `superblock` of the module docstring."""

    bits: int
    dtype: torch.dtype
    superblock: int

    @classmethod
    def of(cls, absmax: AbsmaxScheme) -> "DoubleQuantization":
        return cls(absmax.bits, getattr(torch, absmax.dtype), absmax.superblock)


AbsmaxFormat = torch.dtype | DoubleQuantization
"""A floating-point dtype, or codes of its own."""


@lru_cache
def codebook(bits: int) -> Tensor:
    """The NormalFloat values of that width, ascending, fp32 (2^bits,) on the host."""
    return torch.tensor(NF4 if bits == 4 else quantiles(bits), dtype=torch.float32)


def quantiles(bits: int) -> list[float]:
    """c_0 .. c_(2^bits - 1) by the formula."""
    normal, half = NormalDist(), 2 ** (bits - 1)
    negative = [1 - OUTERMOST + (OUTERMOST - 0.5) * i / (half - 1) for i in range(half - 1)]
    positive = [0.5 + (OUTERMOST - 0.5) * i / half for i in range(half + 1)]
    return [normal.inv_cdf(p) / normal.inv_cdf(OUTERMOST) for p in (*negative, *positive)]


def quantize(weight: Tensor, scheme: Scheme, absmax: AbsmaxFormat, dtype: torch.dtype) -> CodebookWeight:
    """The weight (out, in), floating point, to the nearest NormalFloat values.

    scheme  bits 2 to 8, and a group size that divides `in`; symmetric
    absmax  storage of the groups' maxima
    dtype   of the dequantized weight
    """
    working = torch.promote_types(weight.dtype, torch.float32)

    def groups(rows: slice) -> Tensor:
        part = weight[rows].to(working)
        return part.reshape(part.shape[0], -1, scheme.width(weight.shape[1]))

    largest = in_row_parts(weight, lambda rows: groups(rows).abs().amax(-1))
    stored: Tensor | QuantizedAbsmax
    if isinstance(absmax, DoubleQuantization):
        stored = quantize_absmax(largest.float(), absmax)
        used = stored.dequantize()
    else:
        stored = used = largest.to(absmax)
    values = codebook(scheme.bits).to(weight.device)
    # A group whose stored maximum is 0 has only zeros, whatever its codes; 1 keeps the quotient finite.
    used = torch.where(used == 0, 1, used).to(working).unsqueeze(-1)
    codes = in_row_parts(weight, lambda rows: nearest_codes(groups(rows) / used[rows], values).flatten(1))
    return CodebookWeight(codes, values, stored, scheme, dtype)


def nearest_codes(values: Tensor, levels: Tensor) -> Tensor:
    """The index of the nearest of `levels` (ascending) for each value, uint8; the lower one at a midpoint."""
    edges = ((levels[1:] + levels[:-1]) / 2).to(values.dtype)
    return torch.bucketize(values, edges, out_int32=True).to(torch.uint8)


def quantize_absmax(absmax: Tensor, second_level: DoubleQuantization) -> QuantizedAbsmax:
    """Maxima of groups, fp32 (out, groups), in `second_level.bits` bits."""
    offset, top = absmax.min(), 2**second_level.bits - 1
    padded = _in_superblocks(absmax - offset, second_level.superblock)
    scale = padded.amax(-1).to(second_level.dtype)
    # All maxima of a superblock may be the least one; its codes are 0 then, whatever they are divided by.
    divisor = torch.where(scale == 0, 1, scale).float().unsqueeze(-1)
    codes = (padded / divisor * top).round().clamp(0, top).to(torch.uint8)
    return QuantizedAbsmax(
        codes.flatten()[: absmax.numel()].view(absmax.shape), scale, offset, second_level.bits, second_level.superblock
    )


def squared_errors(
    weight: Tensor, configurations: Sequence[tuple[Scheme, DoubleQuantization]], rows: Tensor, columns: Tensor
) -> Tensor:
    """|| rows * (W - W_hat) * columns ||^2 for each configuration, fp64 (configurations,); W is fp32 (out, in).

    W_hat is that of `quantize`. What configurations share is computed once: groups' maxima, superblocks' maxima, and
    per group size and width everything in one stack of configurations, cut where it would leave a CPU's caches.
    """
    errors = torch.empty(len(configurations), dtype=torch.float64, device=weight.device)
    widths = [scheme.width(weight.shape[1]) for scheme, _ in configurations]
    for width in dict.fromkeys(widths):
        groups = weight.reshape(len(weight), -1, width)
        alike = [index for index, other in enumerate(widths) if other == width]
        levels = list(dict.fromkeys(configurations[index][1] for index in alike))
        maxima = _stored_maxima(groups.abs().amax(-1), levels)
        for bits in dict.fromkeys(configurations[index][0].bits for index in alike):
            chosen = [index for index in alike if configurations[index][0].bits == bits]
            used = maxima[[levels.index(configurations[index][1]) for index in chosen]]
            errors[chosen] = _stacked_errors(groups, used, codebook(bits).to(weight.device), rows, columns)
    return errors


def _stored_maxima(largest: Tensor, levels: Sequence[DoubleQuantization]) -> Tensor:
    """`quantize_absmax` of fp32 maxima (out, groups) and back, for several second levels: (levels, out, groups)."""
    found, offset = torch.empty(len(levels), *largest.shape, device=largest.device), largest.min()
    for superblock in dict.fromkeys(level.superblock for level in levels):
        alike = [index for index, level in enumerate(levels) if level.superblock == superblock]
        tops = [float(2 ** levels[index].bits - 1) for index in alike]
        top, shares = largest.new_tensor([tops, [1 / each for each in tops]])[..., None, None]
        padded = _in_superblocks(largest - offset, superblock)
        widest = padded.amax(-1)
        scale = torch.stack([widest.to(levels[index].dtype).float() for index in alike]).unsqueeze(-1)
        codes = (padded / torch.where(scale == 0, 1, scale) * top).round().clamp(min=0)
        values = torch.minimum(codes, top) * scale * shares + offset
        found[alike] = values.flatten(1)[:, : largest.numel()].view(-1, *largest.shape)
    return found


def _stacked_errors(groups: Tensor, maxima: Tensor, levels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Squared errors (configurations,) of groups (out, groups, width) by their stored maxima (configurations, out,
    groups)."""
    at_once = max(1, (CACHED if groups.device.type == "cpu" else STACKED) // groups.numel())
    return torch.cat([_squares(groups, part, levels, rows, columns) for part in torch.split(maxima, at_once)])


def _squares(groups: Tensor, maxima: Tensor, levels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    maxima = maxima.unsqueeze(-1)
    codes = nearest_codes(groups / torch.where(maxima == 0, 1, maxima), levels).int()
    difference = groups - levels.index_select(0, codes.flatten()).view(codes.shape) * maxima
    return (rows[:, None] * difference.flatten(2) * columns).square().sum((1, 2), dtype=torch.float64)


def _in_superblocks(values: Tensor, superblock: int) -> Tensor:
    """(superblocks, superblock), row after row, with zeros where the last one is not full."""
    flat = values.flatten()
    return torch.nn.functional.pad(flat, (0, -len(flat) % superblock)).view(-1, superblock)


def bits_per_weight(bits: int, group_size: int, absmax: AbsmaxFormat) -> float:
    """Bits per weight with its share of the maxima; `group_size` in columns. The codebook and `off` are left out."""
    if isinstance(absmax, DoubleQuantization):
        return bits + absmax.bits / group_size + absmax.dtype.itemsize * 8 / (group_size * absmax.superblock)
    return bits + absmax.itemsize * 8 / group_size
