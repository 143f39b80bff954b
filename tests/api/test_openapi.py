"""The OpenAPI document is complete and true: schemathesis calls every operation with what the document allows."""

import re
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from openapi_spec_validator import validate

from app.api.main import create_app
from tests.api.conftest import Api, problem

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
            assert parameter.get("description") or parameter["in"] == "path", f"{where} {parameter['name']}"
        problems = {
            status
            for status, answer in operation["responses"].items()
            if "application/problem+json" in answer.get("content", {})
        }
        if path.startswith("/v1/"):
            assert operation["security"] == [{"ApiKey": []}], where
            assert {"401", "403", "422", "503", "500"} <= problems, where
        if "{" in path:
            assert "404" in problems, where
        for status, answer in operation["responses"].items():
            assert answer["description"], f"{where} {status}"
            if status[0] in "45":
                assert set(answer["content"]) == {"application/problem+json"}, f"{where} {status}"


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


def test_every_operation_keeps_what_the_document_promises(api: Api) -> None:
    """A few dozen generated calls an operation, valid and invalid ones, the same ones every time."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(api.settings))
    made = [result.ok() for result in schema.get_all_operations()]
    called: set[str] = set()
    for operation in made:
        _call(api, operation, schemathesis.GenerationMode.POSITIVE, called)
        if operation.body or any(operation.iter_parameters()):
            _call(api, operation, schemathesis.GenerationMode.NEGATIVE, called)
    assert {operation.label for operation in made} == called


def _call(api: Api, operation: Any, mode: schemathesis.GenerationMode, called: set[str]) -> None:
    @seed(20250105)
    @settings(
        max_examples=4,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def call(case: Any) -> None:
        called.add(operation.label)
        # What the schema allows may still name a model that is not there: acceptance is not its promise.
        case.call_and_validate(
            headers={"Authorization": f"Bearer {api.admin_key}"},
            excluded_checks=[schemathesis.checks.positive_data_acceptance],
        )

    call()
