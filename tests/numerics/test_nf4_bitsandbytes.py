"""NF4 against bitsandbytes: its codes and maxima, bit for bit, and each place where ours are others on purpose.

bitsandbytes is no dependency; tests/golden/README.md says how the file was made.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from app.domain.methods import Scheme
from workers.methods.normal_float import QLORA
from workers.numerics.normal_float import codebook, nearest_codes, quantize
from workers.numerics.quantized import CodebookWeight, QuantizedAbsmax

SCHEME = Scheme(bits=4, group_size=64, symmetric=True)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(Path(__file__).parents[1] / "golden" / "nf4_bitsandbytes.safetensors")


def twice(weight: Tensor) -> tuple[CodebookWeight, Tensor]:
    """With double quantization, and the maxima that come back, (groups,)."""
    found = quantize(weight, SCHEME, QLORA, weight.dtype)
    assert isinstance(found.absmax, QuantizedAbsmax)
    return found, found.absmax.dequantize().flatten()


def test_codes_and_maxima_are_the_same(golden: dict[str, Tensor]) -> None:
    found = quantize(golden["weight"], SCHEME, torch.float32, torch.bfloat16)
    assert isinstance(found.absmax, Tensor)
    assert torch.equal(found.codes, golden["codes"])
    assert torch.equal(found.absmax.flatten(), golden["absmax"])
    assert bool((found.absmax == 0).any()), "a block of zeros is among them"
    assert len(golden["codes"].unique()) == 16


def test_the_same_codes_and_maxima_give_the_same_weights(golden: dict[str, Tensor]) -> None:
    maxima = golden["absmax_twice"].view(40, 8)
    theirs = CodebookWeight(golden["codes"], codebook(4), maxima, SCHEME, torch.bfloat16)
    assert torch.equal(theirs.dequantize(), golden["dequantized_twice"])


def test_beside_a_midpoint_theirs_multiply_by_the_reciprocal_and_ours_divide(golden: dict[str, Tensor]) -> None:
    """w * (1/a) is rounded twice and w/a once: codes differ where that moves w over a midpoint, and nowhere else."""
    near, theirs, levels = golden["near"], golden["near_codes"], codebook(4)
    ours = quantize(near, SCHEME, torch.float32, torch.float32).codes
    largest = near.abs().amax(1, keepdim=True)
    assert torch.equal(nearest_codes((near * (1 / largest)).clamp(-1, 1), levels), theirs)
    assert torch.equal(nearest_codes(near / largest, levels), ours)
    assert torch.equal(ours[0], theirs[0]), "with a maximum of 1 both are exact, and a midpoint goes down for both"
    assert ours[0, 1:45:3].tolist() == list(range(15))
    rows, columns = (ours != theirs).nonzero(as_tuple=True)
    assert 0 < len(rows) < 0.1 * near.numel()
    errors = [
        (near[rows, columns].double() - levels[codes[rows, columns].long()].double() * largest[rows, 0].double()).abs()
        for codes in (ours, theirs)
    ]
    assert bool(((errors[0] - errors[1]).abs() <= 2**-22 * largest[rows, 0]).all()), "either is as near as the other"


def test_double_quantization_is_another_second_level_of_the_same_size(golden: dict[str, Tensor]) -> None:
    """Theirs: 8-bit floats around the mean. Ours: 256 even steps from the least to the largest, and so nearer."""
    exact, theirs = golden["absmax"], golden["absmax_twice"]
    found, ours = twice(golden["weight"])
    assert isinstance(found.absmax, QuantizedAbsmax)
    assert found.absmax.codes.numel() == len(exact) == 320
    assert found.absmax.scale.shape == golden["absmax_scales"].shape == (2,)
    assert found.absmax.scale.dtype == golden["absmax_scales"].dtype == torch.float32
    for first in (0, 256):
        part = slice(first, first + 256)
        half_step = float(exact[part].max() - exact.min()) / 255 / 2
        assert float((ours[part] - exact[part]).abs().max()) <= 1.001 * half_step
    assert (ours - exact).norm() < 0.6 * (theirs - exact).norm()


def test_codes_under_double_quantization_differ_where_they_are_found_with_the_maxima_that_ship(
    golden: dict[str, Tensor],
) -> None:
    """Theirs are found with the exact maxima. Ours are the nearest of what ships, and the weights no further off."""
    weight = golden["weight"].float()
    found, ours = twice(golden["weight"])
    quotients = weight.view(-1, 64) / torch.where(ours == 0, 1, ours)[:, None]
    assert torch.equal(nearest_codes(quotients, codebook(4)).view(weight.shape), found.codes)
    changed = (found.codes.int() - golden["codes"].int()).abs()
    assert 0 < int((changed > 0).sum()) < 0.01 * weight.numel()
    assert int(changed.max()) == 1
    assert (found.dequantize().float() - weight).norm() < (golden["dequantized_twice"].float() - weight).norm()
