"""POST /v1/jobs/{id}/exports: whose job it is, what must still be there, and which formats hold the result."""

import json
from typing import Any

import pytest

from app.domain.formats import ExportFormat
from app.domain.request.job_request import JobRequest
from app.domain.request.source_walk import read_sources
from app.store.models import Artifact
from bitwright.errors import InvalidDataset
from tests.api.conftest import Api
from tests.api.conftest import problem as problem_of

LINEAR = {"form": "affine", "bits": 4, "group_size": 64, "symmetric": True, "dtype": "bfloat16"}
NAME = "model.layers.0.mlp.up_proj"


def native(config: dict[str, Any] | None = None, **linear: object) -> dict[str, bytes]:
    """The files of a native checkpoint that the API looks at."""
    described = {"format": "bitwright", "version": 2, "linears": {NAME: {**LINEAR, **linear}}}
    return {
        "bitwright.json": json.dumps(described).encode(),
        "config.json": json.dumps(config or {"model_type": "llama"}).encode(),
        "report.json": b"{}",
        "weights.safetensors": b"weights",
    }


def problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    found: dict[str, Any] = problem_of(answer, status, code)
    return found


def make(api: Api, files: dict[str, dict[str, bytes]] | None = None, **fields: object) -> str:
    """A job that has succeeded; its id."""
    job_id = api.submit(**fields)
    api.succeed(api.claim(), {"native": native()} if files is None else files)
    return job_id


def export(api: Api, job_id: str, *formats: str, **more: object) -> Any:
    return api.client.post(f"/v1/jobs/{job_id}/exports", json={"formats": list(formats), **more})


def test_an_export_is_a_job_of_its_own(any_api: Api) -> None:
    job_id = make(any_api, bits=4)
    answer = export(any_api, job_id, "gguf", "mlx", metadata={"for": "phones"}, priority=3)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert job["id"] != job_id
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    request = job["request"]
    assert (request["base_job"], request["formats"], request["device"]) == (job_id, ["gguf", "mlx"], "cpu")
    assert (request["finetune"], request["evaluation"], request["priority"]) == (None, None, 3)
    assert (job["status"], job["metadata"]) == ("queued", {"for": "phones"})
    read = JobRequest.model_validate(request)
    assert read.exports
    assert read_sources(read) == []
    assert any_api.client.get(f"/v1/jobs/{job['id']}/events").status_code == 200


def test_a_dry_run_says_what_a_gguf_file_will_not_have(api: Api) -> None:
    """Types of llama.cpp with scales of scales, and an importance matrix where no squares of inputs are kept."""
    files = native()
    with_inputs = make(api, {"native": files | {"inputs.safetensors": b"sums"}})
    without, blocks = make(api), make(api, {"native": native(form="blocks", scheme_name="q4_k", group_size=32)})

    def words(job_id: str, *formats: str) -> str:
        answer = api.client.post(f"/v1/jobs/{job_id}/exports?dry_run=true", json={"formats": list(formats)})
        assert answer.status_code == 200, answer.text
        assert answer.json()["request"]["base_job"] == job_id
        return " ".join(answer.json()["warnings"])

    before = api.client.get("/v1/jobs").json()
    assert "q4_k" in words(with_inputs, "gguf")
    assert "imatrix" not in words(with_inputs, "gguf")
    assert "without model.imatrix" in words(without, "gguf")
    assert "q4_k" not in words(blocks, "gguf")
    assert words(without, "awq") == ""
    assert api.client.get("/v1/jobs").json() == before


def test_the_same_key_makes_one_job(api: Api) -> None:
    job_id = make(api)
    headers = {"Idempotency-Key": "once"}
    body = {"formats": ["gguf"]}
    first, second = (api.client.post(f"/v1/jobs/{job_id}/exports", json=body, headers=headers) for _ in range(2))
    assert first.json()["id"] == second.json()["id"]
    assert second.headers["idempotency-replayed"] == "true"
    other = api.client.post(f"/v1/jobs/{job_id}/exports", json={"formats": ["awq"]}, headers=headers)
    problem(other, 422, "idempotency_key_reused")
    api.client.delete(f"/v1/jobs/{job_id}")
    again = api.client.post(f"/v1/jobs/{job_id}/exports", json=body, headers=headers)
    assert again.json()["id"] == first.json()["id"], "it is there, even if its start is gone"


def test_another_tenants_job_is_not_there(any_api: Api) -> None:
    job_id = make(any_api)
    problem(any_api.stranger.post(f"/v1/jobs/{job_id}/exports", json={"formats": ["gguf"]}), 404, "not_found")
    problem(export(any_api, "job_" + "0" * 26, "gguf"), 404, "not_found")


