"""The seam between the engine and the methods: what a method is given for a block, and what it must return.

A method that learns describes each linear as a `TrainableWeight` and hands them to `task.tune`, the engine's one
tuning loop. Everything such a method learns acts through the weight, so the loop needs no more than the weight's
value and gives back no more than the gradient with respect to it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from app.domain.methods import Scheme, WeightSpec
from workers.numerics.quantized import BlockResult, LinearResult


class BlockForward(Protocol):
    """Calls a block as its model does (masks, rotary): hidden (batch, length, width) -> the same shape."""

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor: ...


class TrainableWeight(Protocol):
    """A linear's weight as a function of what a method learns."""

    def weight(self) -> Tensor:
        """W_hat of the present parameters in the model's dtype, (out, in)."""
        ...

    def step(self, gradient: Tensor, learning_rate: float) -> None:
        """Moves the parameters once, given dL/dW_hat, (out, in); called after `weight`."""
        ...

    def result(self) -> LinearResult:
        """The quantized weight of the present parameters, sharing no memory with them."""
        ...


@dataclass(frozen=True)
class TuningSettings:
    """Steps of a block: each over `batch_size` sequences, the learning rate decaying linearly to 0."""

    steps: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class TuningOutcome:
    """The results of the step with the lowest held-out loss, and that loss at the start and then."""

    linears: dict[str, LinearResult]
    loss_initial: float
    loss: float
    best_step: int


@dataclass(frozen=True)
class BlockTask:
    """One decoder block to quantize.

    block       the original block on `device`, weights in the model's dtype; a method may replace weights while it
                works, and leaves the module as it found it
    forward     calls the block as the model does
    inputs      X_q, (samples, length, width): what the quantized blocks before this one produce
    inputs_fp   X_fp, the same of the original blocks
    targets     Y = block(X_fp), (samples, length, width)
    schemes     linear name inside the block -> its scheme; ignored linears are absent
    scale_dtype dtype in which the formats of this job store scales
    seed        of this block
    micro_batch sequences that fit through the block at once with gradients
    tick        told the share of the block that is done, 0 to 1; may be called often
    """

    index: int
    block: nn.Module
    forward: BlockForward
    inputs: Tensor
    inputs_fp: Tensor
    targets: Tensor
    schemes: Mapping[str, Scheme]
    scale_dtype: torch.dtype
    device: torch.device
    seed: int
    micro_batch: int
    tick: Callable[[float], None]
    tune: "Tune"

    def linear(self, name: str) -> nn.Linear:
        """The block's linear of that name."""
        module = self.block.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{name} is {type(module).__name__}, not Linear")
        return module


class Tune(Protocol):
    """The engine's tuning loop (`workers.engine.tuning.tune`)."""

    def __call__(
        self, task: BlockTask, weights: Mapping[str, TrainableWeight], settings: TuningSettings
    ) -> TuningOutcome: ...


S_contra = TypeVar("S_contra", bound=WeightSpec, contravariant=True)


class BlockMethod(Protocol[S_contra]):
    """A quantization method. `needs_inputs`: whether it looks at activations (else they may be empty)."""

    needs_inputs: bool

    def quantize_block(self, task: BlockTask, spec: S_contra) -> BlockResult: ...
