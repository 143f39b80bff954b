"""Protocols of kernels: what each kind offers, whichever backend has its functions."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from app.domain.methods import Scheme
from app.domain.methods.block_types import BlockType
from app.domain.methods.named_schemes import Element
from workers.numerics.adamw import AdamW
from workers.numerics.backends.column_operators import Columns, IntegerGrid, LevelGrid
from workers.numerics.backends.place_operators import Places
from workers.numerics.backends.rounding.block_rounding_operators import BlockGroups
from workers.numerics.backends.rounding.float_rounding_operators import FloatGroups
from workers.numerics.backends.rounding.rounding_operators import GridSettings, Groups
from workers.numerics.blocks.axis import BlockAxis
from workers.numerics.clipping.factor_places import FactorPlaces
from workers.numerics.clipping.state import ClippedState
from workers.numerics.quantized import BlockWeight


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
