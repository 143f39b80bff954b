"""Jobs that start from a base job's result, over HTTP: whose it must be, and what must still be there."""

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from app.store.models import Artifact, Job
from bitwright.errors import InvalidDataset
from tests.api.checkpoints import write_checkpoint
from tests.api.conftest import Api, problem

FINETUNE: dict[str, Any] = {"finetune": {"dataset": "builtin", "steps": 3}}
LINEAR = {"form": "affine", "bits": 4, "group_size": 64, "symmetric": True, "dtype": "bfloat16"}


def native(**linear: object) -> dict[str, bytes]:
    """The files of a native checkpoint that the API looks at."""
    described = {"format": "bitwright", "version": 2, "linears": {"model.layers.0.mlp.up_proj": {**LINEAR, **linear}}}
    return {"bitwright.json": json.dumps(described).encode(), "weights.safetensors": b"weights", "README.md": b"card"}


def make(api: Api, files: dict[str, dict[str, bytes]] | None = None, **fields: object) -> str:
    """A job that has succeeded; its id."""
    job_id = api.submit(**fields)
    api.succeed(api.claim(), {"native": native()} if files is None else files)
    return job_id


def refusal(api: Api, body: dict[str, Any], code: str) -> dict[str, Any]:
    found: dict[str, Any] = problem(api.client.post("/v1/jobs", json=body), 422, code)
    return found


def test_a_job_starts_from_another(any_api: Api) -> None:
    job_id = make(any_api, method="signround", bits=3)
    for body in ({"base_job": job_id}, {"model": job_id}):
        answer = any_api.client.post("/v1/jobs", json={**body, **FINETUNE})
        assert answer.status_code == 202, answer.text
        job = answer.json()
        assert job["request"]["base_job"] == job_id
        assert (job["model"], job["request"]["quantization"]["bits"]) == ("org/model", 3)
        assert job["request"]["adapter"]["kind"] == "lora"
        again = any_api.client.post("/v1/jobs", json=job["request"])
        assert again.json()["request"] == job["request"], "the full form says the same"


def test_the_model_is_pinned_to_the_commit_that_was_quantized(api: Api) -> None:
    job_id = make(api)
    with api.database.transaction() as session:
        job = session.get_one(Job, job_id)
        report = {**(job.report or {})}
        report["model"] = {**report["model"], "revision": "0123abc"}
        session.execute(update(Job).where(Job.id == job_id).values(report=report))
    answer = api.client.post("/v1/jobs", json={"base_job": job_id, **FINETUNE}).json()
    assert answer["request"]["model"] == {"source": "hub", "id": "org/model", "revision": "0123abc"}


def test_another_tenants_job_is_as_unknown_as_one_that_is_not(any_api: Api) -> None:
    job_id = make(any_api)
    nobodys = "job_" + "0" * 26
    bodies = [{"base_job": name, **FINETUNE} for name in (job_id, nobodys)]
    theirs, unknown = (problem(any_api.stranger.post("/v1/jobs", json=b), 422, "source_not_found") for b in bodies)
    for found, name in ((theirs, job_id), (unknown, nobodys)):
        del found["request_id"]
        assert (found["field"], found["value"]) == ("base_job", name)
    assert json.dumps(theirs).replace(job_id, nobodys) == json.dumps(unknown)
    assert "base_job" in str(theirs["hint"])
    refusal(any_api, {"base_job": "job_short", **FINETUNE}, "source_not_found")


def test_a_job_that_has_not_succeeded_is_no_start(any_api: Api) -> None:
    job_id = any_api.submit()
    found = refusal(any_api, {"base_job": job_id, **FINETUNE}, "base_job_unusable")
    assert "queued" in found["detail"]
    assert "wait until it has succeeded" in found["hint"]
    any_api.fail(any_api.claim(), InvalidDataset("line 3 is not JSON"))
    found = refusal(any_api, {"base_job": job_id, **FINETUNE}, "base_job_unusable")
    assert "failed" in found["detail"]
    assert found["errors"][0]["field"] == "base_job"


def test_a_start_must_still_have_its_files(api: Api) -> None:
    bare = make(api, {"compressed-tensors": {"model.safetensors": b"weights"}})
    for job_id, words in ((bare, "has no native"), (make(api, {"native": {"weights.safetensors": b""}}), "no native")):
        found = refusal(api, {"base_job": job_id, **FINETUNE}, "base_job_unusable")
        assert words in found["detail"]
        assert "submit it again" in found["hint"]
    gone = make(api, {"native": native() | {"weights.safetensors": b"only here"}})
    with api.database.reading() as session:
        file = session.query(Artifact).filter_by(job_id=gone, path="weights.safetensors").one()
        blob = api.folder / "blobs" / file.sha256[:2] / file.sha256
    blob.unlink()
    assert "native/weights.safetensors" in refusal(api, {"base_job": gone, **FINETUNE}, "base_job_unusable")["detail"]
    odd = make(api, {"native": native() | {"bitwright.json": b'{"linears": [3'}})
    assert "cannot be read" in refusal(api, {"base_job": odd, **FINETUNE}, "base_job_unusable")["detail"]


def test_a_pooled_adapter_goes_on_from_its_own_file(api: Api) -> None:
    body: dict[str, Any] = {"method": "qa-lora", "rank": 4, **FINETUNE}
    without = make(api, **body)
    assert "no adapter" in refusal(api, {"base_job": without, **FINETUNE}, "base_job_unusable")["detail"]
    whole = make(api, {"native": native(), "adapter": {"adapter.safetensors": b"factors"}}, **body)
    answer = api.client.post("/v1/jobs", json={"base_job": whole, **FINETUNE})
    assert (answer.status_code, answer.json()["request"]["adapter"]["rank"]) == (202, 4)
    other = {"base_job": whole, **FINETUNE, "adapter": {"kind": "lora"}}
    assert refusal(api, other, "invalid_request")["errors"][0]["field"] == "adapter.kind"


