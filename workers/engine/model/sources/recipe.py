"""Recipes: how a checkpoint that is stored in another way makes one tensor of those that it presents."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from app.domain.inputs.quantized.stored import QuantizedTensor
from workers.engine.model.sources.registry import DEQUANTIZERS

ReadStored = Callable[[Path, str], Tensor]
"""File and name of a stored tensor -> the tensor."""
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
DEFAULT_DTYPE = "bfloat16"


class Recipe(Protocol):
    """Makes a tensor, in fp32 and then rounded to the checkpoint's dtype."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that it reads."""

    def make(self, read: ReadStored) -> Tensor:
        """The tensor on the host."""


@dataclass(frozen=True)
class Dequantized:
    """A weight of stored codes.

    places   stored name -> its file
    """

    weight: QuantizedTensor
    places: Mapping[str, Path]
    dtype: torch.dtype

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that it reads."""
        return tuple(sorted(set(self.places.values())))

    def make(self, read: ReadStored) -> Tensor:
        """The weight, in one pass over its codes."""
        parts = {role: read(self.places[name], name) for role, name in self.weight.parts.items()}
        return DEQUANTIZERS[self.weight.kind](parts, self.weight).to(self.dtype).contiguous()


def presented_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that dequantized weights have, by its name in configurations: the configuration's, or bfloat16."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for field in ("dtype", "torch_dtype"):
            name = str(part.get(field)).removeprefix("torch.")
            if name in DTYPES:
                return name
    return DEFAULT_DTYPE


def presented_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that says nothing of quantization, and names the dtype of the dequantized weights."""
    plain = {name: value for name, value in config.items() if name not in ("quantization_config", "compression_config")}
    named = any(plain.get(field) is not None for field in ("dtype", "torch_dtype"))
    text = plain.get("text_config")
    if isinstance(text, Mapping):
        plain["text_config"] = {name: value for name, value in text.items() if name != "quantization_config"}
        named = named or any(text.get(field) is not None for field in ("dtype", "torch_dtype"))
    return plain if named else {**plain, "dtype": DEFAULT_DTYPE}
