"""FP8 and FP4 against compressed-tensors' own casts and decoders, and the formulas in fp64."""

import pytest
import torch
from compressed_tensors.compressors.mx_utils import compress_mx_scale
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from app.domain.methods import Scheme, SchemeName
from app.domain.methods.named_schemes import Element
from workers.methods.rtn import round_to_scheme
from workers.numerics.floats.elements import encode
from workers.numerics.floats.float_grids import encoded, exponents, quantize
from workers.numerics.packed_weight import PackedWeight
from workers.numerics.quantized import FloatWeight

MAGNITUDES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
FLOATS = [name for name in SchemeName if Scheme.named(name).form == "float"]


def random_weight(rows: int = 160, columns: int = 320, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 0.05).to(torch.bfloat16)


def test_e2m1_rounds_to_the_nearest_value_and_ties_to_an_even_mantissa() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, 1e9])
    assert encode(ties, Element.E2M1).tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 7]
    assert encode(-ties, Element.E2M1).tolist() == [8, 10, 10, 12, 12, 14, 14, 15, 15]
    values = torch.linspace(-6.5, 6.5, 4001, dtype=torch.float64)
    grid = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)], dtype=torch.float64)
    found = grid[encode(values, Element.E2M1).long()]
    assert torch.allclose((found - values).abs(), (grid - values.unsqueeze(1)).abs().amin(1))


def test_e4m3_saturates() -> None:
    codes = encode(torch.tensor([448.0, 464.0, 1e6, -1e6, 2.0**-9, 0.0]), Element.E4M3)
    assert codes.view(torch.float8_e4m3fn).float().tolist() == [448, 448, 448, -448, 2.0**-9, 0]


@pytest.mark.parametrize("name", FLOATS)
def test_the_weight_is_what_the_formula_gives_in_fp64(name: SchemeName) -> None:
    weight = random_weight()
    made = quantize(weight, Scheme.named(name), torch.bfloat16)
    scale = made.scale.double() if made.scale.dtype != torch.uint8 else 2.0 ** (made.scale.double() - 127)
    if made.global_scale is not None:
        scale = (made.scale.float() / made.global_scale).double()
    band = -(-160 // scale.shape[0]) if scale.shape[0] != 2 else 128
    width = {1: 320, 3: 128, 10: 32, 20: 16}[scale.shape[1]]
    scale = scale.repeat_interleave(band, 0)[:160].repeat_interleave(width, 1)[:, :320]
    if made.scheme.bits == 8:
        values = made.codes.view(torch.float8_e4m3fn).double()
    else:
        values = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)], dtype=torch.float64)[made.codes.long()]
    assert torch.equal(made.dequantize(), (values * scale).float().to(torch.bfloat16))
    relative = (made.dequantize().double() - weight.double()).norm() / weight.double().norm()
    assert relative < (0.04 if made.scheme.bits == 8 else 0.13)


@pytest.mark.parametrize("name", FLOATS)
def test_training_holds_the_same_weight_packed(name: SchemeName) -> None:
    made = quantize(random_weight(96, 320), Scheme.named(name), torch.bfloat16)
    assert torch.equal(PackedWeight.of(made).dequantize(torch.bfloat16), made.dequantize())


def test_nvfp4_scales_are_those_of_compressed_tensors() -> None:
    weight = random_weight().float()
    made = quantize(weight, Scheme.named(SchemeName.NVFP4A16), torch.bfloat16)
    assert made.global_scale is not None
    args = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    groups = weight.view(160, -1, 16)
    theirs, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=made.global_scale)
    assert torch.equal(made.scale.float(), theirs.to(torch.float8_e4m3fn).float())
    values = torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)], dtype=torch.bfloat16)[made.codes.long()]
    decoded = dequantize(values, made.scale.bfloat16(), args=args, global_scale=made.global_scale, dtype=torch.bfloat16)
    assert torch.equal(decoded, made.dequantize().bfloat16())


@pytest.mark.parametrize("name", [SchemeName.MXFP4A16, SchemeName.MXFP8A16])
def test_exponents_are_those_of_compressed_tensors(name: SchemeName) -> None:
    scheme = Scheme.named(name)
    assert scheme.row is not None
    bits = 4 if name is SchemeName.MXFP4A16 else 8
    args = QuantizationArgs(num_bits=bits, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
    amax = torch.cat([torch.logspace(-6, 6, 997), torch.tensor([6.0, 7.0, 1.75, 448.0, 3.4999])])
    theirs, _ = calculate_qparams(-amax, amax, args)
    assert torch.equal(exponents(amax, scheme.row.element), compress_mx_scale(theirs.float(), torch.uint8))


@pytest.mark.parametrize("name", FLOATS)
def test_zeros_huge_and_tiny_weights_stay_finite(name: SchemeName) -> None:
    weight = random_weight(32, 64).float()
    weight[0], weight[1], weight[2] = 0, weight[1] * 1e30, weight[2] * 1e-30
    made = quantize(weight, Scheme.named(name), torch.float32)
    assert torch.isfinite(made.dequantize()).all()
    assert not made.dequantize()[0].any()


def test_encoding_with_given_scales_keeps_them() -> None:
    made = quantize(random_weight(), Scheme.named(SchemeName.NVFP4), torch.bfloat16)
    again = encoded(made.dequantize(), made)
    assert torch.equal(again.scale.float(), made.scale.float())
    assert torch.equal(again.dequantize(), made.dequantize())


def test_rows_that_a_runtime_joins_share_a_global_scale() -> None:
    weight, larger = random_weight(), random_weight(seed=1) * 3
    amax = torch.stack([weight.abs().max(), larger.abs().max()]).max()
    scheme = Scheme.named(SchemeName.NVFP4)
    both = [quantize(each, scheme, torch.bfloat16, global_amax=amax).global_scale for each in (weight, larger)]
    assert both[0] is not None
    assert both[1] is not None
    assert torch.equal(both[0], both[1])


def test_int8_is_affine_with_a_scale_per_row() -> None:
    made = round_to_scheme(random_weight(), Scheme.named(SchemeName.INT8), torch.bfloat16)
    assert not isinstance(made, FloatWeight)
    assert made.scale.shape == (160, 1)  # type: ignore[union-attr]
    assert made.scheme.name is SchemeName.INT8
