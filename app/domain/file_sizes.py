"""Bytes of a job's weight files, format by format, from shapes and schemes alone, before anything is quantized.

What a format stores of a linear is in the docstring of its file in `workers/formats`; here are the sums. The rest of a
model is copied, GGUF keeps its vocabulary in the same file, and each safetensors file has a header.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from app.domain.formats import EmbeddingRule, ExportFormat
from app.domain.methods import SCALE_BITS, AbsmaxScheme, Candidate, Scheme

HEADER_BYTES = 115
"""Of a tensor in the header of a safetensors file."""
VOCABULARY_BYTES = 36
"""Of a token in a GGUF file: its text and kind, and the pair that it is merged from, with their lengths."""
SHAPE_BYTES = 16
"""Of the tensor with a linear's shape."""
METADATA_BYTES, TENSOR_BYTES = 2000, 96
"""Of a GGUF file's fields, and of a tensor in its list with the room up to the next one."""
GGML_BLOCK = 32
GGML_BYTES = {True: {4: 18, 5: 22, 8: 34}, False: {4: 20, 5: 24}}
"""Symmetric or not -> the widths that there are types of -> bytes of a block."""


@dataclass(frozen=True)
class Matrix:
    """A quantized linear, or the embeddings.

    scheme   None: chosen by a budget, in `average` bits a weight
    absmax   second level of a codebook's maxima
    codebook whether codes are indices into a codebook
    rank     of factors beside it
    twice    whether it is the head, too, and is stored as that again where a format stores a tied head by itself
    """

    shape: tuple[int, int]
    scheme: Scheme | None
    average: float = 0.0
    absmax: AbsmaxScheme | None = None
    codebook: bool = False
    rank: int = 0
    twice: bool = False

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def native_bits(self) -> float:
        """Bits of everything that the native format stores of it, factors included."""
        factors = self.rank * SCALE_BITS * sum(self.shape)
        if self.scheme is None:
            return self.average * self.weights + factors
        return Candidate(self.scheme, self.absmax).stored_bits(self.shape) + factors


@dataclass(frozen=True)
class Rest:
    """Everything else of a model: bytes and number of its tensors, bytes of a weight, tokens of its vocabulary."""

    size: int
    tensors: int
    width: float
    vocabulary: int


def matrix_bytes(matrix: Matrix) -> float:
    """Bytes of a matrix by itself, as packed formats store it."""
    return matrix.native_bits / 8


def file_bytes(
    name: ExportFormat, matrices: Iterable[Matrix], rest: Rest, *, base_alone: bool = False, adapter: int = 0
) -> int:
    """Bytes of the weight files of one format.

    base_alone   whether this checkpoint lacks the factors
    adapter      trained parameters that it stores, where it is an adapter's
    """
    matrices = list(matrices)
    if name.info.is_adapter:
        factors = sum(matrix.rank * sum(matrix.shape) for matrix in matrices)
        return int((factors or adapter) * SCALE_BITS / 8) + 2 * len(matrices) * HEADER_BYTES
    total = float(rest.size)
    for matrix in matrices:
        times = 2 if matrix.twice and name.info.embeddings is EmbeddingRule.UNIFORM else 1
        total += times * _of_matrix(name, matrix, rest.width, base_alone=base_alone)
    if name is ExportFormat.GGUF:
        return (
            int(total)
            + VOCABULARY_BYTES * rest.vocabulary
            + METADATA_BYTES
            + TENSOR_BYTES * (rest.tensors + len(matrices))
        )
    tensors = sum(1 if name.info.dense else _tensors(matrix) for matrix in matrices)
    return int(total) + HEADER_BYTES * (rest.tensors + tensors)


def _tensors(matrix: Matrix) -> int:
    """Tensors of a matrix in a packed format: codes, scales and shape, and what some schemes have besides."""
    zeros = matrix.scheme is not None and not matrix.scheme.symmetric
    return 3 + zeros + matrix.codebook + 2 * (matrix.absmax is not None) + 2 * (matrix.rank > 0)


def _of_matrix(name: ExportFormat, matrix: Matrix, width: float, *, base_alone: bool) -> float:
    rows, columns = matrix.shape
    if name.info.dense:
        return matrix.weights * width
    scheme = matrix.scheme
    factors = 0.0 if base_alone or not name.info.holds_factors else matrix.rank * SCALE_BITS / 8 * (rows + columns)
    if scheme is None:
        return matrix.average / 8 * matrix.weights + factors
    if name is ExportFormat.GGUF:
        bytes_of = GGML_BYTES[scheme.symmetric]
        return matrix.weights / GGML_BLOCK * bytes_of[min(width for width in bytes_of if width >= scheme.bits)]
    if name is ExportFormat.COMPRESSED_TENSORS and scheme.name is None:
        return _words(matrix.shape, scheme)
    codebook = 4 << scheme.bits if matrix.codebook else 0
    return (matrix.native_bits - matrix.rank * SCALE_BITS * (rows + columns)) / 8 + SHAPE_BYTES + factors + codebook


def _words(shape: tuple[int, int], scheme: Scheme) -> float:
    """Codes and zero points in words of 32 bits, scales of 16, and the shape."""
    (rows, columns), groups = shape, scheme.groups(shape[1])
    zeros = 0 if scheme.symmetric else 4 * ceil(rows * scheme.bits / 32) * groups
    return 4 * rows * ceil(columns * scheme.bits / 32) + SCALE_BITS / 8 * rows * groups + zeros + SHAPE_BYTES
