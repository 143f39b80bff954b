"""The API's look at a model on the Hub before its job is queued: refusals, estimates, and what it does without."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from app.api.submission.hub_child import HubChild
from app.domain.request.sources import HubModel
from app.hub.looks import LOOK_BYTES, LOOK_SECONDS, LOOKS_AT_ONCE
from app.settings import Settings
from tests.api.checkpoints import CONFIG, SHAPES, safetensors
from tests.api.conftest import SHORTHAND, Api, make_settings, problem, run_api
from tests.child.hub_server import COMMIT, Hole, Hub, running_hub
from tests.supervise.bench import alive, wait_for

MODEL = "org/model"
BODY = {**SHORTHAND, "group_size": 16}
FILES: dict[str, Any] = {
    "config.json": json.dumps(CONFIG).encode(),
    "model.safetensors": safetensors(SHAPES),
    "tokenizer.json": b"{}",
}


@pytest.fixture(scope="module")
def shared_hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture
def hub(shared_hub: Hub) -> Hub:
    """The Hub as it was at the start."""
    shared_hub.repositories = {f"models/{MODEL}": dict(FILES)}
    shared_hub.gated, shared_hub.renamed, shared_hub.broken, shared_hub.retry_after = set(), {}, False, None
    shared_hub.answering.set()
    shared_hub.given.clear()
    shared_hub.requests.clear()
    shared_hub.tokens.clear()
    return shared_hub


@pytest.fixture
def api(tmp_path: Path, sqlite_url: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """An API that looks at this Hub."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    settings = {"hub_preflight": True, "hub_endpoint": hub.url, "hub_token": SecretStr("hf_secret")}
    yield from run_api(make_settings(tmp_path, sqlite_url, **settings))


def child_of(api: Api) -> HubChild:
    child = api.client.app.state.bitwright.hub  # type: ignore[attr-defined]
    assert isinstance(child, HubChild)
    return child


def test_the_limits_of_a_look() -> None:
    assert (LOOK_SECONDS, LOOK_BYTES, LOOKS_AT_ONCE) == (10.0, 67_108_864, 4)


