"""compressed-tensors' weights: `quant_method` compressed-tensors.

    pack-quantized        weight_packed I32 (out, ceil(in * bits / 32)), weight_scale, weight_shape I64 (2,), and
                          weight_zero_point I32 (ceil(out * bits / 32), groups) where it is asymmetric
    int-, naive- and float-quantized
                          weight I8 or F8 (out, in), weight_scale, and weight_zero_point I8 where it is asymmetric
    nvfp4-pack-quantized  weight_packed U8 (out, in / 2), weight_scale F8_E4M3 (out, in / 16), weight_global_scale F32
    mxfp4-pack-quantized  weight_packed U8 (out, in / 2), weight_scale U8 (out, in / 32)
    mxfp8-quantized       weight F8_E4M3 (out, in), weight_scale U8 (out, in / 32)

Packed codes are those of the signed integers plus 2^(bits - 1). weight_scale has one number, one a row, (out, groups),
or one a block; weight_g_idx I32 (in,) is the group of each input where they are not in order. Which settings are a
module's, `config_groups` say by name, pattern or class. Read in compressed-tensors 0.20 (`compressors/`).

A model that transformers has run is saved with the weights that its codes meant, F16 to F32, beside scales that say
nothing any more: `quantization_status` is "decompressed", and `format` still the packed one's. In other states a float
beside a scale is not rounded yet, and the model rounds it each time that it runs.
"""

import re
from collections.abc import Iterator, Mapping
from math import prod

from app.domain.inputs.quantized import fp8
from app.domain.inputs.quantized.stored import (
    FLOATS,
    QuantizedTensor,
    Reading,
    Stored,
    ceil_div,
    corrupt,
    demand_dtype,
    demand_shape,
    matrix,
    whole,
)
from bitwright.errors import UnsupportedCheckpoint

READ = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
    "dense",
)
DECOMPRESSED = "decompressed"
"""`quantization_status` of rounded weights, and the kind of a weight that is stored so."""
MOST_GROUP, MOST_PATTERN = 1 << 20, 1000
NVFP4_GROUP, MX_GROUP = 16, 32

Settings = Mapping[str, object]


def weights(reading: Reading) -> Iterator[QuantizedTensor]:
    """The weights of a checkpoint.

    Raises:
        CorruptCheckpoint: parts are missing, do not fit, or have no settings.
        UnsupportedCheckpoint: a format that is not read, or weights that are not rounded yet.
    """
    groups = _groups(reading.settings)
    for name, entry in reading.entries.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            yield _packed(reading, module, entry, _of(module, groups))
        elif leaf == "weight" and f"{module}.weight_scale" in reading.entries:
            if entry.dtype in FLOATS:
                yield _decompressed(reading, name, entry)
                continue
            yield _naive(reading, module, entry, _of(module, groups))


def _groups(settings: Settings) -> list[tuple[list[str], Settings, str]]:
    """Targets, settings of weights and format of each group."""
    named = settings.get("config_groups")
    if not isinstance(named, Mapping) or not named:
        raise corrupt("quantization_config", "has no config_groups")
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise _unread(str(sparsity["format"]))
    found = []
    for group in named.values():
        weight = group.get("weights") if isinstance(group, Mapping) else None
        kind = str((group.get("format") if isinstance(group, Mapping) else None) or settings.get("format") or "dense")
        targets = group.get("targets") if isinstance(group, Mapping) else None
        if kind not in READ:
            raise _unread(kind)
        if isinstance(weight, Mapping) and isinstance(targets, list) and all(isinstance(t, str) for t in targets):
            found.append((targets, weight, kind))
    if not found:
        raise corrupt("quantization_config", "has no config_groups with targets and weights")
    return found


def _unread(kind: str) -> UnsupportedCheckpoint:
    detail = f"the checkpoint is compressed-tensors' {kind}; read are {', '.join(READ[:-2])}"
    hint = "give the model that it was made from, or dequantize it with compressed-tensors and save it in bfloat16"
    return UnsupportedCheckpoint(detail, field="model", value=kind, hint=hint)


def _of(module: str, groups: list[tuple[list[str], Settings, str]]) -> tuple[Settings, str]:
    """The settings of a module: a group that names it goes before one with a pattern, and that before one of classes.

    Raises:
        CorruptCheckpoint: no group is the module's.
    """
    for fits in (_is_named, _is_matched, _is_class):
        for targets, weight, kind in groups:
            if any(fits(target, module) for target in targets):
                return weight, kind
    raise corrupt(module, "is quantized, and no group of quantization_config targets it")


def _is_named(target: str, module: str) -> bool:
    return target == module or module.endswith(f".{target}")


def _is_matched(target: str, module: str) -> bool:
    if not target.startswith("re:") or len(target) > MOST_PATTERN:
        return False
    try:
        return re.match(target.removeprefix("re:"), module) is not None
    except (re.error, RecursionError) as error:
        raise corrupt("quantization_config", f"has the pattern {target!r}: {error}") from error


def _is_class(target: str, module: str) -> bool:  # noqa: ARG001 - a class says nothing of names
    return target.isidentifier() and target[:1].isupper()


