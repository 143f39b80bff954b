"""The method against QLoRA's own numbers, by brute force."""

import pytest
import torch

from app.domain.methods import NormalFloatSpec, Scheme
from app.domain.request.job_request import JobRequest
from bitwright.errors import InvalidRequest
from tests.methods.toy_block import toy_task
from workers.methods.normal_float import NormalFloat
from workers.numerics.quantized import CodebookWeight, QuantizedAbsmax


def codebook_weight(bits: int, double: bool) -> tuple[torch.Tensor, CodebookWeight]:
    scheme = Scheme(bits=bits, group_size=16, symmetric=True)
    task = toy_task({"up": scheme, "down": scheme})
    spec = NormalFloatSpec(bits=bits, group_size=16, double_quantization=double)
    result = NormalFloat().quantize_block(task, spec)
    assert result.linears.keys() == {"up", "down"}
    weight = result.linears["up"].weight
    assert isinstance(weight, CodebookWeight)
    return task.linear("up").weight.detach(), weight


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("double", [True, False])
def test_each_weight_is_the_nearest_value_of_its_group(bits: int, double: bool) -> None:
    original, found = codebook_weight(bits, double)
    assert isinstance(found.absmax, QuantizedAbsmax) == double
    largest = found.absmax.dequantize() if isinstance(found.absmax, QuantizedAbsmax) else found.absmax
    levels = found.codebook.double() * largest.double()[..., None, None]
    groups = original.double().view(*largest.shape, -1, 1)
    nearest = (groups - levels).abs().amin(-1)
    taken = (groups.squeeze(-1) - found.dequantize().double().view(*largest.shape, -1)).abs()
    assert (taken - nearest).max() <= 1e-7
    exact = original.view(*largest.shape, -1).abs().amax(-1)
    assert (largest - exact).abs().max() <= (exact.max() - exact.min()) / 255


def test_qloras_sizes_are_4_127_bits_a_weight() -> None:
    assert pytest.approx(4.126953, abs=1e-6) == 4 + 8 / 64 + 32 / (64 * 256)
    _, found = codebook_weight(4, double=True)
    assert isinstance(found.absmax, QuantizedAbsmax)
    assert (found.absmax.bits, found.absmax.superblock, found.absmax.scale.dtype) == (8, 256, torch.float32)


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 5},
        {"symmetric": False},
        {"quantization": {"method": "nf", "modules": {"overrides": {"*": {"symmetric": False}}}}},
    ],
)
def test_what_normal_float_cannot_do_is_refused(fields: dict[str, object]) -> None:
    body = {"model": "org/name", **({} if "quantization" in fields else {"method": "nf"}), **fields}
    with pytest.raises(InvalidRequest):
        JobRequest.parse(body)
