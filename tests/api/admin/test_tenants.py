"""Tenants and keys through the admin routes, and what the audit log and use tell of it."""

import itertools
from decimal import Decimal
from typing import Any

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import select
from starlette.testclient import TestClient

from app.api.main import create_app
from app.domain.access import Scope
from app.store.models import ApiKey, HubToken
from app.store.tenancy.keys import issue_key
from tests.api.checkpoints import write_checkpoint
from tests.api.conftest import SHORTHAND, Answer, Api, make_settings, problem

TENANTS = "/v1/admin/tenants"
TOKEN = "hf_" + "Q" * 34


def client_of(api: Api, key: str) -> TestClient:
    return TestClient(api.client.app, headers={"Authorization": f"Bearer {key}"}, raise_server_exceptions=False)


def test_a_tenant_from_its_making_to_its_end(any_api: Api) -> None:
    admin = any_api.admin
    made = admin.post(TENANTS, json={"name": "acme", "quotas": {"queued_jobs": 1}})
    assert made.status_code == 201, made.text
    tenant = made.json()
    url = made.headers["location"]
    assert url == f"{TENANTS}/{tenant['id']}"
    assert (tenant["quotas"]["queued_jobs"], tenant["has_hub_token"]) == (1, False)
    problem(admin.post(TENANTS, json={"name": "acme"}), 409, "conflict")
    key = admin.post(f"{url}/keys", json={"name": "ci", "expires_in_days": 1}).json()
    with client_of(any_api, key["key"]) as theirs:
        assert theirs.post("/v1/jobs", json=SHORTHAND).status_code == 202
        refused = theirs.post("/v1/jobs", json=SHORTHAND)
        problem(refused, 429, "queued_jobs_exceeded")
        changed = admin.patch(url, json={"quotas": {"queued_jobs": 2}}).json()
        assert changed["quotas"]["queued_jobs"] == 2
        assert theirs.post("/v1/jobs", json=SHORTHAND).status_code == 202
        problem(admin.delete(url), 409, "conflict")
        admin.patch(url, json={"suspended": True})
        problem(theirs.get("/v1/jobs"), 401, "unauthenticated")
        assert admin.patch(url, json={"suspended": False}).json()["suspended_at"] is None
        for job in theirs.get("/v1/jobs").json()["items"]:
            theirs.post(f"/v1/jobs/{job['id']}/cancel")
            theirs.delete(f"/v1/jobs/{job['id']}")
        assert admin.delete(url).status_code == 204
        problem(theirs.get("/v1/jobs"), 401, "unauthenticated")
    problem(admin.get(url), 404, "not_found")
    actions = [entry["action"] for entry in audit(any_api, subject=tenant["id"])]
    assert actions == ["tenant.deleted", *["tenant.changed"] * 3, "tenant.created"]
    theirs_did = [entry["action"] for entry in audit(any_api, tenant_id=tenant["id"])]
    assert theirs_did == ["job.deleted", "job.cancelled", "job.deleted", "job.cancelled", *["job.submitted"] * 2]


def audit(api: Api, **filters: str) -> list[dict[str, object]]:
    """All entries, newest first, page by page."""
    entries: list[dict[str, object]] = []
    after: dict[str, str] = {}
    while True:
        page = api.admin.get("/v1/admin/audit", params={**filters, **after, "limit": 3}).json()
        entries += page["items"]
        if page["next_cursor"] is None:
            return entries
        after = {"after": page["next_cursor"]}


def test_two_keys_open_during_an_overlap_and_the_log_tells_of_it(any_api: Api) -> None:
    url = f"{TENANTS}/{any_api.tenant_id}/keys"
    first = any_api.admin.post(url, json={"name": "ci", "scopes": ["read"]}).json()
    second = any_api.admin.post(f"{url}/{first['id']}/rotate", json={"overlap_seconds": 600}).json()
    assert second["replaces"] == first["id"]
    clients = [client_of(any_api, key["key"]) for key in (first, second)]
    assert [client.get("/v1/jobs").status_code for client in clients] == [200, 200]
    problem(any_api.admin.post(f"{url}/{first['id']}/rotate", json={}), 409, "conflict")
    assert any_api.admin.delete(f"{url}/{first['id']}").status_code == 204
    assert [client.get("/v1/jobs").status_code for client in clients] == [401, 200]
    listed = {key["id"]: key for key in any_api.admin.get(url).json()["items"]}
    assert listed[first["id"]]["revoked_at"] is not None
    assert "key" not in listed[second["id"]]
    assert [entry["action"] for entry in audit(any_api, subject=first["id"])] == [
        "key.revoked",
        "key.rotated",
        "key.created",
    ]


