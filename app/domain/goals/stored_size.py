"""Bytes that a format's weight files take of a linear in a scheme, from its shape alone.

    native               codes dense in bytes, row by row
    compressed-tensors   codes dense in words of 32 bits, row by row; zero points in words along the outputs
    gguf                 blocks of 32 weights (`workers.formats.gguf.blocks`)
    dense ones           16 bits a weight
    others               a bound: words of 32 bits, a scale and a second number of 16 bits a group, an index an input

Exact for the named ones, header aside; never too low for the others.
"""

from collections.abc import Iterable

from app.domain.formats import ExportFormat
from app.domain.methods import Candidate, Scheme
from app.domain.methods.named_schemes import WHOLE
from app.domain.request.goal_problems import sized_formats

DENSE_BITS = 16
SHAPE_BITS = 128
"""Two int64 that say a packed linear's shape."""
NUMBERS_BITS = 64
"""A global scale and a largest input, fp32 each."""
LINEAR_TENSORS = 4
"""Tensors of a packed linear, at the most."""
HEADER_BYTES = 128
"""Of a tensor's entry in a header, its name aside: dtype, shape, offsets, alignment."""
GGUF_BLOCK = 32
GGUF_BYTES = ((4, 18, 20), (5, 22, 24), (8, 34, 36))
"""Of a block: up to these bits, symmetric, asymmetric."""


def stored_bits(formats: Iterable[ExportFormat], choice: Candidate, shape: tuple[int, int], scale_bits: int) -> int:
    """Bits of a linear (out, in), the most that any packed one of the formats takes; of `native` if none packs.

    scale_bits   of a scale in the job's dtype
    """
    packed = sized_formats(formats) or (ExportFormat.NATIVE,)
    return max(_bits(name, choice.scheme, shape, scale_bits) for name in packed)


def _bits(name: ExportFormat, scheme: Scheme, shape: tuple[int, int], scale_bits: int) -> int:
    out, width = shape
    groups = scheme.groups(width)
    if name is ExportFormat.GGUF:
        small, large = next((few, many) for bits, few, many in GGUF_BYTES if scheme.bits <= bits)
        return 8 * out * -(-width // GGUF_BLOCK) * (small if scheme.symmetric else large)
    if scheme.row is not None:
        bands = 1 if scheme.row.rows == WHOLE else -(-out // scheme.row.rows)
        scales = bands * groups * (scheme.row.scale.stored_bits or scale_bits)
        return out * _padded(width * scheme.bits, 8) + scales + NUMBERS_BITS + SHAPE_BITS
    if name is ExportFormat.NATIVE:
        zero_points = 0 if scheme.symmetric else _padded(out * groups * scheme.bits, 8)
        return out * _padded(width * scheme.bits, 8) + out * groups * scale_bits + zero_points + SHAPE_BITS
    codes = out * _padded(width * scheme.bits, 32) + out * groups * scale_bits + SHAPE_BITS
    if name is ExportFormat.COMPRESSED_TENSORS:
        return codes + (0 if scheme.symmetric else _padded(out * scheme.bits, 32) * groups)
    return codes + _padded(out, 32) * groups * DENSE_BITS + 32 * width


def _padded(bits: int, unit: int) -> int:
    return -(-bits // unit) * unit


def header_bytes(linears: Iterable[str], others: Iterable[str]) -> int:
    """Bytes of headers at the most.

    linears   names of packed linears
    others    names of tensors that are stored as they are
    """
    packed = sum(LINEAR_TENSORS * (len(name) + HEADER_BYTES) for name in linears)
    return packed + sum(len(name) + HEADER_BYTES for name in others) + (1 << 12)
