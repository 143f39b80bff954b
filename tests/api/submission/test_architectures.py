"""The list of model types, and formats that a type cannot have: refused before a job is queued, with the way out."""

import pytest

from tests.api.checkpoints import write_checkpoint
from tests.api.conftest import SHORTHAND, Api, problem

DRY = "/v1/jobs?dry_run=true"
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4}
FALCON = {"model_type": "falcon", "n_layer": 2}
GPT_OSS = {"model_type": "gpt_oss", "text_config": None}


def test_types_are_listed_with_the_formats_that_they_cannot_have(api: Api) -> None:
    found = api.reader.get("/v1/architectures").json()
    rows = {row["model_type"]: row for row in found["items"]}
    assert rows["llama"]["model_class"] == "LlamaForCausalLM"
    assert "gguf" not in rows["llama"]["format_refusals"]
    assert {"compressed-tensors"} == set(rows["gpt2"]["format_refusals"]) & {"gguf", "compressed-tensors"}
    assert "llama.cpp v0.5.0" in rows["opt"]["format_refusals"]["gguf"]
    assert "gemma3n" in found["refused"]


@pytest.mark.parametrize(
    ("config", "reason"), [(GPT2, "Conv1D"), (FALCON, "reads the weights"), (GPT_OSS, "fused in its files")]
)
def test_a_format_without_a_stock_loader_is_refused_with_those_that_have_one(
    api: Api, config: dict[str, object], reason: str
) -> None:
    folder = write_checkpoint(api.folder / "models" / "other", config)
    body = {**SHORTHAND, "model": str(folder), "formats": ["compressed-tensors"]}
    found = problem(api.client.post(DRY, json=body), 422, "format_cannot_hold")
    told = str(found["detail"]) + str(found.get("errors"))
    assert reason in told
    assert "merged" in told
    assert "native" in told
    assert api.client.post(DRY, json={**body, "formats": ["merged"]}).status_code == 200


def test_a_wrong_group_is_refused_for_any_type(api: Api) -> None:
    shapes = {"h.0.mlp.dense_h_to_4h.weight": (64, 48)}
    folder = write_checkpoint(api.folder / "models" / "other", {"model_type": "bloom"}, shapes=shapes)
    body = {**SHORTHAND, "model": str(folder), "formats": ["merged"], "group_size": 32}
    assert "48 inputs" in str(problem(api.client.post(DRY, json=body), 422, "group_size_does_not_divide")["detail"])
    assert api.client.post(DRY, json={**body, "group_size": 16}).status_code == 200
