"""Properties of every request: keys, scopes, problem documents, ids, headers, metrics, probes."""

import pytest
from starlette.testclient import TestClient

from app.api.main import create_app
from app.settings import Settings
from app.store.tenancy.keys import list_keys, revoke_key
from tests.api.conftest import SHORTHAND, Api, problem


def test_a_key_is_needed(api: Api) -> None:
    answer = api.anonymous.get("/v1/jobs")
    problem(answer, 401, "unauthenticated")
    assert answer.headers["www-authenticate"].startswith("Bearer")
    for value in ("Bearer x", f"Bearer {api.key[:-1]}_", "Basic abc", "Bearer", f"Bearer {api.key} {api.key}"):
        problem(api.anonymous.get("/v1/jobs", headers={"Authorization": value}), 401, "unauthenticated")
    with api.database.transaction() as session:
        key = next(key for key in list_keys(session, api.tenant_id) if key.name == "submitter")
        revoke_key(session, api.tenant_id, key.id)
    problem(api.client.get("/v1/jobs"), 401, "unauthenticated")


def test_a_reader_may_not_submit(api: Api) -> None:
    job_id = api.submit()
    assert api.reader.get(f"/v1/jobs/{job_id}").status_code == 200
    calls = [
        ("POST", "/v1/jobs"),
        ("POST", "/v1/jobs?dry_run=true"),
        ("DELETE", f"/v1/jobs/{job_id}"),
        ("POST", f"/v1/jobs/{job_id}/cancel"),
        ("POST", f"/v1/jobs/{job_id}/retry"),
        ("POST", "/v1/uploads"),
    ]
    for method, url in calls:
        found = problem(api.reader.request(method, url, json=SHORTHAND), 403, "missing_scope")
        assert "submit" in str(found["detail"])


def test_every_line_of_a_request_names_its_caller(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    api.submit()
    lines = [line for line in capsys.readouterr().out.splitlines() if "job_queued" in line or "request_served" in line]
    assert len(lines) == 2
    for line in lines:
        assert f"tenant_id='{api.tenant_id}'" in line
        assert "key_id='key_" in line


def test_unknown_paths_and_methods_are_problems(api: Api) -> None:
    problem(api.client.get("/v1/nothing"), 404, "not_found")
    answer = api.client.put("/v1/jobs")
    problem(answer, 405, "method_not_allowed")
    assert set(answer.headers["allow"].replace(" ", "").split(",")) >= {"POST"} or "GET" in answer.headers["allow"]


def test_an_unforeseen_error_tells_nothing(settings: Settings) -> None:
    application = create_app(settings)

    @application.get("/boom")
    def boom() -> None:
        raise RuntimeError("password=hunter2")

    with TestClient(application) as client:
        answer = client.get("/boom")
    problem(answer, 500, "internal_error")
    assert "hunter2" not in answer.text
    assert "RuntimeError" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_database_that_is_down_is_told_apart(api: Api) -> None:
    with api.database.transaction() as session:
        session.connection().exec_driver_sql("DROP TABLE alembic_version")
    found = problem(api.anonymous.get("/readyz"), 503, "unavailable")
    assert "migrate" in str(found["hint"])
    assert api.anonymous.get("/livez").json() == {"status": "ok"}


def test_probes_need_no_key(api: Api) -> None:
    assert api.anonymous.get("/livez").json() == {"status": "ok"}
    assert api.anonymous.get("/readyz").json() == {"status": "ok"}


def test_every_answer_has_an_id_and_safe_headers(api: Api) -> None:
    given = api.client.get("/livez", headers={"X-Request-ID": "ci-run-1234"})
    assert given.headers["x-request-id"] == "ci-run-1234"
    for harmful in ("a", "x" * 65, "a b c d e f", "<script>alert</script>"):
        made = api.client.get("/livez", headers={"X-Request-ID": harmful}).headers["x-request-id"]
        assert len(made) == 32
        assert made != harmful
    headers = api.client.get("/v1/jobs").headers
    safe = {
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cross-origin-resource-policy": "same-origin",
        "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
        "cache-control": "no-store",
    }
    assert headers.items() >= safe.items()


def test_metrics_count_routes_and_not_ids(api: Api) -> None:
    job_id = api.submit()
    api.client.get(f"/v1/jobs/{job_id}")
    api.client.get("/v1/nothing")
    text = api.anonymous.get("/metrics").text
    assert 'bitwright_http_requests_total{method="GET",route="/v1/jobs/{job_id}",status="200"} 1.0' in text
    assert 'route="unmatched",status="404"' in text
    assert 'bitwright_jobs{status="queued"} 1.0' in text
    assert 'bitwright_jobs_submitted_total{method="rtn"} 1.0' in text
    assert job_id not in text


def test_a_log_line_names_request_and_job(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    job_id = api.submit()
    lines = capsys.readouterr().out.splitlines()
    queued = next(line for line in lines if "job_queued" in line)
    assert job_id in queued
    assert "request_id=" in queued
    assert all(api.key not in line for line in lines)
