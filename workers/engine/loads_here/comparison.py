"""A runtime's logits beside the engine's: how far apart they are, and how far they may be."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from app.domain.runtimes import Runtime

CLOSE: Mapping[Runtime, float] = MappingProxyType(
    {Runtime.TRANSFORMERS: 0.03, Runtime.PEFT: 0.03, Runtime.LLAMA_CPP: 0.1, Runtime.VLLM: 0.05}
)
"""Largest distance of the median token that two ways to compute the same numbers make. transformers and vLLM compute in
the model's dtype with roundings of their own; llama.cpp rounds activations to 8 bits besides."""
CLOSE_WITH_ACTIVATIONS: Mapping[Runtime, float] = MappingProxyType({Runtime.VLLM: 0.3})
"""The same where the scheme rounds activations, of the runtimes that compare with them rounded."""


ALL_TOKENS = 5.0
"""Times so far all tokens together may be off: a router sends a token that is close to two experts to either of them,
which is one token's matter in one block. Misread weights are the matter of all tokens, or of many by much."""
ROUTED = 5.0
"""Times so far a whole model with experts may be off: a block's odd tokens are read by all tokens of the next ones."""


@dataclass(frozen=True)
class Distance:
    """Logits from logits, root mean square in standard deviations of the first: of the median token, and of all."""

    typical: float
    overall: float

    def is_rounding(self, close: float) -> bool:
        """True if two ways to compute the same numbers may be so far apart; never where one is not finite."""
        return self.typical <= close and self.overall <= ALL_TOKENS * close


def distance(ours: Tensor, theirs: Tensor) -> Distance:
    """Between logits (tokens, vocabulary).

    A constant for each token counts for nothing: log-probabilities are as good as logits.
    """
    ours, theirs = (logits.double() - logits.double().mean(-1, keepdim=True) for logits in (ours, theirs))
    squares, scale = (ours - theirs).square().mean(-1), ours.square().mean()
    return Distance(float((squares.median() / scale).sqrt()), float((squares.mean() / scale).sqrt()))


def read_logits(data: bytes, tokens: int, vocabulary: int) -> Tensor | None:
    """Logits (tokens, vocabulary) from the bytes of their file; None if they are not so many."""
    if vocabulary <= 0 or len(data) != tokens * vocabulary * 4:
        return None
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(tokens, vocabulary)
