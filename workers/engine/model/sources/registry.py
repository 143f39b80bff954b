"""From the stored tensors of a quantized weight to the weight: one pure function for each arithmetic."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor

from app.domain.inputs.quantized.stored import QuantizedTensor
from workers.engine.model.sources import bitsandbytes, floats, groups

Parts = Mapping[str, Tensor]
DEQUANTIZERS: Mapping[str, Callable[[Parts, QuantizedTensor], Tensor]] = MappingProxyType(
    {
        "scaled": floats.scaled,
        "mxfp4": floats.mxfp4,
        "mxfp4_rows": floats.mxfp4_rows,
        "nvfp4": floats.nvfp4,
        "naive": groups.naive,
        "packed": groups.packed,
        "decompressed": groups.decompressed,
        "gptq": groups.gptq,
        "awq": groups.awq,
        "bitsandbytes_4bit": bitsandbytes.four_bits,
        "bitsandbytes_int8": bitsandbytes.eight_bits,
    }
)
"""`QuantizedTensor.kind` -> its parts by role, and the weight -> fp32 in the weight's shape."""