def test_a_job_must_have_succeeded(api: Api) -> None:
    job_id = api.submit()
    found = problem(export(api, job_id, "gguf"), 422, "base_job_unusable")
    assert "queued, not succeeded" in str(found["detail"])
    api.fail(api.claim(), InvalidDataset("line 3 is not JSON"))
    assert "failed, not" in str(problem(export(api, job_id, "gguf"), 422, "base_job_unusable")["detail"])


def test_the_native_checkpoint_must_still_be_there(api: Api) -> None:
    bare = make(api, {"compressed-tensors": {"model.safetensors": b"weights"}})
    assert "has no native any more" in str(problem(export(api, bare, "gguf"), 422, "base_job_unusable")["detail"])
    for lost in ("bitwright.json", "config.json", "report.json"):
        files = {name: content for name, content in native().items() if name != lost}
        found = problem(export(api, make(api, {"native": files}), "gguf"), 422, "base_job_unusable")
        assert f"has no native/{lost} any more" in str(found["detail"])
    gone = make(api, {"native": native() | {"weights.safetensors": b"only here"}})
    with api.database.reading() as session:
        file = session.query(Artifact).filter_by(job_id=gone, path="weights.safetensors").one()
        blob = api.folder / "blobs" / file.sha256[:2] / file.sha256
    blob.unlink()
    found = problem(export(api, gone, "gguf"), 422, "base_job_unusable")
    assert "native/weights.safetensors" in str(found["detail"])
    odd = make(api, {"native": native() | {"config.json": b"[1"}})
    assert "config.json of job" in str(problem(export(api, odd, "gguf"), 422, "base_job_unusable")["detail"])


def test_an_export_is_no_start_of_another(api: Api) -> None:
    job_id = make(api)
    exported = export(api, job_id, "gguf").json()["id"]
    api.succeed(api.claim(), {"gguf": {"model.gguf": b"file"}})
    found = problem(export(api, exported, "awq"), 422, "base_job_unusable")
    assert f"export the job that it started from, {job_id}" in str(found["hint"])
    body = {"base_job": exported, "finetune": {"dataset": "builtin", "steps": 3}}
    problem(api.client.post("/v1/jobs", json=body), 422, "base_job_unusable")


@pytest.mark.parametrize(
    ("linear", "name", "code", "words"),
    [
        ({"bits": 5}, "awq", "format_cannot_hold", "awq holds 4 bits, not 5; change bits, or ask for formats: "),
        ({"symmetric": False}, "gptq", "format_cannot_hold", 'or ["gptq-v2"] or ["awq"] or ["mlx"] or ["native"]'),
        ({"group_size": 16}, "mlx", "format_cannot_hold", "mlx holds groups of multiples of 32, or -1; not 16"),
        ({"form": "codebook"}, "gguf", "format_cannot_hold", "formats that can: bitsandbytes, merged, native, peft"),
        ({"low_rank": {"rank": 4, "alpha": 8}}, "gguf", "format_cannot_hold", 'add "peft" to formats'),
        ({"symmetric": False, "offset": True}, "awq", "offset_not_representable", '["gguf"] or ["mlx"]'),
        ({}, "peft", "format_cannot_hold", "peft holds low-rank factors"),
    ],
    ids=str,
)
def test_what_a_format_cannot_hold_is_refused_with_those_that_can(
    api: Api, linear: dict[str, Any], name: str, code: str, words: str
) -> None:
    job_id = make(api, {"native": native(**linear)})
    found = problem(export(api, job_id, "merged", name), 422, code)
    (told,) = found["errors"]
    assert (told["field"], told["value"]) == ("formats.1", name)
    assert words in told["detail"]


OUTER = "model.embed_tokens"


def native_of(config: dict[str, Any], **schemes: dict[str, Any]) -> dict[str, bytes]:
    """A native checkpoint of these linears: all like the usual one, but for what is given."""
    linears = {name: {**LINEAR, **scheme} for name, scheme in schemes.items()}
    described = {"format": "bitwright", "version": 2, "linears": {NAME: LINEAR, **linears}}
    return native(config) | {"bitwright.json": json.dumps(described).encode()}


LLAMA = {
    "model_type": "llama",
    **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"vocab_size": 400, "max_position_embeddings": 64},
}


