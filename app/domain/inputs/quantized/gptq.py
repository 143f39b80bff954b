"""GPTQ's packed weights: `quant_method` gptq, `checkpoint_format` gptq or gptq_v2.

    module.qweight   I32 (in * bits / 32, out)      codes of a column, packed along the inputs, lowest bits first
    module.qzeros    I32 (groups, out * bits / 32)  zero points, packed along the outputs; in the first format less one
    module.scales    F16 (groups, out)
    module.g_idx     I32 (in,)                      group of each input; absent: inputs in order

W[o, i] = scale[g, o] * (code - zero), with g the group of the input i. Three bits fill words without a gap: 32 codes in
3 words. Read in GPTQModel 7.7 (`nn_modules/qlinear`, `utils/model.py`).
"""

from collections.abc import Iterator, Mapping

from app.domain.inputs.quantized.stored import (
    FLOATS,
    QuantizedTensor,
    Reading,
    ceil_div,
    corrupt,
    demand_dtype,
    demand_shape,
    matrix,
)
from bitwright.errors import UnsupportedCheckpoint

BITS = (2, 3, 4, 8)
MOST_GROUP = 1 << 20
DEQUANTIZE = "dequantize it with GPTQModel and save it in bfloat16, or give the model that it was made from"


def weights(reading: Reading) -> Iterator[QuantizedTensor]:
    """The weights of a checkpoint.

    Raises:
        CorruptCheckpoint: parts are missing or do not fit.
        UnsupportedCheckpoint: widths that no file of this format has, or that differ by module.
    """
    bits = reading.number("bits", 1, 32)
    group = reading.number("group_size", -1, MOST_GROUP)
    first = _is_first_format(reading.settings)
    if bits not in BITS:
        raise _unread(f"{bits} bits", bits)
    if reading.settings.get("dynamic"):
        raise _unread("settings that differ by module (dynamic)", "dynamic")
    for name in reading.entries:
        if name.endswith(".qweight"):
            yield _weight(reading, name.removesuffix(".qweight"), bits, group, first=first)


def _is_first_format(settings: Mapping[str, object]) -> bool:
    """True if stored zero points are one less than they mean."""
    named = settings.get("checkpoint_format", "gptq")
    if named not in ("gptq", "gptq_v2"):
        raise _unread(f"the checkpoint_format {named!r}", named)
    return named == "gptq"


def _unread(what: str, value: object) -> UnsupportedCheckpoint:
    read = f"read are {', '.join(map(str, BITS))} bits, of one width, in the formats gptq and gptq_v2"
    return UnsupportedCheckpoint(
        f"the checkpoint is GPTQ with {what}; {read}", field="model", value=value, hint=DEQUANTIZE
    )


def _weight(reading: Reading, module: str, bits: int, group: int, *, first: bool) -> QuantizedTensor:
    names = {"codes": f"{module}.qweight", "zeros": f"{module}.qzeros", "scale": f"{module}.scales"}
    codes, zeros, scale = (reading.part(name, names["codes"]) for name in names.values())
    words, out = matrix(names["codes"], codes)
    inputs = words * 32 // bits
    if words * 32 % bits:
        raise corrupt(names["codes"], f"has {words} rows of words, which {bits}-bit codes do not fill")
    groups = 1 if group < 1 else ceil_div(inputs, group)
    demand_dtype(names["codes"], codes, {"I32"})
    demand_dtype(names["zeros"], zeros, {"I32"})
    demand_dtype(names["scale"], scale, FLOATS)
    demand_shape(names["scale"], scale, (groups, out), f"{names['codes']} in groups of {group}")
    demand_shape(names["zeros"], zeros, (groups, ceil_div(out * bits, 32)), names["codes"])
    order = f"{module}.g_idx"
    if order in reading.entries:
        demand_dtype(order, reading.entries[order], {"I32", "I64"})
        demand_shape(order, reading.entries[order], (inputs,), names["codes"])
        names["order"] = order
    elif reading.settings.get("desc_act"):
        raise corrupt(names["codes"], f"has no {order} beside it, and quantization_config says desc_act")
    numbers = {"bits": bits, "group": inputs if group < 1 else group, "groups": groups, "zero": int(first)}
    return QuantizedTensor(f"{module}.weight", (out, inputs), "gptq", names, numbers)
