"""Choice of the kernels that compute on a device: Triton's on a GPU, compiled loops or torch's operators on a CPU.

Triton's kernels compute in fp32: they serve every dtype that fp32 holds, and never fp64 (`triton_serves`). Their
modules are imported when they are first chosen: a machine without a GPU needs no Triton.

Each module of `workers.numerics.backends` has the functions of its protocol in `workers.numerics.backends.protocols`.
"""

from functools import cache
from importlib.util import find_spec

import structlog
import torch

from app.domain.methods.block_types import ODD_LEVELS, BlockType
from workers.numerics import loops
from workers.numerics.backends import block_operators, column_operators, place_operators
from workers.numerics.backends.place_operators import Places
from workers.numerics.backends.protocols import (
    BlockKernels,
    BlockRoundingKernels,
    ClippingKernels,
    ColumnKernels,
    CompiledBlockKernels,
    DescentKernels,
    FactorKernels,
    FloatRoundingKernels,
    LevelLoops,
    PlaceKernels,
    RoundingKernels,
    ScaleKernels,
    SearchKernels,
    SubBlockLoops,
    UnpackKernels,
)
from workers.numerics.backends.rounding import block_rounding_operators, float_rounding_operators, rounding_operators
from workers.numerics.backends.trial import triton_fault
from workers.numerics.eight_bits import casts
from workers.numerics.eight_bits.casts import Cast

log = structlog.get_logger(__name__)


def triton_serves(device: torch.device, dtype: torch.dtype) -> bool:
    """True if Triton's kernels compute tensors of this dtype there: on a GPU, if fp32 holds the dtype."""
    return device.type == "cuda" and dtype != torch.float64 and _has_triton()


def loops_serve(device: torch.device, dtype: torch.dtype) -> bool:
    """True if compiled loops compute tensors of this dtype there: on a CPU, in fp32 and bf16."""
    return device.type == "cpu" and dtype in loops.DTYPES


def rounding_kernels(device: torch.device, dtype: torch.dtype) -> RoundingKernels:
    """Rounding kernels for weights of this dtype."""
    if triton_serves(device, dtype):
        return _rounding_kernels()
    return _rounding_loops() if loops_serve(device, dtype) else rounding_operators


def float_rounding_kernels(device: torch.device, dtype: torch.dtype) -> FloatRoundingKernels:
    """Rounding kernels of floating-point grids for weights of this dtype."""
    return _float_rounding_kernels() if triton_serves(device, dtype) else float_rounding_operators


def block_rounding_kernels(device: torch.device, dtype: torch.dtype) -> BlockRoundingKernels:
    """Rounding kernels of llama.cpp's types for weights of this dtype."""
    if triton_serves(device, dtype):
        return _block_rounding_kernels()
    return _block_rounding_loops() if loops_serve(device, dtype) else block_rounding_operators


def column_kernels(device: torch.device, dtype: torch.dtype) -> ColumnKernels:
    """Kernels for columns in turn whose errors are computed in this dtype."""
    return _column_kernels() if triton_serves(device, dtype) else column_operators


def clipping_kernels(device: torch.device, dtype: torch.dtype) -> ClippingKernels | None:
    """Kernels of clipped groups for weights of this dtype; None if torch's operators compute them."""
    return _clipping_kernels() if triton_serves(device, dtype) else None


def factor_kernels(device: torch.device, dtype: torch.dtype) -> FactorKernels | None:
    """Kernels of low-rank factors beside weights of this dtype; None if torch's operators compute them."""
    return _factor_kernels() if triton_serves(device, dtype) else None


def search_kernels(device: torch.device, dtype: torch.dtype) -> SearchKernels | None:
    """Kernels that search weights of this dtype; None if torch's operators compute it."""
    return _search_kernels() if triton_serves(device, dtype) else None


def descent_kernels(device: torch.device, dtype: torch.dtype) -> DescentKernels | None:
    """Kernels for a sweep with H in this dtype; None if torch's operators compute it."""
    return _descent_kernels() if triton_serves(device, dtype) else None


def level_loops(kind: BlockType, device: torch.device, dtype: torch.dtype) -> LevelLoops | None:
    """Loops that move a type's levels in this dtype; None if torch's operators compute it."""
    return _level_loops() if loops_know(kind, device, dtype) else None


def sub_block_loops(kind: BlockType, device: torch.device, dtype: torch.dtype) -> SubBlockLoops | None:
    """Loops that fit a type's sub-blocks in this dtype; None if torch's operators compute it."""
    return _sub_block_loops() if loops_know(kind, device, dtype) else None


def loops_know(kind: BlockType, device: torch.device, dtype: torch.dtype) -> bool:
    """True of all types but those whose levels are points of a lattice, in fp32 on a CPU."""
    return kind.levels != ODD_LEVELS and device.type == "cpu" and dtype == torch.float32


