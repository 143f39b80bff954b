"""The seam between the engine and the methods: what a method is given for a block, and what it must return.

A method that learns describes a block's linears as `TrainableWeights` and hands them to `task.tune`, the engine's one
tuning loop. Everything such a method learns acts through the weight, so the loop needs no more than the weight's
value and gives back no more than the gradient with respect to it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from app.domain.methods import Scheme, WeightSpec
from workers.numerics.quantized import BlockResult, LinearResult, Number


class BlockForward(Protocol):
    """Calls a block, or a method of it, as its model does (masks, rotary) on hidden (batch, length, width)."""

    def __call__(self, block: Callable[..., Any], hidden: Tensor) -> Any: ...


class TrainableWeights(Protocol):
    """Some linears' weights as a function of what a method learns, flat: one tensor holds them one after another.

    Every tensor stays where it is on the device and no method waits for the device, so that the loop can capture its
    steps once and replay them for each block of the same shape.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """(out, in) of each linear by its name inside the block, in the order in which they lie in flat tensors."""
        ...

    def write(self, out: Tensor) -> None:
        """Writes W_hat of the present parameters into `out`, flat, in the model's dtype."""
        ...

    def step(self, gradient: Tensor, rate: Tensor, out: Tensor) -> None:
        """Moves the parameters once, given dL/dW_hat, flat, and the learning rate, a number on the device.

        The new W_hat goes into `out`, as `write` does it. For fp16 the gradient is a constant times dL/dW_hat.
        """
        ...

    def keep(self, better: Tensor) -> None:
        """Remembers the present parameters' result if `better`, a truth value on the device."""
        ...

    def restart(self) -> None:
        """Back to the start, nothing remembered."""
        ...

    def adopt(self, other: Self) -> None:
        """Takes over the start of another block's weights of the same shapes."""
        ...

    def faults(self) -> Number:
        """Times since the start that a gradient held NaN, which moves nothing."""
        ...

    def results(self) -> dict[str, LinearResult]:
        """What was remembered last, sharing no memory with the parameters."""
        ...


@dataclass(frozen=True)
class TuningSettings:
    """Steps of a block: each over `batch_size` sequences, the learning rate decaying linearly to 0."""

    steps: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class TuningOutcome:
    """The results of the step with the lowest held-out loss, and that loss at the start and then.

    On a GPU numbers are tensors: reading one waits for the device, and a loss that is not finite is an error.

    faults   gradients that held NaN, see `TrainableWeights.faults`
    """

    linears: dict[str, LinearResult]
    loss_initial: Number
    loss: Number
    best_step: Number
    faults: Number


@dataclass(frozen=True)
class BlockTask:
    """One decoder block to quantize. Where several ranks share the work, samples are those of this rank.

    block       the original block on `device`, weights in the model's dtype; a method may replace weights while it
                works, and leaves the module as it found it
    forward     calls the block as the model does
    inputs      X_q, (samples, length, width): what the quantized blocks before this one produce
    inputs_fp   X_fp, the same of the original blocks; empty unless the spec's `needs_original_inputs` says so
    targets     Y = block(X_fp), (samples, length, width)
    schemes     linear name inside the block -> its scheme; ignored linears are absent
    moments     linear name -> sum over tokens of x_j^2 of its inputs in the original stream, fp32 (in,); may be empty
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
    moments: Mapping[str, Tensor]
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


@dataclass(frozen=True)
class WarmUp:
    """What a method's kernels will be compiled for: (in_features, scheme) of the linears, dtypes and device."""

    linears: frozenset[tuple[int, Scheme]]
    dtype: torch.dtype
    scale_dtype: torch.dtype
    device: torch.device


class Tune(Protocol):
    """The engine's tuning loop (`workers.engine.tuning.tune`)."""

    def __call__(
        self, task: BlockTask, weights: Sequence[TrainableWeights], settings: TuningSettings
    ) -> TuningOutcome: ...


S_contra = TypeVar("S_contra", bound=WeightSpec, contravariant=True)


class BlockMethod(Protocol[S_contra]):
    """A quantization method. `needs_inputs`: whether it looks at activations (else they may be empty)."""

    needs_inputs: bool

    def quantize_block(self, task: BlockTask, spec: S_contra) -> BlockResult: ...


class AttachAdapters(Protocol):
    """Makes the adapters that training puts beside quantized linears, on the device of their weights.

    An adapter is a module with fp32 parameters (fp64 beside fp64 weights), all of which are trained. It is called as
    adapter(x) with the inputs of its linear (..., in) and returns what is added to the output, (..., out) in the dtype
    of x. Random numbers that it draws while it trains are torch's global ones: each step seeds them. It may have:

    rates            learning rates of parameters of their own, by name; those are not decayed
    penalty()        a term of every step's loss, a scalar on the device
    progress(share)  told before each step which share of the training is done; a parameter that it then excludes from
                     gradients moves no more, not by momentum either
    """

    def __call__(self, linears: Mapping[str, LinearResult], seed: int) -> dict[str, nn.Module]:
        """By full linear name, for a block's linears; the same for the same seed.

        An adapter takes over the `low_rank` of its linear: beside it the weight alone is the base.
        """
        ...
