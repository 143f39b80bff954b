"""Linears that are to be tuned one by one, and a mixture's, which not every token passes through."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from app.domain.fit import misfits
from app.domain.inputs.inspection import FolderFiles, Inspection, inspect_checkpoint
from app.domain.request.job_request import JobRequest

CONFIG: dict[str, Any] = {
    **{"model_type": "qwen3_moe", "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "head_dim": 32},
    **{"num_key_value_heads": 2, "vocab_size": 128, "tie_word_embeddings": True, "dtype": "bfloat16"},
    **{"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64, "intermediate_size": 64},
}


@pytest.fixture
def mixture(tmp_path: Path) -> Inspection:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128, 64), "model.norm.weight": (64,)}
    shapes |= {f"model.layers.0.self_attn.{part}_proj.weight": (64, 64) for part in "qkvo"}
    experts = [f"model.layers.0.mlp.experts.{n}.{part}_proj" for n in range(2) for part in ("gate", "up", "down")]
    shapes |= {f"{name}.weight": (64, 64) for name in experts}
    save_file({n: torch.zeros(s, dtype=torch.bfloat16) for n, s in shapes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return inspect_checkpoint(FolderFiles(tmp_path))


def told(inspection: Inspection, **quantization: Any) -> list[tuple[str, str]]:
    spec = {"method": "apiq", "group_size": 64, **quantization}
    request = JobRequest.parse({"model": "org/name", "quantization": spec, "formats": ["native"]})
    return [(problem.field, problem.detail) for problem in misfits(request, inspection)]


def test_experts_are_not_tuned_layer_by_layer(mixture: Inspection) -> None:
    ((field, detail),) = told(mixture, granularity="layer")
    assert field == "quantization.granularity"
    assert "experts" in detail
    assert 'give "block"' in detail


def test_a_mixture_is_tuned_by_blocks_and_its_attention_by_layers(mixture: Inspection) -> None:
    assert told(mixture, granularity="block") == []
    assert told(mixture, granularity="layer", modules={"ignore": ["*.experts.*"]}) == []
