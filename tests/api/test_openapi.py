"""The OpenAPI document is complete and true: schemathesis calls every operation with what the document allows."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import schemathesis
from cryptography.fernet import Fernet
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies
from openapi_spec_validator import validate
from pydantic import SecretStr
from starlette.testclient import TestClient

from app.api.main import create_app
from app.api.openai.errors import is_openais
from tests.api.conftest import Api, openai_error, problem

METHODS = ("get", "put", "post", "delete", "patch", "head")


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(path, method, operation) of all operations."""
    return [
        (path, method, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method in METHODS
    ]


def test_the_document_is_valid_and_complete(api: Api) -> None:
    document = api.anonymous.get("/openapi.json").json()
    validate(document)
    found = operations(document)
    assert len(found) >= 23
    ids = [operation["operationId"] for _, _, operation in found]
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"[a-z_]+", name) for name in ids)
    tags = {tag["name"] for tag in document["tags"]}
    for path, method, operation in found:
        where = f"{method} {path}"
        assert operation["summary"], where
        assert operation["description"], where
        assert set(operation["tags"]) <= tags, where
        for parameter in operation.get("parameters", []):
            assert parameter.get("description"), f"{where} {parameter['name']}"
        kind = "application/json" if is_openais(path) else "application/problem+json"
        problems = {status for status, answer in operation["responses"].items() if kind in answer.get("content", {})}
        if path.startswith(("/v1/", "/hub/")):
            assert operation["security"] == [{"ApiKey": []}], where
            assert {"401", "403", "400" if is_openais(path) else "422", "503", "500"} <= problems, where
        if "{" in path:
            assert "404" in problems, where
        for status, answer in operation["responses"].items():
            assert answer["description"], f"{where} {status}"
            if status[0] in "45":
                assert set(answer["content"]) == {kind}, f"{where} {status}"


def test_examples_of_the_document_are_accepted(api: Api) -> None:
    document = api.anonymous.get("/openapi.json").json()
    body = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]
    examples = {name: example["value"] for name, example in body["examples"].items()}
    assert {"shorthand", "finetune", "continued", "full"} == set(examples)
    unknown = problem(api.client.post("/v1/jobs?dry_run=true", json=examples["continued"]), 422, "source_not_found")
    assert unknown["value"] == examples["continued"]["base_job"]
    api.submit(formats=["native"])
    held = api.claim()
    api.succeed(held, {"native": {"bitwright.json": b'{"linears": {}}', "weights.safetensors": b""}})
    examples["continued"]["base_job"] = held.job_id
    for example in examples.values():
        assert api.client.post("/v1/jobs?dry_run=true", json=example).status_code == 200


MEANING = {
    *("POST /v1/jobs", "POST /v1/jobs/{job_id}/exports", "POST /v1/jobs/{job_id}/publish"),
    "POST /v1/uploads",
    *("POST /v1/admin/tenants", "PATCH /v1/admin/tenants/{tenant_id}"),
    *("PUT /v1/uploads/{upload_id}/files/{name}", "POST /v1/files", "POST /v1/fine_tuning/jobs"),
    *("POST /v1/webhooks", "PATCH /v1/webhooks/{webhook_id}"),
}
"""Operations that refuse more than a schema can say: what goes with what, tokens that are not there, files that make no
checkpoint together, a tenant's folders out of the service's, more bytes than were announced.
"""


def test_every_operation_keeps_what_the_document_promises(any_api: Api) -> None:
    """All checks on some hundred generated calls, valid and invalid ones, the same ones every time."""
    assert fuzz(any_api, examples=2, number=20250105) > 100


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_calls_keep_what_the_document_promises(any_api: Api) -> None:
    calls, number = 0, 1
    while calls < 5_000:  # on each database
        calls += fuzz(any_api, examples=40, number=number)
        number += 1


def fuzz(api: Api, *, examples: int, number: int) -> int:
    """Call every operation with up to `examples` cases of each kind; how many calls there were."""
    keys = (SecretStr(Fernet.generate_key().decode()),)
    app = create_app(api.settings.model_copy(update={"token_keys": keys}))
    api = replace(api, client=TestClient(app, headers=dict(api.client.headers)))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    made = [result.ok() for result in schema.get_all_operations()]
    ids = real_ids(api)
    called: Counter[str] = Counter()
    for operation in made:
        call(api, operation, schemathesis.GenerationMode.POSITIVE, examples, number, called, ids)
        if operation.body or any(operation.iter_parameters()):
            call(api, operation, schemathesis.GenerationMode.NEGATIVE, examples, number, called, {})
    assert {operation.label for operation in made} == set(called)
    return called.total()


