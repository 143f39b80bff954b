"""MXFP4 experts as gpt-oss stores them: `quant_method` mxfp4.

    name_blocks   U8 (experts, rows, groups, 16)   two codes a byte, the first in the low half
    name_scales   U8 (experts, rows, groups)       exponents with the bias 127

The parameter `name` is transposed: (experts, groups * 32, rows). Read in transformers 5.23 (`integrations/mxfp4.py`).
"""

from collections.abc import Iterator

from app.domain.inputs.quantized.stored import QuantizedTensor, Reading, corrupt, demand_dtype, demand_shape

BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32


def weights(reading: Reading) -> Iterator[QuantizedTensor]:
    """The weights of a checkpoint.

    Raises:
        CorruptCheckpoint: blocks and scales do not fit.
    """
    for name, entry in reading.entries.items():
        if not name.endswith(BLOCKS):
            continue
        scales = name.removesuffix(BLOCKS) + SCALES
        grid = reading.part(scales, name)
        demand_dtype(name, entry, {"U8"})
        demand_dtype(scales, grid, {"U8"})
        if len(entry.shape) != 4 or 0 in entry.shape or entry.shape[3] != GROUP // 2:
            raise corrupt(name, f"has the shape {entry.shape}; it must be (experts, rows, groups, {GROUP // 2})")
        demand_shape(scales, grid, entry.shape[:3], name)
        experts, rows, groups, _ = entry.shape
        parts = {"codes": name, "scale": scales}
        yield QuantizedTensor(name.removesuffix(BLOCKS), (experts, groups * GROUP, rows), "mxfp4", parts)
