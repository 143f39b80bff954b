"""AWQ's packed weights in the GEMM layout: `quant_method` awq.

    module.qweight   I32 (in, out / 8)       eight outputs a word, from the lowest bits 0, 2, 4, 6, 1, 3, 5, 7
    module.qzeros    I32 (groups, out / 8)   zero points, likewise; absent: 8
    module.scales    F16 (groups, out)

W[o, i] = scale[g, o] * (code - zero). Read in compressed-tensors 0.20 (`converters/autoawq.py`).
"""

from collections.abc import Iterator

from app.domain.inputs.quantized.stored import (
    FLOATS,
    QuantizedTensor,
    Reading,
    ceil_div,
    demand_dtype,
    demand_shape,
    matrix,
)
from bitwright.errors import UnsupportedCheckpoint

BITS, IN_A_WORD, MOST_GROUP = 4, 8, 1 << 20


def weights(reading: Reading) -> Iterator[QuantizedTensor]:
    """The weights of a checkpoint.

    Raises:
        CorruptCheckpoint: parts are missing or do not fit.
        UnsupportedCheckpoint: another width or layout.
    """
    settings = reading.settings
    bits, group = reading.number("bits", 1, 32), reading.number("group_size", -1, MOST_GROUP)
    layout, backend = str(settings.get("version", "gemm")).lower(), settings.get("backend", "autoawq")
    if bits != BITS or layout != "gemm" or backend != "autoawq":
        detail = f"the checkpoint is AWQ of {bits} bits in the layout {layout!r} of {backend}; read are 4 bits, gemm"
        hint = "give the model that it was made from, or the checkpoint saved with version gemm"
        raise UnsupportedCheckpoint(detail, field="model", value=layout, hint=hint)
    for name in reading.entries:
        if name.endswith(".qweight"):
            yield _weight(reading, name.removesuffix(".qweight"), group)


def _weight(reading: Reading, module: str, group: int) -> QuantizedTensor:
    names = {"codes": f"{module}.qweight", "scale": f"{module}.scales"}
    codes, scale = (reading.part(name, names["codes"]) for name in names.values())
    inputs, words = matrix(names["codes"], codes)
    out, groups = words * IN_A_WORD, 1 if group < 1 else ceil_div(inputs, group)
    demand_dtype(names["codes"], codes, {"I32"})
    demand_dtype(names["scale"], scale, FLOATS)
    demand_shape(names["scale"], scale, (groups, out), f"{names['codes']} in groups of {group}")
    if reading.settings.get("zero_point", True):
        names["zeros"] = f"{module}.qzeros"
        zeros = reading.part(names["zeros"], names["codes"])
        demand_dtype(names["zeros"], zeros, {"I32"})
        demand_shape(names["zeros"], zeros, (groups, words), names["codes"])
    numbers = {"bits": BITS, "group": inputs if group < 1 else group, "groups": groups}
    return QuantizedTensor(f"{module}.weight", (out, inputs), "awq", names, numbers)
