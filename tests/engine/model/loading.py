"""Checkpoints of a job as a user loads them: bases, adapters, and the logits that they give."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    found = model(ids).logits
    assert isinstance(found, Tensor)
    return found


def loader(folder: Path, name: str = "load_bitwright") -> Any:
    """The loader that lies in the artifact."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def base_of(folder: Path) -> Any:
    """The base of an adapter, as the adapter's card says for each format."""
    if folder.name == "native":
        return loader(folder).load(folder, merge=False)
    if folder.name == "compressed-tensors":
        config = CompressedTensorsConfig(dequantize=True)
        with pytest.warns(UserWarning, match="You passed `quantization_config`"):
            return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    return AutoModelForCausalLM.from_pretrained(folder)
