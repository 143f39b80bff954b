"""The seam between the engine and the methods: what a method is given for a block, and what it must return.

A method that learns describes a block's linears as `TrainableWeights` and hands them to `task.tune`, the engine's one
tuning loop. Everything such a method learns acts through the weight, so the loop needs no more than the weight's
value and gives back no more than the gradient with respect to it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from app.domain.methods import AbsmaxScheme, Candidate, Scheme, WeightSpec
from workers.contracts.results import BlockResult
from workers.contracts.tuning import TrainableWeights, TuningOutcome, TuningSettings
from workers.numerics.floats.input_rounding import InputRounding, input_roundings
from workers.numerics.floats.joined import joined_amax
from workers.numerics.quantized import LinearResult


class BlockForward(Protocol):
    """Calls a block, or a method of it, as its model does (masks, rotary) on hidden (batch, length, width)."""

    def __call__(self, block: Callable[..., Any], hidden: Tensor) -> Any: ...


class SplitOutput(ABC):
    """A block that can leave the last sum to its caller: a loss then adds it as it reads both tensors."""

    @abstractmethod
    def residual_and_update(self, hidden_states: Tensor, **keywords: Any) -> list[Tensor]:
        """Two tensors whose sum is the block's output."""


class JoinsLinears(nn.Module):
    """A part of a block that can compute several linears of the same input at once.

    together   their names inside the part; () where it gains nothing
    joined     all of them as one linear, set by whoever holds their weights one after another; else None
    """

    together: tuple[str, ...] = ()
    joined: nn.Module | None = None


@dataclass(frozen=True)
class Fold:
    """Two neighbours inside a block between which scales can move: output j of `source` over s_j, column j of every
    one of `linears` times s_j, and the block computes the same.

    source     name of a norm or of a linear inside the block
    linears    all that its output goes into, if only through elementwise products or sums over tokens
    measured   the module inside the block whose output says what rounding `linears` costs
    unclipped  those of `linears` whose output only decides a softmax
    offset     what a norm adds to its weight before it multiplies
    """

    source: str
    linears: tuple[str, ...]
    measured: str
    unclipped: tuple[str, ...] = ()
    offset: float = 0.0


def _no_other_method(task: "BlockTask", spec: WeightSpec) -> BlockResult:
    raise TypeError(f"block {task.index} cannot be given to {spec}: this task knows no other method")


@dataclass(frozen=True)
class Fisher:
    """Squared gradients of the calibration text's loss by a linear's weight, summed over sequences, F (out, in).

    rows      sum_j F_ij, fp32 (out,)
    columns   sum_i F_ij, fp32 (in,)
    """

    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class ScoreTask:
    """One linear whose width a budget decides: what each way to store it would cost in error.

    weight       (out, in) on the device, the model's dtype
    fisher       where the spec asks for it
    """

    weight: Tensor
    candidates: tuple[Candidate, ...]
    fisher: Fisher | None
    scale_dtype: torch.dtype
    seed: int


