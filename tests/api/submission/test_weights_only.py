"""Requests that run without a model: what a dry run says of them, and what is refused when they are submitted."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.api.checkpoints import safetensors
from tests.api.conftest import Api, problem

SHAPES = {
    "model.embed_tokens.weight": (128, 64),
    "model.layers.0.mlp.gate.weight": (4, 64),
    "model.layers.0.mlp.experts.gate_up_proj": (4, 192, 64),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.1.mtp_proj.weight": (64, 64),
}
PATTERN = {"method": "rtn", "group_size": 16, "modules": {"ignore": ["*.none", "lm_head"]}}
CONFIG = {"model_type": "unheard_of", "hidden_size": 64, "num_hidden_layers": 1}


@pytest.fixture
def body(api: Api) -> dict[str, Any]:
    folder = api.folder / "models" / "unheard"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(safetensors(SHAPES))
    return {"model": str(folder), "method": "rtn", "bits": 4, "group_size": 16}


def test_a_dry_run_says_that_no_model_is_built_and_what_is_quantized(api: Api, body: dict[str, Any]) -> None:
    answer = api.client.post("/v1/jobs?dry_run=true", json=body).json()
    weights = 4 * 192 * 64 + 64 * 64
    assert answer["estimates"]["weights_quantized"] == weights
    assert answer["estimates"]["bits_per_weight"] == 4 + 16 / 16
    rest = 128 * 64 + 4 * 64 + 64 * 64
    assert answer["estimates"]["bytes_checkpoint"] == weights * 5 // 8 + rest * 2
    assert any("'unheard_of' is not an accepted type" in warning for warning in answer["warnings"])
    assert api.client.post("/v1/jobs", json=body).status_code == 202


def test_an_accepted_type_runs_so_where_the_request_says_it(api: Api, body: dict[str, Any]) -> None:
    sizes = {"intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 128}
    (Path(body["model"]) / "config.json").write_text(json.dumps({**CONFIG, **sizes, "model_type": "llama"}))
    asked = {**body, "weights_only": True}
    answer = api.client.post("/v1/jobs?dry_run=true", json=asked).json()
    assert answer["request"]["quantization"]["weights_only"] is True
    assert any("quantization.weights_only" in warning for warning in answer["warnings"])
    assert answer["estimates"]["weights_quantized"] == 4 * 192 * 64 + 64 * 64
    plain = api.client.post("/v1/jobs?dry_run=true", json=body).json()
    assert not any("without a model" in warning for warning in plain["warnings"])


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"method": "signround"}, "unsupported_architecture", "model"),
        ({"formats": ["gguf"], "group_size": 32}, "format_cannot_hold", "formats.0"),
        ({"require": {"max_perplexity_ratio": 1.1}}, "invalid_request", "require"),
        ({"group_size": 48}, "group_size_does_not_divide", "quantization.group_size"),
        ({"quantization": PATTERN}, "unknown_module", "quantization.modules.ignore.0"),
        ({"bits": {"average": 3.5}}, "unsupported_architecture", "model"),
        ({"bits": {"average": 3.5}, "weights_only": True}, "invalid_request", "quantization.bits"),
    ],
)
def test_what_needs_a_model_is_refused(
    api: Api, body: dict[str, Any], fields: dict[str, Any], code: str, field: str
) -> None:
    shorthand = {"model": body["model"]} if "quantization" in fields else body
    found = problem(api.client.post("/v1/jobs", json=shorthand | fields), 422, code)
    errors = found["errors"]
    assert isinstance(errors, list)
    assert errors[0]["field"] == field
