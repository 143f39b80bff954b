"""Nothing that a caller sends is passed over in silence: query parameters, fields, bodies, names that stand twice."""

from typing import Any

import pytest

from app.api.openai.errors import is_openais
from tests.api.conftest import SHORTHAND, Api, openai_error, problem
from tests.api.test_openapi import operations as all_operations

IDS = {
    "{job_id}": "job_0123456789abcdefghjkmnpqrs",
    "{artifact_id}": "art_0123456789abcdefghjkmnpqrs",
    "{upload_id}": "upl_0123456789abcdefghjkmnpqrs",
    "{file_id}": "upl_0123456789abcdefghjkmnpqrs",
    "{webhook_id}": "whe_0123456789abcdefghjkmnpqrs",
    "{delivery_id}": "whd_0123456789abcdefghjkmnpqrs",
    "{format}": "native",
    "{export_format}": "native",
    "{name}": "a.jsonl",
}


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """All but those for clients of a Hub, each version of which sends parameters of its own."""
    return [found for found in all_operations(document) if not found[0].startswith("/hub/")]


def path_of(template: str) -> str:
    """A path with some id in each of its places."""
    for place, value in IDS.items():
        template = template.replace(place, value)
    return template


def details(found: dict[str, object]) -> dict[str, str]:
    """Field -> "code: detail" of a problem document."""
    errors: Any = found["errors"]
    return {error["field"]: f"{error['code']}: {error['detail']}" for error in errors}


def test_no_route_takes_a_query_parameter_that_the_document_does_not_name(api: Api) -> None:
    document = api.anonymous.get("/openapi.json").json()
    called = operations(document)
    assert len(called) >= 23
    for template, method, operation in called:
        declared = [p for p in operation.get("parameters", []) if p["in"] == "query"]
        answer = api.admin.request(method, path_of(template), params={"dryrun": "true"})
        if method == "head":
            assert answer.status_code == 422, template
            continue
        if is_openais(template):
            assert openai_error(answer, 400, "unknown_parameter")["param"] == "query.dryrun"
            continue
        told = details(problem(answer, 422, "invalid_request"))["query.dryrun"]
        assert told.startswith("unknown_parameter: "), (method, template)
        for parameter in declared:
            assert parameter["name"] in told, (method, template)
        if not declared:
            assert "takes none" in told, (method, template)


def test_no_route_takes_a_single_value_twice(api: Api) -> None:
    document = api.anonymous.get("/openapi.json").json()
    for template, method, operation in operations(document):
        for parameter in operation.get("parameters", []):
            if parameter["in"] != "query" or parameter["schema"].get("type") == "object":
                continue
            name = parameter["name"]
            answer = api.admin.request(method, path_of(template), params=[(name, "1"), (name, "1")])
            if method == "head":
                assert answer.status_code == 422, template
                continue
            if is_openais(template):
                assert openai_error(answer, 400, "given_twice")["param"] == f"query.{name}"
                continue
            told = details(problem(answer, 422, "invalid_request"))
            assert told[f"query.{name}"].startswith("given_twice: "), (method, template)


def test_a_misspelt_dry_run_queues_nothing(api: Api) -> None:
    for query, meant in (("dryrun=true", "dry_run"), ("dry-run=1", "dry_run"), ("Dry_Run=true", "dry_run")):
        found = problem(api.client.post(f"/v1/jobs?{query}", json=SHORTHAND), 422, "invalid_request")
        assert f"did you mean {meant}?" in str(found["detail"])
        assert "there are: dry_run" in str(found["detail"])
    twice = api.client.post("/v1/jobs?dry_run=true&dry_run=false", json=SHORTHAND)
    assert "query.dry_run" in details(problem(twice, 422, "invalid_request"))
    assert api.client.get("/v1/jobs").json()["items"] == []


def test_labels_of_ones_own_filter_and_nothing_else_does(api: Api) -> None:
    job = api.submit(metadata={"commit": "abc"})
    assert [found["id"] for found in api.client.get("/v1/jobs?metadata.commit=abc").json()["items"]] == [job]
    for query in ("metadata.=abc", "metadata=abc", "sort=created_at", "metadata.commit=abc&metadata.commit=x"):
        problem(api.client.get(f"/v1/jobs?{query}"), 422, "invalid_request")


