"""Jobs over HTTP, on SQLite and on a real PostgreSQL."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from app.domain.methods import BLOCK_SCHEMES, PRESET_SCHEMES
from app.store.models import Job
from app.store.workers import register
from bitwright.errors import InvalidDataset
from bitwright.job_states import DeviceClass
from tests.api.checkpoints import as_hub_cache, write_checkpoint
from tests.api.conftest import SHORTHAND, Api, make_settings, problem, run_api
from tests.store.samples import block, progress


def test_a_job_goes_from_post_to_its_report(any_api: Api) -> None:
    response = any_api.client.post("/v1/jobs", json={**SHORTHAND, "metadata": {"commit": "abc"}})
    assert response.status_code == 202
    job = response.json()
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    assert int(response.headers["retry-after"]) > 0
    assert job["status"] == "queued"
    assert job["request"]["model"] == {"source": "hub", "id": "org/model", "revision": "main"}
    assert job["request"]["quantization"]["group_size"] == 64

    held = any_api.claim()
    any_api.tell(held, progress(1.0), block(0))
    running = any_api.reader.get(response.headers["location"]).json()
    assert (running["status"], running["attempt"], running["progress"]["done"]) == ("running", 1, 1.0)
    any_api.succeed(held)
    done = any_api.reader.get(response.headers["location"]).json()
    assert done["status"] == "succeeded"
    assert done["report"]["size"]["bits_per_weight"] == 4.0
    assert [(attempt["number"], attempt["status"]) for attempt in done["attempts"]] == [(1, "succeeded")]
    assert done["finished_at"].endswith("Z")


def test_lists_are_pages_that_filter(any_api: Api) -> None:
    first = any_api.submit(metadata={"commit": "a", "branch": "x"})
    second = any_api.submit(method="signround", metadata={"commit": "b"})
    third = any_api.submit(model="org/other")

    def ids(query: str) -> list[str]:
        return [job["id"] for job in any_api.reader.get(f"/v1/jobs?{query}").json()["items"]]

    assert ids("") == [third, second, first]
    assert ids("method=signround") == [second]
    assert ids("model=org/other") == [third]
    assert ids("metadata.commit=a&metadata.branch=x") == [first]
    assert ids("metadata.commit=a&metadata.branch=y") == []
    assert ids("status=running") == []
    assert any_api.stranger.get("/v1/jobs").json() == {"items": [], "next_cursor": None}
    page = any_api.reader.get("/v1/jobs?limit=2").json()
    assert [job["id"] for job in page["items"]] == [third, second]
    last = any_api.reader.get("/v1/jobs", params={"limit": 2, "after": page["next_cursor"]}).json()
    assert ([job["id"] for job in last["items"]], last["next_cursor"]) == ([first], None)


def test_a_repeated_key_gives_the_same_job(any_api: Api) -> None:
    headers = {"Idempotency-Key": "run-17"}
    first = any_api.client.post("/v1/jobs", json=SHORTHAND, headers=headers)
    again = any_api.client.post("/v1/jobs", json=SHORTHAND, headers=headers)
    assert first.json()["id"] == again.json()["id"]
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    other = any_api.client.post("/v1/jobs", json={**SHORTHAND, "bits": 8}, headers=headers)
    problem(other, 422, "idempotency_key_reused")
    assert len(any_api.client.get("/v1/jobs").json()["items"]) == 1
    assert any_api.stranger.post("/v1/jobs", json=SHORTHAND, headers=headers).json()["id"] != first.json()["id"]


def test_a_repeated_key_gives_the_job_even_if_it_would_be_refused_now(api: Api) -> None:
    folder = write_checkpoint(api.folder / "models" / "tiny")
    body, headers = {**SHORTHAND, "model": str(folder)}, {"Idempotency-Key": "run-18"}
    first = api.client.post("/v1/jobs", json=body, headers=headers)
    (folder / "config.json").unlink()
    problem(api.client.post("/v1/jobs", json=body), 422, "corrupt_checkpoint")
    again = api.client.post("/v1/jobs", json=body, headers=headers)
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
    assert again.headers["idempotency-replayed"] == "true"
    problem(api.client.post("/v1/jobs", json={**body, "bits": 8}, headers=headers), 422, "idempotency_key_reused")


def test_cancel_retry_and_delete_follow_the_states(any_api: Api) -> None:
    job_id = any_api.submit()
    url = f"/v1/jobs/{job_id}"
    problem(any_api.client.post(f"{url}/retry"), 409, "illegal_transition")
    problem(any_api.client.delete(url), 409, "conflict")
    cancelled = any_api.client.post(f"{url}/cancel")
    assert (cancelled.status_code, cancelled.json()["status"]) == (202, "cancelled")
    for verb in ("cancel", "pause", "resume"):
        problem(any_api.client.post(f"{url}/{verb}"), 409, "illegal_transition")
    assert any_api.client.post(f"{url}/retry").json()["status"] == "queued"
    paused = any_api.client.post(f"{url}/pause").json()
    assert (paused["status"], paused["held"], paused["queue"]) == ("queued", True, None)
    assert any_api.client.post(f"{url}/resume").json()["held"] is False
    held = any_api.claim()
    asked = any_api.client.post(f"{url}/cancel").json()
    assert (asked["status"], asked["cancel_requested"]) == ("running", True)
    any_api.fail(held, InvalidDataset("line 3 is not JSON"))
    assert any_api.client.get(url).json()["status"] == "cancelled"
    any_api.client.post(f"{url}/retry")
    any_api.fail(any_api.claim(), InvalidDataset("line 3 is not JSON"))
    failed = any_api.client.get(url).json()
    assert (failed["status"], failed["error"]["code"]) == ("failed", "invalid_dataset")
    assert any_api.client.delete(url).status_code == 204
    problem(any_api.client.get(url), 404, "not_found")


def test_a_dry_run_stores_nothing(api: Api) -> None:
    folder = write_checkpoint(api.folder / "models" / "tiny", shards=True)
    body = {"model": str(folder), "method": "signround", "bits": 3, "group_size": 16, "preset": "light"}
    answer = api.client.post("/v1/jobs?dry_run=true", json=body)
    assert answer.status_code == 200
    view = answer.json()
    assert view["request"]["quantization"]["steps"] == 50
    linears = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 192)
    assert view["estimates"]["weights_quantized"] == linears
    assert view["estimates"]["bits_per_weight"] == 3 + 16 / 16
    assert view["estimates"]["seconds"]["cpu"] >= view["estimates"]["seconds"]["cuda"]
    untuned = api.client.post("/v1/jobs?dry_run=true", json={"model": str(folder), "method": "rtn"}).json()
    for name in ("host_memory_bytes", "device_memory_bytes"):
        assert untuned["estimates"][name] < view["estimates"][name], "it keeps no calibration and tunes nothing"
    packed, merged = ({**body, "formats": [name]} for name in ("native", "merged"))
    sizes = [
        api.client.post("/v1/jobs?dry_run=true", json=b).json()["estimates"]["disk_bytes"] for b in (packed, merged)
    ]
    assert sizes[1] - sizes[0] == 2 * view["estimates"]["weights"], "a checkpoint of the weights in 16 bits more"
    (told,) = (warning for warning in view["warnings"] if warning.startswith("vllm"))
    assert told.startswith("vllm loads compressed-tensors of 3 bits, symmetric, group size 16 from 0.25.0 on (by the")
    assert api.client.get("/v1/jobs").json()["items"] == []


def test_a_scheme_by_name_is_told_where_vllm_refuses_its_shapes(api: Api) -> None:
    """Before anything is computed, naming the linear; other schemes have no such rule."""
    folder = write_checkpoint(api.folder / "models" / "tiny", shards=True)

    def dry(scheme: str) -> dict[str, Any]:
        body = {"model": str(folder), "method": "rtn", "scheme": scheme}
        answer = api.client.post("/v1/jobs?dry_run=true", json=body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def told(view: dict[str, Any]) -> list[str]:
        return [warning for warning in view["warnings"] if "refuses linears" in warning]

    (refusal,) = told(dry("fp8-block"))
    assert "in blocks of 128 rows, and " in refusal
    assert "model.layers.0.self_attn" in refusal
    assert "by the rules of 0.33.0" in refusal
    served = dry("fp8")
    assert told(served) == []
    assert served["request"]["formats"] == ["compressed-tensors"]


def test_a_dry_run_prices_finetuning(api: Api) -> None:
    """By its steps in time, by the whole model and the adapter's states in memory."""
    folder = write_checkpoint(api.folder / "models" / "tiny", shards=True)

    def estimates(steps: int, rank: int) -> dict[str, Any]:
        part = {"dataset": "builtin", "steps": steps, "batch_size": 64, "sequence_length": 4096}
        body = {"model": str(folder), "method": "qlora", "group_size": 16, "rank": rank, "finetune": part}
        answer = api.client.post("/v1/jobs?dry_run=true", json=body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()["estimates"]
        return found | {"seconds": found["seconds"]["cpu"]}

    short, long, wide = estimates(1000, 4), estimates(2000, 4), estimates(1000, 8)
    assert long["seconds"] == pytest.approx(2 * short["seconds"], rel=0.05)
    more = wide["adapter_parameters"] - short["adapter_parameters"]
    assert wide["device_memory_bytes"] - short["device_memory_bytes"] >= 16 * more > 0


def test_a_dry_run_prices_epochs_as_the_steps_they_are(api: Api) -> None:
    """By the bytes of the text, at four a token: 64 KiB are 16 sequences of 1,024, of which two make a step."""
    folder = write_checkpoint(api.folder / "models" / "tiny", shards=True)
    text = api.folder / "models" / "rows.jsonl"
    row = '{"text": "' + "x" * 1011 + '"}\n'
    text.write_text(row * 64)
    assert text.stat().st_size == 1 << 16

    def dry(length: dict[str, float], dataset: object) -> dict[str, Any]:
        part = {"dataset": dataset, "batch_size": 2, "sequence_length": 1024, "validation_share": 0.0, **length}
        body = {"model": str(folder), "method": "qlora", "group_size": 16, "rank": 4, "finetune": part}
        answer = api.client.post("/v1/jobs?dry_run=true", json=body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found | {"told": [warning for warning in found["warnings"] if warning.startswith("finetune.epochs")]}

    here = {"source": "local", "path": str(text)}
    epochs, steps = dry({"epochs": 3}, here), dry({"steps": 3 * 16 // 2}, here)
    assert epochs["estimates"]["seconds"] == steps["estimates"]["seconds"]
    assert epochs["told"] == ["finetune.epochs: 3 are about 24 steps, by the 65536 bytes of the text"]
    assert steps["told"] == []
    assert epochs["request"]["finetune"]["epochs"] == 3
    (unknown,) = dry({"epochs": 3}, "builtin")["told"]
    assert "is known when the text is read" in unknown


SNAPSHOTS, BLOBS = "cache/models--org--model/snapshots", "cache/models--org--model/blobs"
HEADS = ("num_attention_heads", "num_key_value_heads", "vocab_size", "tie_word_embeddings")


@pytest.mark.parametrize("model", ["gemma3_text", "qwen3"])
def test_shapes_follow_each_architecture(api: Api, model: str) -> None:
    # Gemma 3 leaves out what its defaults say; the heads here are those.
    config: dict[str, object] = {"model_type": "gemma3_text", **dict.fromkeys(HEADS)}
    if model == "qwen3":
        config = {"model_type": "qwen3", "num_attention_heads": 2, "num_key_value_heads": 1}
    folder = write_checkpoint(api.folder / "models" / model, config)
    view = api.client.post("/v1/jobs?dry_run=true", json={"model": str(folder), "method": "rtn"}).json()
    heads, shared, width = (8, 4, 256) if model == "gemma3_text" else (2, 1, 128)
    attention = 2 * 64 * heads * width + 2 * 64 * shared * width
    assert view["estimates"]["weights_quantized"] == 2 * (attention + 3 * 64 * 192)


def test_a_dry_run_tells_what_the_workers_cannot_hold(api: Api) -> None:
    folder = write_checkpoint(api.folder / "models" / "tiny")
    body = {"model": str(folder), "method": "signround", "device": "cpu"}

    def warnings() -> str:
        return " ".join(api.client.post("/v1/jobs?dry_run=true", json=body).json()["warnings"])

    assert "no cpu worker is alive" in warnings()
    with api.database.transaction() as session:
        register(session, "gpu-1", DeviceClass.CUDA, {"host_memory_bytes": 1 << 40})
        register(session, "cpu-1", DeviceClass.CPU, {"host_memory_bytes": 7 << 27, "disk_bytes": 1 << 40})
    assert "GiB of memory; the largest worker has 0.9 GiB" in warnings()
    assert "disk" not in warnings()
    with api.database.transaction() as session:
        register(session, "cpu-2", DeviceClass.CPU, {"host_memory_bytes": 1 << 40, "disk_bytes": 1 << 40})
    assert "GiB" not in warnings()


@pytest.mark.parametrize("query", ["", "?dry_run=true"])
def test_a_job_that_no_worker_could_ever_hold_is_refused(api: Api, query: str) -> None:
    folder = write_checkpoint(api.folder / "models" / "tiny")
    body = {"model": str(folder), "method": "signround", "device": "cpu"}
    url = f"/v1/jobs{query}"
    accepted = 200 if query else 202
    assert api.client.post(url, json=body).status_code == accepted, "a larger worker may come"
    with api.database.transaction() as session:
        register(session, "gpu-1", DeviceClass.CUDA, {"host_memory_bytes": 1 << 40})
        register(session, "cpu-1", DeviceClass.CPU, {"host_memory_bytes": 1 << 28, "disk_total_bytes": 1 << 40})
    api.look_at_workers()
    found = problem(api.client.post(url, json=body), 422, "exceeds_capacity")
    assert "GiB of memory, and 0.2 GiB is what there is" in str(found["detail"])
    assert found["hint"]
    assert api.client.post(url, json={**body, "device": "any"}).status_code == accepted, "the GPU worker holds it"
    with api.database.transaction() as session:
        register(session, "cpu-2", DeviceClass.CPU, {"host_memory_bytes": 1 << 40, "disk_total_bytes": 1 << 10})
    assert "disk" in str(problem(api.client.post(url, json=body), 422, "exceeds_capacity")["detail"])
    with api.database.transaction() as session:
        register(session, "cpu-3", DeviceClass.CPU, {})
    assert api.client.post(url, json=body).status_code == accepted, "a worker that does not tell may hold it"


def test_a_stored_local_path_is_the_real_one(api: Api) -> None:
    folder = write_checkpoint(api.folder / "models" / "tiny")
    (api.folder / "models" / "link").symlink_to(folder)
    job_id = api.submit(model=str(api.folder / "models" / "link" / ".." / "tiny"))
    assert api.client.get(f"/v1/jobs/{job_id}").json()["request"]["model"]["path"] == str(folder)


@pytest.mark.parametrize(("roots", "accepted"), [(["cache"], True), ([SNAPSHOTS], False), ([SNAPSHOTS, BLOBS], True)])
def test_a_snapshot_of_a_hub_cache_is_a_model_where_a_root_holds_its_blobs(
    tmp_path: Path, sqlite_url: str, roots: list[str], accepted: bool
) -> None:
    snapshot = as_hub_cache(write_checkpoint(tmp_path / "made"), tmp_path / "cache")
    settings = make_settings(tmp_path, sqlite_url, model_roots=[tmp_path / root for root in roots])
    for api in run_api(settings):
        answer = api.client.post("/v1/jobs", json={**SHORTHAND, "model": str(snapshot)})
        if accepted:
            assert (answer.status_code, answer.json()["request"]["model"]["path"]) == (202, str(snapshot))
        else:
            assert "config.json is a link" in str(problem(answer, 422, "source_forbidden")["detail"])


def test_workers_show_only_ones_own_jobs(api: Api) -> None:
    with api.database.transaction() as session:
        register(session, "worker-1", DeviceClass.CPU, {"host_memory_bytes": 5})
    job_id = api.submit()
    api.claim()
    mine, theirs = (client.get("/v1/workers").json()["items"] for client in (api.client, api.stranger))
    assert (mine[0]["id"], mine[0]["device"], mine[0]["job_id"]) == ("worker-1", "cpu", job_id)
    assert theirs[0]["job_id"] is None


def test_workers_name_the_runtimes_that_they_have(api: Api) -> None:
    with api.database.transaction() as session:
        register(session, "worker-1", DeviceClass.CPU, {"runtimes": {"transformers": "5.23.0"}, "disk_bytes": 5})
        register(session, "worker-2", DeviceClass.CPU, {"disk_bytes": 5})
    first, older = api.client.get("/v1/workers").json()["items"]
    assert (first["runtimes"], first["capacity"]) == ({"transformers": "5.23.0"}, {"disk_bytes": 5})
    assert older["runtimes"] is None


def test_a_job_of_another_version_is_told_as_it_was_stored(any_api: Api) -> None:
    """Neither the request nor the report that it stored is one that this version knows."""
    fine = any_api.submit()
    stale = any_api.submit(metadata={"commit": "abc"})
    any_api.succeed(any_api.claim())
    any_api.succeed(any_api.claim())
    told = any_api.client.get(f"/v1/jobs/{stale}").json()
    request = {**told["request"], "quantization": {"method": "of-the-future", "bits": 4}}
    values = {"request": request, "report": {"version": "9"}, "error": {"no": "code"}, "progress": {"stage": "dream"}}
    with any_api.database.transaction() as session:
        session.execute(update(Job).where(Job.id == stale).values(values))
    listed = any_api.reader.get("/v1/jobs").json()["items"]
    assert [job["id"] for job in listed] == [stale, fine]
    alone = any_api.reader.get(f"/v1/jobs/{stale}")
    assert alone.status_code == 200
    for job in (listed[0], alone.json()):
        assert job["request"] == request
        assert (job["report"], job["error"], job["progress"]) == (None, None, None)
        assert (job["status"], job["model"], job["metadata"]) == ("succeeded", "org/model", {"commit": "abc"})
    assert [attempt["status"] for attempt in alone.json()["attempts"]] == ["succeeded"]


def test_methods_and_formats_are_listed(api: Api) -> None:
    methods = api.reader.get("/v1/methods").json()
    signround = next(item for item in methods["items"] if item["name"] == "signround")
    assert signround["paper"] == "2309.05516"
    assert signround["parameters"]["properties"]["steps"]["maximum"] == 20_000
    assert any(recipe["name"] == "auto-round-light" for recipe in methods["recipes"])
    formats = {item["name"]: item for item in api.reader.get("/v1/formats").json()["items"]}
    gpu, cpu = (item for item in formats["compressed-tensors"]["runtimes"] if item["runtime"] == "vllm")
    assert (gpu["support"], gpu["bits"], gpu["smallest_group"]) == ("by_rules", [2, 3, 4, 5, 6, 7, 8], 16)
    assert (gpu["version"], "NVIDIA" in gpu["devices"], gpu["since"][0]["version"]) == ("0.33.0", True, "0.25.0")
    assert (cpu["support"], cpu["bits"], cpu["version"], cpu["devices"]) == ("tested", [4], "0.32.0", "CPUs")
    assert formats["compressed-tensors"]["schemes"] == sorted(PRESET_SCHEMES)
    assert (set(gpu["schemes"]), cpu["schemes"]) == (set(PRESET_SCHEMES), ["fp8", "int8"])
    assert formats["gguf"]["schemes"] == sorted(BLOCK_SCHEMES)
    assert all(runtime["version"] for item in formats.values() for runtime in item["runtimes"])
