"""bitsandbytes' weights: 4 bits by a codebook, or 8 bits by row. `quant_method` bitsandbytes.

    name                    U8 (ceil(n / 2), 1)   two codes a byte, the first in the high half, row after row
    name.quant_state.bitsandbytes__nf4 | __fp4   U8, JSON: shape, blocksize, and of a nested absmax the offset
    name.quant_map          F32 (16,)             the codebook
    name.absmax             F32 (blocks,), or U8 with
    name.nested_absmax      F32 (blocks of blocks,) and name.nested_quant_map F32 (256,)

    module.weight           I8 (out, in), with module.SCB F32 (out,): W = code * SCB / 127

Read in bitsandbytes 0.50 (`functional.py`, `nn/modules.py`).
"""

import json
import math
from collections.abc import Iterator, Mapping
from math import prod

from app.domain.inputs.quantized.stored import (
    QuantizedTensor,
    Reading,
    ceil_div,
    corrupt,
    demand_dtype,
    demand_shape,
    matrix,
    whole,
)

STATE = ".quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
STORAGE = {"U8": 1, "BF16": 2, "F16": 2, "F32": 4}
"""Dtypes that the bytes of codes are stored as (`bnb_4bit_quant_storage`), and bytes of each."""
MOST_BLOCK, MOST_SIDE = 1 << 16, 1 << 24


def weights(reading: Reading) -> Iterator[QuantizedTensor]:
    """The weights of a checkpoint.

    Raises:
        CorruptCheckpoint: parts are missing or do not fit.
    """
    for name, entry in reading.entries.items():
        owner, state, kind = name.partition(STATE)
        if state and kind in KINDS:
            yield _four_bits(reading, owner, name)
        elif name.endswith(".SCB"):
            module = name.removesuffix(".SCB")
            codes = reading.part(f"{module}.weight", name)
            rows, _ = matrix(f"{module}.weight", codes)
            demand_dtype(f"{module}.weight", codes, {"I8"})
            demand_dtype(name, entry, {"F32"})
            demand_shape(name, entry, (rows,), f"{module}.weight")
            yield QuantizedTensor(
                f"{module}.weight", codes.shape, "bitsandbytes_int8", {"codes": f"{module}.weight", "scale": name}
            )


def _four_bits(reading: Reading, name: str, state_name: str) -> QuantizedTensor:
    state = _state(reading, state_name)
    shape = _shape(state_name, state)
    block = whole(state.get("blocksize"), f"{state_name}'s blocksize", 1, MOST_BLOCK)
    names = {"codes": name, "codebook": f"{name}.quant_map", "absmax": f"{name}.absmax"}
    codes, codebook, absmax = (reading.part(part, state_name) for part in names.values())
    demand_dtype(name, codes, STORAGE.keys())
    stored, needed = prod(codes.shape) * STORAGE[codes.dtype], ceil_div(prod(shape), 2)
    if not needed <= stored < needed + STORAGE[codes.dtype]:
        raise corrupt(name, f"has {stored} bytes; a weight of shape {shape} has {needed}")
    demand_dtype(names["codebook"], codebook, {"F32"})
    demand_shape(names["codebook"], codebook, (16,), name)
    blocks = ceil_div(prod(shape), block)
    numbers: dict[str, float] = {"block": block}
    demand_shape(names["absmax"], absmax, (blocks,), f"{name} in blocks of {block}")
    if absmax.dtype == "U8":
        names |= {"nested_absmax": f"{name}.nested_absmax", "nested_codebook": f"{name}.nested_quant_map"}
        numbers |= _nested(reading, names, state_name, state, blocks)
    else:
        demand_dtype(names["absmax"], absmax, {"F32"})
    return QuantizedTensor(name, shape, "bitsandbytes_4bit", names, numbers)


def _nested(
    reading: Reading, names: Mapping[str, str], state_name: str, state: Mapping[str, object], blocks: int
) -> dict[str, float]:
    block = whole(state.get("nested_blocksize"), f"{state_name}'s nested_blocksize", 1, MOST_BLOCK)
    offset = state.get("nested_offset", 0.0)
    if isinstance(offset, bool) or not isinstance(offset, int | float) or not math.isfinite(offset):
        raise corrupt(state_name, f"has nested_offset = {offset!r}; it must be a finite number")
    for role, shape in (("nested_absmax", (ceil_div(blocks, block),)), ("nested_codebook", (256,))):
        entry = reading.part(names[role], state_name)
        demand_dtype(names[role], entry, {"F32"})
        demand_shape(names[role], entry, shape, names["absmax"])
    return {"nested_block": block, "offset": float(offset)}


def _state(reading: Reading, name: str) -> Mapping[str, object]:
    demand_dtype(name, reading.entries[name], {"U8"})
    try:
        state = json.loads(reading.content(name))
    except (ValueError, RecursionError) as error:
        raise corrupt(name, f"is not JSON: {error}") from error
    if not isinstance(state, dict):
        raise corrupt(name, "is no JSON object")
    return state


def _shape(name: str, state: Mapping[str, object]) -> tuple[int, ...]:
    given = state.get("shape")
    if not isinstance(given, list) or len(given) not in (1, 2, 3):
        raise corrupt(name, f"has shape = {given!r}; it must be a list of sides")
    return tuple(whole(side, f"{name}'s shape", 1, MOST_SIDE) for side in given)