def _packed(reading: Reading, module: str, entry: Stored, of: tuple[Settings, str]) -> QuantizedTensor:
    name = f"{module}.weight_packed"
    rows, columns = matrix(name, entry)
    if entry.dtype == "U8":
        return _four_bit_floats(reading, module, rows, columns * 2)
    demand_dtype(name, entry, {"I32"})
    bits = whole(of[0].get("num_bits"), "quantization_config's num_bits", 1, 8)
    shape = _shape(reading, module, rows)
    if shape[0] != rows or ceil_div(shape[1] * bits, 32) != columns:
        raise corrupt(name, f"has the shape {entry.shape}, which holds no weight of shape {shape} in {bits} bits")
    names = {"codes": name}
    numbers = _grouping(reading, module, shape, of[0], names) | {"bits": bits}
    if f"{module}.weight_zero_point" in reading.entries:
        names["zeros"] = f"{module}.weight_zero_point"
        zeros = reading.entries[names["zeros"]]
        demand_dtype(names["zeros"], zeros, {"I32"})
        demand_shape(names["zeros"], zeros, (ceil_div(rows * bits, 32), int(numbers["groups"])), name)
    elif of[0].get("symmetric") is False:
        raise corrupt(name, "has no weight_zero_point beside it, and quantization_config says it is asymmetric")
    return QuantizedTensor(f"{module}.weight", shape, "packed", names, numbers)


def _shape(reading: Reading, module: str, rows: int) -> tuple[int, int]:
    name = f"{module}.weight_shape"
    entry = reading.part(name, f"{module}.weight_packed")
    demand_dtype(name, entry, {"I64", "I32"})
    demand_shape(name, entry, (2,), "a matrix")
    content = reading.content(name)
    side = len(content) // 2
    first, second = (int.from_bytes(content[i * side :][:side], "little", signed=True) for i in range(2))
    return whole(first, name, rows, rows), whole(second, name, 1, 1 << 24)


def _grouping(
    reading: Reading, module: str, shape: tuple[int, int], weight: Settings, names: dict[str, str]
) -> dict[str, float]:
    """Number of inputs that share a scale; adds the scale, and the order of groups, to the parts."""
    name = f"{module}.weight_scale"
    scale, (rows, columns) = reading.part(name, f"{module}.weight"), shape
    demand_dtype(name, scale, FLOATS)
    names["scale"] = name
    if prod(scale.shape) == 1 or scale.shape in ((rows,), (rows, 1)):
        return {"group": columns, "groups": 1}
    group = whole(weight.get("group_size"), "quantization_config's group_size", 1, MOST_GROUP)
    demand_shape(name, scale, (rows, ceil_div(columns, group)), f"{module}.weight in groups of {group}")
    order = f"{module}.weight_g_idx"
    if order in reading.entries:
        demand_dtype(order, reading.entries[order], {"I32", "I64"})
        demand_shape(order, reading.entries[order], (columns,), f"{module}.weight")
        names["order"] = order
    return {"group": group, "groups": ceil_div(columns, group)}


def _four_bit_floats(reading: Reading, module: str, rows: int, columns: int) -> QuantizedTensor:
    names = {"codes": f"{module}.weight_packed", "scale": f"{module}.weight_scale"}
    scale = reading.part(names["scale"], names["codes"])
    demand_dtype(names["scale"], scale, {"F8_E4M3", "U8"})
    group = NVFP4_GROUP if scale.dtype == "F8_E4M3" else MX_GROUP
    demand_shape(names["scale"], scale, (rows, ceil_div(columns, group)), f"{names['codes']} in groups of {group}")
    if group == NVFP4_GROUP:
        names["global_scale"] = f"{module}.weight_global_scale"
        single = reading.part(names["global_scale"], names["codes"])
        demand_dtype(names["global_scale"], single, FLOATS)
        if prod(single.shape) != 1:
            raise corrupt(names["global_scale"], f"has the shape {single.shape}; it must be one number")
    kind = "nvfp4" if group == NVFP4_GROUP else "mxfp4_rows"
    return QuantizedTensor(f"{module}.weight", (rows, columns), kind, names, {"group": group})


def _decompressed(reading: Reading, name: str, entry: Stored) -> QuantizedTensor:
    """A weight that is stored as it is, beside scales that are not applied to it again."""
    status = reading.settings.get("quantization_status")
    if status != DECOMPRESSED:
        detail = f"{name} is {entry.dtype} beside a scale and not rounded yet: quantization_status is {status!r}"
        hint = "save it compressed by the library that made it, or give the model that it was made from"
        raise UnsupportedCheckpoint(detail, field="model", value=status, hint=hint)
    return QuantizedTensor(name, entry.shape, DECOMPRESSED, {"weight": name})


def _naive(reading: Reading, module: str, entry: Stored, of: tuple[Settings, str]) -> QuantizedTensor:
    name, scale_name = f"{module}.weight", f"{module}.weight_scale"
    demand_dtype(name, entry, {"I8", *fp8.CODES})
    scale = reading.entries[scale_name]
    if of[0].get("strategy") == "block" or len(entry.shape) == 3:
        return fp8.scaled(name, entry, scale_name, scale, fp8.block_sides(of[0].get("block_structure")))
    shape = matrix(name, entry)
    if scale.dtype in fp8.EXPONENTS:
        demand_shape(scale_name, scale, (shape[0], ceil_div(shape[1], MX_GROUP)), name)
        exponents = {"rows": 1, "columns": MX_GROUP, "exponents": 1}
        return QuantizedTensor(name, shape, "scaled", {"codes": name, "scale": scale_name}, exponents)
    names = {"codes": name}
    numbers = _grouping(reading, module, shape, of[0], names)
    if f"{module}.weight_zero_point" in reading.entries:
        names["zeros"] = f"{module}.weight_zero_point"
        demand_shape(names["zeros"], reading.entries[names["zeros"]], scale.shape, scale_name)
        demand_dtype(names["zeros"], reading.entries[names["zeros"]], {entry.dtype, "I8"})
    return QuantizedTensor(name, shape, "naive", names, numbers)