def test_a_dry_run_of_a_model_on_the_hub_has_estimates_and_reads_no_weight(api: Api, hub: Hub) -> None:
    answer = api.client.post("/v1/jobs?dry_run=true", json=BODY).json()
    assert (answer["not_checked"], answer["estimates"]["weights"]) == (None, len(FILES["model.safetensors"]) // 2)
    assert answer["estimates"]["weights_quantized"] > 0
    assert (hub.bytes_of(".safetensors"), hub.tokens) == (0, {"Bearer hf_secret"})
    before = len(hub.requests)
    job = api.client.post("/v1/jobs", json=BODY).json()
    assert (job["not_checked"], job["status"]) == (None, "queued")
    assert [path for _, path in hub.requests[before:] if "resolve" in path] == [], "the commit has been seen"
    pinned = {**BODY, "model": {"source": "hub", "id": MODEL, "revision": COMMIT}}
    api.client.post("/v1/jobs?dry_run=true", json=pinned)
    before = len(hub.requests)
    api.client.post("/v1/jobs?dry_run=true", json=pinned)
    assert hub.requests[before:] == [], "nor does a commit change"


def test_a_model_that_will_fail_is_refused_when_it_is_submitted(api: Api, hub: Hub) -> None:
    files = hub.repositories[f"models/{MODEL}"]
    found = problem(api.client.post("/v1/jobs", json={**BODY, "group_size": 48}), 422, "group_size_does_not_divide")
    assert found["field"] == "quantization.group_size"
    hub.repositories["models/org/big"] = {
        **files,
        "config.json": json.dumps({**CONFIG, "model_type": "unheard_of"}).encode(),
        "model.safetensors": Hole(93 << 30),
    }
    signround = {**BODY, "method": "signround", "model": "org/big"}
    problem(api.client.post("/v1/jobs", json=signround), 422, "unsupported_architecture")
    assert sum(hub.given.values()) < 20_000
    hub.repositories["models/org/gated"] = files
    hub.gated.add("models/org/gated")
    problem(api.client.post("/v1/jobs", json={**BODY, "model": "org/gated"}), 422, "source_gated")
    problem(api.client.post("/v1/jobs", json={**BODY, "model": "org/none"}), 422, "source_not_found")


def test_nothing_is_looked_at_that_another_token_fetches_or_that_a_tenant_may_not_use(api: Api, hub: Hub) -> None:
    """The service's token sees more than its tenants may: what it says is for those alone whom it fetches for."""
    own = {"X-Hub-Token": "hf_mine"}
    answer = api.client.post("/v1/jobs?dry_run=true", json=BODY, headers=own).json()
    assert (answer["not_checked"], answer["estimates"], hub.requests) == ("hub", {}, [])
    api.admin.patch(f"/v1/admin/tenants/{api.tenant_id}", json={"allowed_models": ["other/*"]})
    refused = [api.client.post("/v1/jobs", json={**BODY, "model": name}).json() for name in (MODEL, "org/none")]
    assert [(each["code"], each["detail"]) for each in refused] == [
        ("source_forbidden", "the tenant may not use this model")
    ] * 2
    assert hub.requests == []


def test_a_type_without_a_model_class_is_taken_where_weights_are_enough(api: Api, hub: Hub) -> None:
    config = json.dumps({**CONFIG, "model_type": "unheard_of"}).encode()
    hub.repositories[f"models/{MODEL}"]["config.json"] = config
    answer = api.client.post("/v1/jobs?dry_run=true", json=BODY).json()
    assert answer["estimates"]["bytes_original"] == len(FILES["model.safetensors"])
    assert any("without a model" in warning for warning in answer["warnings"])


def test_what_the_hub_cannot_say_now_is_left_to_the_worker(api: Api, hub: Hub) -> None:
    hub.retry_after = "20"
    answer = api.client.post("/v1/jobs?dry_run=true", json=BODY).json()
    assert (answer["not_checked"], answer["estimates"]) == ("hub", {})
    assert any("asks to wait 20 seconds" in warning for warning in answer["warnings"])
    hub.retry_after, hub.broken = None, True
    job = api.client.post("/v1/jobs", json=BODY)
    assert (job.status_code, job.json()["not_checked"]) == (202, "hub")


def test_a_renamed_repository_is_told_of(api: Api, hub: Hub) -> None:
    hub.repositories["models/new/name"] = hub.repositories.pop(f"models/{MODEL}")
    hub.renamed[f"models/{MODEL}"] = "models/new/name"
    answer = api.client.post("/v1/jobs?dry_run=true", json=BODY).json()
    assert answer["estimates"]
    assert any("renamed to new/name" in warning for warning in answer["warnings"])


def test_a_job_is_taken_when_the_hub_is_late(hub: Hub, tmp_path: Path, sqlite_url: str) -> None:
    settings = make_settings(tmp_path, sqlite_url, hub_preflight=True, hub_endpoint=hub.url)
    child = HubChild(settings, seconds=0.2)
    hub.answering.clear()
    try:
        assert child.look(HubModel(id=MODEL), any_type=False) is None
        assert child.pid is not None
    finally:
        hub.answering.set()
        child.close()


def test_the_child_is_started_again_when_it_has_died_and_ends_with_the_api(
    hub: Hub, tmp_path: Path, sqlite_url: str
) -> None:
    child = HubChild(make_settings(tmp_path, sqlite_url, hub_preflight=True, hub_endpoint=hub.url))
    try:
        first = child.look(HubModel(id=MODEL), any_type=False)
        assert first is not None
        assert first.found is not None
        assert child.pid is not None
        hub.answering.clear()
        waiting: list[object] = []
        asking = threading.Thread(target=lambda: waiting.append(child.look(HubModel(id=MODEL), any_type=False)))
        before, dead = len(hub.requests), child.pid
        asking.start()
        wait_for(lambda: len(hub.requests) > before, what="a question")
        os.kill(dead, signal.SIGKILL)
        asking.join(5)
        assert waiting == [None], "who waits is not kept waiting"
        hub.answering.set()
        again = child.look(HubModel(id=MODEL), any_type=False)
        assert again is not None
        assert child.pid != dead
        last = child.pid
    finally:
        hub.answering.set()
        child.close()
    assert not alive(last)


def test_the_child_has_the_networks_variables_and_no_secret_of_the_service(
    api: Api, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITWRIGHT_TEST_SECRET", "sesame")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    api.client.post("/v1/jobs?dry_run=true", json=BODY)
    pid = child_of(api).pid
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    assert b"no_proxy=127.0.0.1" in environment
    assert not any(secret in environment for secret in (b"sesame", b"hf_secret", b"BITWRIGHT_"))
    assert b"torch" not in Path(f"/proc/{pid}/maps").read_bytes()


def test_an_api_that_is_not_to_ask_the_hub_says_what_it_has_not_checked(
    tmp_path: Path, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (api,) = [next(run_api(make_settings(tmp_path, sqlite_url)))]
    assert api.client.app.state.bitwright.hub is None  # type: ignore[attr-defined]
    assert api.client.post("/v1/jobs?dry_run=true", json=BODY).json()["not_checked"] == "hub"
    for offline, asks in (("1", False), ("true", False), ("0", True), ("", True)):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        assert Settings(hub_preflight=True).looks_at_hub is asks
    assert not Settings(hub_preflight=True, hub_enabled=False).looks_at_hub
    assert not Settings().hub_preflight
