"""Bytes of a job's weight files, format by format, from shapes and schemes alone, before anything is quantized.

What a format stores of a linear is in the docstring of its file in `workers/formats`; here are the sums. The rest of a
model is copied, GGUF keeps its vocabulary in the same file, and each safetensors file has a header.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from types import MappingProxyType

from app.domain.formats import EmbeddingRule, ExportFormat
from app.domain.methods import SCALE_BITS, AbsmaxScheme, Candidate, Scheme
from app.domain.methods.block_types import BlockType
from app.domain.methods.named_schemes import ScaleType

HEADER_BYTES = 115
"""Of a tensor in the header of a safetensors file."""
VOCABULARY_BYTES = 36
"""Of a token in a GGUF file: its text and kind, and the pair that it is merged from, with their lengths."""
METADATA_BYTES, TENSOR_BYTES = 2000, 96
"""Of a GGUF file's fields, and of a tensor in its list with the room up to the next one."""
SHARD_BYTES, HELD_BYTES, ROOM_BYTES = 2 << 30, 256 << 20, 1 << 20
"""Bytes of a safetensors file, those from which on it is written as it grows, and the room for its header then."""
SHAPE_BYTES = 16
"""Of the tensor with a linear's shape."""
NUMBER_BYTES = 4
"""Of a global scale, and of a largest input."""
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
    scale_bits   of a scale in the job's dtype
    """

    shape: tuple[int, int]
    scheme: Scheme | None
    average: float = 0.0
    absmax: AbsmaxScheme | None = None
    codebook: bool = False
    rank: int = 0
    twice: bool = False
    scale_bits: int = SCALE_BITS

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def base_bits(self) -> float:
        """Bits of its codes and scales in the native format."""
        if self.scheme is None:
            return self.average * self.weights
        return Candidate(self.scheme, self.absmax).stored_bits(self.shape, self.scale_bits)

    @property
    def native_bits(self) -> float:
        """Bits of everything that the native format stores of it, factors included."""
        return self.base_bits + 8 * self.factor_bytes

    @property
    def factor_bytes(self) -> float:
        """Bytes of its low-rank factors."""
        return self.rank * SCALE_BITS / 8 * sum(self.shape)


@dataclass(frozen=True)
class Rest:
    """Everything else of a model: bytes and number of its tensors, bytes of a weight, tokens of its vocabulary."""

    size: int
    tensors: int
    width: float
    vocabulary: int


@dataclass(frozen=True)
class Stored:
    """A matrix in a format's file: its bytes, and the number of its tensors."""

    size: float
    tensors: int


def file_bytes(
    name: ExportFormat, matrices: Sequence[Matrix], rest: Rest, *, base_alone: bool = False, adapter: int = 0
) -> int:
    """Bytes of the weight files of one format.

    base_alone   whether this checkpoint lacks the factors
    adapter      trained parameters that it stores, where it is an adapter's
    """
    if name.info.is_adapter:
        factors = sum(matrix.factor_bytes for matrix in matrices)
        return int(factors or adapter * SCALE_BITS / 8) + 2 * len(matrices) * HEADER_BYTES
    total, tensors = float(rest.size), rest.tensors
    for matrix in matrices:
        stored = stored_in(name, matrix, rest.width, base_alone=base_alone)
        total, tensors = total + stored.size, tensors + stored.tensors
    if name is ExportFormat.GGUF:
        return int(total) + VOCABULARY_BYTES * rest.vocabulary + METADATA_BYTES + TENSOR_BYTES * tensors
    rooms = ceil(total / SHARD_BYTES) * ROOM_BYTES if total > HELD_BYTES else 0
    return int(total) + max(rooms, HEADER_BYTES * tensors)


def stored_in(name: ExportFormat, matrix: Matrix, width: float, *, base_alone: bool = False) -> Stored:
    """The bytes of a matrix in a format's file, header aside.

    width        bytes of a weight that stays as it is
    base_alone   whether this checkpoint lacks the factors
    """
    stored = _once(name, matrix, width, base_alone=base_alone)
    times = 2 if matrix.twice and name.info.embeddings is EmbeddingRule.UNIFORM else 1
    return Stored(times * stored.size, times * stored.tensors)


def _once(name: ExportFormat, matrix: Matrix, width: float, *, base_alone: bool) -> Stored:
    if name.info.dense:
        return Stored(matrix.weights * width, 1)
    if name is ExportFormat.NATIVE or matrix.scheme is None:
        beside = name.info.holds_factors and not base_alone
        return _native(matrix, matrix.factor_bytes if beside else 0.0)
    return PACKED.get(name, _as_native)(matrix, matrix.scheme)


