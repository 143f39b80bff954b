"""Folders of single quantized weights, and of the tiny model with all of its linears quantized in one way."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from workers.engine.model.checkpoint import Checkpoint


def written(folder: Path, settings: object, tensors: Mapping[str, Tensor], dtype: str = "float32") -> Checkpoint:
    """A checkpoint with these tensors and this quantization_config, opened."""
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {"model_type": "llama", "dtype": dtype, "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return Checkpoint.open(folder)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Weights of the usual size, fp32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def exactly(one: Tensor, other: Tensor) -> bool:
    """True if dtype, shape and every bit are equal, but for the sign of zero."""
    return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