def test_a_bayesian_lora_does_not_go_on(api: Api) -> None:
    job_id = make(api, method="bayesian-lora", **FINETUNE)
    found = refusal(api, {"base_job": job_id, **FINETUNE}, "base_job_unusable")
    assert "gates are decided" in found["detail"]
    assert "without base_job" in found["hint"]


def test_offsets_of_a_folded_adapter_decide_the_formats(api: Api) -> None:
    merged = {"method": "qa-lora", "merge": "quantized", **FINETUNE}
    job_id = make(api, {"native": native(symmetric=False, offset=True)}, **merged)
    answer = api.client.post("/v1/jobs", json={"base_job": job_id, **FINETUNE})
    assert answer.json()["request"]["formats"] == ["native"]
    second = answer.json()["id"]
    api.succeed(api.claim(), {"native": native(symmetric=False, offset=True)})
    body = {"base_job": second, **FINETUNE, "formats": ["compressed-tensors", "peft"]}
    found = refusal(api, body, "invalid_request")
    assert found["errors"][0]["code"] == "offset_not_representable", "the fold of a job before the one before"


def test_naming_another_model_is_said_with_everything_else(api: Api) -> None:
    body = {"base_job": make(api), "model": "org/other", "bits": 3, "seed": "x", **FINETUNE}
    found = refusal(api, body, "invalid_request")
    assert {(p["field"], p["code"]) for p in found["errors"]} == {
        ("model", "conflicting_fields"),
        ("bits", "conflicting_fields"),
        ("seed", "wrong_type"),
    }


def test_a_dry_run_prices_no_quantization(api: Api) -> None:
    folder = write_checkpoint(api.folder / "models" / "tiny", shards=True)
    quantized: dict[str, Any] = {
        "model": str(folder),
        "method": "signround",
        "group_size": 16,
        "calibration": {"num_samples": 999},
    }
    job_id = make(api, **quantized)

    def estimates(body: dict[str, Any]) -> dict[str, Any]:
        answer = api.client.post("/v1/jobs?dry_run=true", json={**body, **FINETUNE})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()["estimates"]
        return found

    whole, continued = estimates({**quantized, "bits": 4}), estimates({"base_job": job_id})
    for name in ("weights_quantized", "bits_per_weight", "bytes_checkpoint", "adapter_parameters"):
        assert continued[name] == whole[name]
    assert continued["seconds"]["cpu"] < whole["seconds"]["cpu"] / 10
    assert continued["host_memory_bytes"] < whole["host_memory_bytes"]
    assert continued["device_memory_bytes"] <= whole["device_memory_bytes"]
    assert continued["disk_bytes"] == whole["disk_bytes"] + whole["bytes_checkpoint"], "the base job's checkpoint"


def test_a_calibration_text_that_is_gone_is_no_matter(api: Api, tmp_path: Path) -> None:
    text = api.folder / "models" / "text.jsonl"
    text.write_text('{"text": "a"}\n')
    job_id = make(api, calibration={"dataset": str(text)})
    text.unlink()
    answer = api.client.post("/v1/jobs", json={"base_job": job_id, **FINETUNE})
    assert answer.status_code == 202, answer.text


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("request", {"quantization": {"method": "of-the-future"}}),
        ("report", {"version": "9"}),
        ("report", {"model": "org/model"}),
        ("report", {"model": {"revision": 7}}),
    ],
)
def test_a_job_of_another_version_is_refused_or_understood(api: Api, part: str, value: dict[str, Any]) -> None:
    job_id, values = make(api), {part: value}
    with api.database.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(values))
    answer = api.client.post("/v1/jobs", json={"base_job": job_id, **FINETUNE})
    if part == "request":
        assert "another version" in str(problem(answer, 422, "base_job_unusable")["detail"])
    else:
        assert answer.status_code == 202, "it only has no commit to pin"


@pytest.mark.parametrize(
    ("made", "asked"),
    [
        ({"method": "signround"}, {}),
        ({"method": "rtn"}, {"adapter": {"kind": "qa-lora"}, "merge": "quantized"}),
        ({"method": "rtn", "formats": ["merged"]}, {"adapter": {"kind": "lora", "rank": 4, "dropout": 0.1}}),
        ({"method": "qlora", **FINETUNE}, {}),
        ({"method": "rtn", "bits": 5, "formats": ["native"]}, {}),
    ],
)
def test_a_repeated_key_gives_the_same_job_even_if_its_start_is_gone(
    any_api: Api, made: dict[str, Any], asked: dict[str, Any]
) -> None:
    job_id = make(any_api, **made)
    body, headers = {"base_job": job_id, **FINETUNE, **asked}, {"Idempotency-Key": "run-19"}
    if made.get("bits") == 5:
        body["formats"] = ["native"]
    first, again = (any_api.client.post("/v1/jobs", json=body, headers=headers) for _ in range(2))
    assert first.status_code == 202, first.text
    any_api.client.delete(f"/v1/jobs/{job_id}")
    later = any_api.client.post("/v1/jobs", json=body, headers=headers)
    for answer in (again, later):
        assert answer.json()["id"] == first.json()["id"], answer.text
        assert answer.headers["idempotency-replayed"] == "true"
    problem(any_api.client.post("/v1/jobs", json={**body, "seed": 1}, headers=headers), 422, "idempotency_key_reused")
    problem(any_api.client.post("/v1/jobs", json=body), 422, "source_not_found")
    other = {**body, "base_job": "job_" + "0" * 26}
    problem(any_api.client.post("/v1/jobs", json=other, headers=headers), 422, "source_not_found")
