"""FP8 weights with scales by tensor, by row or by block: `quant_method` fp8 and fbgemm_fp8.

    name        F8_E4M3 or F8_E5M2 (out, in) or (experts, out, in)
    name + _scale_inv | _scale, or `.scale` in place of `.weight`
                one number; or (out, 1) or (out,); or (ceil(out / rows), ceil(in / columns)) of the configured block,
                F32, BF16, F16, or exponents with the bias 127 (F8_E8M0, U8)

W = code * scale, although DeepSeek calls the scale an inverse. The last blocks of rows and columns may be partial, so
that the size of a block cannot be learned from the grid: it is the configuration's. Read in transformers 5.23
(`integrations/finegrained_fp8.py`) and compressed-tensors 0.20 (`converters/fp8block_dequantizer.py`).
"""

from collections.abc import Iterator
from math import prod

from app.domain.inputs.quantized.stored import (
    FLOATS,
    QuantizedTensor,
    Reading,
    Stored,
    ceil_div,
    corrupt,
    demand_dtype,
    whole,
)

CODES = frozenset({"F8_E4M3", "F8_E5M2"})
EXPONENTS = frozenset({"F8_E8M0", "U8"})
MOST_SIDE = 1 << 16


def weights(reading: Reading) -> Iterator[QuantizedTensor]:
    """The weights of a checkpoint.

    Raises:
        CorruptCheckpoint: a weight has no scale, or one that does not fit.
    """
    sides = block_sides(reading.settings.get("weight_block_size"))
    for name, entry in reading.entries.items():
        if entry.dtype in CODES:
            scale = scale_name(reading, name)
            yield scaled(name, entry, scale, reading.part(scale, name), sides)


def block_sides(given: object) -> tuple[int, int] | None:
    """Rows and columns of a block, as configurations write them.

    Raises:
        CorruptCheckpoint: not two whole numbers.
    """
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != 2:
        raise corrupt("quantization_config", f"has blocks of the size {given!r}; it must be two whole numbers")
    rows, columns = (whole(side, "quantization_config's block", 1, MOST_SIDE) for side in given)
    return rows, columns


def scale_name(reading: Reading, name: str) -> str:
    """The stored name of a weight's scale.

    Raises:
        CorruptCheckpoint: there is none.
    """
    for scale in (f"{name}_scale_inv", f"{name}_scale", name.removesuffix(".weight") + ".scale"):
        if scale != name and scale in reading.entries:
            return scale
    raise corrupt(name, "is an FP8 weight without scales")


def scaled(name: str, entry: Stored, scale: str, grid: Stored, sides: tuple[int, int] | None) -> QuantizedTensor:
    """A weight whose codes are numbers, with the scale that multiplies them.

    Raises:
        CorruptCheckpoint: the scale's dtype or shape does not fit.
    """
    demand_dtype(scale, grid, FLOATS | EXPONENTS)
    if len(entry.shape) not in (2, 3) or 0 in entry.shape:
        raise corrupt(name, f"has the shape {entry.shape}; a quantized weight has two or three dimensions")
    *experts, rows, columns = entry.shape
    block = _block(tuple(experts), rows, columns, grid.shape, sides)
    if block is None:
        sizes = "no block size is configured" if sides is None else f"blocks are {sides[0]} x {sides[1]}"
        raise corrupt(scale, f"has the shape {grid.shape}, which scales no weight of shape {entry.shape}; {sizes}")
    numbers = {"rows": block[0], "columns": block[1], "exponents": float(grid.dtype in EXPONENTS)}
    return QuantizedTensor(name, entry.shape, "scaled", {"codes": name, "scale": scale}, numbers)


def _block(
    experts: tuple[int, ...], rows: int, columns: int, grid: tuple[int, ...], sides: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None if the grid fits no way of sharing."""
    if prod(grid) == 1 or (experts and grid in (experts, (*experts, 1), (*experts, 1, 1))):
        return rows, columns
    if sides is not None and grid == (*experts, ceil_div(rows, sides[0]), ceil_div(columns, sides[1])):
        return sides
    return (1, columns) if grid in ((*experts, rows, 1), (*experts, rows)) else None
