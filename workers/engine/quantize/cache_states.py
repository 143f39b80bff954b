"""Keys and values of a block's attention as its cache gets them: after norms and rotary embeddings.

transformers' attention gives both to `past_key_values.update` and goes on with what that returns (5.23). So an object
in the place of a cache sees them, or rounds them as a runtime with an FP8 cache reads them back.
"""

from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import UnsupportedArchitecture
from workers.contracts.kv_cache import LARGEST_E4M3, KVScales
from workers.engine.model.block_calls import BlockCall

CACHE = "past_key_values"


class CacheWatch:
    """Largest magnitudes of keys and values, fp32 () on their device; None before the first."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The states as they are."""
        self.key, self.value = _larger(self.key, key), _larger(self.value, value)
        return key, value


class RoundedCache:
    """Keys and values as a runtime reads them from an FP8 cache with these scales."""

    def __init__(self, scales: KVScales, device: torch.device) -> None:
        self._key, self._value = scales.key.to(device), scales.value.to(device)

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The states, rounded."""
        return _rounded(key, self._key), _rounded(value, self._value)


def with_cache(call: BlockCall, cache: CacheWatch | RoundedCache) -> BlockCall:
    """The call with `cache` in the place of the one that the model does not use.

    Raises:
        UnsupportedArchitecture: the block is not given a cache by that name.
    """
    if CACHE not in call.keywords:
        raise UnsupportedArchitecture(
            "blocks of this model are given no cache of keys and values that could be looked at",
            field="quantization.kv_cache",
            hint="leave kv_cache out",
        )
    return BlockCall(call.arguments, {**call.keywords, CACHE: cache}, call.by_row)


def attention_of(block: nn.Module) -> str | None:
    """Name inside a block of the module that attends; None if there is none."""
    found = (name for name, module in block.named_modules() if name and "Attention" in type(module).__name__)
    return next(found, None)


def _larger(known: Tensor | None, states: Tensor) -> Tensor:
    amax = states.detach().abs().amax().float()
    return amax if known is None else torch.maximum(known, amax)


def _rounded(states: Tensor, scale: Tensor) -> Tensor:
    in_steps = (states.float() / scale).clamp(-LARGEST_E4M3, LARGEST_E4M3)
    return (in_steps.to(torch.float8_e4m3fn).float() * scale).to(states.dtype)