@pytest.mark.parametrize(
    ("tied", "schemes", "modules", "held"),
    [
        (True, {OUTER: {}}, {"embeddings": 4}, ["compressed-tensors", "merged", "gguf", "mlx"]),
        (False, {OUTER: {}}, {"embeddings": 4}, ["merged", "gguf", "mlx"]),
        (
            False,
            {OUTER: {}, "lm_head": {}},
            {"embeddings": 4, "head": 4},
            ["compressed-tensors", "merged", "gguf", "mlx"],
        ),
        (True, {OUTER: {"bits": 8}}, {"embeddings": 8}, ["merged", "gguf", "mlx"]),
        (
            True,
            {OUTER: {"bits": 8, "group_size": -1, "form": "float", "scheme_name": "fp8a16"}},
            {"embeddings": "fp8a16"},
            ["merged"],
        ),
        (
            False,
            {"lm_head": {"bits": 8}},
            {"head": 8},
            ["compressed-tensors", "merged", "gguf", "gptq", "gptq-v2", "mlx"],
        ),
    ],
    ids=["tied", "a head that stays", "both", "two schemes", "a number format", "a head alone"],
)
def test_quantized_embeddings_are_refused_where_a_format_does_not_hold_them(
    api: Api, tied: bool, schemes: dict[str, dict[str, Any]], modules: dict[str, Any], held: list[str]
) -> None:
    files = {"native": native_of({**LLAMA, "tie_word_embeddings": tied}, **schemes)}
    quantization = {"method": "rtn", "bits": 4, "group_size": 64, "modules": modules}
    body = {"model": "org/model", "quantization": quantization, "formats": ["merged"]}
    job_id = api.client.post("/v1/jobs", json=body).json()["id"]
    api.succeed(api.claim(), files)
    answers = {name.value: export(api, job_id, name.value) for name in ExportFormat}
    assert [name for name, answer in answers.items() if answer.status_code == 202] == held
    refused = [name for name in answers if name not in [*held, "native", "peft"]]
    for name in refused:
        told = problem(answers[name], 422, "format_cannot_hold")["errors"]
        assert {(each["field"], each["value"]) for each in told} == {("formats.0", name)}
        assert "embeddings" not in modules or "merged" in told[-1]["detail"]


def test_scales_of_a_cache_are_no_reason_to_refuse(api: Api) -> None:
    files = {"native": native_of(LLAMA)}
    job_id = make(api, files, bits=4, group_size=64, kv_cache="fp8", formats=["native"])
    assert export(api, job_id, "compressed-tensors", "gguf").status_code == 202
    assert export(api, job_id, "gguf").status_code == 202


def test_nothing_is_read_unless_it_is_asked_for(api: Api) -> None:
    job_id = make(api, verify="files")
    assert export(api, job_id, "gguf").json()["request"]["verify"] == "off"
    assert export(api, job_id, "gguf", verify="files").json()["request"]["verify"] == "files"
    found = problem(export(api, job_id, "gguf", verify="block"), 422, "invalid_request")
    assert found["errors"][0]["field"] == "verify"


def test_the_models_own_type_is_judged_too(api: Api) -> None:
    job_id = make(api, {"native": native({"model_type": "gpt_neo"})})
    found = problem(export(api, job_id, "gguf"), 422, "format_cannot_hold")
    assert "types that llama.cpp v0.5.0 knows, and gpt_neo is none of them" in str(found["detail"])


def test_native_is_the_jobs_own(api: Api) -> None:
    found = problem(export(api, make(api), "native", "gguf"), 422, "invalid_request")
    assert "the job keeps it already" in str(found["errors"][0]["detail"])


def test_an_adapter_in_a_file_of_its_own_is_not_exported(api: Api) -> None:
    files = {"native": native(), "adapter": {"adapter.safetensors": b"factors"}}
    body: dict[str, Any] = {"method": "qa-lora", "rank": 4, "finetune": {"dataset": "builtin", "steps": 3}}
    found = problem(export(api, make(api, files, **body), "merged"), 422, "base_job_unusable")
    assert "qa-lora beside its weights" in str(found["detail"])
    folded = make(api, {"native": native(symmetric=False, offset=True)}, **body, merge="quantized")
    answer = export(api, folded, "mlx", "merged")
    assert answer.status_code == 202
    assert (answer.json()["request"]["finetune"], answer.json()["request"]["adapter"]) == (None, None)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "formats"),
        ({"formats": []}, "formats"),
        ({"formats": ["onnx"]}, "formats.0"),
        ({"formats": "gguf"}, "formats"),
    ],
)
def test_a_bad_body_is_named(api: Api, body: dict[str, Any], field: str) -> None:
    found = problem(api.client.post(f"/v1/jobs/{make(api)}/exports", json=body), 422, "invalid_request")
    assert found["errors"][0]["field"] == field
    cuda = api.client.post(f"/v1/jobs/{make(api)}/exports", json={"formats": ["gguf"], "device": "cuda"})
    assert problem(cuda, 422, "invalid_request")["errors"][0]["field"] == "device"


def test_every_format_but_native_and_peft_holds_what_it_says(api: Api) -> None:
    """Symmetric, 4 bits, groups of 64: what most jobs make."""
    job_id = make(api)
    held = [name.value for name in ExportFormat if export(api, job_id, name.value).status_code == 202]
    assert held == ["compressed-tensors", "merged", "gguf", "gptq", "gptq-v2", "awq", "mlx"]
