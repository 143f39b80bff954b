"""Weights of integer codes in groups: GPTQ, AWQ and compressed-tensors, read as their own libraries read them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file
from torch import Tensor

from bitwright.errors import CorruptCheckpoint, UnsupportedCheckpoint
from tests.engine.model.sources.folders import drawn, exactly, written

GOLDEN = Path(__file__).parents[3] / "golden" / "gptqmodel_weights.safetensors"
"""Made as `tests/golden/README.md` says."""


def words(shape: tuple[int, int], seed: int) -> Tensor:
    """Any 32 bits."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).to(torch.int32)


def bits_of(column: list[int], bits: int, count: int) -> list[int]:
    """Codes of a column of words, one bit after another: the definition of the format, in whole numbers."""
    stream = sum((word & 0xFFFFFFFF) << 32 * place for place, word in enumerate(column))
    return [stream >> bits * place & (1 << bits) - 1 for place in range(count)]


def gptq(bits: int, out: int, width: int, group: int) -> dict[str, Tensor]:
    """Stored tensors of a weight with random bits."""
    groups = width // group
    return {
        "a.qweight": words((width * bits // 32, out), 1),
        "a.qzeros": words((groups, out * bits // 32), 2),
        "a.scales": (drawn(groups, out, seed=3).abs() + 0.001).half(),
        "a.g_idx": torch.arange(width, dtype=torch.int32) // group,
    }


def gptq_by_definition(stored: dict[str, Tensor], bits: int, *, first: bool) -> Tensor:
    """fp64, number by number, from the table of the format."""
    order, scales = stored["a.g_idx"].tolist(), stored["a.scales"].double()
    width, out = len(order), scales.shape[1]
    zeros = [bits_of(row, bits, out) for row in stored["a.qzeros"].tolist()]
    weight = torch.empty(out, width, dtype=torch.float64)
    for row in range(out):
        codes = bits_of(stored["a.qweight"][:, row].tolist(), bits, width)
        for place, (code, group) in enumerate(zip(codes, order, strict=True)):
            zero = (zeros[group][row] + first) % (1 << bits)
            weight[row, place] = scales[group, row] * (code - zero)
    return weight


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_read_by_its_definition(bits: int, form: str, tmp_path: Path) -> None:
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": form, "desc_act": False}
    stored = gptq(bits, 32, 96, 32)
    ours = written(tmp_path, settings, stored).read("a.weight")
    assert exactly(ours, gptq_by_definition(stored, bits, first=form == "gptq").float())


def test_inputs_of_gptq_may_be_in_the_order_of_their_activations(tmp_path: Path) -> None:
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    stored = gptq(4, 32, 96, 32)
    stored["a.g_idx"] = stored["a.g_idx"][torch.randperm(96, generator=torch.Generator().manual_seed(5))]
    checkpoint = written(tmp_path, settings, stored)
    assert exactly(checkpoint.read("a.weight"), gptq_by_definition(stored, 4, first=True).float())
    assert set(checkpoint.tensors) == {"a.weight"}
    del stored["a.g_idx"]
    with pytest.raises(CorruptCheckpoint, match="desc_act"):
        written(tmp_path, settings, stored)


def test_a_group_that_there_is_not_is_refused_before_anything_is_indexed(tmp_path: Path) -> None:
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    for index in (3, -1, 1 << 30):
        stored = gptq(4, 32, 96, 32)
        stored["a.g_idx"][17] = index
        with pytest.raises(CorruptCheckpoint, match="of 3"):
            written(tmp_path, settings, stored).read("a.weight")


@pytest.mark.parametrize("form", ["v1", "v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_what_gptqmodel_makes_of_what_it_wrote(bits: int, form: str, tmp_path: Path) -> None:
    prefix = f"bits{bits}_{form}."
    found = {name.removeprefix(prefix): t for name, t in load_file(GOLDEN).items() if name.startswith(prefix)}
    wanted = found.pop("dequantized")
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": True}
    settings["checkpoint_format"] = "gptq" if form == "v1" else "gptq_v2"
    ours = written(tmp_path, settings, {f"a.{part}": tensor for part, tensor in found.items()}).read("a.weight")
    # GPTQModel multiplies in the dtype of its scales, fp16.
    assert torch.equal(ours.half(), wanted.half())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"bits": 5}, "5 bits"),
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"dynamic": {"+:.*": {"bits": 8}}}, "dynamic"),
    ],
)
def test_other_kinds_of_gptq_are_refused_by_name(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32} | change
    with pytest.raises(UnsupportedCheckpoint, match=told) as refused:
        written(tmp_path, settings, gptq(4, 32, 96, 32))
    assert "bfloat16" in str(refused.value.hint)


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("group", [32, -1])
def test_awq_is_what_the_converter_of_compressed_tensors_makes_of_it(
    group: int, zero_point: bool, tmp_path: Path
) -> None:
    out, width = 64, 96
    groups = 1 if group < 1 else width // group
    stored = {"a.qweight": words((width, out // 8), 1), "a.scales": (drawn(groups, out).abs() + 0.001).half()}
    stored |= {"a.qzeros": words((groups, out // 8), 2)} if zero_point else {}
    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": zero_point, "version": "gemm"}
    converted = AutoAWQConverter(bits=4, group_size=group, zero_point=zero_point, version="gemm").process(dict(stored))
    codes = unpack_from_int32(converted["a.weight_packed"], 4, torch.Size((out, width))).double()
    zeros = torch.zeros(out, groups, dtype=torch.float64)
    if zero_point:
        zeros = unpack_from_int32(converted["a.weight_zero_point"], 4, zeros.shape, packed_dim=0).double()
    each = width // groups
    wanted = (codes - zeros.repeat_interleave(each, 1)) * converted["a.weight_scale"].double().repeat_interleave(
        each, 1
    )
    assert exactly(written(tmp_path, settings, stored).read("a.weight"), wanted.float())


@pytest.mark.parametrize("change", [{"version": "gemv"}, {"bits": 8}, {"backend": "llm-awq"}])
def test_other_layouts_of_awq_are_refused_by_name(change: dict[str, Any], tmp_path: Path) -> None:
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32} | change
    with pytest.raises(UnsupportedCheckpoint, match="read are 4 bits, gemm"):
        written(tmp_path, settings, {})


def scaled(weight: Tensor, args: QuantizationArgs) -> dict[str, Tensor]:
    """Weight, scale and zero point as an observer of compressed-tensors makes them."""
    out, width = weight.shape
    group = args.group_size if args.strategy == "group" else width
    assert group is not None
    each = weight.float().view(out, -1, group)
    most = 2 ** (args.num_bits - 1)
    state = {"weight": weight}
    if args.symmetric:
        scale = each.abs().amax(-1) / (most if args.type == "int" else 448)
    else:
        scale = (each.amax(-1) - each.amin(-1)).clamp_min(1e-4) / (2 * most - 1)
        zero = (-most - each.amin(-1) / scale).round().clamp(-most, most - 1)
        state["weight_zero_point"] = zero.to(torch.int8)
    if args.strategy == "tensor":
        scale = scale.amax().view(1)
    return state | {"weight_scale": scale}


FORMS = [
    *(("pack-quantized", {"num_bits": bits, "strategy": "group", "group_size": 32}) for bits in (2, 3, 4, 5, 6, 7, 8)),
    *(("pack-quantized", {"num_bits": bits, "strategy": "channel"}) for bits in (3, 4)),
    *(
        ("pack-quantized", {"num_bits": bits, "strategy": "group", "group_size": 32, "symmetric": False})
        for bits in (3, 4, 8)
    ),
    ("pack-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": False}),
    ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    ("int-quantized", {"num_bits": 8, "strategy": "tensor"}),
    ("naive-quantized", {"num_bits": 8, "strategy": "group", "group_size": 32, "symmetric": False}),
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
]


@pytest.mark.parametrize(("form", "given"), FORMS, ids=str)
def test_compressed_tensors_is_what_its_own_decompressor_makes_of_it(
    form: str, given: dict[str, Any], tmp_path: Path
) -> None:
    args = QuantizationArgs(**{"type": "int", "symmetric": True, **given})
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(scaled(drawn(24, 96), args), scheme)
    settings = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}},
    }
    checkpoint = written(tmp_path, settings, {f"a.{name}": tensor for name, tensor in stored.items()})
    oracle = compressor.decompress(dict(stored), scheme)["weight"]
    assert exactly(checkpoint.read("a.weight"), oracle)
    assert float((oracle - drawn(24, 96)).abs().max()) < 0.2, "the oracle read what was written"
    assert set(checkpoint.tensors) == {"a.weight"}


def test_compressed_tensors_may_have_blocks_and_inputs_in_another_order(tmp_path: Path) -> None:
    args = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [4, 8]}
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    settings["config_groups"] = {"g": {"targets": ["Linear"], "weights": args}}  # type: ignore[assignment]
    codes, grid = drawn(10, 20).to(torch.float8_e4m3fn), drawn(3, 3, seed=2).abs()
    ours = written(tmp_path, settings, {"a.weight": codes, "a.weight_scale": grid}).read("a.weight")
    wide = grid.repeat_interleave(4, 0)[:10].repeat_interleave(8, 1)[:, :20]
    assert exactly(ours, codes.float() * wide)

    args = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "actorder": "group"}
    settings["config_groups"] = {"g": {"targets": ["Linear"], "weights": args}}  # type: ignore[assignment]
    order = (torch.arange(96, dtype=torch.int32) // 32)[torch.randperm(96, generator=torch.Generator().manual_seed(5))]
    stored = {
        "a.weight_packed": words((8, 12), 1),
        "a.weight_scale": drawn(8, 3).abs(),
        "a.weight_shape": torch.tensor([8, 96]),
    }
    codes = unpack_from_int32(stored["a.weight_packed"], 4, torch.Size((8, 96))).float()
    for index, wanted in ((order, order.long()), (torch.full((96,), -1, dtype=torch.int32), torch.arange(96) // 32)):
        ours = written(tmp_path, settings, stored | {"a.weight_g_idx": index}).read("a.weight")
        assert exactly(ours, codes * stored["a.weight_scale"][:, wanted])


def test_a_module_has_the_settings_of_the_group_that_targets_it(tmp_path: Path) -> None:
    def group(bits: int, *targets: str) -> dict[str, Any]:
        return {"targets": list(targets), "weights": {"num_bits": bits, "strategy": "group", "group_size": 32}}

    groups = {"a": group(4, "Linear"), "b": group(8, "re:.*down_proj"), "c": group(2, "model.layers.1.mlp.down_proj")}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    stored: dict[str, Tensor] = {}
    modules = {"mlp.up_proj": 4, "model.layers.0.mlp.down_proj": 8, "model.layers.1.mlp.down_proj": 2}
    for module, bits in modules.items():
        stored[f"{module}.weight_packed"] = words((8, 3 * bits), 1)
        stored[f"{module}.weight_scale"] = drawn(8, 3)
        stored[f"{module}.weight_shape"] = torch.tensor([8, 96])
    checkpoint = written(tmp_path, settings, stored)
    for module, bits in modules.items():
        codes = unpack_from_int32(stored[f"{module}.weight_packed"], bits, torch.Size((8, 96)))
        wanted = codes.float() * stored[f"{module}.weight_scale"].repeat_interleave(32, 1)
        assert exactly(checkpoint.read(f"{module}.weight"), wanted)