@dataclass(frozen=True)
class BlockTask:
    """One decoder block to quantize. Where several ranks share the work, sequences are those of this rank.

    block       the original block on `device`, weights in the model's dtype; a method may replace weights while it
                works, and leaves the module as it found it
    forward     calls the block as the model does
    inputs      X_q, (sequences, length, width): what the quantized blocks before this one produce
    inputs_fp   X_fp, the same of the original blocks; empty unless the spec's `needs_original_inputs` says so
    targets     Y = block(X_fp), (sequences, length, width)
    schemes     linear name inside the block -> its scheme; ignored linears are absent
    second_moments  linear name -> sum over tokens of x_j^2 of its original inputs, fp32 (in,); may be empty
    scale_dtype dtype in which the formats of this job store scales
    seed        of this block
    micro_batch sequences that fit through the block at once with gradients
    absmax      linear name -> second level of codes for a codebook's maxima, where the budget chose one
    fisher      linear name -> its Fisher information, where the spec asks for it
    starved     linears of experts that got too few tokens: the tuning loop leaves them at their start
    joined      sets of linears of the same input that a runtime makes one matrix of: their scales of whole tensors are
                one (`workers.numerics.floats.joined`)
    input_amax  linear name -> largest magnitude of its set's original inputs, fp32 (1,), where the scheme is calibrated
    tick        called with the share of the block that is done, 0 to 1; often
    owns_sequences  whether inputs and targets are this task's alone: the tuning loop may keep and overwrite them
    folds       where scales can move inside the block, in the order of the forward pass
    log         called with an event's name and fields when a method falls back to something worse
    sum_        makes tensors their sums over all processes that share the sequences, in place
    quantize    the same block by another method, named by its spec: where a method starts from another's result
    """

    index: int
    block: nn.Module
    forward: BlockForward
    inputs: Tensor
    inputs_fp: Tensor
    targets: Tensor
    schemes: Mapping[str, Scheme]
    second_moments: Mapping[str, Tensor]
    scale_dtype: torch.dtype
    device: torch.device
    seed: int
    micro_batch: int
    tick: Callable[[float], None]
    tune: "Tune"
    folds: Sequence[Fold] = ()
    log: Callable[..., None] = lambda *_, **__: None
    sum_: Callable[..., None] = lambda *_: None
    quantize: "Quantize" = _no_other_method
    absmax: Mapping[str, AbsmaxScheme] = field(default_factory=dict)
    fisher: Mapping[str, Fisher] = field(default_factory=dict)
    starved: frozenset[str] = frozenset()
    joined: Sequence[tuple[str, ...]] = ()
    input_amax: Mapping[str, Tensor] = field(default_factory=dict)
    owns_sequences: bool = False

    def linear(self, name: str) -> nn.Linear:
        """The block's linear of that name."""
        module = self.block.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{name} is {type(module).__name__}, not Linear")
        return module

    def total(self, number: int) -> int:
        """The sum of a number over all processes that share the sequences."""
        sum_of_all = torch.tensor(number)
        self.sum_(sum_of_all)
        return int(sum_of_all)

    def joined_amax(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """By linear, where its scheme has a scale of the whole tensor: the largest magnitude of its set, fp32 ().

        weights   in place of the block's own
        """
        own = {name: self.linear(name).weight.detach() for name in self.schemes} if weights is None else weights
        return joined_amax(self.joined, self.schemes, own)

    def input_roundings(self) -> dict[str, InputRounding]:
        """The rounding of inputs that a server of the result does, by linear."""
        return input_roundings(self.schemes, self.input_amax)

    def alike(self) -> dict[tuple[Scheme, int], dict[str, Tensor]]:
        """Weights by name, those of the same scheme and group width together."""
        groups: dict[tuple[Scheme, int], dict[str, Tensor]] = {}
        for name, scheme in self.schemes.items():
            weight = self.linear(name).weight.detach()
            groups.setdefault((scheme, scheme.width(weight.shape[1])), {})[name] = weight
        return groups

    def of_one_shape(self, most: int) -> list[list[str]]:
        """Names of linears that are computed as one batch: of one shape, with `most` weights together, or one alone."""
        by_shape: dict[torch.Size, list[str]] = {}
        for name in self.schemes:
            by_shape.setdefault(self.linear(name).weight.shape, []).append(name)
        return [
            names[first : first + count]
            for shape, names in by_shape.items()
            for count in (max(1, most // shape.numel()),)
            for first in range(0, len(names), count)
        ]

    def passes(self, inputs: Tensor) -> Iterator[Callable[[], Tensor]]:
        """Forward passes of the block over hidden states (sequences, length, width), a micro-batch each."""
        for rows in torch.split(inputs, self.micro_batch):
            yield partial(self.forward, self.block, rows.to(self.device, non_blocking=True))

    @torch.no_grad()
    def augmented(self) -> "BlockTask":
        """The task for || F(X_q; W_hat) - F(X_fp; W) ||^2 + || F(X_q; W_hat) - F(X_q; W) ||^2 (OmniQuant's aug loss).

        The two add up to a constant and twice the loss to the mean of both targets, and a factor of two is nothing to
        Adam: so that mean is the target, in the targets' dtype, and losses that are reported are those to it.
        """
        targets, first = torch.empty_like(self.targets), 0
        for forward in self.passes(self.inputs):
            own = forward()
            rows = slice(first, first := first + len(own))
            wide = torch.promote_types(own.dtype, torch.float32)
            targets[rows] = (own.to(targets.device, wide) + self.targets[rows]) / 2
        return replace(self, targets=targets)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Weights of linears that are replaced while the context lasts come back afterwards."""
        weights = {name: self.linear(name).weight for name in self.schemes}
        try:
            yield
        finally:
            for name, weight in weights.items():
                self.linear(name).weight = weight


@dataclass(frozen=True)
class WarmUp:
    """Shapes that a method's kernels are compiled for: (in_features, scheme) of the linears, dtypes and device."""

    linears: frozenset[tuple[int, Scheme]]
    dtype: torch.dtype
    scale_dtype: torch.dtype
    device: torch.device


class Tune(Protocol):
    """The engine's tuning loop (`workers.engine.tune.tuner.Tuner`)."""

    def __call__(
        self, task: BlockTask, weights: Sequence[TrainableWeights], settings: TuningSettings
    ) -> TuningOutcome: ...


class Quantize(Protocol):
    """A block by the method that a spec names; its schemes are the task's."""

    def __call__(self, task: BlockTask, spec: WeightSpec) -> BlockResult: ...


S_contra = TypeVar("S_contra", bound=WeightSpec, contravariant=True)


class BlockMethod(Protocol[S_contra]):
    """A quantization method. Activations of the task are empty where the spec's `observes_inputs` is false."""

    def quantize_block(self, task: BlockTask, spec: S_contra) -> BlockResult: ...


S = TypeVar("S", bound=WeightSpec)


@dataclass(frozen=True)
class Method(Generic[S]):
    """The `METHOD` that the file of a method defines: the spec that names it in a request, and its code."""

    spec: type[S]
    code: BlockMethod[S]


@runtime_checkable
class KernelMethod(Protocol[S_contra]):
    """A method with kernels of its own, which the engine compiles while texts are tokenized."""

    @abstractmethod
    def warm_ups(self, kinds: WarmUp, spec: S_contra) -> list[Callable[[], object]]:
        """Calls that compile the kernels for the linears of a model; none where there is nothing to compile."""
        ...


@runtime_checkable
class TensorMethod(Protocol[S_contra]):
    """A method that looks at nothing but a linear's weight, so that it needs no model around it."""

    @abstractmethod
    def quantize_tensor(
        self,
        weight: Tensor,
        scheme: Scheme,
        scale_dtype: torch.dtype,
        spec: S_contra,
        joined_amax: Tensor | None = None,
    ) -> LinearResult:
        """The result for one linear's weight (out, in), floating point, on the host.

        joined_amax   largest magnitude of all linears that a runtime joins with it; None: of it alone
        """
        ...


@runtime_checkable
class ScoringMethod(Protocol[S_contra]):
    """A method that says itself what a budget weighs; else that is the distance that rounding is predicted to add."""

    def candidate_errors(self, tasks: Sequence[ScoreTask], spec: S_contra) -> list[list[float]]:
        """For each linear of a block an error of each of its candidates, in one unit for all linears of a model."""
        ...
