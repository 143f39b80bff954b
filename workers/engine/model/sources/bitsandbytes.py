"""bitsandbytes' weights to fp32: 4-bit codes of a codebook with absmax by block, and 8-bit codes with maxima by row.

Read in bitsandbytes 0.50 (`functional.py`, `backends/default/ops.py`).
"""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor

from app.domain.inputs.quantized.stored import QuantizedTensor


def four_bits(parts: Mapping[str, Tensor], weight: QuantizedTensor) -> Tensor:
    """codebook[code] * absmax of its block, row after row; the first code of a byte is in its high half.

    A nested absmax is nested_codebook[absmax] * nested_absmax of its block, plus an offset.
    """
    count, block = prod(weight.shape), weight.number("block")
    octets = parts["codes"].flatten().view(torch.uint8)
    codes = torch.stack((octets >> 4, octets & 15), dim=-1).flatten()[:count]
    absmax = parts["absmax"]
    if "nested_absmax" in parts:
        nested = parts["nested_absmax"].repeat_interleave(weight.number("nested_block"))[: len(absmax)]
        absmax = parts["nested_codebook"][absmax.int()] * nested + weight.numbers["offset"]
    scale = absmax.repeat_interleave(block)[:count]
    return (parts["codebook"][codes.int()] * scale).view(weight.shape)


def eight_bits(parts: Mapping[str, Tensor], weight: QuantizedTensor) -> Tensor:  # noqa: ARG001 - codes have its shape
    """code * maximum of the row / 127."""
    return parts["codes"].float() * parts["scale"].float().unsqueeze(1) * (1 / 127)
