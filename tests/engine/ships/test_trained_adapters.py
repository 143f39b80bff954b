"""Adapters at the end of a job: merged as the request says, with offsets of one dtype for all of its formats."""

from typing import Any

import pytest
import torch

from app.domain.methods import Scheme
from app.domain.request.job_request import JobRequest
from tests.formats.examples import random_result
from workers.adapters.attaching import Attach
from workers.engine.shipped import TrainedAdapters
from workers.numerics.quantized import AffineWeight, LinearResult

NAME = "model.layers.0.mlp.up_proj"
BASE = random_result((48, 64), Scheme(bits=4, group_size=32, symmetric=False), torch.float16)


def trained(formats: list[str], **ending: Any) -> TrainedAdapters:
    request = JobRequest.parse(
        {
            "model": "/model",
            **{"method": "qa-lora", "bits": 4, "group_size": 32, "rank": 4, "symmetric": False},
            **{"finetune": {"dataset": "builtin"}, "formats": formats, **ending},
        }
    )
    assert request.adapter is not None
    modules = Attach(request.adapter)({NAME: BASE}, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in modules[NAME].parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return TrainedAdapters.of(request, request.adapter, modules)


def both(adapters: TrainedAdapters) -> list[LinearResult]:
    """As it is measured, and as it is written."""
    return [adapters.result(NAME, BASE), adapters.results({NAME: BASE})[NAME], adapters.finished(NAME, BASE).result]


@pytest.mark.parametrize(
    ("formats", "dtype"),
    [
        (["native"], torch.float32),
        (["native", "merged"], torch.float32),
        (["gguf"], torch.float16),
        (["native", "gguf"], torch.float16),
        (["gguf", "merged"], torch.float16),
    ],
)
def test_all_formats_of_a_job_hold_the_same_offsets(formats: list[str], dtype: torch.dtype) -> None:
    """GGUF has fp16 ones: beside it the native checkpoint has those, too."""
    adapters = trained(formats, merge="quantized")
    factors = {name: tensor.double() for name, tensor in adapters.modules[NAME].state_dict().items()}
    group_delta = factors["b"] @ factors["a"]
    assert isinstance(BASE.weight, AffineWeight)
    assert BASE.weight.zero_point is not None
    scale = 16 / 4 / 32
    exact = group_delta * scale - BASE.weight.scale.double() * BASE.weight.zero_point.double()
    for result in both(adapters):
        assert isinstance(result.weight, AffineWeight)
        assert result.weight.offset is not None
        assert result.weight.offset.dtype == dtype
        assert torch.equal(result.weight.offset, exact.to(dtype))
        assert torch.equal(result.weight.codes, BASE.weight.codes)


def test_zero_points_are_rounded_where_it_is_asked_for_alone() -> None:
    for result in both(trained(["native"], merge="quantized", round_offset=True)):
        assert isinstance(result.weight, AffineWeight)
        assert result.weight.offset is None
        assert result.weight.zero_point is not None


@pytest.mark.parametrize(("merge", "folded", "beside"), [("quantized", True, False), ("16bit", False, True)])
def test_a_merge_is_the_one_that_is_asked_for(merge: str, folded: bool, beside: bool) -> None:
    formats = ["native"] if folded else ["merged"]
    adapters = trained(formats, merge=merge)
    for result in both(adapters):
        assert isinstance(result.weight, AffineWeight)
        assert (result.weight.offset is not None) is folded
        assert (result.low_rank is not None) is beside
    assert (adapters.finished(NAME, BASE).proof is not None) is folded
    for result in both(trained(["native"])):
        assert result.weight is BASE.weight
        assert result.low_rank is None


def test_a_linear_without_an_adapter_is_its_base() -> None:
    adapters = trained(["native"], merge="quantized")
    assert adapters.result("model.layers.0.mlp.down_proj", BASE) is BASE
    assert adapters.finished("model.layers.0.mlp.down_proj", BASE).result is BASE
    assert adapters.finished("model.layers.0.mlp.down_proj", BASE).proof is None
