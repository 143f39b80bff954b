"""Choice of the kernels that compute on a device: Triton's on a GPU, torch's operators elsewhere.

Triton's kernels compute in fp32: they serve every dtype that fp32 holds, and never fp64 (`triton_serves`). Their
modules are imported when they are first chosen: a machine without a GPU needs no Triton.

Each module of `workers.numerics.backends` has the functions of its protocol.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Protocol

import structlog
import torch
from torch import Tensor

from app.domain.methods import Scheme
from app.domain.methods.block_types import ODD_LEVELS, BlockType
from app.domain.methods.named_schemes import Element
from workers.numerics import loops
from workers.numerics.adamw import AdamW
from workers.numerics.backends import block_operators, column_operators, place_operators
from workers.numerics.backends.column_operators import Columns, IntegerGrid, LevelGrid
from workers.numerics.backends.place_operators import Places
from workers.numerics.backends.rounding import block_rounding_operators, float_rounding_operators, rounding_operators
from workers.numerics.backends.rounding.block_rounding_operators import BlockGroups
from workers.numerics.backends.rounding.float_rounding_operators import FloatGroups
from workers.numerics.backends.rounding.rounding_operators import GridSettings, Groups
from workers.numerics.backends.trial import triton_fault
from workers.numerics.blocks.axis import BlockAxis
from workers.numerics.clipping.factor_places import FactorPlaces
from workers.numerics.clipping.state import ClippedState
from workers.numerics.eight_bits import casts
from workers.numerics.eight_bits.casts import Cast
from workers.numerics.quantized import BlockWeight

log = structlog.get_logger(__name__)


class RoundingKernels(Protocol):
    """The fake quantizer of SignRound; `workers.numerics.backends.rounding.rounding_operators` describes it."""

    def offset_unit(self, steps: int, learning_rate: float) -> float | None: ...
    def write(self, groups: Groups, settings: GridSettings, w_hat: Tensor) -> None: ...
    def step(
        self,
        groups: Groups,
        settings: GridSettings,
        *,
        gradient: Tensor,
        rate: Tensor,
        faults: Tensor,
        limits: tuple[float, float],
        w_hat: Tensor,
    ) -> None: ...
    def keep(self, groups: Groups, settings: GridSettings, better: Tensor) -> None: ...
    def search_range(
        self, weight: Tensor, second_moments: Tensor, settings: GridSettings, scale_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]: ...
    def warm_ups(
        self,
        columns: int,
        width: int,
        settings: GridSettings,
        *,
        dtypes: tuple[torch.dtype, torch.dtype],
        counted: bool,
        device: torch.device,
    ) -> list[Callable[[], object]]: ...


class FloatRoundingKernels(Protocol):
    """The same on floating-point grids; `.float_rounding_operators` of the backends describes the functions."""

    def write(self, groups: FloatGroups, element: Element, w_hat: Tensor) -> None: ...
    def step(
        self, groups: FloatGroups, element: Element, *, gradient: Tensor, rate: Tensor, faults: Tensor, w_hat: Tensor
    ) -> None: ...
    def keep(self, groups: FloatGroups, element: Element, better: Tensor) -> None: ...
    def warm_ups(
        self, width: int, element: Element, dtype: torch.dtype, device: torch.device
    ) -> list[Callable[[], object]]: ...


class BlockRoundingKernels(Protocol):
    """The same on llama.cpp's types; `workers.numerics.backends.rounding.block_rounding_operators` describes it."""

    def write(self, groups: BlockGroups, axis: BlockAxis, w_hat: Tensor) -> None: ...
    def step(
        self, groups: BlockGroups, axis: BlockAxis, *, gradient: Tensor, rate: Tensor, faults: Tensor, w_hat: Tensor
    ) -> None: ...
    def keep(self, groups: BlockGroups, axis: BlockAxis, better: Tensor) -> None: ...
    def warm_ups(self, kind: BlockType, dtype: torch.dtype, device: torch.device) -> list[Callable[[], object]]: ...


class ColumnKernels(Protocol):
    """Columns that are rounded in turn; `workers.numerics.backends.column_operators` describes the functions."""

    def lie_side_by_side(self, rows: int) -> bool: ...
    def round_integers(self, columns: Columns, batch: slice, grid: IntegerGrid) -> None: ...
    def round_floats(self, columns: Columns, batch: slice, scale: Tensor, element: Element) -> None: ...
    def round_levels(self, columns: Columns, batch: slice, now: slice, grid: LevelGrid) -> None: ...
    def warm_ups(
        self, columns: int, scheme: Scheme, scale_dtype: torch.dtype, device: torch.device
    ) -> list[Callable[[], object]]: ...


class SearchKernels(Protocol):
    """The search of block types; `workers.numerics.blocks.search` has it in torch's operators."""

    def search(
        self,
        made: BlockWeight,
        weight: Tensor,
        weights: Tensor,
        factor: Tensor | None = None,
        offset: Tensor | None = None,
        *,
        codes: bool = True,
    ) -> None: ...
    def warm_ups(
        self, columns: int, scheme: Scheme, dtype: torch.dtype, device: torch.device
    ) -> list[Callable[[], object]]: ...


