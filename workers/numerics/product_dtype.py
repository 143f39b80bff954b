"""The dtype that matrix products are computed in on a device: on many processors 16-bit ones are slower than fp32.

A processor with AMX multiplies bf16 eight times as fast as fp32, and AMD's with AVX512-BF16 twice as fast. Intel's
without AMX, whether they lack it or their virtual machine hides it, have AVX512-BF16 products that take twice the time
of fp32 ones, and what has neither converts 16-bit matrices first (`benchmarks.cpu_products` measures it). There the
products are computed in fp32, which holds every 16-bit number, and are rounded where the model rounds them.
"""

from functools import cache
from pathlib import Path

import torch

PROCESSORS = Path("/proc/cpuinfo")
SIXTEEN_BITS = frozenset({torch.bfloat16, torch.float16})


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or fp32 where that is the quicker way to multiply matrices of it; the same on the same machine."""
    if device.type != "cpu" or dtype not in SIXTEEN_BITS:
        return dtype
    return dtype if dtype == torch.bfloat16 and _multiplies_bfloat16(PROCESSORS) else torch.float32


@cache
def _multiplies_bfloat16(processors: Path) -> bool:
    """True if a processor with these flags is quicker in bf16."""
    try:
        lines = processors.read_text().splitlines()
    except OSError:
        return False
    fields = {name.strip(): value.split() for name, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", [])
    return "amx_bf16" in flags or ("avx512_bf16" in flags and fields.get("vendor_id", []) == ["AuthenticAMD"])