def test_the_last_use_of_a_key_is_written_later_and_costs_no_write_at_once(any_api: Api) -> None:
    url = f"{TENANTS}/{any_api.tenant_id}/keys"

    def uses() -> dict[str, object]:
        return {key["name"]: key["last_used_at"] for key in any_api.admin.get(url).json()["items"]}

    any_api.reader.get("/v1/jobs")
    assert uses()["reader"] is None
    any_api.client.app.state.bitwright.later.write()  # type: ignore[attr-defined]
    assert uses()["reader"] is not None
    assert uses()["submitter"] is None


def test_the_use_of_a_key_at_the_pages_is_noted(any_api: Api) -> None:
    def used() -> Any:
        any_api.client.app.state.bitwright.later.write()  # type: ignore[attr-defined]
        keys = any_api.admin.get(f"{TENANTS}/{any_api.tenant_id}/keys").json()["items"]
        return {key["name"]: key["last_used_at"] for key in keys}["submitter"]

    assert used() is None
    browser = any_api.visitor()
    logged_in = used()
    assert logged_in is not None
    assert browser.get("/").status_code == 200
    seen = used()
    assert seen is not None
    assert seen > logged_in, "each page is a use of the session's key"


def test_downloads_are_in_the_log_once_and_their_bytes_in_the_use(any_api: Api) -> None:
    job_id = any_api.submit()
    any_api.succeed(any_api.claim(), {"native": {"w.bin": b"x" * 1000}})
    artifact = any_api.client.get(f"/v1/jobs/{job_id}/artifacts").json()["items"][0]["id"]
    url = f"/v1/artifacts/{artifact}/content"
    assert any_api.reader.head(url).status_code == 200
    assert audit(any_api, subject=artifact) == []
    for start in (0, 400):
        part = any_api.reader.get(url, headers={"Range": f"bytes={start}-{start + 399}"})
        assert part.status_code == 206
    assert any_api.client.get(url).content == b"x" * 1000
    told = audit(any_api, subject=artifact)
    assert [(entry["action"], entry["tenant_id"]) for entry in told] == [
        ("artifact.downloaded", any_api.tenant_id)
    ] * 2, "one entry for each key"
    assert told[0]["key_id"] != told[1]["key_id"]
    archive = any_api.reader.get(f"/v1/jobs/{job_id}/archive")
    assert [entry["action"] for entry in audit(any_api, subject=job_id)] == ["archive.downloaded", "job.submitted"]
    any_api.client.app.state.bitwright.later.write()  # type: ignore[attr-defined]
    usage = any_api.reader.get("/v1/usage").json()
    assert usage["months"][0]["downloaded_bytes"] == 1800 + len(archive.content)
    assert usage["months"][0]["stored_bytes"] == usage["used"]["storage_bytes"] == 1000
    assert usage["months"][0]["jobs"] == 1
    same = any_api.admin.get(f"{TENANTS}/{any_api.tenant_id}/usage").json()
    assert same == usage
    assert any_api.stranger.get("/v1/usage").json()["months"] == []


def test_a_rate_is_told_in_every_answer_and_refused_with_its_end(any_api: Api) -> None:
    any_api.admin.patch(f"{TENANTS}/{any_api.tenant_id}", json={"quotas": {"posts_per_minute": 3}})
    answers = [any_api.client.post("/v1/jobs?dry_run=true", json=body) for body in (SHORTHAND, SHORTHAND, {"x": 1})]
    assert [answer.status_code for answer in answers] == [200, 200, 422]
    assert [answer.headers["ratelimit-policy"] for answer in answers] == ['"posts";q=3;w=60'] * 3
    for answer, left in zip(answers, (2, 1, 0), strict=True):
        name, remaining, seconds = answer.headers["ratelimit"].split(";")
        assert (name, remaining) == ('"posts"', f"r={left}")
        assert 1 <= int(seconds.removeprefix("t=")) <= 60
    refused = any_api.client.post("/v1/jobs?dry_run=true", json=SHORTHAND)
    found = problem(refused, 429, "rate_limit_exceeded")
    assert found["violated-policies"] == ["posts"]
    reset = int(refused.headers["ratelimit"].partition("t=")[2])
    assert reset <= int(refused.headers["retry-after"]) <= 60, "no earlier than the end of the window"
    assert any_api.client.get("/v1/jobs").status_code == 200
    assert "ratelimit" not in any_api.stranger.post("/v1/jobs", json=SHORTHAND).headers