class DescentKernels(Protocol):
    """A sweep of coordinate descent over all of a block type's numbers; `workers.numerics.blocks.descent` has it."""

    def sweep(
        self,
        kind: BlockType,
        hessian: Tensor,
        levels: Tensor,
        numbers: Tensor,
        scale: Tensor,
        minimum_numbers: Tensor,
        minimum: Tensor,
        pull: Tensor,
    ) -> None: ...
    def warm_ups(self, columns: int, kind: BlockType, device: torch.device) -> list[Callable[[], object]]: ...


class SubBlockLoops(Protocol):
    """Fits of sub-blocks; `workers.numerics.backends.sub_block_loops` describes the functions."""

    def fit_factors(
        self,
        numbers: Tensor,
        weights: Tensor,
        kind: BlockType,
        divisors: Sequence[float],
        *,
        unsigned: bool,
        refinements: int,
    ) -> tuple[Tensor, Tensor]: ...
    def fit_with_offsets(
        self,
        numbers: Tensor,
        weights: Tensor,
        kind: BlockType,
        divisors: Sequence[float],
        *,
        free: bool,
        alike: float,
        refinements: int,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class LevelLoops(Protocol):
    """Levels of some columns that move in turn; `workers.numerics.backends.column_loops` describes the functions."""

    def move_levels(
        self, kind: BlockType, levels: Tensor, pull: Tensor, factor: Tensor, near: Tensor, changes: Tensor
    ) -> None: ...


class ClippingKernels(Protocol):
    """Groups whose ranges are clipped by learned factors: `workers.numerics.clipping.clipped_groups`."""

    def write(self, state: ClippedState, settings: GridSettings, w_hat: Tensor) -> None: ...
    def step(
        self,
        state: ClippedState,
        settings: GridSettings,
        *,
        gradient: Tensor,
        rate: Tensor,
        decay: float,
        faults: Tensor,
        w_hat: Tensor,
    ) -> None: ...
    def keep(self, state: ClippedState, settings: GridSettings, better: Tensor) -> None: ...
    def warm_ups(
        self,
        width: int,
        settings: GridSettings,
        dtype: torch.dtype,
        scale_dtype: torch.dtype,
        device: torch.device,
    ) -> list[Callable[[], object]]: ...


class FactorKernels(Protocol):
    """Low-rank factors of all linears of a block; `workers.methods.apiq` has them in operators."""

    def step(
        self,
        places: FactorPlaces,
        factors: Tensor,
        rounded: Tensor,
        optimizer: AdamW,
        *,
        gradient: Tensor,
        rate: Tensor,
        share: float,
        decay: float,
        faults: Tensor,
        last_fault: Tensor,
    ) -> None: ...
    def add_products(self, places: FactorPlaces, rounded: Tensor, w_hat: Tensor) -> None: ...
    def warm_ups(self, dtype: torch.dtype, device: torch.device) -> list[Callable[[], object]]: ...


class BlockKernels(Protocol):
    """Parts of a decoder block and of its loss; `workers.numerics.backends.block_kernels` describes the functions."""

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, rounds_twice: bool = True
    ) -> Tensor: ...
    def add_rms_norm(self, x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]: ...
    def silu_mul(self, *gate_up: Tensor) -> Tensor: ...
    def gelu_mul(self, *gate_up: Tensor) -> Tensor: ...
    def apply_rope(
        self, *heads: Tensor, counts: Sequence[int], cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def square_error(
        self, parts: Sequence[Tensor], targets: Tensor, index: Tensor, share: float, scaled: float
    ) -> tuple[Tensor, Tensor]: ...
    def error_gradient(
        self, parts: Sequence[Tensor], targets: Tensor, index: Tensor, share: float, scaled: float
    ) -> Tensor: ...
    def take_rows(self, source: Tensor, index: Tensor) -> Tensor: ...


class CompiledBlockKernels(BlockKernels, Protocol):
    """Triton's block kernels, which are compiled on first use or by these calls."""

    def warm_ups(
        self, sizes: tuple[int, int], heads: Sequence[int], head_width: int, dtype: torch.dtype, device: torch.device
    ) -> list[Callable[[], object]]: ...


class PlaceKernels(Protocol):
    """Places of codes that move; `workers.numerics.backends.place_operators` describes the functions."""

    def move_places(self, places: Places, pace: Tensor, unbiased: Tensor, betas: tuple[float, float]) -> None: ...
    def dequantize_places(self, places: Places, scale: Tensor, zero: Tensor | int, out: Tensor) -> None: ...
    def add_place_gradient(
        self, gradient: Tensor, places: Places, rows: slice, zero: Tensor | int, sign: Tensor, out: Tensor
    ) -> None: ...


class ScaleKernels(PlaceKernels, Protocol):
    """Weights as functions of their scales; `workers.numerics.group_scales` and `.divergence` have the formulas."""

    def dequantize(self, codes: Tensor, scale: Tensor, zero: Tensor | int, out: Tensor) -> None: ...
    def add_scale_gradient(self, gradient: Tensor, codes: Tensor, zero: Tensor | int, out: Tensor) -> None: ...
    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor: ...
    def squared_distance(self, one: Tensor, other: Tensor) -> Tensor: ...


class UnpackKernels(Protocol):
    """W_hat from packed codes; `workers.numerics.packed_weight` has the formulas."""

    def unpack(
        self,
        packed: Tensor,
        scale: Tensor,
        other: Tensor | None,
        out: Tensor,
        *,
        kind: str,
        width: int,
        group_size: int,
        middle: float,
    ) -> None: ...


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
