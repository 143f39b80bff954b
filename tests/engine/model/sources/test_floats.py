"""Weights of small floating-point codes: read as the libraries that others read them with do."""

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert.converters import FP8BlockDequantizer
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from bitwright.errors import CorruptCheckpoint
from tests.engine.model.sources.folders import drawn, exactly, written

BLOCK = 128


def fp8(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Codes and the scale of each block, the last ones partial."""
    out, width = weight.shape
    grid = torch.empty(-(-out // rows), -(-width // columns))
    codes = torch.empty_like(weight)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            block = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            grid[i, j] = weight[block].abs().max() / 448
            codes[block] = weight[block] / grid[i, j]
    return codes.to(torch.float8_e4m3fn), grid


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(256, 128), (192, 200), (576, 129), (3, 5)], ids=str)
def test_blocks_of_fp8_are_what_compressed_tensors_makes_of_them(
    shape: tuple[int, int], dtype: str, tmp_path: Path
) -> None:
    codes, grid = fp8(drawn(*shape), BLOCK, BLOCK)
    tensors = {"a.weight": codes, "a.weight_scale_inv": grid}
    settings = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    ours = written(tmp_path, settings, tensors, dtype).read("a.weight")
    oracle = FP8BlockDequantizer(targets=["a"], weight_block_size=(BLOCK, BLOCK), dtype=getattr(torch, dtype))
    assert exactly(ours, oracle.process(dict(tensors))["a.weight"])


def test_blocks_may_be_of_another_size_and_of_each_expert(tmp_path: Path) -> None:
    settings = {"quant_method": "fp8", "weight_block_size": [4, 8]}
    both = [fp8(drawn(10, 20, seed=seed), 4, 8) for seed in range(2)]
    codes, grid = (torch.stack(parts) for parts in zip(*both, strict=True))
    tensors = {"mlp.experts.up_proj": codes, "mlp.experts.up_proj_scale_inv": grid}
    ours = written(tmp_path, settings, tensors).read("mlp.experts.up_proj")
    for expert in range(2):
        for row, column in ((0, 0), (3, 7), (4, 8), (9, 19), (8, 16)):
            wanted = codes[expert, row, column].float() * grid[expert, row // 4, column // 8]
            assert ours[expert, row, column] == wanted


def test_exponents_are_powers_of_two_and_not_numbers(tmp_path: Path) -> None:
    codes = drawn(8, 8).to(torch.float8_e4m3fn)
    settings = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    biased = torch.tensor([[127, 130], [120, 100]], dtype=torch.uint8)
    for stored in (biased, biased.view(torch.float8_e8m0fnu)):
        ours = written(tmp_path, settings, {"a.weight": codes, "a.weight_scale_inv": stored}).read("a.weight")
        assert exactly(ours[:4, 4:], codes[:4, 4:].float() * 8)
        assert exactly(ours[4:, 4:], codes[4:, 4:].float() * 2.0**-27)


@pytest.mark.parametrize("scale", [torch.tensor(0.25), torch.tensor([0.25]), torch.full((8, 1), 0.25)])
def test_a_scale_is_of_a_whole_tensor_or_of_each_row(scale: Tensor, tmp_path: Path) -> None:
    codes = drawn(8, 24).to(torch.float8_e4m3fn)
    rows = torch.arange(1.0, 9.0).view(8, 1) if scale.numel() > 1 else torch.ones(())
    tensors = {"a.weight": codes, "a.weight_scale": scale * rows, "a.input_scale": torch.ones(())}
    checkpoint = written(tmp_path, {"quant_method": "fbgemm_fp8"}, tensors)
    assert exactly(checkpoint.read("a.weight"), codes.float() * 0.25 * rows)
    assert set(checkpoint.tensors) == {"a.weight"}


def test_v4_names_its_scales_otherwise(tmp_path: Path) -> None:
    codes, grid = fp8(drawn(8, 8), 4, 4)
    settings = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    one = written(tmp_path / "a", settings, {"a.weight": codes, "a.weight_scale_inv": grid}).read("a.weight")
    other = written(tmp_path / "b", settings, {"a.weight": codes, "a.scale": grid}).read("a.weight")
    assert exactly(one, other)


def test_a_grid_that_covers_no_weight_is_refused(tmp_path: Path) -> None:
    codes, settings = drawn(192, 128).to(torch.float8_e4m3fn), {"quant_method": "fp8", "weight_block_size": [128, 128]}
    # 192 rows in two blocks of 96 would be another model, without an error.
    for grid in ((1, 2), (3, 1), (2, 2), (192, 2), (0,)):
        with pytest.raises(CorruptCheckpoint, match="which scales no weight of shape"):
            written(tmp_path, settings, {"a.weight": codes, "a.weight_scale_inv": torch.ones(grid)})
    with pytest.raises(CorruptCheckpoint, match="without scales"):
        written(tmp_path, settings, {"a.weight": codes})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_of_mxfp4_are_what_transformers_makes_of_them(dtype: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (3, 12, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (3, 12, 2), dtype=torch.uint8, generator=generator)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales, f"{name}_bias": torch.ones(3, 12)}
    checkpoint = written(tmp_path, {"quant_method": "mxfp4"}, tensors, dtype)
    ours = checkpoint.read(name)
    assert checkpoint.tensors[name].shape == ours.shape == (3, 64, 12)
    assert exactly(ours, convert_moe_packed_tensors(blocks, scales, dtype=getattr(torch, dtype)))
    assert set(checkpoint.tensors) == {name, f"{name}_bias"}


NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
MXFP4 = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("form", ["nvfp4-pack-quantized", "mxfp4-pack-quantized"])
def test_packed_floats_are_what_compressed_tensors_makes_of_them(form: str, dtype: str, tmp_path: Path) -> None:
    weight = drawn(6, 64).bfloat16()
    args = QuantizationArgs(**(NVFP4 if form.startswith("nv") else MXFP4))
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    largest = weight.float().view(6, -1, int(args.group_size or 0)).abs().amax(-1)
    state = {"weight": weight, "weight_scale": torch.exp2((largest / 6).log2().ceil())}
    if form.startswith("nv"):
        state["weight_global_scale"] = torch.tensor([448 * 6 / float(weight.abs().max())])
        state["weight_scale"] = (largest / 6 * state["weight_global_scale"]).to(torch.float8_e4m3fn).float()
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    oracle = compressor.decompress(dict(stored), scheme)["weight"]
    settings = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}},
    }
    tensors = {f"a.{name}": tensor for name, tensor in stored.items()}
    ours = written(tmp_path, settings, tensors, dtype).read("a.weight")
    assert float((oracle.float() - weight.float()).abs().max()) < 0.05, "the oracle read what was written"
    # The oracle rounds to bf16 at every step; the numbers of the format are exact in fp32.
    assert torch.equal(ours.bfloat16(), oracle.bfloat16())
