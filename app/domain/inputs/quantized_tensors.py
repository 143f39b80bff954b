"""Tensors that only a quantized checkpoint has, recognized by name and dtype, whatever its config.json says.

Where a config.json says how they are quantized, `app.domain.inputs.quantized` reads them; what is left over, or in a
checkpoint whose config.json is silent, is refused by these names.
"""

from collections.abc import Iterable

SUFFIXES = {
    ".qweight": "GPTQ's or AWQ's packed weights",
    ".qzeros": "GPTQ's or AWQ's packed zero points",
    ".weight_packed": "compressed-tensors' packed weights",
    ".weight_scale": "scales of weights that are quantized",
    ".weight_scale_inv": "scales of FP8 weights",
    ".SCB": "bitsandbytes' int8 scales",
    ".absmax": "bitsandbytes' 4-bit maxima",
    ".quant_map": "bitsandbytes' 4-bit codebook",
}
NARROW = ("F8", "F4", "I8", "U8")
"""Beginnings of dtypes that no weight is trained in."""
HINT = (
    "start from the model's 16-bit checkpoint; where there is none, dequantize it with the library that made it "
    "and save the result in bfloat16"
)


def quantized_tensor(tensors: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    """The first of (name, safetensors dtype) that says that weights are quantized, and what it is."""
    for name, dtype in tensors:
        for suffix, what in SUFFIXES.items():
            if name.endswith(suffix):
                return name, what
        if name.endswith(".weight") and dtype.startswith(NARROW):
            return name, "an FP8 weight" if dtype.startswith("F8") else f"a weight of the dtype {dtype}"
    return None