def _native(matrix: Matrix, factors: float) -> Stored:
    """Codes, scales and shape; zero points, a codebook, a second level, numbers of a tensor and factors besides."""
    scheme = None if matrix.scheme is None else matrix.scheme.fitted(matrix.shape[1])
    if scheme is not None and scheme.blocks is not None:
        return _native_blocks(matrix, scheme.blocks, factors)
    zeros = scheme is not None and not scheme.symmetric
    tensors = 3 + zeros + matrix.codebook + 2 * (matrix.absmax is not None) + 2 * (factors > 0)
    if scheme is None:
        return Stored(matrix.base_bits / 8 + SHAPE_BYTES + factors, tensors)
    (rows, columns), codebook = matrix.shape, 4 << scheme.bits if matrix.codebook else 0
    # A row of codes ends with a whole byte, and so do all zero points.
    padding = rows * (-columns * scheme.bits % 8) + (-rows * scheme.groups(columns) * scheme.bits % 8) * zeros
    row = scheme.row
    numbers = 0 if row is None else (row.scale is ScaleType.E4M3) + row.calibrated
    size = (matrix.base_bits + padding) / 8 + SHAPE_BYTES + codebook + NUMBER_BYTES * numbers + factors
    return Stored(size, tensors + numbers)


def _native_blocks(matrix: Matrix, kind: BlockType, factors: float) -> Stored:
    """Codes of a width that holds them all, and the numbers of blocks and of sub-blocks, each a tensor."""
    (rows, columns), halves = matrix.shape, 1 + kind.offset
    beside = [integers for integers in (kind.scales, kind.minimums) if integers is not None]
    codes = rows * ceil(columns * kind.code_bits / 8)
    integers = sum(ceil(matrix.weights / kind.columns * of.bits / 8) for of in beside)
    size = codes + integers + 2 * halves * matrix.weights / kind.weights + SHAPE_BYTES + factors
    return Stored(size, 2 + halves + len(beside) + 2 * (factors > 0))


def _as_native(matrix: Matrix, _scheme: Scheme) -> Stored:
    return _native(matrix, 0.0)


def _gguf(matrix: Matrix, scheme: Scheme) -> Stored:
    """Blocks of 32 weights with a scale each, whatever the group; of a type by name, its own."""
    kind = scheme.fitted(matrix.shape[1]).blocks
    if kind is not None:
        return Stored(matrix.weights / kind.weights * kind.size, 1)
    bytes_of = GGML_BYTES[scheme.symmetric]
    block = bytes_of[min((width for width in bytes_of if width >= scheme.bits), default=max(bytes_of))]
    return Stored(matrix.shape[0] * ceil(matrix.shape[1] / GGML_BLOCK) * block, 1)


def _compressed_tensors(matrix: Matrix, scheme: Scheme) -> Stored:
    """Codes and zero points in words, scales, and the shape; schemes by name as native, without it."""
    if scheme.name is not None:
        native = _as_native(matrix, scheme)
        return Stored(native.size - SHAPE_BYTES, native.tensors - 1)
    (rows, columns), groups = matrix.shape, scheme.groups(matrix.shape[1])
    zeros = 0 if scheme.symmetric else _words(rows, scheme.bits) * groups
    size = rows * _words(columns, scheme.bits) + zeros + matrix.scale_bits / 8 * rows * groups + SHAPE_BYTES
    return Stored(size, 3 + (not scheme.symmetric))


def _gptq(matrix: Matrix, scheme: Scheme) -> Stored:
    """Words, zero points of every group, scales of 16 bits, and the group of each input."""
    awq = _awq(matrix, scheme)
    return Stored(awq.size + 4 * matrix.shape[1], awq.tensors + 1)


def _awq(matrix: Matrix, scheme: Scheme) -> Stored:
    """Words, zero points of every group, and scales of 16 bits."""
    (rows, columns), groups = matrix.shape, scheme.groups(matrix.shape[1])
    return Stored(rows * _words(columns, scheme.bits) + groups * (_words(rows, scheme.bits) + 2 * rows), 3)


def _mlx(matrix: Matrix, scheme: Scheme) -> Stored:
    """Words, and a scale and a bias of 16 bits for each group."""
    rows, columns = matrix.shape
    return Stored(rows * (_words(columns, scheme.bits) + 4 * scheme.groups(columns)), 3)


def _bitsandbytes(matrix: Matrix, scheme: Scheme) -> Stored:
    """Codes, maxima, codebook and a description; with a second level a table of 256 numbers, too."""
    blocks, codes = matrix.weights / scheme.width(matrix.shape[1]), matrix.weights * scheme.bits / 8
    if matrix.absmax is None:
        return Stored(codes + 4 * blocks + 64 + 95, 4)
    return Stored(codes + blocks + 4 * ceil(blocks / matrix.absmax.superblock) + 1024 + 64 + 185, 6)


def _words(count: int, bits: int) -> int:
    """Bytes of so many codes in words of 32 bits."""
    return 4 * ceil(count * bits / 32)


PACKED: Mapping[ExportFormat, Callable[[Matrix, Scheme], Stored]] = MappingProxyType(
    {
        ExportFormat.GGUF: _gguf,
        ExportFormat.COMPRESSED_TENSORS: _compressed_tensors,
        ExportFormat.GPTQ: _gptq,
        ExportFormat.GPTQ_V2: _gptq,
        ExportFormat.AWQ: _awq,
        ExportFormat.MLX: _mlx,
        ExportFormat.BITSANDBYTES: _bitsandbytes,
    }
)
"""Size of a matrix in each packed format but the native one."""
