"""The seam between finetuning and adapters."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import ClassVar, Protocol, Self

from torch import Tensor, nn

from workers.numerics.quantized import LinearResult


class TrainableAdapter(nn.Module):
    """A module that is trained beside a quantized linear, and what else its training asks for.

    Its parameters are fp32 (fp64 beside fp64 weights), and all of them are trained. It is called as adapter(x) with the
    inputs of its linear (..., in) and returns what is added to the output, (..., out) in the dtype of x. Random numbers
    that it draws while it trains are torch's global ones: each step seeds them.

    rates        learning rates of parameters that have their own, by name; these are not decayed
    pass_bytes   bytes that `together` keeps per trained number until the passes have ended
    draws_noise  whether a call may draw random numbers while it trains, beside what `together` draws; a class that says
                 it does not has its passes captured where blocks are computed again
    """

    rates: Mapping[str, float] = MappingProxyType({})
    pass_bytes: ClassVar[int] = 0
    draws_noise: bool = True

    def progress(self, share: float) -> None:
        """Called before each step with the share of the training that is done.

        A parameter that it excludes from gradients moves no more, not by momentum either. Passes may be captured: what
        they compute changes by this call at no other time.
        """

    @classmethod
    def together(cls, adapters: Sequence[Self]) -> AbstractContextManager[None]:
        """A context around the passes of each batch, in which all adapters of the class may compute at once."""
        del adapters
        return nullcontext()

    @classmethod
    def penalty(cls, adapters: Sequence[Self]) -> Tensor | None:
        """A term of every step's loss for all adapters of the class, a scalar on the device; None if there is none."""
        del adapters
        return None


class AttachAdapters(Protocol):
    """Makes the adapters that training puts beside quantized linears, on the device of their weights."""

    def __call__(self, linears: Mapping[str, LinearResult], seed: int) -> Mapping[str, TrainableAdapter]:
        """By full linear name, for a block's linears; the same for the same seed.

        An adapter takes over the `low_rank` of its linear: beside it the weight alone is the base.
        """
        ...


class AdapterFactory(AttachAdapters, Protocol):
    """`AttachAdapters` of one class of adapters, whose memory is planned before any of them is made."""

    @property
    def pass_bytes(self) -> int:
        """That of the class."""
        ...
