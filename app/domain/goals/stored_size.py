"""Bits that the packed formats of a request take, the most of all, as `app.domain.sizes.files` counts them.

Exact for linears of the blocks, header aside; of the header, the most that it takes.
"""

from collections.abc import Iterable
from math import ceil

from app.domain.formats import ExportFormat
from app.domain.methods import Candidate, Scheme
from app.domain.request.goal_problems import sized_formats
from app.domain.sizes.files import Matrix, stored_in

DENSE_BYTES = 2
"""Of a weight in 16 bits."""
LINEAR_TENSORS = 4
"""Tensors of a packed linear, at the most."""
HEADER_BYTES = 128
"""Of a tensor's entry in a header, its name aside: dtype, shape, offsets, alignment."""


def stored_bits(formats: Iterable[ExportFormat], choice: Candidate, shape: tuple[int, int], scale_bits: int) -> int:
    """Bits of a linear (out, in), the most that any packed one of the formats takes; of `native` if none packs.

    scale_bits   of a scale in the job's dtype
    """
    return _most(formats, Matrix(shape, choice.scheme, absmax=choice.absmax, scale_bits=scale_bits))


def outer_bits(
    formats: Iterable[ExportFormat] | None, scheme: Scheme, shape: tuple[int, int], scale_bits: int, *, tied: bool
) -> int:
    """Bits of quantized embeddings or of a quantized head, the most that any packed one of the formats takes.

    formats   None: codes and scales alone count, of each matrix once, as for a budget
    tied      whether it is both of them in the model: some formats store it twice then
    """
    matrix = Matrix(shape, scheme, twice=tied, scale_bits=scale_bits)
    return ceil(matrix.base_bits) if formats is None else _most(formats, matrix)


def _most(formats: Iterable[ExportFormat], matrix: Matrix) -> int:
    packed = sized_formats(formats) or (ExportFormat.NATIVE,)
    return max(ceil(8 * stored_in(name, matrix, DENSE_BYTES).size) for name in packed)


def header_bytes(linears: Iterable[str], others: Iterable[str]) -> int:
    """Bytes of headers at the most.

    linears   names of packed linears
    others    names of tensors that are stored as they are
    """
    packed = sum(LINEAR_TENSORS * (len(name) + HEADER_BYTES) for name in linears)
    return packed + sum(len(name) + HEADER_BYTES for name in others) + (1 << 12)
