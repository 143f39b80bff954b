"""bitsandbytes' weights, against what bitsandbytes made and reads (`tests/golden/README.md` says how)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.engine.model.sources.folders import exactly, written

GOLDEN = Path(__file__).parents[3] / "golden" / "bitsandbytes_weights.safetensors"
SETTINGS = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def stored(name: str) -> tuple[dict[str, Tensor], Tensor]:
    """Stored tensors of a weight, and the weight."""
    found = {key: tensor for key, tensor in load_file(GOLDEN).items() if key.startswith(f"{name}.")}
    return found, found.pop(f"{name}.dequantized")


@pytest.mark.parametrize("name", ["nf4_plain", "nf4_nested", "fp4_plain", "fp4_nested"])
def test_four_bits_are_what_bitsandbytes_makes_of_them(name: str, tmp_path: Path) -> None:
    tensors, wanted = stored(name)
    checkpoint = written(tmp_path, SETTINGS, tensors)
    assert set(checkpoint.tensors) == {f"{name}.weight"}
    assert checkpoint.tensors[f"{name}.weight"].shape == (48, 70)
    assert exactly(checkpoint.read(f"{name}.weight"), wanted)


def test_codes_may_be_stored_as_another_dtype(tmp_path: Path) -> None:
    tensors, wanted = stored("nf4_plain")
    tensors["nf4_plain.weight"] = tensors["nf4_plain.weight"].flatten().view(torch.bfloat16).view(-1, 1)
    assert exactly(written(tmp_path, SETTINGS, tensors).read("nf4_plain.weight"), wanted)


def test_eight_bits_are_what_bitsandbytes_makes_of_them(tmp_path: Path) -> None:
    tensors, wanted = stored("int8")
    checkpoint = written(tmp_path, {"load_in_8bit": True}, tensors)
    assert set(checkpoint.tensors) == {"int8.weight"}
    assert exactly(checkpoint.read("int8.weight"), wanted)
