"""Every scheme by name through a whole job: transformers, which rounds inputs as a server does, has what was measured.

In fp32, where both compute the same to the last digits and a rounding that differs would show. compressed-tensors'
decoders of NVFP4 and MX give bf16, in which the weights of MX are exact.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from app.domain.methods import SCHEMES, SchemeName
from tests.engine.conftest import run_job
from tests.engine.model.loading import logits

LIMITS = {
    **dict.fromkeys(("fp8", "fp8-tensor", "fp8a16", "mxfp4", "mxfp4a16", "mxfp8", "mxfp8a16"), 1e-4),
    "nvfp4a16": 0.02,
    "nvfp4": 0.5,
    "int8": 0.08,
}
"""Largest difference of a log-probability. nvfp4: weights that were rounded to bf16. int8: servers divide a token's
inputs by amax / 127, compressed-tensors by amax / 127.5."""


@pytest.mark.parametrize("name", LIMITS)
def test_transformers_computes_what_was_measured(
    tmp_path: Path, single_model: Path, engine_logits: list[tuple[Tensor, Tensor]], name: str
) -> None:
    result = run_job(single_model, tmp_path, scheme=name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / result.checkpoints["compressed-tensors"]).eval()
    if SCHEMES[SchemeName(name)].activations is not None:
        model.hf_quantizer.compressor.decompress_model(model)
    ids, found = engine_logits[-1]
    ours, theirs = (torch.log_softmax(each.double(), -1) for each in (found, logits(nn.Module.float(model), ids)))
    assert (theirs - ours).abs().max() < LIMITS[name]


def test_the_default_format_of_a_scheme_by_name_is_compressed_tensors(tmp_path: Path, small_model: Path) -> None:
    result = run_job(small_model, tmp_path, scheme="fp8")
    assert set(result.checkpoints) == {"compressed-tensors", "native"}
    report = result.report
    assert {linear.scheme for block in report.blocks for linear in block.linears} == {SchemeName.FP8}


def test_linears_that_run_as_one_share_what_a_runtime_shares(tmp_path: Path, small_model: Path) -> None:
    folder = tmp_path / run_job(small_model, tmp_path, scheme="nvfp4").checkpoints["compressed-tensors"]
    tensors = load_file(folder / "model.safetensors")
    for layer in range(3):
        for parent, names in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            for number in ("weight_global_scale", "input_global_scale"):
                found = {float(tensors[f"model.layers.{layer}.{parent}.{name}_proj.{number}"]) for name in names}
                assert len(found) == 1


def test_a_cache_in_fp8_has_its_scales(tmp_path: Path, small_model: Path) -> None:
    folder = tmp_path / run_job(small_model, tmp_path, kv_cache="fp8").checkpoints["compressed-tensors"]
    tensors = load_file(folder / "model.safetensors")
    for layer in range(3):
        for number in ("k_scale", "v_scale"):
            scale = tensors[f"model.layers.{layer}.self_attn.{number}"]
            assert scale.shape == (1,)
            assert scale > 0
    asked = json.loads((folder / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert asked == {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def test_shapes_that_vllm_refuses_are_told(tmp_path: Path, small_model: Path) -> None:
    result = run_job(small_model, tmp_path, scheme="fp8-block")
    (warning,) = (w for w in result.report.warnings if "refuses linears" in w)
    assert (
        "vllm refuses linears of this model: it runs q_proj, k_proj, v_proj of model.layers.0.self_attn as one"
        in warning
    )
    card = (tmp_path / result.checkpoints["compressed-tensors"] / "README.md").read_text()
    assert "vLLM does not load it, by the rules of 0.33.0" in card
    assert "in blocks of 128 rows" in card
