"""Results of jobs without a model in transformers: a mixture of experts loads with every key, and computes the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from tests.engine.conftest import run_job
from tests.engine.model.loading import loader
from tests.engine.weights_only.checkpoints import read

SIZES: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2},
    **{"vocab_size": 128, "decoder_sparse_step": 1, "max_position_embeddings": 64, "tie_word_embeddings": False},
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture") / "model"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SIZES)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def opened(folder: Path) -> Any:
    """The model, whose keys are all there and all used."""
    model, about = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert {name: set(about[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")} == {
        name: set() for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    return model.eval()


STOCK: list[dict[str, Any]] = [
    {"group_size": 32},
    *({"scheme": name} for name in ("fp8a16", "mxfp4a16")),
    {"group_size": 32, "modules": {"overrides": {"*.self_attn.*": {"scheme": "fp8a16"}}}},
    {"scheme": "fp8a16", "modules": {"overrides": {"*.self_attn.*": {"bits": 4, "group_size": 32}}}},
]
BY_LOADER: list[dict[str, Any]] = [
    *({"scheme": name} for name in ("nvfp4a16", "mxfp8", "int8", "fp8-block")),
    {"group_size": 32, "symmetric": False},
    {"group_size": 32, "modules": {"overrides": {"*.down_proj": {"scheme": "nvfp4a16"}}}},
]


@pytest.mark.parametrize("scheme", [*STOCK, *BY_LOADER], ids=str)
def test_a_mixture_of_experts_loads_in_transformers(mixture: Path, tmp_path: Path, scheme: dict[str, Any]) -> None:
    """By itself, or with the loader where it would misread experts; a merged checkpoint has the same weights."""
    run_job(mixture, tmp_path, formats=["merged", "compressed-tensors"], weights_only=True, **scheme)
    output = tmp_path / "output"
    before, after = read(mixture), read(output / "merged")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("experts" in name for name in changed)
    assert not any("mlp.gate.weight" in name or "norm" in name or "embed" in name for name in changed)
    folder = output / "compressed-tensors"
    assert (folder / "load_bitwright.py").exists() is (scheme in BY_LOADER)
    merged = opened(output / "merged")
    packed = loader(folder).load(folder) if scheme in BY_LOADER else opened(folder)
    ids = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = merged(ids).logits.float(), packed(ids).logits.float()
    assert torch.isfinite(expected).all()
    assert (expected - found).abs().max() <= 0.02 * expected.std(), "bf16 of other kernels"