def real_ids(api: Api) -> dict[str, list[str]]:
    """Values of path parameters for which there is something: generated ones meet nothing."""
    jobs, artifacts, uploads = [], [], []
    for number in range(3):
        api.submit(metadata={"commit": str(number)})
        held = api.claim()  # that one, or one that a generated call has queued
        jobs.append(held.job_id)
        files = {"config.json": b"{}", "README.md": b"#", "load.py": b"", "model.safetensors": b"12345678"}
        api.succeed(held, {"native": {**files, "chat_template.jinja": b"x"}})
        artifacts += [item["id"] for item in api.reader.get(f"/v1/jobs/{jobs[-1]}/artifacts").json()["items"]]
        spec = {"name": "text.jsonl", "size": 3 * number, "sha256": "0" * 64}
        uploads.append(api.client.post("/v1/uploads", json={"files": [spec]}).json()["id"])
    jobs += [api.submit() for _ in range(2)]
    tenant = api.admin.post("/v1/admin/tenants", json={"name": "generated"}).json()["id"]
    keys = [api.admin.post(f"/v1/admin/tenants/{tenant}/keys", json={"name": "x"}).json()["id"] for _ in range(3)]
    sent = [api.send_file() for _ in range(2)]
    for file in sent:
        asked = {"model": "org/model", "training_file": file}
        jobs.append(api.client.post("/v1/fine_tuning/jobs", json=asked).json()["id"])
    texts = {"name": ["text.jsonl"], "file_id": sent, "tenant_id": [tenant], "key_id": keys}
    made = [api.client.post("/v1/webhooks", json={"url": "https://example.org/"}) for _ in range(2)]
    hooks = [answer.json()["id"] for answer in made if answer.status_code == 201]
    tests = [api.client.post(f"/v1/webhooks/{hook}/test").json()["id"] for hook in hooks]
    texts |= {"webhook_id": hooks or ["whe_x"], "delivery_id": tests or ["whd_x"]}
    texts |= {"namespace": ["jobs"], "repository": jobs[:3], "revision": ["main"], "path": ["config.json"]}
    return {"job_id": jobs, "artifact_id": artifacts, "upload_id": uploads, **texts}


def call(
    api: Api, operation: Any, mode: Any, examples: int, number: int, called: Counter[str], ids: Mapping[str, list[str]]
) -> None:
    """Call one operation and check each answer."""

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), which=strategies.integers(0, 20))
    def one(case: Any, which: int) -> None:
        called[operation.label] += 1
        for name in set(case.path_parameters) & set(ids):
            if which < 15:
                case.path_parameters[name] = ids[name][which % len(ids[name])]
        key = api.admin_key if "/v1/admin/" in operation.label else api.key
        headers = {"Authorization": f"Bearer {key}"}
        excluded = [schemathesis.checks.positive_data_acceptance] if operation.label in MEANING else []
        answer = case.call_and_validate(headers=headers, excluded_checks=excluded)
        if excluded and mode is schemathesis.GenerationMode.POSITIVE and answer.status_code >= 400:
            told = answer.json()
            assert answer.status_code in (400, 404, 409, 413, 422), told
            named = told["error"]["param"] if "error" in told else told["errors"] or told.get("field")
            assert answer.status_code in (404, 409) or named, told

    one()


def test_a_method_that_a_path_does_not_take_is_told_all_that_it_takes(api: Api) -> None:
    document = api.anonymous.get("/openapi.json").json()
    for path, item in document["paths"].items():
        url = re.sub(r"{\w+}", "x", path)
        for method in {"OPTIONS", "PATCH", "TRACE"} - {name.upper() for name in item}:
            answer = api.client.request(method, url)
            (openai_error if is_openais(path) else problem)(answer, 405, "method_not_allowed")
            allowed = {name.strip().lower() for name in answer.headers["allow"].split(",")}
            assert allowed == set(item) & set(METHODS), path


def test_a_whole_number_may_be_written_with_a_point(api: Api) -> None:
    """JSON and its schemas do not tell 4.0 from 4."""
    body = '{"model": "o/m", "method": "rtn", "bits": 4.0, "priority": -3.0}'
    answer = api.client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 202
    request = answer.json()["request"]
    assert (request["quantization"]["bits"], request["priority"]) == (4, -3)
    for wrong in ("4.5", "true", '"4"'):
        refused = body.replace("4.0", wrong)
        answer = api.client.post("/v1/jobs", content=refused, headers={"Content-Type": "application/json"})
        problem(answer, 422, "invalid_request")


def test_an_empty_cursor_is_outside_the_schema(api: Api) -> None:
    for path, prefix in (("/v1/jobs", "job"), ("/v1/uploads", "upl")):
        told = problem(api.client.get(f"{path}?after="), 422, "invalid_request")
        assert told["field"] == "after"
        parameters = api.anonymous.get("/openapi.json").json()["paths"][path]["get"]["parameters"]
        (pattern,) = [find_pattern(p["schema"]) for p in parameters if p["name"] == "after"]
        assert re.search(pattern, f"{prefix}_{'0' * 26}")
        assert not re.search(pattern, "")


def find_pattern(schema: Any) -> str:
    """The one pattern in a schema."""
    (pattern,) = [part["pattern"] for part in [schema, *schema.get("anyOf", [])] if "pattern" in part]
    return str(pattern)
