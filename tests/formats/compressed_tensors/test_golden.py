"""compressed-tensors' own bytes of every scheme, read and written again; `tests/golden/README.md` says how."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from app.domain.methods import Scheme, SchemeName
from tests.formats.examples import assert_same
from workers.formats.compressed_tensors import compress, decompress
from workers.formats.stored_linear import StoredLinear
from workers.numerics.floats.float_grids import quantize
from workers.numerics.quantized import LinearResult

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "compressed_tensors_weights.safetensors")
PRESETS = {
    "FP8": "fp8-tensor",
    "FP8_DYNAMIC": "fp8",
    "FP8_BLOCK": "fp8-block",
    "W8A8": "int8",
    "NVFP4": "nvfp4",
    "MXFP4": "mxfp4",
    "MXFP8": "mxfp8",
}
CALIBRATED = ("FP8", "NVFP4")
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def of_preset(preset: str) -> dict[str, Tensor]:
    return {f"x.{name.split('.', 1)[1]}": t for name, t in GOLDEN.items() if name.startswith(f"{preset}.")}


def read(preset: str) -> LinearResult:
    scheme = Scheme.named(SchemeName(PRESETS[preset]))
    stored = StoredLinear(
        form=scheme.form,
        bits=scheme.bits,
        group_size=scheme.group_size,
        symmetric=True,
        dtype="float32",
        scheme_name=scheme.name,
        input_amax=preset in CALIBRATED,
    )
    return decompress("x", of_preset(preset), stored)


def by_hand(preset: str) -> Tensor:
    """The weight in fp64, from the bytes and the tables of the formats."""
    stored = of_preset(preset)
    packed, scale = stored.get("x.weight_packed"), stored["x.weight_scale"]
    if packed is not None:
        codes = torch.stack([packed & 15, packed >> 4], 2).flatten(1).long()
        values = torch.tensor([*E2M1, *(-m for m in E2M1)], dtype=torch.float64)[codes]
    else:
        values = stored["x.weight"].double()
    factor = 2.0 ** (scale.double() - 127) if scale.dtype == torch.uint8 else scale.double()
    if preset == "NVFP4":
        factor = (scale.float() / stored["x.weight_global_scale"]).double()
    rows, columns = values.shape
    factor = factor.view(1, 1) if factor.ndim == 1 else factor
    band = {1: rows, 2: 128}.get(len(factor), 1)
    width = {1: columns, 2: 128, 5: 32, 10: 16}[factor.shape[1]]
    return values * factor.repeat_interleave(band, 0)[:rows].repeat_interleave(width, 1)[:, :columns]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_weight_is_what_the_bytes_say(preset: str) -> None:
    result = read(preset)
    assert torch.equal(result.dequantize(), by_hand(preset).float())
    error = (by_hand(preset) - GOLDEN["weight"].double()).norm() / GOLDEN["weight"].double().norm()
    assert error < (0.14 if preset in ("NVFP4", "MXFP4") else 0.04)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_same_bytes_are_written_again(preset: str) -> None:
    assert_same(compress("x", read(preset)), of_preset(preset))


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != "W8A8"])
def test_rounding_to_nearest_makes_the_same_bytes(preset: str) -> None:
    """Of int8, compressed-tensors puts the largest weight half a step beyond the grid."""
    made = quantize(GOLDEN["weight"].float(), Scheme.named(SchemeName(PRESETS[preset])), torch.float32)
    theirs = of_preset(preset)
    ours = compress("x", LinearResult(replace(made, input_amax=GOLDEN["input_amax"] if preset in CALIBRATED else None)))
    for name, tensor in theirs.items():
        numbers = [each.float() for each in (ours[name], tensor)]
        if name == "x.weight_scale" and tensor.ndim == 2 and tensor.shape[1] > 2:
            for each in numbers:  # of a group of zeros the scale does not matter
                each[3, 64 * each.shape[1] // 160 : 96 * each.shape[1] // 160] = 0
        assert torch.equal(*numbers), name


@pytest.mark.parametrize("preset", CALIBRATED)
def test_the_largest_magnitude_of_inputs_comes_back(preset: str) -> None:
    amax = getattr(read(preset).weight, "input_amax", None)
    assert amax is not None
    assert amax.tolist() == [2.75]
