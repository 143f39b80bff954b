"""Rounded inputs of linears against compressed-tensors' fake quantization, and against the formula for INT8."""

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor, nn

from app.domain.methods import Scheme, SchemeName
from workers.numerics.floats.input_rounding import InputRounding, input_roundings, rounding_inputs

FLOAT8 = {"num_bits": 8, "type": "float"}
ARGS: dict[SchemeName, dict[str, Any]] = {
    SchemeName.FP8: {**FLOAT8, "strategy": "token", "dynamic": True},
    SchemeName.FP8_BLOCK: {**FLOAT8, "strategy": "group", "group_size": 128},
    SchemeName.FP8_TENSOR: {**FLOAT8, "strategy": "tensor"},
    SchemeName.MXFP4: {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": torch.uint8,
    },
    SchemeName.MXFP8: {**FLOAT8, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    SchemeName.NVFP4: {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": torch.float8_e4m3fn,
    },
}


def inputs(columns: int = 256) -> Tensor:
    x = torch.randn(3, 7, columns, generator=torch.Generator().manual_seed(2))
    x[..., 5] *= 30
    return x


def rounding(name: SchemeName, amax: float | None = None) -> InputRounding:
    known = {} if amax is None else {"linear": torch.tensor([amax])}
    return input_roundings({"linear": Scheme.named(name)}, known)["linear"]


def theirs(x: Tensor, name: SchemeName, amax: float) -> Tensor:
    args, divisor = QuantizationArgs(**ARGS[name]), None
    if name is SchemeName.NVFP4:
        divisor = torch.tensor([448 * 6 / amax])
    if name is SchemeName.FP8_TENSOR:
        scale, zero = torch.tensor([amax / 448]), torch.zeros(1)
    else:
        groups = x if args.group_size is None else x.unflatten(-1, (-1, args.group_size))
        keep = args.group_size is None
        scale, zero = calculate_qparams(
            groups.amin(-1, keepdim=keep), groups.amax(-1, keepdim=keep), args, global_scale=divisor
        )
    found: Tensor = fake_quantize(x, scale, zero, args, global_scale=divisor)
    return found


@pytest.mark.parametrize("name", ARGS)
def test_it_is_what_compressed_tensors_computes(name: SchemeName) -> None:
    x, amax = inputs(), 60.0
    found = rounding(name, amax if name in {SchemeName.NVFP4, SchemeName.FP8_TENSOR} else None)(x)
    torch.testing.assert_close(found, theirs(x, name, amax), rtol=1e-6, atol=1e-7)
    assert not torch.equal(found, x)


def test_int8_is_a_scale_per_token_by_the_largest_magnitude_over_127() -> None:
    x = inputs().double()
    scale = x.abs().amax(-1, keepdim=True) / 127
    torch.testing.assert_close(rounding(SchemeName.INT8)(x.float()).double(), (x / scale).round() * scale)


@pytest.mark.parametrize("name", [SchemeName.FP8_TENSOR, SchemeName.NVFP4])
def test_what_is_larger_than_in_calibration_is_clipped(name: SchemeName) -> None:
    x, amax = inputs(), 4.0
    found = rounding(name, amax)(x)
    assert found.abs().max() == pytest.approx(amax, rel=0.01)
    with pytest.raises(ValueError, match="calibration"):
        rounding(name)(x)


def test_a_last_group_may_be_narrower_and_the_dtype_stays() -> None:
    x = inputs(200).to(torch.bfloat16)
    found = rounding(SchemeName.FP8_BLOCK)(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[..., :128], rounding(SchemeName.FP8_BLOCK)(x[..., :128]))
    assert torch.equal(found[..., 128:], rounding(SchemeName.FP8)(x[..., 128:]))
    assert not rounding(SchemeName.MXFP4)(torch.zeros(2, 64)).any()


def test_linears_of_one_input_get_the_rounded_one_and_others_stay() -> None:
    linears = {name: nn.Linear(256, 8) for name in ("q", "k", "o")}
    seen: dict[str, Tensor] = {}
    roundings = input_roundings({"q": Scheme.named(SchemeName.FP8), "k": Scheme.named(SchemeName.MXFP8)}, {})
    with rounding_inputs(linears, roundings):
        for name, linear in linears.items():
            linear.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
        x = inputs()
        for linear in linears.values():
            linear(x)
    assert torch.equal(seen["q"], rounding(SchemeName.FP8)(x))
    assert torch.equal(seen["k"], rounding(SchemeName.MXFP8)(x))
    assert seen["o"] is x
    assert input_roundings({"q": Scheme.named(SchemeName.NVFP4A16)}, {}) == {}