def test_a_caller_without_a_key_learns_that_first(api: Api) -> None:
    problem(api.anonymous.get("/v1/jobs?sort=x"), 401, "unauthenticated")
    problem(api.anonymous.get("/livez?sort=x"), 422, "invalid_request")


def test_a_route_without_a_body_takes_none(api: Api) -> None:
    job = api.submit()
    answer = api.client.post(f"/v1/jobs/{job}/cancel", json={"reason": "typo"})
    assert "reads no body" in details(problem(answer, 422, "invalid_request"))["body"]
    assert api.client.get(f"/v1/jobs/{job}").json()["status"] == "queued"
    assert api.client.post(f"/v1/jobs/{job}/cancel", json={}).status_code == 202
    assert api.client.post(f"/v1/jobs/{job}/retry").status_code == 202


def test_a_name_that_stands_twice_in_a_body_is_refused(api: Api) -> None:
    headers = {"Content-Type": "application/json"}
    body = '{"model": "org/model", "method": "rtn", "bits": 4, "bits": 3}'
    found = details(problem(api.client.post("/v1/jobs", content=body, headers=headers), 422, "invalid_request"))
    assert found["bits"].startswith("given_twice: ")
    inner = '{"model": "org/model", "method": "rtn", "calibration": {"num_samples": 1, "num_samples": 2}}'
    found = details(problem(api.client.post("/v1/jobs", content=inner, headers=headers), 422, "invalid_request"))
    assert found["num_samples"].startswith("given_twice: ")


def test_a_body_that_is_sent_as_something_else_is_told_so(api: Api) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = api.client.post("/v1/jobs", content='{"model": "org/model", "method": "rtn"}', headers=form)
    assert (
        "send Content-Type: application/json" in details(problem(answer, 422, "invalid_request"))["header.Content-Type"]
    )
    parts = api.client.post("/v1/uploads", files={"file": ("a.jsonl", b"{}")})
    assert "multipart/form-data" in details(problem(parts, 422, "invalid_request"))["header.Content-Type"]


@pytest.mark.parametrize(
    ("fields", "field", "meant"),
    [
        ({"group_sise": 32}, "group_sise", "group_size"),
        ({"groupSize": 32}, "groupSize", "group_size"),
        ({"format": ["native"]}, "format", "formats"),
        ({"calibration": {"samples": 4}}, "calibration.samples", "num_samples"),
        ({"require": {"max_kl": 1.0}}, "require.max_kl", "max_kl_divergence"),
    ],
)
def test_an_unknown_field_gets_the_name_that_was_meant(
    api: Api, fields: dict[str, object], field: str, meant: str
) -> None:
    found = details(problem(api.client.post("/v1/jobs", json={**SHORTHAND, **fields}), 422, "invalid_request"))
    assert f"did you mean {meant}?" in found[field]


def test_an_unknown_field_lists_the_shorthands(api: Api) -> None:
    told = details(problem(api.client.post("/v1/jobs", json={**SHORTHAND, "zzz": 1}), 422, "invalid_request"))["zzz"]
    listed = told.partition("in shorthand also: ")[2].split(", ")
    assert {"method", "bits", "group_size", "preset", "rank", "alpha", "dropout"} <= set(listed)
    lonely = api.client.post("/v1/jobs", json={**SHORTHAND, "dropout": 0.1})
    assert "recipe of an adapter" in details(problem(lonely, 422, "invalid_request"))["dropout"]


def test_an_upload_gets_the_name_that_was_meant(api: Api) -> None:
    file = {"name": "a.jsonl", "size": 2, "sha256": "0" * 64}
    found = details(problem(api.client.post("/v1/uploads", json={"file": [file]}), 422, "invalid_request"))
    assert "did you mean files? there are: files" in found["file"]
    inner = {"files": [{**file, "sha": "0"}]}
    found = details(problem(api.client.post("/v1/uploads", json=inner), 422, "invalid_request"))
    assert "did you mean sha256? there are: name, size, sha256" in found["files.0.sha"]
