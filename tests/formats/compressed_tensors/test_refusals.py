"""Numbers that the format does not write, and linears that must agree because runtimes run them as one."""

from collections.abc import Callable
from dataclasses import replace
from math import log2
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.domain.formats import ExportFormat
from app.domain.methods import PRESET_SCHEMES, Scheme, SchemeName
from bitwright.errors import CorruptCheckpoint, FormatCannotHold
from tests.formats.examples import assert_same, random_result, tiny_llama
from workers.formats.compressed_tensors import compress, decompress
from workers.formats.registry import open_writer
from workers.formats.stored_linear import StoredLinear
from workers.numerics.floats.float_grids import quantize
from workers.numerics.quantized import FloatWeight, LinearResult

NAMES = sorted(PRESET_SCHEMES)
FLOATS = [name for name in NAMES if name != SchemeName.INT8]
NAN, INF = float("nan"), float("inf")


def made(name: str, rows: int = 40, columns: int = 320) -> FloatWeight:
    weight = random_result((rows, columns), Scheme.named(SchemeName(name))).weight
    assert isinstance(weight, FloatWeight)
    return weight


def refused(weight: FloatWeight, words: str) -> None:
    with pytest.raises(FormatCannotHold, match=words) as caught:
        compress("model.x", LinearResult(weight))
    assert caught.value.field == "model.x"


def spoiled(numbers: Tensor, value: float) -> Tensor:
    """With one other number."""
    changed = numbers.float().clone()
    changed.view(-1)[1 if changed.numel() > 1 else 0] = value
    return changed.to(numbers.dtype)


@pytest.mark.parametrize(("value", "told"), [(0.0, "0"), (-1.5, "-1.5"), (NAN, "nan")])
@pytest.mark.parametrize("name", ["nvfp4", "nvfp4a16"])
def test_a_block_scale_that_is_not_positive_is_refused(name: str, value: float, told: str) -> None:
    weight = made(name)
    refused(replace(weight, scale=spoiled(weight.scale, value)), f"a stored scale is {told}; runtimes read")


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8a16"])
def test_an_exponent_that_means_nan_is_refused(name: str) -> None:
    weight = made(name)
    refused(replace(weight, scale=spoiled(weight.scale, 255)), "a stored scale is nan")
    compress("x", LinearResult(replace(weight, scale=spoiled(weight.scale, 254))))


@pytest.mark.parametrize("value", [0.0, -0.25, NAN, INF])
@pytest.mark.parametrize("name", ["fp8", "fp8-tensor", "fp8-block", "fp8a16"])
def test_a_scale_of_fp8_that_is_not_positive_is_refused(name: str, value: float) -> None:
    weight = made(name)
    refused(replace(weight, scale=spoiled(weight.scale, value)), "a scale is .*, which is no positive number")


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("name", ["fp8", "mxfp8"])
def test_a_code_that_is_nan_is_refused(name: str, code: int) -> None:
    weight = made(name)
    codes = weight.codes.clone()
    codes[3, 5] = code
    refused(replace(weight, codes=codes), "a code is NaN")


@pytest.mark.parametrize("value", [0.0, -3.0, NAN, INF])
@pytest.mark.parametrize(
    ("name", "part"), [("nvfp4", "global_scale"), ("nvfp4", "input_amax"), ("fp8-tensor", "input_amax")]
)
def test_numbers_of_a_whole_tensor_are_positive(name: str, part: str, value: float) -> None:
    refused(replace(made(name), **{part: torch.tensor([value])}), "no positive number")  # type: ignore[arg-type]
    refused(replace(made(name), **{part: None}), "is missing")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "columns"), [("nvfp4", 24), ("nvfp4a16", 40), ("mxfp4", 48), ("mxfp8a16", 16), ("mxfp4a16", 33)]
)
def test_columns_that_are_no_whole_groups_are_refused(name: str, columns: int) -> None:
    weight = quantize(torch.ones(4, columns, dtype=torch.bfloat16), Scheme.named(SchemeName(name)), torch.bfloat16)
    weight = replace(weight, input_amax=torch.ones(1) if name == "nvfp4" else None)
    refused(weight, f"do not divide its {columns} inputs")


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("largest", [6.0, 7.0, 448.0, 6 * 2.0**-9, 7 * 2.0**20, 448 * 2.0**-20])
def test_largest_magnitudes_at_the_edge_of_a_grid_come_back(name: SchemeName, largest: float) -> None:
    """Exactly 6 and 448 steps, and 7 times a power of two: half a step beyond 3 of the next exponent, so 4 of them."""
    weight = torch.linspace(-1, 1, 8 * 64).view(8, 64).bfloat16() * largest
    weight[2], weight[0, 0] = 0, largest
    result = LinearResult(quantize(weight, Scheme.named(name), torch.bfloat16))
    amax = torch.tensor([largest]) if result.weight.scheme.row and result.weight.scheme.row.calibrated else None
    result = replace(result, weight=replace(result.weight, input_amax=amax))  # type: ignore[arg-type]
    tensors = compress("x", result)
    assert_same(decompress("x", tensors, StoredLinear.of(result)), result)
    assert torch.isfinite(result.dequantize()).all()
    assert (result.dequantize()[2] == 0).all()
    exact = result.dequantize()[0, 0].item() / largest
    assert exact == (8 / 7 if name.startswith("mxfp4") and largest / 7 == 2.0 ** round(log2(largest / 7)) else 1)


