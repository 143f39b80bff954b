"""A runtime's logits beside the engine's: how far apart they are, and how far they may be."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from app.domain.runtimes import Runtime

CLOSE: Mapping[Runtime, float] = MappingProxyType(
    {Runtime.TRANSFORMERS: 0.03, Runtime.PEFT: 0.03, Runtime.LLAMA_CPP: 0.1, Runtime.VLLM: 0.05}
)
"""Largest difference that two ways to compute the same numbers make. transformers and vLLM compute in the model's dtype
with roundings of their own; llama.cpp rounds activations to 8 bits besides."""
CLOSE_WITH_ACTIVATIONS: Mapping[Runtime, float] = MappingProxyType({Runtime.VLLM: 0.3})
"""The same where the scheme rounds activations, of the runtimes that compare with them rounded."""


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Root mean square of what is between logits (tokens, vocabulary), in standard deviations of `ours`.

    A constant for each token counts for nothing: log-probabilities are as good as logits. NaN where one is not finite.
    """
    ours, theirs = (logits.double() - logits.double().mean(-1, keepdim=True) for logits in (ours, theirs))
    return float((ours - theirs).square().mean().sqrt() / ours.square().mean().sqrt())


def read_logits(data: bytes, tokens: int, vocabulary: int) -> Tensor | None:
    """Logits (tokens, vocabulary) from the bytes of their file; None if they are not so many."""
    if vocabulary <= 0 or len(data) != tokens * vocabulary * 4:
        return None
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(tokens, vocabulary)
