"""Small floating-point types as tables of their values: E4M3 (8 bits) and E2M1 (4 bits).

E4M3 is torch's `float8_e4m3fn` (largest 448, no infinities; OCP 8-bit Floating Point Specification 1.0). E2M1 has sign,
two bits of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 (OCP Microscaling Formats 1.0, section 5.3.3).
Rounding is to the nearest value, ties to an even mantissa, which for E2M1 is the even index; what is larger than the
largest value becomes that.
"""

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from app.domain.methods import Scheme
from app.domain.methods.named_schemes import Element

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MANTISSA_BITS, SMALLEST_EXPONENT = {Element.E4M3: 3, Element.E2M1: 1}, {Element.E4M3: -6, Element.E2M1: 0}
"""Bits after the leading one of a normal number, and the exponent of the smallest one."""
LAST_INDEX = {Element.E4M3: 126, Element.E2M1: 7}
"""Index of the largest value, counted from 0 at 0."""
LARGEST = {Element.E4M3: 448.0, Element.E2M1: 6.0}
SIGN = 8
"""Bit of an E2M1 code."""


def element_of(scheme: Scheme) -> Element:
    """The type of the codes of a scheme by name."""
    if scheme.row is None:
        raise ValueError(f"{scheme} goes by no name")
    return scheme.row.element


def element_table(scheme: Scheme, device: torch.device) -> Tensor:
    """The value of every code, fp32 (2^bits,)."""
    return _table(element_of(scheme), device)


@cache
def _table(element: Element, device: torch.device) -> Tensor:
    if element is Element.E4M3:
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)
    magnitudes = torch.tensor(E2M1_MAGNITUDES)
    return torch.cat([magnitudes, -magnitudes]).to(device)


def encode(values: Tensor, element: Element) -> Tensor:
    """Codes, uint8, of floating-point numbers of any shape that are scaled already."""
    if element is Element.E4M3:
        return values.float().clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    magnitude = values.abs()
    # Midpoints between neighbours; a tie goes down to an even index, and up from an odd one.
    index = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for lower, (low, high) in enumerate(pairwise(E2M1_MAGNITUDES)):
        middle = (low + high) / 2
        index += (magnitude > middle) if lower % 2 == 0 else (magnitude >= middle)
    return torch.where(torch.signbit(values), index | SIGN, index)


def to_index(values: Tensor, element: Element) -> Tensor:
    """u of every value, in its dtype: the piecewise linear map through u(k-th value) = k, odd, on past the largest.

    So a cast to nearest is a rounding of u to nearest, ties to even included: `round_to_index(x) = round(u(x))`. With M
    bits of mantissa, e = floor(log2 |x|) or the least exponent: u = 2^M * (e - least + |x| / 2^e); for 0 that is 0.
    """
    magnitude = values.abs()
    if element is Element.E2M1:  # concave: the least of its three lines
        index = torch.minimum(torch.minimum(2 * magnitude, magnitude + 2), magnitude / 2 + 4)
        return torch.copysign(index, values)
    least, steps = SMALLEST_EXPONENT[element], 1 << MANTISSA_BITS[element]
    exponent = torch.frexp(magnitude.clamp(min=2.0**least)).exponent - 1
    return torch.copysign(steps * (exponent - least + torch.ldexp(magnitude, -exponent)), values)


def from_index(index: Tensor, element: Element) -> Tensor:
    """The values of whole signed indices in a floating-point dtype, in that dtype."""
    magnitude = index.abs()
    if element is Element.E2M1:  # convex: the largest of its three lines
        value = torch.maximum(torch.maximum(magnitude / 2, magnitude - 2), 2 * magnitude - 8)
        return torch.copysign(value, index)
    least, steps = SMALLEST_EXPONENT[element], 1 << MANTISSA_BITS[element]
    above = (magnitude / steps).floor().clamp(min=1) - 1
    value = (magnitude / steps - above) * torch.exp2(above + least)
    return torch.copysign(value, index)


def rounded(values: Tensor, element: Element) -> Tensor:
    """The nearest values of the element, ties to an even mantissa, in the dtype given; larger ones become the largest.

    The same as `encode` and its table, in fewer passes.
    """
    if element is Element.E4M3:
        return values.clamp(-448, 448).float().to(torch.float8_e4m3fn).to(values.dtype)
    return from_index(to_index(values, element).round_().clamp_(-7, 7), element)


def code_of_index(index: Tensor, element: Element) -> Tensor:
    """Codes, uint8, of whole signed indices within the element's; 0 has no sign."""
    magnitude = index.abs().to(torch.uint8)
    sign = SIGN if element is Element.E2M1 else 0x80
    return torch.where(index < 0, magnitude | sign, magnitude)
