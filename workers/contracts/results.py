"""The result of a method for one block."""

from dataclasses import dataclass, field

from torch import Tensor

from workers.numerics.quantized import LinearResult, Number


@dataclass(frozen=True)
class BlockResult:
    """Output of a method for one block: a result for each linear by its name inside the block, and its losses.

    Losses are mean squared errors of the block's output on the method's held-out sequences; None for methods
    that do not look at it.

    parameters  others that change with the linears (norms, biases) by name inside the block, in the model's dtype
    counters    what happened how often, for the report
    """

    linears: dict[str, LinearResult]
    loss_initial: Number | None = None
    loss: Number | None = None
    counters: dict[str, Number] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
