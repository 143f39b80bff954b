"""Scales of a key-value cache in FP8, as runtimes keep it: k_hat = key_scale * e4m3(k / key_scale), v_hat alike.

One scale for all keys of an attention, after rotary embeddings, and one for its values: the largest magnitude in
calibration text over 448, the largest e4m3 (vLLM 0.33 and compressed-tensors 0.20 call them `k_scale` and `v_scale`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.errors import CorruptCheckpoint

LARGEST_E4M3 = 448.0
KEY_SCALE, VALUE_SCALE = "k_scale", "v_scale"


@dataclass(frozen=True)
class KVScales:
    """Scales of one attention's cached keys and values, each fp32 (1,) and above 0."""

    key: Tensor
    value: Tensor

    @classmethod
    def of_amax(cls, key: Tensor, value: Tensor) -> "KVScales":
        """Scales for the largest magnitudes of keys and values; of an attention that saw only zeros they are 1."""
        scales = (amax.float().reshape(1) / LARGEST_E4M3 for amax in (key, value))
        return cls(*(torch.where(scale > 0, scale, torch.ones_like(scale)) for scale in scales))

    def tensors(self, attention: str) -> dict[str, Tensor]:
        """Both by full name: `<attention>.k_scale` and `<attention>.v_scale`."""
        return {f"{attention}.{KEY_SCALE}": self.key, f"{attention}.{VALUE_SCALE}": self.value}

    @classmethod
    def read(cls, attention: str, tensors: Mapping[str, Tensor]) -> "KVScales":
        """The inverse of `tensors`.

        Raises:
            CorruptCheckpoint: one is missing, or is no positive number.
        """
        found = []
        for suffix in (KEY_SCALE, VALUE_SCALE):
            scale = tensors.get(f"{attention}.{suffix}")
            if scale is None or scale.shape != (1,) or not bool(scale.isfinite().all() & (scale > 0).all()):
                detail = f"{attention}.{suffix} should be one positive number"
                raise CorruptCheckpoint(detail, field=f"{attention}.{suffix}")
            found.append(scale.float())
        return cls(*found)