def block_kernels(device: torch.device, dtype: torch.dtype) -> BlockKernels | None:
    """Block kernels for hidden states of this dtype; None if only the generic path computes them."""
    if device.type == "cpu":
        return cpu_block_kernels(dtype)
    return compiled_block_kernels() if triton_serves(device, dtype) else None


def cpu_block_kernels(dtype: torch.dtype) -> BlockKernels:
    """Block kernels on a CPU."""
    return _block_loops() if loops_serve(torch.device("cpu"), dtype) else block_operators


def scale_kernels(device: torch.device, dtype: torch.dtype) -> ScaleKernels | None:
    """Scale kernels for weights or logits of this dtype; None if torch's operators compute them."""
    return _scale_kernels() if triton_serves(device, dtype) else None


def place_kernels(places: Places) -> PlaceKernels:
    """Kernels of these places; a square that a group shares is torch's."""
    whole = places.square.shape == places.place.shape
    return _scale_kernels() if whole and triton_serves(places.place.device, places.place.dtype) else place_operators


def unpack_kernels(device: torch.device, dtype: torch.dtype) -> UnpackKernels | None:
    """Unpacking kernels for dequantized weights of this dtype; None if torch's operators compute them."""
    return _unpack_kernels() if triton_serves(device, dtype) else None


def cast_to_eight_bits(device: torch.device, dtype: torch.dtype) -> Cast:
    """Rounding of matrices of this dtype to FP8."""
    return _cast_kernel() if triton_serves(device, dtype) else casts.cast


@cache
def compiled_block_kernels() -> CompiledBlockKernels:
    """Triton's block kernels on any device: in its interpreter they run on a CPU."""
    from workers.numerics.backends import block_kernels as kernels  # noqa: PLC0415 - Triton

    return kernels


@cache
def _rounding_kernels() -> RoundingKernels:
    from workers.numerics.backends.rounding import rounding_kernels as kernels  # noqa: PLC0415 - Triton

    return kernels


@cache
def _block_loops() -> BlockKernels:
    from workers.numerics.backends import block_loops as kernels  # noqa: PLC0415 - Numba

    return kernels


@cache
def _level_loops() -> LevelLoops:
    from workers.numerics.backends import column_loops as loops  # noqa: PLC0415 - Numba

    return loops


@cache
def _sub_block_loops() -> SubBlockLoops:
    from workers.numerics.backends import sub_block_loops as loops  # noqa: PLC0415 - Numba

    return loops


@cache
def _rounding_loops() -> RoundingKernels:
    from workers.numerics.backends.rounding import rounding_loops as kernels  # noqa: PLC0415 - Numba

    return kernels


@cache
def _block_rounding_loops() -> BlockRoundingKernels:
    from workers.numerics.backends.rounding import block_rounding_loops as kernels  # noqa: PLC0415 - Numba

    return kernels


@cache
def _float_rounding_kernels() -> FloatRoundingKernels:
    from workers.numerics.backends.rounding import float_rounding_kernels as kernels  # noqa: PLC0415 - Triton

    return kernels


@cache
def _block_rounding_kernels() -> BlockRoundingKernels:
    from workers.numerics.backends.rounding import block_rounding_kernels as kernels  # noqa: PLC0415 - Triton

    return kernels


@cache
def _column_kernels() -> ColumnKernels:
    from workers.numerics.backends import column_kernels as kernels  # noqa: PLC0415 - Triton

    return kernels


@cache
def _clipping_kernels() -> ClippingKernels:
    from workers.numerics.clipping import kernels  # noqa: PLC0415 - Triton

    return kernels


@cache
def _factor_kernels() -> FactorKernels:
    from workers.numerics.clipping import factor_kernels as kernels  # noqa: PLC0415 - Triton

    return kernels


@cache
def _search_kernels() -> SearchKernels:
    from workers.numerics.backends import search_kernels as kernels  # noqa: PLC0415 - Triton

    return kernels


@cache
def _descent_kernels() -> DescentKernels:
    from workers.numerics.backends import descent_kernels as kernels  # noqa: PLC0415 - Triton

    return kernels


@cache
def _scale_kernels() -> ScaleKernels:
    from workers.numerics.backends import scale_kernels as kernels  # noqa: PLC0415 - Triton

    return kernels


@cache
def _unpack_kernels() -> UnpackKernels:
    from workers.numerics.backends import unpack_kernels as kernels  # noqa: PLC0415 - Triton

    return kernels


@cache
def _cast_kernel() -> Cast:
    from workers.numerics.eight_bits.cast_kernels import cast  # noqa: PLC0415 - Triton

    return cast


@cache
def _has_triton() -> bool:
    """True if Triton works here, found by use: without a compiler, say, all is computed by torch's operators."""
    if find_spec("triton") is None:
        return False
    fault = triton_fault(torch.device("cuda"))
    if fault is not None:
        log.warning("triton_does_not_work", reason=fault)
    return fault is None
