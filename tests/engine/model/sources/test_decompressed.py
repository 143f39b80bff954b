"""Checkpoints of compressed-tensors saved after the model had run: numbers, under the name of a packed format."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
    preset_name_to_scheme,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from bitwright.errors import UnsupportedCheckpoint
from tests.engine.model.sources.folders import drawn, exactly, written
from workers.engine.model.checkpoint import Checkpoint

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
LINEAR = "model.layers.0.self_attn.q_proj"
FORMS = {
    "W4A16": "pack-quantized",
    "W8A8": "int-quantized",
    "FP8_DYNAMIC": "float-quantized",
    "NVFP4A16": "nvfp4-pack-quantized",
}


def compressed(folder: Path, preset: str) -> None:
    """A random Llama, its scales those of the largest numbers, as compressed-tensors and transformers save it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, dtype="bfloat16"))
    scheme: QuantizationScheme = preset_name_to_scheme(preset, ["Linear"])
    config = QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head"], format=FORMS[preset], quantization_status="compressed"
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            each = module.weight.detach().float().reshape(*module.weight_scale.shape, -1).abs().amax(-1)
            whole = 1.0
            if hasattr(module, "weight_global_scale"):
                whole = float(448 * 6 / each.max())
                module.weight_global_scale.data.fill_(whole)
            most = {"W4A16": 7, "W8A8": 127, "FP8_DYNAMIC": 448, "NVFP4A16": 6}[preset]
            module.weight_scale.data = (each / most * whole).to(module.weight_scale.dtype)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))


@pytest.mark.parametrize("preset", FORMS)
def test_a_model_saved_after_it_has_run_is_read_as_the_weights_that_it_ran_with(preset: str, tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    compressed(before, preset)
    model = AutoModelForCausalLM.from_pretrained(before)
    with torch.no_grad():
        model(torch.tensor([[1, 2]]))
    model.save_pretrained(after)
    settings = json.loads((after / "config.json").read_text())["quantization_config"]
    stored = load_file(after / "model.safetensors")
    assert settings["quantization_status"] == "decompressed", "transformers saved what this test is about"
    assert settings["format"] == FORMS[preset]
    assert stored[f"{LINEAR}.weight"].dtype == torch.bfloat16
    assert f"{LINEAR}.weight_scale" in stored

    checkpoint = Checkpoint.open(after)
    ran: Tensor = model.model.layers[0].self_attn.q_proj.weight.detach()
    assert exactly(checkpoint.read(f"{LINEAR}.weight"), ran)
    assert set(checkpoint.tensors) == set(Checkpoint.open(before).tensors)
    packed = Checkpoint.open(before).read(f"{LINEAR}.weight")
    assert float((packed.float() - ran.float()).norm() / ran.float().norm()) < 0.01, "what its codes mean"


def test_zero_points_and_orders_beside_such_a_weight_are_left_behind(tmp_path: Path) -> None:
    groups = {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    stored = {
        "a.weight": drawn(8, 96),
        "a.weight_scale": drawn(8, 3),
        "a.weight_zero_point": torch.zeros(8, 3, dtype=torch.int8),
        "a.weight_g_idx": torch.arange(96, dtype=torch.int32) // 32,
        "a.weight_shape": torch.tensor([8, 96]),
    }
    checkpoint = written(tmp_path, settings | {"quantization_status": "decompressed"}, stored)
    assert set(checkpoint.tensors) == {"a.weight"}
    assert exactly(checkpoint.read("a.weight"), stored["a.weight"])


@pytest.mark.parametrize("status", ["frozen", "compressed", None])
def test_floats_that_the_model_rounds_as_it_runs_are_refused(status: str | None, tmp_path: Path) -> None:
    compressed(tmp_path, "W8A8")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["quantization_status"] = status
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored = load_file(tmp_path / "model.safetensors")
    stored[f"{LINEAR}.weight"] = stored[f"{LINEAR}.weight"].bfloat16()
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedCheckpoint, match=f"q_proj.weight is BF16 .* quantization_status is {status!r}"):
        Checkpoint.open(tmp_path)
