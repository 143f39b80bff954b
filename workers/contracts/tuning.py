"""The seam between the tuning loop and methods that learn."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from torch import Tensor

from workers.numerics.quantized import LinearResult, Number


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
        """The results that were remembered last, sharing no memory with the parameters."""
        ...


Gradients = Literal["exact", "quick", "eight_bits"]
"""Products that make gradients: in the model's dtype; in FP8 where that is quicker; in FP8 where it is possible."""


@dataclass(frozen=True)
class TuningSettings:
    """Steps of a block: each over `batch_size` sequences, the learning rate constant or decaying linearly to 0.

    half_batches   first steps that read half of their batch alone
    gradients      for methods that use signs alone, which small errors hardly turn, not only "exact"
    """

    steps: int
    batch_size: int
    learning_rate: float
    schedule: Literal["linear", "constant"] = "linear"
    half_batches: int = 0
    gradients: Gradients = "exact"


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