def test_a_linear_of_zeros_comes_back() -> None:
    for name in FLOATS:
        result = LinearResult(quantize(torch.zeros(4, 64).bfloat16(), Scheme.named(name), torch.bfloat16))
        amax = torch.ones(1) if result.weight.scheme.row and result.weight.scheme.row.calibrated else None
        result = replace(result, weight=replace(result.weight, input_amax=amax))  # type: ignore[arg-type]
        found = decompress("x", compress("x", result), StoredLinear.of(result))
        assert (found.dequantize() == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_or_misshapen_tensor_is_told(name: SchemeName) -> None:
    result = random_result((40, 320), Scheme.named(name))
    tensors, stored = compress("x", result), StoredLinear.of(result)
    for part, tensor in tensors.items():
        with pytest.raises(CorruptCheckpoint, match=f"{part} is missing|tensor .{part}. is missing"):
            decompress("x", {n: t for n, t in tensors.items() if n != part}, stored)
        with pytest.raises(CorruptCheckpoint):
            decompress("x", tensors | {part: torch.cat([tensor.view(torch.uint8), tensor.view(torch.uint8)])}, stored)


Change = Callable[[FloatWeight], FloatWeight]


def other_global(weight: FloatWeight) -> FloatWeight:
    assert weight.global_scale is not None
    return replace(weight, global_scale=weight.global_scale + 1)


def other_inputs(weight: FloatWeight) -> FloatWeight:
    return replace(weight, input_amax=torch.tensor([2.5]))


@pytest.mark.parametrize(
    ("change", "what"), [(other_global, "global scale"), (other_inputs, "magnitude of the inputs")]
)
@pytest.mark.parametrize(("first", "second"), [("q_proj", "v_proj"), ("q_proj", "k_proj"), ("gate_proj", "up_proj")])
def test_unequal_numbers_of_linears_that_run_as_one_are_refused(
    tmp_path: Path, change: Change, what: str, first: str, second: str
) -> None:
    source = tiny_llama(tmp_path / "source")
    writer = open_writer(tmp_path / "out", ExportFormat.COMPRESSED_TENSORS, source)
    parent = "model.layers.1.mlp" if first == "gate_proj" else "model.layers.1.self_attn"
    shapes: dict[str, Any] = {n: tuple(source.tensors[f"{parent}.{n}.weight"].shape) for n in (first, second)}
    weight = made("nvfp4", *shapes[first])
    writer.add_linear(f"{parent}.{first}", LinearResult(weight))
    other = change(made("nvfp4", *shapes[second]))
    with pytest.raises(FormatCannotHold, match=f"{what} of {parent}.{second} is .* of {parent}.{first}; runtimes run"):
        writer.add_linear(f"{parent}.{second}", LinearResult(other))
    # Another parent's, or a linear that runs alone, may have its own.
    writer.add_linear(f"{parent.replace('1', '0')}.{second}", LinearResult(other))
    alone = made("nvfp4", *source.tensors["model.layers.0.self_attn.o_proj.weight"].shape)
    writer.add_linear("model.layers.0.self_attn.o_proj", LinearResult(change(alone)))