@pytest.mark.parametrize(
    ("quotas", "code", "policy"),
    [
        ({"queued_jobs": 0}, "queued_jobs_exceeded", '"queued-jobs";q=0'),
        ({"storage_bytes": 0}, "storage_exceeded", '"storage";q=0;qu="content-bytes"'),
        ({"uploads": 0}, "uploads_exceeded", '"uploads";q=0'),
        ({"streams": 0}, "streams_exceeded", '"streams";q=0;qu="concurrent-requests"'),
    ],
)
def test_each_quota_has_a_code_a_policy_and_a_time_to_come_back(
    api: Api, quotas: dict[str, int], code: str, policy: str
) -> None:
    job_id = api.submit()
    api.admin.patch(f"{TENANTS}/{api.tenant_id}", json={"quotas": quotas})
    files = [{"name": "t.jsonl", "size": 1, "sha256": "0" * 64}]
    answer = {
        "uploads": lambda: api.client.post("/v1/uploads", json={"files": files}),
        "streams": lambda: api.client.get(f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"}),
    }.get(next(iter(quotas)), lambda: api.client.post("/v1/jobs", json=SHORTHAND))()
    found = problem(answer, 429, code)
    assert answer.headers["ratelimit-policy"] == policy
    assert answer.headers["ratelimit"] == f"{policy.partition(';')[0]};r=0"
    assert int(answer.headers["retry-after"]) > 0
    assert found["violated-policies"] == [policy.split('"')[1]]
    assert found["hint"]


def test_a_queue_with_room_tells_what_is_left(api: Api) -> None:
    api.admin.patch(f"{TENANTS}/{api.tenant_id}", json={"quotas": {"queued_jobs": 2}})
    left = [api.client.post("/v1/jobs", json=SHORTHAND).headers["ratelimit"] for _ in range(2)]
    assert left == ['"queued-jobs";r=1', '"queued-jobs";r=0']
    problem(api.client.post("/v1/jobs", json=SHORTHAND), 429, "queued_jobs_exceeded")
    job = api.client.get("/v1/jobs").json()["items"][0]["id"]
    api.client.post(f"/v1/jobs/{job}/cancel")
    assert api.client.post(f"/v1/jobs/{job}/retry").status_code == 202, "as many as may wait"
    api.client.post(f"/v1/jobs/{job}/cancel")
    api.submit()
    problem(api.client.post(f"/v1/jobs/{job}/retry"), 429, "queued_jobs_exceeded")
    assert api.client.get(f"/v1/jobs/{job}").json()["status"] == "cancelled", "a refusal takes the retry back"


def test_a_repeated_request_is_answered_though_the_queue_is_full(api: Api) -> None:
    headers = {"Idempotency-Key": "k"}
    first = api.client.post("/v1/jobs", json=SHORTHAND, headers=headers).json()["id"]
    api.admin.patch(f"{TENANTS}/{api.tenant_id}", json={"quotas": {"queued_jobs": 1}})
    again = api.client.post("/v1/jobs", json=SHORTHAND, headers=headers)
    assert (again.status_code, again.json()["id"]) == (202, first)


def test_the_services_quotas_hold_where_a_tenant_has_none(tmp_path_factory: pytest.TempPathFactory, api: Api) -> None:
    settings = api.settings.model_copy(
        update={"tenant_quotas": api.settings.tenant_quotas.model_copy(update={"uploads": 0})}
    )
    with TestClient(create_app(settings), headers={"Authorization": f"Bearer {api.key}"}) as client:
        files = [{"name": "t.jsonl", "size": 1, "sha256": "0" * 64}]
        problem(client.post("/v1/uploads", json={"files": files}), 429, "uploads_exceeded")
        assert client.get("/v1/usage").json()["quotas"]["uploads"] == 0
        api.admin.patch(f"{TENANTS}/{api.tenant_id}", json={"quotas": {"uploads": 1}})
        assert client.post("/v1/uploads", json={"files": files}).status_code == 201


def test_an_upload_may_be_as_large_as_its_tenant_may(api: Api) -> None:
    api.admin.patch(f"{TENANTS}/{api.tenant_id}", json={"quotas": {"upload_bytes": 10}})
    files = [{"name": "t.jsonl", "size": 11, "sha256": "0" * 64}]
    found = problem(api.client.post("/v1/uploads", json={"files": files}), 413, "body_too_large")
    assert "upload_bytes" in str(found["hint"])
    files[0]["size"] = 10
    assert api.client.post("/v1/uploads", json={"files": files}).status_code == 201


def test_priorities_models_and_folders_are_the_tenants(api: Api) -> None:
    models = api.folder / "models"
    for name in ("mine", "theirs"):
        (models / name).mkdir()
    url = f"{TENANTS}/{api.tenant_id}"
    changed = api.admin.patch(
        url,
        json={
            "quotas": {"max_priority": 5},
            "allowed_models": ["org/*", "other/model@abc", f"{models}/*"],
            "model_roots": [str(models / "mine")],
        },
    )
    assert changed.status_code == 200, changed.text

    def submit(**fields: object) -> Answer:
        return api.client.post("/v1/jobs?dry_run=true", json={**SHORTHAND, **fields})

    found = problem(submit(priority=6), 422, "invalid_request")
    assert found["field"] == "priority"
    assert submit(priority=5).status_code == 200
    problem(submit(model="other/model"), 422, "source_forbidden")
    by_revision = {"source": "hub", "id": "other/model", "revision": "abc"}
    assert submit(model=by_revision).status_code == 200
    outside = problem(submit(model=str(models / "theirs")), 422, "source_forbidden")
    assert "outside the folders" in str(outside["detail"])
    problem(submit(model=str(models / "mine")), 422, "corrupt_checkpoint")  # it may be read, and is no model
    too_wide = problem(api.admin.patch(url, json={"model_roots": ["/etc", str(models), "x"]}), 422, "invalid_request")
    assert isinstance(too_wide["errors"], list)
    assert [each["field"] for each in too_wide["errors"]] == ["model_roots.0", "model_roots.2"]
    api.admin.patch(url, json={"allowed_models": ["none/*"]})
    refused = problem(submit(), 422, "source_forbidden")
    assert (refused["field"], refused["value"]) == ("model", "org/model")


def test_a_token_is_kept_sealed_and_shown_nowhere(any_api: Api, capfd: pytest.CaptureFixture[str]) -> None:
    key = Fernet.generate_key().decode()
    settings = make_settings(any_api.folder, any_api.settings.database_url, token_keys=key)
    problem(any_api.client.post("/v1/jobs", json=SHORTHAND, headers={"X-Hub-Token": TOKEN}), 422, "invalid_request")
    with any_api.database.transaction() as session:
        _, admin_key = issue_key(session, any_api.tenant_id, name="a", scopes=frozenset({Scope.ADMIN}))
    said = []
    with TestClient(create_app(settings), headers={"Authorization": f"Bearer {admin_key}"}) as client:
        url = f"{TENANTS}/{any_api.tenant_id}"
        answers = [
            client.post("/v1/jobs", json=SHORTHAND, headers={"X-Hub-Token": TOKEN}),
            client.put(f"{url}/hub-token", json={"token": TOKEN}),
            client.get(url),
            client.post("/v1/jobs", json=SHORTHAND, headers={"X-Hub-Token": TOKEN + " x"}),
            client.put(f"{url}/hub-token", json={"token": TOKEN + "\n"}),
            client.put(f"{url}/hub-token", json={"token": TOKEN, "other": TOKEN}),
            client.get("/v1/admin/audit"),
        ]
        assert [answer.status_code for answer in answers] == [202, 204, 200, 422, 422, 422, 200]
        said += [answer.text for answer in answers[:5]] + [answers[6].text]
        assert answers[2].json()["has_hub_token"] is True
        job_id = answers[0].json()["id"]
        with any_api.database.reading() as session:
            sealed = list(session.scalars(select(HubToken.sealed)))
        assert len(sealed) == 2
        said += sealed
        client.post(f"/v1/jobs/{job_id}/cancel")
        assert client.delete(f"{url}/hub-token").status_code == 204
    with any_api.database.reading() as session:
        assert list(session.scalars(select(HubToken.sealed))) == []
    said += itertools.chain(capfd.readouterr())
    assert TOKEN not in "".join(said)


def test_reads_note_uses_without_a_write(api: Api) -> None:
    """Reads leave the table of keys as it was."""
    for _ in range(5):
        assert api.reader.get("/v1/methods").status_code == 200
    with api.database.reading() as session:
        assert set(session.scalars(select(ApiKey.last_used_at))) == {None}


def test_with_a_price_a_dry_run_tells_money(api: Api) -> None:
    """Seconds as estimated, at 3.60 an hour: a thousandth of the currency for each."""
    body = {**SHORTHAND, "model": str(write_checkpoint(api.folder / "models" / "tiny")), "group_size": 16}
    free = api.client.post("/v1/jobs?dry_run=true", json=body).json()
    assert free["cost"] == {}
    settings = api.settings.model_copy(update={"price_per_gpu_hour": Decimal("3.6"), "price_currency": "EUR"})
    with TestClient(create_app(settings), headers={"Authorization": f"Bearer {api.key}"}) as client:
        priced = client.post("/v1/jobs?dry_run=true", json=body).json()
    assert priced["cost"].keys() == {"cuda"}, "a CPU has no price"
    assert priced["cost"]["cuda"]["currency"] == "EUR"
    assert float(priced["cost"]["cuda"]["amount"]) == pytest.approx(priced["estimates"]["seconds"]["cuda"] / 1000)
