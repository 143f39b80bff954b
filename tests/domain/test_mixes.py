"""Mixes and types of llama.cpp in dry runs: facts of a model, what falls back, and the bytes that result."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from app.domain.estimates import estimate
from app.domain.fit import misfits, warnings_of
from app.domain.inputs.inspection import FolderFiles, Inspection, inspect_checkpoint
from app.domain.methods.block_presets import MixFacts
from app.domain.mixes import facts_of
from app.domain.request.job_request import JobRequest

CONFIG: dict[str, Any] = {
    **{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512},
    **{"num_key_value_heads": 2, "intermediate_size": 256, "tie_word_embeddings": True, "dtype": "bfloat16"},
}
LINEARS = {
    **{"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64)},
    **{"self_attn.o_proj": (64, 64), "mlp.gate_proj": (256, 64), "mlp.up_proj": (256, 64), "mlp.down_proj": (64, 256)},
}
OTHERS = 64 * 64 * 2 + 2 * 32 * 64 + 2 * 256 * 64
"""Weights of a block whose rows of 64 are no super-blocks; `down_proj` has rows of 256."""


@pytest.fixture
def inspection(tmp_path: Path) -> Inspection:
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{n}.{name}.weight": shape for n in range(2) for name, shape in LINEARS.items()
    }
    shapes |= {"model.embed_tokens.weight": (512, 64), "model.norm.weight": (64,)}
    save_file({n: torch.zeros(s, dtype=torch.bfloat16) for n, s in shapes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "tokenizer.json").write_text("{}")
    return inspect_checkpoint(FolderFiles(tmp_path))


def request(**fields: Any) -> JobRequest:
    return JobRequest.parse({"model": "org/name", "method": "rtn", **fields})


def fallbacks(inspection: Inspection, **fields: Any) -> list[str]:
    return [each for each in warnings_of(request(**fields), inspection) if "fall back" in each]


def test_facts_are_those_of_the_configuration() -> None:
    assert facts_of(CONFIG, tied=True) == MixFacts(layers=2, grouped=2, experts=0, tied=True)
    experts = {**CONFIG, "num_local_experts": 8, "num_key_value_heads": None}
    assert facts_of(experts, tied=False) == MixFacts(layers=2, grouped=1, experts=8, tied=False)
    latent = {**CONFIG, "kv_lora_rank": 16, "n_routed_experts": 64, "num_key_value_heads": 4}
    assert facts_of(latent, tied=False) == MixFacts(layers=2, grouped=4, experts=64, tied=False)
    assert facts_of({"model_type": "other", "text_config": CONFIG}, tied=False).layers == 2


def test_linears_that_fall_back_are_counted_with_the_bits_that_result(inspection: Inspection) -> None:
    (told,) = fallbacks(inspection, scheme="q2_k")
    assert "of 14 linears 12 have rows" in told
    assert "12 get q4_0 in place of q2_k" in told
    bits = (4.5 * OTHERS + 2.625 * 64 * 256) / (OTHERS + 64 * 256)
    assert f"a weight takes {bits:.4g} bits" in told
    assert fallbacks(inspection, scheme="q4_0") == []
    assert fallbacks(inspection, bits={"average": 6, "over": "model"}, formats=["gguf"]) == []


def test_a_mix_counts_its_own_types_and_the_embeddings(inspection: Inspection) -> None:
    """Q4_K_M of two layers: six bits for v and down in the second, which begins the last eighth, and in none before."""
    (told,) = fallbacks(inspection, scheme="Q4_K_M")
    assert "of 15 linears 13 have rows" in told
    assert "11 get q5_0 in place of q4_k" in told
    assert "2 get q8_0 in place of q6_k" in told
    told_bytes = estimate(request(scheme="Q4_K_M"), inspection)["bytes_files"]["gguf"]
    linears = (2 * OTHERS - 32 * 64) * 22 // 32 + 32 * 64 * 34 // 32 + 64 * 256 * (144 + 210) // 256
    embeddings = 512 * 64 * 34 // 32
    assert 0 < told_bytes - linears - embeddings < 40_000, "the vocabulary and the header"


def test_a_budget_out_of_reach_counts_embeddings_at_their_smallest(inspection: Inspection) -> None:
    least = request(bits={"average": 2.7, "over": "model"}, formats=["gguf"])
    (problem,) = misfits(least, inspection)
    weights = 2 * (OTHERS + 64 * 256) + 512 * 64 + 64
    bits = (4.5 * (2 * OTHERS + 512 * 64) + 2.625 * 2 * 64 * 256 + 16 * 64) / weights
    assert f"{bits:.4g} bits a weight" in problem.detail
    assert misfits(request(bits={"average": 4.5, "over": "model"}, formats=["gguf"]), inspection) == []
