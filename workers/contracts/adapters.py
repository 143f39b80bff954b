"""The seam between finetuning and adapters."""

from collections.abc import Mapping
from typing import Protocol

from torch import nn

from workers.numerics.quantized import LinearResult


class AttachAdapters(Protocol):
    """Makes the adapters that training puts beside quantized linears, on the device of their weights.

    An adapter is a module with fp32 parameters (fp64 beside fp64 weights), all of which are trained. It is called as
    adapter(x) with the inputs of its linear (..., in) and returns what is added to the output, (..., out) in the dtype
    of x. Random numbers that it draws while it trains are torch's global ones: each step seeds them. It may have:

    rates            learning rates of parameters of their own, by name; those are not decayed
    progress(share)  told before each step which share of the training is done; a parameter that it then excludes from
                     gradients moves no more, not by momentum either. Its passes may be captured: what it computes
                     changes by that at no other time

    and its class, of all adapters of the job at once:

    penalty(adapters)   a term of every step's loss, a scalar on the device
    together(adapters)  a context around the passes of each batch: what adapters can compute together is computed there

    and the maker itself:

    pass_bytes   that `together` keeps for each trained number until the passes have ended
    """

    def __call__(self, linears: Mapping[str, LinearResult], seed: int) -> dict[str, nn.Module]:
        """By full linear name, for a block's linears; the same for the same seed.

        An adapter takes over the `low_rank` of its linear: beside it the weight alone is the base.
        """
        ...
